"""torchao: weights only, no data: "int4, groups of 64" (its format for CPUs; scales chosen by its
HQQ, which it says is the more accurate) or "int8" (a scale for each row). Linear layers alone:
embeddings, convolutions and norms stay float16, and so does a head that is tied to the embedding.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from peer import Job, main, plain, tied_head
from torchao.prototype.quantization.int4 import Int4OpaqueTensor, PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm


def compress(job: Job) -> None:
    model = job.model(torch.float16)
    tied = tied_head(model)
    if job.setting == "int8":
        config = Int8WeightOnlyConfig()
    else:
        config = PrototypeInt4WeightOnlyConfig(
            group_size=int(job.numbers()[0]),
            int4_choose_qparams_algorithm=Int4ChooseQParamsAlgorithm.HQQ,
        )
    quantize_(
        model,
        config,
        filter_fn=lambda m, name: isinstance(m, torch.nn.Linear) and name not in tied,
    )
    left_out = {f"{name}.weight" for name in tied}
    state = {name: w for name, w in model.state_dict().items() if name not in left_out}
    torch.save(state, job.artifact / "model.pt")
    job.written()
    treated = {
        name: decoded(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module.weight) is not torch.nn.Parameter
    }
    job.judge(plain(model, treated))


def decoded(weight: torch.Tensor) -> torch.Tensor:
    """The packed format has no way back to numbers but its product, so that is asked for them."""
    if isinstance(weight, Int4OpaqueTensor):
        identity = torch.eye(weight.shape[1], dtype=weight.dtype)
        return torch.nn.functional.linear(identity, weight).T
    return weight.dequantize()


main(compress)

"""HQQ: needs no data. The setting names bits and group size. Linear layers alone: embeddings,
convolutions and norms stay float16, and so does a head that is tied to the embedding."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from peer import Job, main, plain, tied_head


def compress(job: Job) -> None:
    model = job.model(torch.float16)
    bits, group_size = (int(n) for n in job.numbers())
    config = BaseQuantizeConfig(nbits=bits, group_size=group_size)
    if job.kind == "language":
        AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float16, device="cpu")
        AutoHQQHFModel.save_quantized(model, str(job.artifact))
    else:  # its loader of whole models knows language models only
        replace_layers(model, config)
        torch.save(model.state_dict(), job.artifact / "model.pt")
    job.written()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, HQQLinear)}
    weights = plain(model, {name: layer.dequantize() for name, layer in layers.items()})
    # It holds biases as tensors that are no parameters.
    biases = {f"{n}.bias": m.bias for n, m in layers.items() if m.bias is not None}
    job.judge({**weights, **biases})


def replace_layers(model: torch.nn.Module, config: dict) -> None:
    tied = tied_head(model)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for name, layer in found:
        if name not in tied:
            made = HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu")
            model.set_submodule(name, made)


main(compress)

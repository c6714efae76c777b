"""ModelOpt's AutoQuantize: the setting names its effective bits. It chooses between blocks of 128
in 4 bits, rows in 8 and 16 bits, weights alone, by scores from gradients; of linear layers:
embeddings and norms stay float16, and so does a head that is tied to the embedding."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from peer import Job, main, plain, tied_head

FORMATS = ["INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT8_WEIGHT_ONLY_CFG"]
# Its default number of batches that layers are scored on.
SCORED = 128


def compress(job: Job) -> None:
    batches = batches_of(job)
    model, _ = mtq.auto_quantize(
        job.model(torch.float32),
        constraints={"effective_bits": job.numbers()[0]},
        quantization_formats=FORMATS,
        data_loader=batches,
        forward_step=lambda module, batch: module(**batch),
        loss_func=loss_of(job.kind),
        disabled_layers=[f"*{name}*" for name in tied_head(job.model(torch.float32))] or None,
        num_calib_steps=len(batches),
        num_score_steps=min(SCORED, len(batches)),
    )
    weights = plain(model, rounded(model))
    mtq.compress(model)
    mto.save(model.half(), job.artifact / "model.pt")
    job.written()
    job.judge(weights)


def batches_of(job: Job) -> list[dict[str, torch.Tensor]]:
    """One sequence each, as transformers' models are called."""
    names = {"tokens": "input_ids", "attention": "attention_mask"}
    given = {names.get(name, name): values for name, values in job.calibration.items()}
    if job.kind == "language":
        given["labels"] = given["input_ids"]
    count = len(given["input_ids"])
    return [{k: v[n : n + 1] for k, v in given.items()} for n in range(count)]


def loss_of(kind: str) -> Callable[[Any, Any], torch.Tensor]:
    """What a model was trained on; without labels, how far a sentence's vectors are from zero."""

    def loss(output: Any, _: Any) -> torch.Tensor:
        return output.loss if kind == "language" else output.last_hidden_state.square().mean()

    return loss


def rounded(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights as the quantized model reads them."""
    found = {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            found[name] = quantizer(module.weight).detach().clone()
    return found


main(compress)

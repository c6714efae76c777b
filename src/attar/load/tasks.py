"""What each kind of model answers: batch to outputs of shape `samples predictions width`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from attar.errors import DataError
from attar.records import Batch, Task


def _named(batch: Batch, name: str) -> Tensor:
    if name not in batch:
        raise DataError(
            f"the data holds {', '.join(sorted(batch)) or 'nothing'}, but the model reads {name}",
            hint="give data of the kind the model was made for",
        )
    return batch[name]


def _logits(output: Any) -> Tensor:
    """Plain tensors, transformers' output objects and tuples that start with the logits."""
    found = getattr(output, "logits", output)
    tensor: Tensor = found[0] if isinstance(found, tuple) else found
    return tensor


def _language(module: nn.Module, batch: Batch) -> Tensor:
    tokens = _named(batch, "tokens")
    # Transformers' modules keep keys and values by default, which would cost memory for nothing.
    cached = "use_cache" in inspect.signature(module.forward).parameters
    return _logits(module(tokens, use_cache=False) if cached else module(tokens))


def _classify(module: nn.Module, batch: Batch) -> Tensor:
    inputs = batch["inputs"] if "inputs" in batch else _named(batch, "pixels")
    return _logits(module(inputs)).unsqueeze(1)


def _embed(module: nn.Module, batch: Batch) -> Tensor:
    vector: Tensor = module(_named(batch, "tokens"), _named(batch, "attention"))
    return vector.unsqueeze(1)


def _transcribe(module: nn.Module, batch: Batch) -> Tensor:
    return _logits(
        module(
            input_features=_named(batch, "features"),
            decoder_input_ids=_named(batch, "decoder_tokens"),
            use_cache=False,
        )
    )


def _regress(module: nn.Module, batch: Batch) -> Tensor:
    return _logits(module(_named(batch, "inputs"))).unsqueeze(1)


TASKS: dict[str, Task] = {
    "language": Task("language", "categorical", _language),
    "classify": Task("classify", "categorical", _classify),
    "embed": Task("embed", "gaussian", _embed),
    "transcribe": Task("transcribe", "categorical", _transcribe),
    "regress": Task("regress", "gaussian", _regress),
}

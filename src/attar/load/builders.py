"""Build an empty module from its configuration, and fill it with tensors.

Nothing is initialised at random on the way: memory of an empty module is never touched, so that
building costs a few hundredths of a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from attar.disk import give_back, lying, on_disk
from attar.errors import ModelError
from attar.load.extras import import_extra
from attar.load.mobilenet import build_mobilenet
from attar.load.sentence import SentenceEncoder
from attar.load.tasks import TASKS
from attar.records import Architecture

__all__ = [
    "BUILDERS",
    "PICTURE_SETTINGS",
    "TASKS",
    "build_empty",
    "build_module",
    "check_finite",
    "fill",
    "tied_names",
]

# Of a vision model, in its configuration under "picture": side in pixels, mean and std per channel
# where white is 1, how to scale, and the share of the shorter side that is kept.
PICTURE_SETTINGS: dict[str, dict[str, Any]] = {
    "mobilenetv2": {
        "size": 224,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear",
        "crop_fraction": 0.875,
    },
    "efficientnet-lite0": {
        "size": 224,
        # The model was trained on (x - 127) / 128 with x from 0 to 255.
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
        "interpolation": "bicubic",
        "crop_fraction": 0.875,
    },
}


def _without_initialisation() -> AbstractContextManager[None]:
    context: AbstractContextManager[None] = import_extra(
        "transformers.initialization", "language"
    ).no_init_weights()
    return context


def _build_causal_language(config: Mapping[str, Any]) -> nn.Module:
    auto = import_extra("transformers", "language")
    settings = _transformers_config(config)
    with _without_initialisation():
        module: nn.Module = auto.AutoModelForCausalLM.from_config(
            settings, attn_implementation="sdpa", dtype=torch.float32
        )
    return module


def _build_whisper(config: Mapping[str, Any]) -> nn.Module:
    whisper = import_extra("transformers.models.whisper.modeling_whisper", "language")
    settings = _transformers_config(config)
    settings._attn_implementation = "sdpa"
    with _without_initialisation():
        module: nn.Module = whisper.WhisperForConditionalGeneration(settings)
    return module


def _build_sentence_encoder(config: Mapping[str, Any]) -> nn.Module:
    bert = import_extra("transformers.models.bert.modeling_bert", "language")
    settings = _transformers_config(config["bert"])
    settings._attn_implementation = "sdpa"
    with _without_initialisation():
        # The pooler is not used by mean pooling, so its weights need not be stored.
        encoder = bert.BertModel(settings, add_pooling_layer=False)
    return SentenceEncoder(encoder, normalise=config["normalise"])


def _build_efficientnet_lite(config: Mapping[str, Any]) -> nn.Module:
    package = import_extra("efficientnet_lite_pytorch", "vision")
    module: nn.Module = package.EfficientNet.from_name(
        "efficientnet-lite0", num_classes=config.get("classes", 1000)
    )
    return module


def _transformers_config(config: Mapping[str, Any]) -> Any:
    auto = import_extra("transformers", "language")
    try:
        return auto.AutoConfig.for_model(**config)
    except Exception as error:  # each class checks its settings in its own way
        raise ModelError(
            f"the model's configuration cannot be used: {_first_line(error)}",
            hint="check model_type and the sizes in config.json",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


BUILDERS: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "causal-language": _build_causal_language,
    "whisper": _build_whisper,
    "sentence-bert": _build_sentence_encoder,
    "mobilenetv2": build_mobilenet,
    "efficientnet-lite0": _build_efficientnet_lite,
}


def build_empty(architecture: Architecture) -> nn.Module:
    """Build a module whose weights mean nothing yet.

    Raises:
        ModelError: The builder is not known, or its configuration cannot be used.
    """
    builder = BUILDERS.get(architecture.builder)
    if builder is None:
        raise ModelError(
            f"there is no builder {architecture.builder!r}; known: {', '.join(BUILDERS)}",
            hint="a model of your own is loaded by naming it: `package.module:factory`",
        )
    try:
        module = builder(architecture.config)
        # Transformers ties only where it also initialises, which is skipped here.
        tie = getattr(module, "tie_weights", None)
        if callable(tie):
            tie()
        return module
    except ModelError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"no {architecture.builder} model can be built from its configuration: "
            f"{type(error).__name__}: {_first_line(error)}",
            hint="check the configuration, or load the model from its original source",
        ) from error


def build_module(architecture: Architecture, state: Mapping[str, Tensor]) -> nn.Module:
    """Build a module and fill it.

    Args:
        architecture: Of a known builder; nothing named by a file is ever imported.
        state: Tensor name to tensor; of tied weights one name is enough. Not copied where already
            float32, or where it lies on disk: there it stays.

    Returns:
        In eval mode, float32, no parameter requiring grad, tied weights one parameter.

    Raises:
        ModelError: The builder is unknown, or a tensor is missing, unexpected, of another shape,
            or not finite; the tensor is named.
    """
    return fill(build_empty(architecture), state)


def fill(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Put tensors into a module; see `build_module`."""
    groups = tied_names(module)
    alias = {name: names[0] for names in groups for name in names}
    chosen = _one_of_each(state, alias)
    expected = {alias.get(name, name): tensor for name, tensor in module.state_dict().items()}
    ready = {name: _checked(name, expected, chosen) for name in expected}
    _refuse_unexpected(module, set(chosen) - set(expected))
    module.load_state_dict(ready, strict=False, assign=True)
    for names in groups:
        _share(module, names)
    module.requires_grad_(requires_grad=False)
    return module.eval()


def tied_names(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of parameter names that are one and the same parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def _one_of_each(state: Mapping[str, Tensor], alias: Mapping[str, str]) -> dict[str, Tensor]:
    chosen: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = alias.get(name, name)
        if key in chosen and not torch.equal(chosen[key], tensor):
            raise ModelError(
                f"{name} and {key} are tied in this model, but the file holds different tensors",
                hint="set tie_word_embeddings to false in config.json if that is meant",
            )
        chosen.setdefault(key, tensor)
    return chosen


def _checked(name: str, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Tensor:
    hint = "fetch or convert the model again, or check that config.json belongs to it"
    if name not in state:
        raise ModelError(f"the tensor {name} is missing", hint=hint)
    wanted, tensor = expected[name], state[name]
    if tensor.shape != wanted.shape:
        raise ModelError(
            f"the tensor {name} has shape {tuple(tensor.shape)}, "
            f"the configuration needs {tuple(wanted.shape)}",
            hint=hint,
        )
    if not wanted.is_floating_point():
        return tensor.to(wanted.dtype)
    check_finite(name, tensor)
    if not on_disk(tensor):
        return tensor.float().contiguous()
    give_back(tensor)
    # What operations other than a layer's read (norms, biases) is small.
    return lying(tensor) if tensor.dim() > 1 else tensor.float().clone()


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that holds NaN or infinity.

    Raises:
        ModelError: It does; the message says how many values.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # One pass without temporaries, 10 times cheaper than isfinite().all(); NaN reaches both ends.
    low, high = tensor.aminmax()
    if math.isfinite(low) and math.isfinite(high):
        return
    bad = int((~torch.isfinite(tensor)).sum())
    raise ModelError(
        f"the tensor {name} holds {bad} NaN or infinite values of {tensor.numel()}",
        hint="use a checkpoint from before the training diverged, or fetch the file again",
    )


# Tables that older files store and newer code computes.
_COMPUTED = ("position_ids", "rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def _refuse_unexpected(module: nn.Module, names: set[str]) -> None:
    computed = {name for name, _ in module.named_buffers()}
    unexpected = sorted(n for n in names - computed if not n.endswith(_COMPUTED))
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise ModelError(
            f"the file holds the tensor {unexpected[0]}{more}, which this architecture does not "
            "have",
            hint="check that config.json belongs to these weights",
        )


def _share(module: nn.Module, names: tuple[str, ...]) -> None:
    parameter = module.get_parameter(names[0])
    for name in names[1:]:
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, parameter)

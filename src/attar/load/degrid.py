"""Take a language model's weights off their quantization grid without changing its function.

A model decoded from a 4-bit file is rounded to 4 bits again for free, which makes 4-bit results
wrong. Multiplying channels by random factors that cancel exactly moves the weights off the grid:

    norm gain / s        and columns of the maps that read the norm * s
    rows of v * s        and columns of o / s     (a key-value head's factors serve all its queries)
    rows of up * s       and columns of down / s

The logits stay the same to float32 rounding. A tied embedding stays on its grid: scaling it would
change what is added to the residual stream. Rows of q and k, and of maps whose output Gemma
normalises, stay too, because the normalisation would not cancel a factor.

Source: own; factors exp(U(-ln 1.25, ln 1.25)) as measured in design section 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attar.errors import ModelError

_LARGEST_FACTOR = 1.25
# Model type: the norm before the MLP, and what is added to a stored gain to get the real one.
FAMILIES: dict[str, tuple[str, float]] = {
    "llama": ("post_attention_layernorm", 0.0),
    "gemma3_text": ("pre_feedforward_layernorm", 1.0),
}


def degrid(state: Mapping[str, Tensor], config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Rescale channels by random factors that cancel.

    Args:
        state: Tensors by transformers' names, float32.
        config: Of the causal language model.
        seed: Of the factors; the same seed gives the same weights bit for bit.

    Returns:
        A new state; tensors that do not change are the same objects.

    Raises:
        ModelError: The model is neither Llama- nor Gemma3-shaped.
    """
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        raise ModelError(
            f"a {config.get('model_type', 'non-language')} model cannot be taken off its grid; "
            f"known: {', '.join(FAMILIES)}",
            hint="leave --degrid away",
        )
    mlp_norm, offset = family
    generator = torch.Generator().manual_seed(seed)
    new = dict(state)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        readers = [f"{attention}{name}_proj.weight" for name in ("q", "k", "v")]
        _move_gain(new, f"{prefix}input_layernorm.weight", readers, offset, generator)
        readers = [f"{mlp}{name}_proj.weight" for name in ("gate", "up")]
        _move_gain(new, f"{prefix}{mlp_norm}.weight", readers, offset, generator)
        _move_values(new, attention, config, generator)
        _move_rows(new, f"{mlp}up_proj", f"{mlp}down_proj", generator)
    if "lm_head.weight" in new and not config.get("tie_word_embeddings", False):
        _move_gain(new, "model.norm.weight", ["lm_head.weight"], offset, generator)
    return new


def _factors(count: int, generator: torch.Generator) -> Float[Tensor, " channels"]:
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.exp((2 * uniform - 1) * math.log(_LARGEST_FACTOR))


def _scaled(weight: Tensor, factors: Tensor) -> Tensor:
    # One rounding only: the product is formed in float64.
    return (weight.double() * factors).to(weight.dtype)


def _move_gain(
    state: dict[str, Tensor],
    norm: str,
    readers: list[str],
    offset: float,
    generator: torch.Generator,
) -> None:
    """Divide a norm's gain and multiply the columns of what reads it."""
    factors = _factors(state[norm].numel(), generator)
    gain = (state[norm].double() + offset) / factors
    state[norm] = (gain - offset).to(state[norm].dtype)
    for reader in readers:
        state[reader] = _scaled(state[reader], factors)


def _move_values(
    state: dict[str, Tensor], attention: str, config: Mapping[str, Any], generator: torch.Generator
) -> None:
    """Multiply the rows of v and divide the columns of o that they reach."""
    value, output = f"{attention}v_proj", f"{attention}o_proj.weight"
    factors = _factors(state[f"{value}.weight"].shape[0], generator)
    _scale_rows(state, value, factors)
    heads = config["num_attention_heads"]
    shared_by = heads // (config.get("num_key_value_heads") or heads)
    per_head = factors.reshape(-1, state[output].shape[1] // heads)
    reached = per_head.repeat_interleave(shared_by, dim=0).flatten()
    state[output] = _scaled(state[output], 1 / reached)


def _move_rows(
    state: dict[str, Tensor], writer: str, reader: str, generator: torch.Generator
) -> None:
    """Multiply the rows of one map and divide the columns of the one that reads it."""
    factors = _factors(state[f"{writer}.weight"].shape[0], generator)
    _scale_rows(state, writer, factors)
    state[f"{reader}.weight"] = _scaled(state[f"{reader}.weight"], 1 / factors)


def _scale_rows(state: dict[str, Tensor], name: str, factors: Float[Tensor, " rows"]) -> None:
    state[f"{name}.weight"] = _scaled(state[f"{name}.weight"], factors[:, None])
    if f"{name}.bias" in state:
        state[f"{name}.bias"] = _scaled(state[f"{name}.bias"], factors)

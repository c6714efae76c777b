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
from jaxtyping import Float, Int
from torch import Tensor

from attar.disk import Scratch, give_back, on_disk
from attar.errors import ModelError
from attar.links import GAIN, ROWS, Change, Link, Mix, Reader, Writer, folded

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
    new = _State(state)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        readers = [f"{attention}{name}_proj" for name in ("q", "k", "v")]
        _move(new, f"{prefix}input_layernorm", readers, offset, generator)
        readers = [f"{mlp}{name}_proj" for name in ("gate", "up")]
        _move(new, f"{prefix}{mlp_norm}", readers, offset, generator)
        output = f"{attention}o_proj"
        reached = _reached(config, new[f"{output}.weight"].shape[1])
        _move(new, f"{attention}v_proj", [output], None, generator, reached)
        _move(new, f"{mlp}up_proj", [f"{mlp}down_proj"], None, generator)
    if "lm_head.weight" in new and not config.get("tie_word_embeddings", False):
        _move(new, "model.norm", ["lm_head"], offset, generator)
    return new


class _State(dict[str, Tensor]):
    """Tensors by name; new ones go to disk where the old ones lie there."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__(state)
        self._scratch = Scratch(on_disk=any(on_disk(tensor) for tensor in state.values()))

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        super().__setitem__(name, self._scratch.moved(tensor))


def _factors(count: int, generator: torch.Generator) -> Float[Tensor, " channels"]:
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.exp((2 * uniform - 1) * math.log(_LARGEST_FACTOR))


def _move(
    state: dict[str, Tensor],
    writer: str,
    readers: list[str],
    offset: float | None,
    generator: torch.Generator,
    reached: Tensor | None = None,
) -> None:
    """Move random factors from what makes channels to what reads them.

    Args:
        offset: Of a norm's gain, which is divided; None for a map, whose rows are multiplied.
        reached: Channel that meets each column of the readers; None for each its own.
    """
    count = len(state[f"{writer}.weight"])
    factors = _factors(count, generator)
    is_gain = offset is not None
    bias = f"{writer}.bias" if f"{writer}.bias" in state else None
    own = torch.arange(count) if reached is None else reached
    link = Link(
        name=writer,
        kind="norm" if is_gain else "linear",
        writers=(Writer(f"{writer}.weight", GAIN if is_gain else ROWS, bias, offset or 0.0),),
        readers=tuple(Reader(f"{reader}.weight", own) for reader in readers),
        channels=count,
        free=torch.ones(count, dtype=torch.bool),
    )
    sides = Mix(1 / factors), Mix(factors)
    for name, tensor in folded(link, Change(*(sides if is_gain else sides[::-1])), state).items():
        state[name] = tensor
    give_back(*(state[f"{reader}.weight"] for reader in readers))


def _reached(config: Mapping[str, Any], columns: int) -> Int[Tensor, " columns"]:
    """Row of v that each column of o reads: a key-value head serves all its queries."""
    heads = config["num_attention_heads"]
    shared_by = heads // (config.get("num_key_value_heads") or heads)
    per_head = torch.arange(columns // shared_by).reshape(-1, columns // heads)
    return per_head.repeat_interleave(shared_by, dim=0).flatten()

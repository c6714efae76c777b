"""Activations in 8 bits: what is rounded while a model runs, and to what.

    code = clamp(round(x / scale) + zero_point, 0, 255),   x becomes scale · (code − zero_point)

Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877, eq. 1; halves are rounded to even and a
dynamic range is that of ONNX's QuantizeLinear and DynamicQuantizeLinear, which an engine runs. A
static range holds for a whole tensor. A dynamic one is that of one row of a linear map's input (a
token), or of one sample of a convolution's, as where an engine answers one request at a time.

Source: rows: Yao et al. 2022, ZeroQuant, https://arxiv.org/abs/2206.01861, "token-wise quantization
for activations"; here with zero points, for much of what is multiplied lies to one side of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attar.records import Activation, Candidate
from attar.sites import Roundings, substituted

TOP_CODE = 255
# A row of zeros has some step; the smallest float32 that every engine can divide by.
TINY = torch.finfo(torch.float32).tiny


def activation_of(low: float, high: float) -> Activation:
    """Choose scale and zero point so that 0.0 has a code of its own.

    Args:
        low: End of the range; taken as 0 where above it.
        high: The other end; taken as 0 where below it.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    # As a float32, which is what a file holds.
    scale = float(torch.tensor((high - low) / TOP_CODE)) or 1.0
    return Activation(scale, min(TOP_CODE, max(0, round(-low / scale))))


def rounded(x: Float[Tensor, "*shape"], activation: Activation) -> Float[Tensor, "*shape"]:
    """Round a tensor whose first dimension is the sample."""
    if activation.scale is None:
        return _by_row(x) if activation.by_row else _by_sample(x)
    codes = (x / activation.scale).round_().add_(activation.zero_point).clamp_(0, TOP_CODE)
    return codes.sub_(activation.zero_point).mul_(activation.scale)


def _by_sample(x: Tensor) -> Tensor:
    rows = x.flatten(1) if x.dim() > 1 else x[:, None]
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    scale = (high - low) / TOP_CODE
    scale = torch.where(scale > 0, scale, 1.0)[:, None]
    zero_point = (-low[:, None] / scale).round_().clamp_(0, TOP_CODE)
    codes = (rows / scale).round_().add_(zero_point).clamp_(0, TOP_CODE)
    return codes.sub_(zero_point).mul_(scale).view(x.shape)


def _by_row(x: Tensor) -> Tensor:
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / TOP_CODE).clamp(min=TINY)
    zero_point = (-low / scale).round_()
    codes = (x / scale).round_().add_(zero_point).clamp_(0, TOP_CODE)
    return codes.sub_(zero_point).mul_(scale)


def roundings(choices: Mapping[str, Candidate]) -> Roundings:
    """What a plan rounds while the model runs, for `sites.substituted`."""

    def of(side: str) -> dict[str, Callable[[Tensor], Tensor]]:
        return {
            f"{name}.weight": partial(rounded, activation=activation)
            for name, choice in choices.items()
            if (activation := getattr(choice, side)) is not None
        }

    return Roundings(of("input"), of("output"))


class RoundedModule(nn.Module):
    """A module that runs with other weights and rounds activations.

    Args:
        weights: As for `sites.substituted`.
    """

    def __init__(
        self, module: nn.Module, weights: Mapping[str, Callable[[], Tensor]], rounds: Roundings
    ) -> None:
        super().__init__()
        self._inside, self._weights, self._rounds = (module,), weights, rounds  # not a child

    def forward(self, *inputs: Tensor) -> Tensor:
        """Do what the module does."""
        with substituted(self._inside[0], self._weights, self._rounds):
            output: Tensor = self._inside[0](*inputs)
        return output

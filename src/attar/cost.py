"""Units and treatments to cost: bytes and multiply-accumulates, exact, from shapes.

Leftovers (norms, biases) are stored as they are, in float16 where that is as good as exact.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from attar.errors import PlanError
from attar.records import Cost, Leftover, Transform, Unit

FLOAT16_BYTES = 2
# A normal float16 has 11 significant bits: it errs by at most 2**-11 of each value.
LEFTOVER_TOLERANCE = 2.0**-10
# Share of a bias's root mean square below which how large a value is hardly matters.
SMALL_BIAS = 1e-3


def unit_cost(unit: Unit, transform: Transform) -> Cost:
    """Price one unit with one treatment.

    Raises:
        PlanError: The transform rejects the unit, and why.
    """
    reason = transform.rejects(unit)
    if reason is not None:
        raise PlanError(
            f"unit {unit.name} cannot have this treatment: it {reason}.",
            hint=f"choose another treatment for {unit.name}; `attar plan` lists those that fit.",
        )
    return transform.cost(unit)


def total_macs(units: Iterable[Unit]) -> int:
    """Add up the multiply-accumulates of one sample of the untreated model."""
    return sum(unit.macs for unit in units)


def fp16_bytes(units: Iterable[Unit], leftovers: Iterable[Leftover]) -> int:
    """Count the bytes of everything at 16 bits per weight: what sizes are compared with."""
    return FLOAT16_BYTES * count_numbers(units, leftovers)


def count_numbers(units: Iterable[Unit], leftovers: Iterable[Leftover]) -> int:
    """Count the numbers of all weights, and of what is stored as it is."""
    n_leftover = sum(torch.Size(leftover.shape).numel() for leftover in leftovers)
    return sum(unit.n_weights for unit in units) + n_leftover


def leftover_dtype(name: str, tensor: Tensor) -> torch.dtype:
    """Choose the format a leftover is stored in.

    float16 where every value is finite and comes back within LEFTOVER_TOLERANCE of itself, else
    float32. A bias is added, so its values may also err by that share of a thousandth of their
    root mean square: below float16's smallest normal number they would come back less exactly.
    Integers and booleans stay what they are.
    """
    if not tensor.is_floating_point():
        return tensor.dtype
    back = tensor.half().to(tensor.dtype)
    size = tensor.abs()
    if name.rpartition(".")[2] == "bias" and tensor.numel():
        size = size.clamp(min=float(SMALL_BIAS * tensor.square().mean().sqrt()))
    # An infinite or NaN difference is not within any tolerance.
    close = (back - tensor).abs() <= LEFTOVER_TOLERANCE * size
    fits = bool(close.all()) and bool(tensor.isfinite().all())
    return torch.float16 if fits else torch.float32

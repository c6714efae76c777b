"""What is taken away together: tokens, columns, patches of a picture, blocks of a sound."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Sides of a grid over a picture, and bands and times of one over a spectrogram.
SQUARES, BANDS, TIMES = 7, 4, 25


def number_places(shape: torch.Size, kept: int) -> Int[Tensor, "..."]:
    """Number of the feature of every place; -1 for a place that always stays.

    Tokens and columns each are one; a picture is cut into squares, a spectrogram into blocks.

    Args:
        shape: Of the map: `tokens`, `columns`, or `rows columns`.
        kept: First places of a line that stay.
    """
    if len(shape) == 2:
        return _grid(shape, (SQUARES, SQUARES) if shape[1] < 4 * shape[0] else (BANDS, TIMES))
    places = torch.arange(shape.numel()).reshape(shape)
    return (places - kept).clamp(min=-1)


def _grid(shape: torch.Size, most: tuple[int, int]) -> Tensor:
    rows, columns = (
        torch.arange(side) * min(n, side) // side for side, n in zip(shape, most, strict=True)
    )
    return rows[:, None] * min(most[1], shape[1]) + columns


def spread(
    values: Float[Tensor, " features"], features: Int[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Deal each feature's value evenly to its places, so that they sum to it."""
    known = features.flatten() >= 0
    sizes = torch.bincount(features.flatten()[known], minlength=len(values))
    places = torch.zeros(features.numel(), dtype=torch.float64)
    places[known] = (values.double() / sizes)[features.flatten()[known]]
    return places.reshape(features.shape)


def gathered(
    places: Float[Tensor, "..."], features: Int[Tensor, "..."]
) -> Float[Tensor, " features"]:
    """Sum the values of each feature's places."""
    known = features.flatten() >= 0
    sums = torch.zeros(int(features.max()) + 1, dtype=torch.float64)
    return sums.index_add(0, features.flatten()[known], places.flatten()[known].double())

"""Where in a weight a change lies, if it lies in few places: a head, some rows."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A change lies in few places if this share of its squares does,
MOSTLY = 0.9
# and these are at most this share of all places.
FEW = 0.5
# and with them goes what changed by this share of their mean square.
ALIKE = 0.02


def where(change: Float[Tensor, "rows columns"], heads: int = 0) -> str:
    """Name the head or the rows that hold nearly all of a change; "" where it is spread.

    Args:
        change: Of a weight.
        heads: How many heads the columns join; 0 where they are none.
    """
    squares = change.double().square()
    if not bool(squares.any()):
        return ""
    if heads > 1:
        of_heads = squares.sum(0).reshape(heads, -1).sum(1)
        if float(of_heads.max() / of_heads.sum()) >= MOSTLY:
            return f"head {int(of_heads.argmax())}"
    places = _few(squares.sum(1))
    return "" if places is None else _named(places, len(change))


def _few(squares: Float[Tensor, " places"]) -> Int[Tensor, " few"] | None:
    """Fewest places that hold nearly all of it, in order; None where they are not few."""
    largest, order = squares.sort(descending=True, stable=True)
    held = largest.cumsum(0) / squares.sum()
    count = int((held < MOSTLY).sum()) + 1
    if count > FEW * len(squares):
        return None
    # Neighbours of these that changed likewise belong to them; what was only rounded does not.
    alike = (squares >= ALIKE * largest[:count].mean()).nonzero()[:, 0]
    return alike if count <= len(alike) <= FEW * len(squares) else order[:count].sort().values


def _named(rows: Int[Tensor, " few"], of: int) -> str:
    first, last = int(rows[0]), int(rows[-1])
    if len(rows) == 1:
        return f"row {first}"
    if torch.equal(rows, torch.arange(first, last + 1)):
        return f"rows {first} to {last}"
    return f"{len(rows)} of {of} rows, such as {first}"

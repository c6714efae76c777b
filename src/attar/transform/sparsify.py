"""Which weights are kept and what they become: shared by the zeroing transforms.

Three scores choose. `obs`: what zeroing a weight loses when all that is left makes good what it can
(`kernels/sparse_feedback.py`); kept weights take up what the zeroed ones did, and are rounded in
the same pass. `wanda`: |w| · sqrt(E[x²]), and `magnitude`: |w|; kept weights stay as they are, each
rounded by itself. Without a full second moment there is nothing to feed back along, and `obs` keeps
what `wanda` keeps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from attar.errors import SettingError
from attar.kernels import bitpack
from attar.kernels.sparse_feedback import Choice, zero
from attar.transform import groups, kept
from attar.transform.keep_float import to_float
from attar.transform.quantize_feedback import Turn, turns

SCORES = ("obs", "wanda", "magnitude")
# Passes in which the loss above which a weight is kept settles: it changes what later ones are.
PASSES = 3

Choose = Callable[[Tensor, Tensor | None], Tensor]
"""Of a weight and column weights, `rows columns` of what is kept."""


def check_score(method: str, score: str) -> None:
    """Raise SettingError unless `score` is one of SCORES."""
    if score not in SCORES:
        raise SettingError(
            f"score is {score!r}, but {method} takes one of {', '.join(SCORES)}.",
            hint="set score to obs.",
        )


def score_label(score: str) -> str:
    """Name a score where it is not the usual one."""
    return "" if score == "obs" else f", by {score}"


def sparsify(
    weight: Float[Tensor, "rows columns"],
    moment: Tensor | None,
    score: str,
    pattern: tuple[int, int],
    choose: Choose,
    stored: tuple[int, int],
) -> tuple[Bool[Tensor, "rows columns"], dict[str, Tensor]]:
    """Choose what is kept, and store its values.

    Args:
        pattern: How many of how many columns are kept: of each row, or, where that is less than a
            row, of every so many.
        choose: By `wanda` or `magnitude`.
        stored: Bits and group size, as for `kept.store_kept`.
    """
    importance = None if score == "magnitude" else groups.column_weights(moment)
    if score == "obs" and moment is not None and moment.dim() == 3 and bool((moment != 0).any()):
        return _compensated(weight, moment, pattern, stored)
    mask = choose(weight, importance)
    values, spread = kept.gather_kept(weight, mask, importance)
    return mask, kept.store_kept(values, spread, *stored)


def _compensated(
    weight: Float[Tensor, "rows columns"],
    moment: Float[Tensor, "groups columns columns"],
    pattern: tuple[int, int],
    stored: tuple[int, int],
) -> tuple[Bool[Tensor, "rows columns"], dict[str, Tensor]]:
    n_kept, of = pattern
    by_blocks = of < weight.shape[1]
    some = turns(moment, None, len(weight), weight.shape[1], together=of if by_blocks else 1)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    values = torch.zeros(weight.shape)
    for number, turn in enumerate(some):
        part = weight[turn.rows][:, turn.order.places].float().contiguous()
        chosen = _choose(part, turn, number, n_kept, of if by_blocks else 0)
        made = zero(part, turn.feedback, _worth(turn, number), Choice(chosen)).values
        back = torch.argsort(turn.order.places)
        mask[turn.rows], values[turn.rows] = chosen[:, back], made[:, back]
    gathered, importance = kept.gather_kept(values, mask, groups.column_weights(moment))
    bits, group_size = stored
    if bits == 16:
        return mask, {"values": to_float(gathered, torch.float16)}
    scale = kept.scales_of(gathered, importance, bits, group_size)
    steps = kept.put_back(mask, _spread(scale, gathered.shape[1], group_size))
    codes = _rounded(weight, some, mask, steps, 1 << bits - 1)
    return mask, {"codes": bitpack.pack(codes.flatten(), bits), "scale": scale}


def _rounded(weight: Tensor, some: list[Turn], mask: Tensor, steps: Tensor, top: int) -> Tensor:
    """Codes of what is kept, `rows n_kept`: zeroed and rounded in one pass, scales being known."""
    codes = torch.empty(weight.shape)
    for number, turn in enumerate(some):
        places, rows = turn.order.places, turn.rows
        part, chosen, own = (
            one[rows][:, places].contiguous() for one in (weight.float(), mask, steps)
        )
        made = zero(part, turn.feedback, _worth(turn, number), Choice(chosen), own, top).values
        whole = (made / torch.where(own == 0, 1.0, own)).round() + top
        codes[rows] = whole[:, torch.argsort(places)]
    return codes[mask].view(len(weight), -1).to(torch.uint8)


def _choose(
    part: Float32[Tensor, "rows columns"], turn: Turn, number: int, n_kept: int, m: int
) -> Bool[Tensor, "rows columns"]:
    """Choose what is kept, columns being in the order of zeroing."""
    worth = _worth(turn, number)
    chosen = torch.zeros(part.shape, dtype=torch.bool)
    if m:
        zero(part, turn.feedback, worth, Choice(chosen, None, n_kept, m))
        return chosen
    losses = part.square() * worth
    for _ in range(PASSES):
        least = losses.kthvalue(part.shape[1] - n_kept, dim=1).values
        losses = zero(part, turn.feedback, worth, Choice(chosen, least)).losses
    return torch.zeros_like(chosen).scatter_(1, losses.topk(n_kept, sorted=False).indices, True)


def _worth(turn: Turn, number: int) -> Float32[Tensor, " columns"]:
    return turn.order.lasting[number].square()


def _spread(scale: Tensor, n_kept: int, group_size: int) -> Float32[Tensor, "rows n_kept"]:
    """Give each kept value the scale of its group."""
    width = groups.group_width(n_kept, group_size)
    return scale.float().repeat_interleave(width, dim=1)[:, :n_kept].contiguous()

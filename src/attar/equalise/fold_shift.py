"""Take a constant off each channel, which biases take up, and scale down those that range far.

x' = (x - z) / s with z the middle of a channel's range (or its mean), and s = max(1, range / t), so
that no channel ranges further than t. For activations in few bits this makes them symmetric and
alike; for weights alone it takes what all inputs share out of what rounding errors meet.

Source: Wei et al. 2023, Outlier Suppression+, https://arxiv.org/abs/2304.09145, the channel-wise
shifting and scaling of its method section. We differ in two ways: t is a
multiple of the median range, a few of which are compared by price, instead of a grid search on the
layer's squared error; and where the shift would have to pass a residual connection it is refused,
because nothing there could take it up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attar.equalise.facts import Facts
from attar.equalise.fold_scale import balanced
from attar.errors import SettingError
from attar.links import Change, Link, scaling

CENTRES = ("middle", "mean")


@dataclass(frozen=True)
class FoldShift:
    """Centre each channel, and cap its range.

    Attributes:
        centre: What is taken off: the "middle" of the range seen, or the "mean".
        cap: Ranges are scaled down to this multiple of the median range; 0 for no scaling.
    """

    centre: str = "middle"
    cap: float = 0.0

    def __post_init__(self) -> None:
        if self.centre not in CENTRES:
            raise SettingError(
                f"centre is {self.centre!r}, but fold_shift takes {' or '.join(CENTRES)}.",
                hint="set centre to middle.",
            )
        if not isinstance(self.cap, int | float) or self.cap < 0:
            raise SettingError(
                f"cap is {self.cap!r}, but fold_shift takes 0 or more.", hint="set cap to 0."
            )

    def refuses(self, link: Link) -> str | None:
        if not link.can_shift:
            return "has no bias on one side, or a path that a constant does not pass"
        return None

    def change(self, link: Link, facts: Facts) -> Change:
        ones = torch.ones(link.channels, dtype=torch.float64)
        if facts.mean is None or facts.low is None or facts.high is None:
            return scaling(ones)  # nothing was seen of it, or no means were gathered
        low, high = facts.low.double(), facts.high.double()
        seen = link.free & low.isfinite() & high.isfinite()
        middle = facts.mean.double() if self.centre == "mean" else (low + high) / 2
        shift = middle.where(seen, 0.0)
        if not self.cap:
            return scaling(ones, shift)
        reach = (high - low).where(seen, 0.0)
        limit = self.cap * reach[seen].median() if bool(seen.any()) else ones[0]
        factors = (reach / limit.clamp(min=1e-30)).clamp(min=1.0)
        return scaling(balanced(link, factors), shift)

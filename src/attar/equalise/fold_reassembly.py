"""Split channels that are far larger than the others over several, at places others give up.

A channel i with more than `theta` times the median size is split into T equal parts x / T, each
read by the same columns. The count stays, because a place is given up by a channel that another
stands for: one that is never written or never read, or one whose row is a positive multiple of
another's.

Source: Liu et al. 2024, QLLM, https://arxiv.org/abs/2310.08041, its channel disassembly and
channel assembly. We differ in two ways. QLLM merges the most similar channels, which changes the
answer; only those that are the same up to a factor are merged here, so that it stays, and there may
be none. QLLM gathers channels anew while the model runs; here the rows that write them do it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attar.equalise.facts import Facts
from attar.errors import SettingError
from attar.links import Change, Link, Mix

# Rows this close to parallel are the same: the rounding of float32.
SAME_COSINE = 1 - 1e-6


@dataclass(frozen=True)
class FoldReassembly:
    """Split large channels into places that others give up.

    Attributes:
        theta: Largest size of a channel, in medians, above 1.
    """

    theta: float = 4.0

    def __post_init__(self) -> None:
        if not isinstance(self.theta, int | float) or self.theta <= 1:
            raise SettingError(
                f"theta is {self.theta!r}, but fold_reassembly takes more than 1.",
                hint="set theta to 4.",
            )

    def refuses(self, link: Link) -> str | None:
        if link.kind not in ("linear", "convolution") or not bool(link.free.all()):
            return f"is a {link.kind}, whose channels are not all alike"
        if any(reader.groups > 1 for reader in link.readers):
            return "is read by a convolution that reads each channel by itself"
        return None

    def change(self, link: Link, facts: Facts) -> Change:
        every = torch.arange(link.channels)[None]
        write = torch.eye(link.channels, dtype=torch.float64)
        read = write.clone()
        if facts.written is not None and facts.read is not None:
            places = _given_up(facts.written, facts.read, read)
            write[places] = 0
            read[:, places] = 0
            _split(facts.power.sqrt(), self.theta, places, write, read)
        return Change(Mix(write[None], every), Mix(read[None], every))


def _given_up(written: Tensor, meets: Tensor, read: Tensor) -> list[int]:
    """List the channels that others can stand for; `read` lets those others do so."""
    sizes = written.norm(dim=1)
    alive = (sizes > 0) & (meets.norm(dim=1) > 0)
    cosine = (written / sizes.clamp(min=1e-30)[:, None]) @ (
        written / sizes.clamp(min=1e-30)[:, None]
    ).T
    places: list[int] = (~alive).nonzero().flatten().tolist()
    for one in alive.nonzero().flatten().tolist():
        same = (cosine[one, :one] > SAME_COSINE) & alive[:one]
        twin = next((k for k in same.nonzero().flatten().tolist() if k not in places), None)
        if twin is not None:
            read[one, twin] = sizes[one] / sizes[twin]
            places.append(one)
    return places


def _split(sizes: Tensor, theta: float, places: list[int], write: Tensor, read: Tensor) -> None:
    """Spread the largest channels over the places, the largest first."""
    free = list(places)
    limit = theta * sizes.median()
    for one in torch.argsort(sizes, descending=True, stable=True).tolist():
        parts = min(int((sizes[one] / limit).ceil()), len(free) + 1)
        if parts < 2 or one in places:
            continue
        taken, free = free[: parts - 1], free[parts - 1 :]
        write[one] /= parts
        write[taken] = write[one].clone()
        read[:, taken] = read[:, [one]]

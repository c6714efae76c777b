"""What a cut of several units costs together when what is left is fitted again, and that fit.

With columns S gone from a weight W that meets inputs of second moment A, and K kept:

    refit    W_K + W_S A_SK A_KK⁻¹                  least of tr(R dW A dWᵀ), whatever R is
    damage   1/2 tr(R W_S (A_SS − A_SK A_KK⁻¹ A_KS) W_Sᵀ)

Units are taken one after the other, the cheapest each time, and the inverse of A is brought up to
date after each: of two channels that say the same, the second is dear once the first is gone.

Source: Hassibi and Stork 1992, Second order derivatives for network pruning: Optimal Brain Surgeon,
eq. 5 and 6 for one weight; blocks of columns as in Frantar and Alistarh 2022, Optimal Brain
Compression, https://arxiv.org/abs/2208.11580, section 4 ("the removal of blocks"). We differ in R,
the second moment of gradients at the output, and in summing over all that reads a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

DAMPING_FRACTION = 0.01
# Tried where a moment may be of few samples; the least is what rounding with feedback adds.
DAMPINGS = (DAMPING_FRACTION, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Reader:
    """A weight that reads the units of a group.

    Attributes:
        weight: With the root of R on its left, so that rows count alike.
        moment: A, or its diagonal where no more is known; then nothing can be fitted again.
        columns: That go with each unit.
        damping: See `factor_of`.
    """

    weight: Float[Tensor, "rows columns"]
    moment: Tensor
    columns: Int[Tensor, "units width"]
    damping: float | None = None


def weighted(weight: Float[Tensor, "rows columns"], rows: Tensor) -> Float[Tensor, "rows columns"]:
    """Multiply by a root of R, `1 rows rows` or its diagonal, from the left."""
    if rows.dim() == 1:
        return weight.double() * rows.double().clamp(min=0).sqrt()[:, None]
    values, vectors = torch.linalg.eigh(rows[0].double())
    root: Tensor = values.clamp(min=0).sqrt()[:, None] * (vectors.T @ weight.double())
    return root


def factor_of(
    moment: Float[Tensor, "columns columns"], damping: float | None = None
) -> Float[Tensor, "columns columns"]:
    """Cholesky factor, after a share of the mean power is added to each column's own.

    A moment that was kept in 16 bits may have eigenvalues below zero by more than that share; then
    it is added tenfold until it is enough.

    Args:
        damping: That share; None for what rounding with feedback adds.
    """
    exact = moment.double()
    mean = exact.diagonal().mean()
    assert bool(mean.isfinite())  # a model with such weights is refused before
    share = DAMPING_FRACTION if damping is None else damping
    ridge = share * mean if mean > 0 else torch.ones_like(mean)
    while True:
        damped = exact + ridge * torch.eye(len(exact), dtype=torch.float64)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            found: Tensor = factor
            return found
        ridge = 10 * ridge.clamp(min=1e-6 * mean)


class _Left:
    """What is left of one reader while units go; changed in place."""

    def __init__(self, reader: Reader) -> None:
        self.columns = reader.columns
        self.weight = reader.weight.double().clone()
        self.inverse: Tensor | None = None
        if reader.moment.dim() == 2:
            self.inverse = torch.cholesky_inverse(factor_of(reader.moment, reader.damping))
        else:
            powers = reader.moment.double() * self.weight.square().sum(0)
            self.fixed = 0.5 * powers[self.columns].sum(1)

    def prices(self) -> Float[Tensor, " units"]:
        """What each unit costs next."""
        if self.inverse is None:
            return self.fixed
        if self.columns.shape[1] == 1:
            each = self.weight.square().sum(0) / self.inverse.diagonal().clamp(min=1e-300)
            return 0.5 * each[self.columns[:, 0]]
        blocks = self.inverse[self.columns[:, :, None], self.columns[:, None, :]]
        read = self.weight[:, self.columns].permute(1, 2, 0)
        solved: Tensor = torch.linalg.solve(blocks, read)
        return 0.5 * (solved * read).sum((1, 2))

    def take(self, unit: int) -> None:
        """Cut a unit, and let what is left take its part over."""
        if self.inverse is None:
            return
        gone = self.columns[unit]
        over = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])
        self.weight -= self.weight[:, gone] @ over
        self.inverse -= self.inverse[:, gone] @ over
        # Of what is gone nothing may come back by rounding.
        self.inverse[gone] = 0.0
        self.inverse[:, gone] = 0.0
        self.inverse[gone, gone] = 1.0


def cheapest_first(
    readers: Sequence[Reader], count: int, stop: float = float("inf")
) -> tuple[list[int], list[float]]:
    """Choose units to cut, one after the other.

    Args:
        readers: All that read the units of one group.
        count: How many to choose; fewer than there are.
        stop: Nats from which on the next unit is too dear.

    Returns:
        The units in order, and what each adds in nats per prediction, on the data of the moments.
    """
    left = [_Left(reader) for reader in readers]
    chosen: list[int] = []
    added: list[float] = []
    for _ in range(count):
        prices = torch.stack([one.prices() for one in left]).sum(0)
        prices[chosen] = torch.inf
        unit = int(prices.argmin())
        if prices[unit] > stop:
            break
        chosen.append(unit)
        added.append(float(prices[unit]))
        for one in left:
            one.take(unit)
    return chosen, added


def held_out_damping(
    weight: Float[Tensor, "rows columns"],
    first: Float[Tensor, "columns columns"],
    second: Float[Tensor, "columns columns"],
) -> float:
    """Choose a damping: that with which other columns foretell each best on other samples.

    A few dozen pictures say which of a thousand channels could take another's part over, and other
    pictures say that they cannot.

    Args:
        weight: With the root of R on its left.
        first: A of some samples, on which columns are fitted to one another.
        second: A of the others, on which what is left of each is seen.
    """
    sizes, best, least = weight.double().square().sum(0), DAMPINGS[0], float("inf")
    for damping in DAMPINGS:
        inverse = torch.cholesky_inverse(factor_of(first, damping))
        left = ((inverse @ second.double()) * inverse).sum(1) / inverse.diagonal().square()
        total = float((left * sizes).sum())
        if total < least:
            best, least = damping, total
    return best


def refitted(
    weight: Float[Tensor, "rows columns"],
    moment: Tensor,
    gone: Int[Tensor, " gone"],
    damping: float | None = None,
) -> Float[Tensor, "rows columns"]:
    """Fit a weight again without some columns, which become zero.

    Args:
        moment: A, or its diagonal: then the others stay as they are.
        damping: See `factor_of`.
    """
    new = weight.double().clone()
    new[:, gone] = 0.0
    if moment.dim() == 2:
        stays = torch.ones(weight.shape[1], dtype=torch.bool)
        stays[gone] = False
        kept = stays.nonzero().flatten()
        root = factor_of(moment[kept][:, kept], damping)
        over = torch.cholesky_solve(moment[kept][:, gone].double(), root)
        new[:, kept] += weight[:, gone].double() @ over.T
    return new.to(weight.dtype)

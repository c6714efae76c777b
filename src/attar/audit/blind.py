"""What a model would lose that answers the same whatever it reads: what a divergence is held to."""

from __future__ import annotations

from torch import Tensor

from attar.divergence import Divergence

Sums = tuple[int, Tensor | None, float, float]
"""Predictions, their answers, squares and entropies."""


class Blind:
    """Sums for the divergence of a model that gives everybody the average answer."""

    def __init__(self, divergence: Divergence) -> None:
        self._divergence = divergence
        self._n = 0
        self._answers: Tensor | None = None
        self._squares = 0.0
        self._entropy = 0.0

    @property
    def sums(self) -> Sums:
        """All that was added so far, which goes on from there when it is given back."""
        return self._n, self._answers, self._squares, self._entropy

    @sums.setter
    def sums(self, sums: Sums) -> None:
        self._n, self._answers, self._squares, self._entropy = sums

    def add(self, outputs: Tensor) -> None:
        """Add the original's outputs, `predictions width`."""
        if self._divergence.family == "gaussian":
            assert self._divergence.whitening is not None
            outputs = outputs @ self._divergence.whitening.T
            self._squares += float(outputs.double().square().sum())
        else:
            logs = outputs.log_softmax(-1)
            outputs = logs.exp()
            self._entropy -= float((outputs * logs).sum(-1).double().sum())
        self._add(outputs.double().sum(0), len(outputs))

    def join(self, other: Blind) -> None:
        """Add what another saw."""
        self._squares += other._squares
        self._entropy += other._entropy
        if other._answers is not None:
            self._add(other._answers, other._n)

    def _add(self, answers: Tensor, n: int) -> None:
        self._answers = answers if self._answers is None else self._answers + answers
        self._n += n

    def entropy(self) -> float:
        """Mean entropy of the original's answers, nats; 0 for gaussian."""
        return self._entropy / self._n

    def mean(self) -> float:
        """H(mean p) - mean H(p), or half the spread of the whitened means."""
        assert self._answers is not None
        mean = self._answers / self._n
        if self._divergence.family == "gaussian":
            return 0.5 * (self._squares / self._n - float(mean.square().sum()))
        return float(-(mean * mean.clamp(min=1e-300).log()).sum()) - self.entropy()

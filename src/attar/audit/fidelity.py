"""Run the original and the compressed model on the same inputs and keep what differs.

Streams: nothing but a few numbers per prediction is held, whatever the size of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attar.divergence import Divergence
from attar.parallel import in_order
from attar.records import Batch, Estimate, Model, Progress

# Predictions compared at once: the differences of 49,152 logits of each fit in 25 MB.
ROWS_AT_ONCE = 128
N_RESAMPLES = 1000

Forward = Callable[[Batch], Tensor]
"""A batch to outputs, `samples predictions width`."""


@dataclass(frozen=True)
class Measured:
    """One number per prediction, in order; `sample` says which sample it belongs to.

    Attributes:
        divergence: Nats.
        answer_before: Most likely answer of the original; -1 for gaussian.
        probability_before: Its probability.
        surprise_before: -log p(next token), nats; empty where there is no next token to compare.
        blind_divergence: Mean nats lost by a model that answers the same whatever the input:
            the scale on which a divergence is large or small.
        entropy: Mean entropy of the original's answers, nats.
    """

    sample: np.ndarray
    position: np.ndarray
    divergence: np.ndarray
    answer_before: np.ndarray
    answer_after: np.ndarray
    probability_before: np.ndarray
    probability_after: np.ndarray
    surprise_before: np.ndarray
    surprise_after: np.ndarray
    surprise_sample: np.ndarray
    cosine: np.ndarray
    blind_divergence: float
    entropy: float

    @property
    def mean_divergence(self) -> float:
        """Nats per prediction."""
        return float(self.divergence.mean())


def measure(
    model: Model,
    compressed: Forward,
    batches: Sequence[Batch],
    divergence: Divergence,
    *,
    progress: Progress,
    stage: str = "audit",
) -> Measured:
    """Compare the two on every prediction of `batches`."""

    def compare(batch: Batch) -> tuple[list[dict[str, np.ndarray]], _Blind]:
        blind = _Blind(divergence)
        with torch.no_grad():
            before = model.task.forward(model.module, batch)
            after = compressed(batch)
            return list(_compare(model, batch, before, after, divergence, blind)), blind

    parts: list[dict[str, np.ndarray]] = []
    blind = _Blind(divergence)
    first = 0
    with progress.stage(stage, len(batches)) as advance:
        for batch, (found, seen) in zip(batches, in_order(compare, batches), strict=True):
            for part in found:
                part["sample"] += first
                part["surprise_sample"] += first
            parts += found
            blind.join(seen)
            first += len(next(iter(batch.values())))
            advance(1)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Measured(**joined, blind_divergence=blind.mean(), entropy=blind.entropy())


def _compare(
    model: Model,
    batch: Batch,
    before: Tensor,
    after: Tensor,
    divergence: Divergence,
    blind: _Blind,
) -> Iterator[dict[str, np.ndarray]]:
    """Compare one batch, a few rows at a time."""
    mask = batch.get("mask", torch.ones(before.shape[:2], dtype=torch.bool))
    following = _next_tokens(model, batch, before, mask)
    where = mask.nonzero()
    for rows in torch.split(where, ROWS_AT_ONCE):
        sample, position = rows.unbind(1)
        p, q = before[sample, position], after[sample, position]
        blind.add(p)
        answer = torch.full((len(p), 2), -1)
        chance = torch.ones(len(p), 2)
        surprise = torch.zeros(0, 2)
        kept = torch.zeros(0, dtype=torch.long)
        if divergence.family == "categorical":
            logs = [p.log_softmax(-1), q.log_softmax(-1)]
            best = [log.max(-1) for log in logs]
            chance = torch.stack([b.values.exp() for b in best], 1)
            answer = torch.stack([b.indices for b in best], 1)
            token = following[sample, position]
            kept = (token >= 0).nonzero().flatten()
            surprise = torch.stack([-log[kept, token[kept]] for log in logs], 1)
        yield {
            "sample": sample.numpy().copy(),
            "position": position.numpy().copy(),
            "divergence": divergence.between(p, q).double().numpy(),
            "answer_before": answer[:, 0].numpy(),
            "answer_after": answer[:, 1].numpy(),
            "probability_before": chance[:, 0].numpy(),
            "probability_after": chance[:, 1].numpy(),
            "surprise_before": surprise[:, 0].double().numpy(),
            "surprise_after": surprise[:, 1].double().numpy(),
            "surprise_sample": sample[kept].numpy().copy(),
            "cosine": torch.cosine_similarity(p, q, dim=-1).double().numpy(),
        }


def _next_tokens(model: Model, batch: Batch, outputs: Tensor, mask: Tensor) -> Tensor:
    """The token that really follows each position; -1 where none does."""
    following = torch.full(outputs.shape[:2], -1)
    name = {"language": "tokens", "transcribe": "decoder_tokens"}.get(model.task.name)
    if name is not None:
        following[:, :-1] = batch[name][:, 1:].masked_fill(~mask[:, 1:], -1)
    return following


class _Blind:
    """Sums for the divergence of a model that gives everybody the average answer."""

    def __init__(self, divergence: Divergence) -> None:
        self._divergence = divergence
        self._n = 0
        self._answers: Tensor | None = None
        self._squares = 0.0
        self._entropy = 0.0

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

    def join(self, other: _Blind) -> None:
        """Add what another saw."""
        self._squares += other._squares
        self._entropy += other._entropy
        if other._answers is not None:
            self._add(other._answers, other._n)

    def _add(self, answers: Tensor, n: int) -> None:
        self._answers = answers if self._answers is None else self._answers + answers
        self._n += n

    def entropy(self) -> float:
        return self._entropy / self._n

    def mean(self) -> float:
        """H(mean p) - mean H(p), or half the spread of the whitened means."""
        assert self._answers is not None
        mean = self._answers / self._n
        if self._divergence.family == "gaussian":
            return 0.5 * (self._squares / self._n - float(mean.square().sum()))
        return float(-(mean * mean.clamp(min=1e-300).log()).sum()) - self.entropy()


def bootstrap(
    values: np.ndarray,
    sample: np.ndarray,
    *,
    seed: int,
    of: Callable[[np.ndarray], np.ndarray] = lambda mean: mean,
) -> Estimate:
    """Mean over predictions with a 95% interval by resampling whole samples.

    Predictions of one sequence hang together, so sequences are drawn, not predictions.

    Args:
        values: One per prediction.
        sample: Which sample each prediction belongs to.
        of: Applied to the means, for instance `np.exp`.

    Source: Efron and Tibshirani 1993, An introduction to the bootstrap, section 13.3 (percentile).
    """
    _, place = np.unique(sample, return_inverse=True)
    sums = np.bincount(place, weights=values)
    counts = np.bincount(place)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (N_RESAMPLES, len(sums)))
    means = of(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(of(values.mean())), float(low), float(high))

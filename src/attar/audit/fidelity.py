"""Run the original and the compressed model on the same inputs and keep what differs.

Streams: nothing but a few numbers per prediction is held, whatever the size of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attar.audit.blind import Blind, Sums
from attar.divergence import Divergence, predictions_mask
from attar.errors import DataError
from attar.parallel import in_order
from attar.records import Batch, Estimate, Model, Progress

# Predictions compared at once: the differences of 49,152 logits of each fit in 25 MB.
ROWS_AT_ONCE = 128
N_RESAMPLES = 1000
DRAWN_AT_ONCE = 2**21  # 16 MB of places: of 60,000 questions all at once they would be 500
# Temperatures among which each model's best is looked for, on predictions of so many numbers.
TEMPERATURES = tuple(2.0 ** (k / 16) for k in range(-24, 25))
TEMPERED_NUMBERS, TEMPERED_AT_LEAST = 2**25, 256

# Batches that are finished, and kept, together: more would be done again after a kill, and fewer
# cost more, since what all answers sum to is kept with each.
KEPT_TOGETHER = 32

Forward = Callable[[Batch], Tensor]
"""A batch to outputs, `samples predictions width`."""
Keep = Callable[[str, Callable[[], Any]], Any]
"""The name of a step and what makes it, to what it makes or an earlier run has made."""


@dataclass(frozen=True)
class Measured:
    """One number per prediction, in order; `sample` says which sample it belongs to.

    Attributes:
        divergence: Nats.
        answer_before: Most likely answer of the original; -1 for gaussian.
        probability_before: Its probability.
        surprise_before: -log p(true answer), nats: of the next token, or of a label; one for each
            prediction that has one.
        surprise_sample: Which sample each of these belongs to.
        surprise_at: Place of each of these among all predictions.
        truth: True answers, likewise.
        brier_before: Squared errors of the whole distribution, likewise.
        blind_divergence: Mean nats lost by a model that answers the same whatever the input:
            the scale on which a divergence is large or small.
        entropy: Mean entropy of the original's answers, nats.
        jensen_shannon: Nats between each model and the mean of both; empty for gaussian, and where
            it was not looked at closely.
        tempered_before: Of some of the predictions with a true answer: surprise at each of
            TEMPERATURES, the probability of the most likely answer, and whether it is right (the
            same at each), `predictions temperatures 3`.
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
    surprise_at: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    truth: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    brier_before: np.ndarray = field(default_factory=lambda: np.zeros(0))
    brier_after: np.ndarray = field(default_factory=lambda: np.zeros(0))
    jensen_shannon: np.ndarray = field(default_factory=lambda: np.zeros(0))
    tempered_before: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3)))
    tempered_after: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3)))

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
    answers: Sequence[int] = (),
    closely: bool = False,
) -> Measured:
    """Compare the two on every prediction of `batches`.

    Args:
        answers: True class of each sample, -1 where it is not known; or empty.
        closely: Also Jensen and Shannon's divergence, and other temperatures: for a report.
    """
    comparison = _Comparison(model, compressed, batches, divergence, answers, closely)
    with progress.stage(stage, len(batches)) as advance:
        return comparison.measured(len(batches), _at_once, advance)


def measure_for_report(
    model: Model,
    compressed: Forward,
    batches: Sequence[Batch],
    divergence: Divergence,
    *,
    progress: Progress,
    answers: Sequence[int] = (),
    keep: Keep | None = None,
) -> Measured:
    """Do what `measure` does closely.

    Args:
        keep: Keeps what is finished, some batches at a time; None where nothing is kept.
    """
    comparison = _Comparison(model, compressed, batches, divergence, answers, closely=True)
    together = len(batches) if keep is None else KEPT_TOGETHER
    with progress.stage("audit", len(batches)) as advance:
        return comparison.measured(together, keep or _at_once, advance)


@dataclass(frozen=True)
class _Comparison:
    """Two models, and what they are compared on; see `measure`."""

    model: Model
    compressed: Forward
    batches: Sequence[Batch]
    divergence: Divergence
    answers: Sequence[int]
    closely: bool

    def measured(self, together: int, keep: Keep, advance: Callable[[int], None]) -> Measured:
        """Compare on all batches, so many in a step that is kept."""
        numbers = range(len(self.batches))
        starts = list(accumulate((_samples(batch) for batch in self.batches), initial=0))[:-1]
        blind, parts = Blind(self.divergence), []

        def some(first: int) -> tuple[list[Any], Sums]:
            done, own = [], numbers[first : first + together]
            for found, seen in in_order(lambda n: self._compared(n, starts[n]), own):
                done.append(found)
                blind.join(seen)
                advance(1)
            return done, blind.sums

        for first in numbers[::together]:
            done, sums = keep(f"batches from {first}", partial(some, first))
            if sums[0] > blind.sums[0]:  # an earlier run has added these
                blind.sums = sums
                advance(len(done))
            parts += done
        return Measured(
            **_joined(starts, parts), blind_divergence=blind.mean(), entropy=blind.entropy()
        )

    def _compared(self, number: int, first: int) -> tuple[list[dict[str, np.ndarray]], Blind]:
        blind, batch = Blind(self.divergence), self.batches[number]
        with torch.no_grad():
            before = self.model.task.forward(self.model.module, batch)
            after = self.compressed(batch)
            truth = _true_answers(self.model, batch, before, self.answers[first:])
            every = _tried_every(self.batches, before) if self.closely else 0
            parts = _compare(batch, before, after, truth, self.divergence, blind, every)
            return list(parts), blind


def _at_once(_step: str, make: Callable[[], Any]) -> Any:
    return make()


def _samples(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _joined(
    starts: Sequence[int], parts: Sequence[Sequence[dict[str, np.ndarray]]]
) -> dict[str, np.ndarray]:
    """Put the parts of all batches together, samples and predictions counted on."""
    n_before, flat = 0, []
    for first, found in zip(starts, parts, strict=True):
        for part in found:
            part["sample"] += first
            part["surprise_sample"] += first
            part["surprise_at"] += n_before
            n_before += len(part["sample"])
            flat.append(part)
    return {name: np.concatenate([part[name] for part in flat]) for name in flat[0]}


def _tried_every(batches: Sequence[Batch], outputs: Tensor) -> int:
    """Of how many predictions one is tried at all temperatures."""
    n = sum(
        int(b["mask"].sum()) if "mask" in b else _samples(b) * outputs.shape[1] for b in batches
    )
    return -(-n // max(TEMPERED_AT_LEAST, TEMPERED_NUMBERS // outputs.shape[-1]))


def _compare(
    batch: Batch,
    before: Tensor,
    after: Tensor,
    truth: Tensor,
    divergence: Divergence,
    blind: Blind,
    every: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Compare one batch, a few rows at a time.

    Args:
        every: See `_tried_every`; 0 for what is cheap alone.
    """
    mask = predictions_mask(before, batch)
    for rows in torch.split(mask.nonzero(), ROWS_AT_ONCE):
        sample, position = rows.unbind(1)
        p, q = before[sample, position], after[sample, position]
        blind.add(p)
        found = {
            "sample": sample.numpy().copy(),
            "position": position.numpy().copy(),
            "divergence": divergence.between(p, q).double().numpy(),
            "cosine": torch.cosine_similarity(p, q, dim=-1).double().numpy(),
        }
        if divergence.family == "categorical":
            logs = p.log_softmax(-1), q.log_softmax(-1)
            found |= _answers(logs, closely=every > 0)
            yield found | _against_truth(logs, truth[sample, position], sample, every)
        else:
            yield found | _no_answers(len(p))


def _answers(logs: tuple[Tensor, Tensor], *, closely: bool) -> dict[str, np.ndarray]:
    """What both answer, and how far apart that is."""
    best = [log.max(-1) for log in logs]
    apart = torch.zeros(0)
    if closely:
        middle = torch.logaddexp(*logs) - math.log(2)
        apart = 0.5 * torch.stack([(log.exp() * (log - middle)).sum(-1) for log in logs]).sum(0)
    return {
        "answer_before": best[0].indices.numpy(),
        "answer_after": best[1].indices.numpy(),
        "probability_before": best[0].values.exp().numpy(),
        "probability_after": best[1].values.exp().numpy(),
        "jensen_shannon": apart.double().numpy(),
    }


def _against_truth(
    logs: tuple[Tensor, Tensor], truth: Tensor, sample: Tensor, every: int
) -> dict[str, np.ndarray]:
    """How both answer where the true answer is known."""
    kept = (truth >= 0).nonzero().flatten()
    true, found = truth[kept], {"truth": truth[kept].numpy()}
    some = slice(None, None, every) if every else slice(0)
    for name, log in zip(("before", "after"), (log[kept] for log in logs), strict=True):
        own = log.gather(-1, true[:, None])[:, 0]
        found[f"surprise_{name}"] = -own.double().numpy()
        found[f"brier_{name}"] = (log.exp().square().sum(-1) - 2 * own.exp() + 1).double().numpy()
        found[f"tempered_{name}"] = _tempered(log[some], true[some])
    found["surprise_sample"] = sample[kept].numpy().copy()
    found["surprise_at"] = kept.numpy().copy()
    return found


def _tempered(logs: Tensor, truth: Tensor) -> np.ndarray:
    """Surprise, confidence and being right at each temperature, see `Measured`."""
    right = (logs.argmax(-1) == truth).double()
    found = torch.zeros(len(logs), len(TEMPERATURES), 3, dtype=torch.float64)
    for place, temperature in enumerate(TEMPERATURES):
        log = (logs / temperature).log_softmax(-1)
        found[:, place, 0] = -log.gather(-1, truth[:, None])[:, 0].double()
        found[:, place, 1] = log.amax(-1).exp().double()
        found[:, place, 2] = right
    return found.numpy()


def _no_answers(n: int) -> dict[str, np.ndarray]:
    """Of outputs that are no choice among answers."""
    none = np.zeros(0)
    both = {
        f"{name}_{side}": none for name in ("surprise", "brier") for side in ("before", "after")
    }
    chances = {f"probability_{side}": np.ones(n) for side in ("before", "after")}
    answers = {f"answer_{side}": np.full(n, -1) for side in ("before", "after")}
    tempered = {f"tempered_{side}": np.zeros((0, 0, 3)) for side in ("before", "after")}
    places = {name: np.zeros(0, int) for name in ("surprise_sample", "surprise_at", "truth")}
    return both | chances | answers | tempered | places | {"jensen_shannon": none}


def _true_answers(model: Model, batch: Batch, outputs: Tensor, answers: Sequence[int]) -> Tensor:
    """The token that really follows each position, or the sample's class; -1 where none is known.

    Args:
        answers: Of this batch's samples and those after it; or empty.
    """
    truth = torch.full(outputs.shape[:2], -1)
    name = {"language": "tokens", "transcribe": "decoder_tokens"}.get(model.task.name)
    if name is not None:
        mask = predictions_mask(outputs, batch)
        truth[:, :-1] = batch[name][:, 1:].masked_fill(~mask[:, 1:], -1)
    elif len(answers):
        truth[:] = torch.tensor(answers[: len(truth)])[:, None]
        if int(truth.max()) >= outputs.shape[-1]:
            raise DataError(
                f"a true answer is class {int(truth.max())}, and {model.name} has "
                f"{outputs.shape[-1]} classes, from 0 on.",
                hint="give numbers of the model's own classes, or -1 where none fits.",
            )
    return truth


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
    parts = [sums[drawn].sum(1) / counts[drawn].sum(1) for drawn in resamples(len(sums), seed)]
    low, high = np.quantile(of(np.concatenate(parts)), [0.025, 0.975])
    return Estimate(float(of(values.mean())), float(low), float(high))


def resamples(n: int, seed: int) -> Iterator[np.ndarray]:
    """Draw N_RESAMPLES times from n samples with replacement, a few draws at a time, `draws n`."""
    draws, at_once = np.random.default_rng(seed), max(1, DRAWN_AT_ONCE // n)
    for start in range(0, N_RESAMPLES, at_once):
        yield draws.integers(0, n, (min(at_once, N_RESAMPLES - start), n))

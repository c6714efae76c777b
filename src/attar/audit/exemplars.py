"""Inputs that compression forgets: several compressed models change their answer, and agree.

Source: Hooker et al. 2019, What do compressed deep neural networks forget?,
https://arxiv.org/abs/1911.05248 (Pruning Identified Exemplars): the inputs whose most frequent
label over a population of compressed models is another than over a population of originals. We
differ in two ways: there is one original, and an answer must be that of more than half of the
compressed models and not the most frequent one, which among three may be a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from jaxtyping import Bool, Int
from scipy import stats

from attar.audit import paired
from attar.audit.examples import place_of
from attar.audit.fidelity import Measured, bootstrap
from attar.records import Estimate, Exemplar, Exemplars, ExemplarSlice

FEWEST_MODELS = 3
MOST_SHOWN = 24


def agreed(
    answers: Int[np.ndarray, "models predictions"],
) -> tuple[Int[np.ndarray, " predictions"], Int[np.ndarray, " predictions"]]:
    """The answer of more than half of the models where there is one, and how many give it.

    An answer that more than half give stands in the middle when they are sorted.
    """
    middle = np.sort(answers, axis=0)[len(answers) // 2]
    return middle, (answers == middle).sum(axis=0)


def find_exemplars(
    measured: Sequence[Measured],
    labels: Sequence[str],
    *,
    seed: int,
    name_of: Callable[[int], str],
    shown: Sequence[object],
    decode: Callable[[list[int]], str] | None,
) -> Exemplars:
    """Find the exemplars of some compressed models, and say what they are like.

    Args:
        measured: Of each compressed model, on the same predictions.
        labels: Of each sample; empty for no slices.
        name_of: Number of an answer to its name.
        shown: By sample: token ids (with `decode`), or the name of the sample.
    """
    first = measured[0]
    after, agreeing = agreed(np.stack([one.answer_after for one in measured]))
    forgotten = (agreeing > len(measured) / 2) & (after != first.answer_before)
    divergence = np.mean([one.divergence for one in measured], axis=0)
    truth = np.full(len(forgotten), -1)
    truth[first.surprise_at] = first.truth

    named = partial(_readable, name_of)

    def show(i: int) -> Exemplar:
        where, text = place_of(first, i, shown, decode)
        return Exemplar(
            sample=where,
            shown=text,
            label=labels[first.sample[i]] if len(labels) else "",
            before=named(int(first.answer_before[i])),
            after=named(int(after[i])),
            truth="" if truth[i] < 0 else named(int(truth[i])),
            agreeing=int(agreeing[i]),
            divergence=float(divergence[i]),
        )

    places = np.flatnonzero(forgotten)
    worst = places[np.argsort(-divergence[places], kind="stable")][:MOST_SHOWN]
    return Exemplars(
        n_models=len(measured),
        n_predictions=len(forgotten),
        n_exemplars=len(places),
        share=bootstrap(forgotten.astype(float), first.sample, seed=seed),
        **_right(measured, truth, forgotten, seed),
        slices=_by_slice(forgotten, first.sample, labels, seed),
        shown=tuple(show(int(i)) for i in worst),
    )


def _readable(name_of: Callable[[int], str], answer: int) -> str:
    """Name an answer so that a space or an end of line can be read too."""
    name = name_of(answer)
    return name if name.strip() else repr(name)


def _right(
    measured: Sequence[Measured],
    truth: Int[np.ndarray, " predictions"],
    forgotten: Bool[np.ndarray, " predictions"],
    seed: int,
) -> dict[str, Estimate | None]:
    """Share of right answers among the exemplars and among the rest, before and after."""
    before = (measured[0].answer_before == truth).astype(float)
    after = np.mean([one.answer_after == truth for one in measured], axis=0)
    found: dict[str, Estimate | None] = {}
    for name, chosen in (("right", forgotten), ("rest", ~forgotten)):
        known = chosen & (truth >= 0)
        for side, values in (("before", before), ("after", after)):
            found[f"{name}_{side}"] = (
                bootstrap(values[known], measured[0].sample[known], seed=seed)
                if known.any()
                else None
            )
    return found


def _by_slice(
    forgotten: Bool[np.ndarray, " predictions"],
    sample: Int[np.ndarray, " predictions"],
    labels: Sequence[str],
    seed: int,
) -> tuple[ExemplarSlice, ...]:
    """How many exemplars each label has, against its share of the predictions."""
    names = sorted(set(labels))
    if len(names) < 2:
        return ()
    own = np.asarray(labels)[sample]
    found = []
    for name in names:
        inside = own == name
        expected = float(forgotten.mean() * inside.sum())
        p = over_represented(forgotten, inside, sample, seed)
        counts = int(inside.sum()), int(forgotten[inside].sum())
        found.append(ExemplarSlice(name, *counts, expected, p))
    adjusted = paired.holm([one.p_more for one in found])
    found = [replace(one, p_more=p) for one, p in zip(found, adjusted, strict=True)]
    return tuple(sorted(found, key=lambda one: one.expected - one.n_exemplars))


def over_represented(
    forgotten: Bool[np.ndarray, " predictions"],
    inside: Bool[np.ndarray, " predictions"],
    sample: Int[np.ndarray, " predictions"],
    seed: int,
) -> float:
    """P of so many exemplars inside a slice if they fell anywhere alike, one-sided.

    Fisher's exact test (1935, The design of experiments: the hypergeometric tail) where a sample
    has one prediction; else samples are drawn whole, because predictions of one hang together.
    """
    present, place = np.unique(sample, return_inverse=True)
    if len(present) == len(sample):
        drawn = stats.hypergeom(len(forgotten), int(inside.sum()), int(forgotten.sum()))
        return float(drawn.sf(int(forgotten[inside].sum()) - 1))
    sums, counts = np.bincount(place, forgotten.astype(float)), np.bincount(place)
    is_other = np.bincount(place, inside.astype(float)) == 0
    return float(paired.larger_than_the_rest(sums, counts, is_other.astype(int), seed)[0])

"""Search: plans are tried, boosted trees learn what they lose, and propose the next ones to try.

The first plans are drawn at random. Then, turn by turn, boosted trees are fitted to the logarithm
of what was lost, many plans are made (at random, and by small changes of the best), and of those
the trees like best a few are tried. The best plan tried is the answer.

Source: Lee et al. 2022, Quantune: Post-training quantization of convolutional neural networks using
extreme gradient boosting for fast deployment, https://arxiv.org/abs/2202.05048, algorithm 1.
We differ in four ways. A configuration is a candidate for every unit within the bytes, where the
paper's is one setting of calibration, scheme, clipping and granularity for the network: 96 of them,
which can all be ranked, where ours are proposed from a pool. What is minimised is divergence, not
lost accuracy. The trees are our own (`boosting.py`). Nothing is carried over from other models.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from attar.plan.boosting import boost
from attar.plan.solve import allowed
from attar.records import Candidate, Question

TRIALS, FIRST_TRIALS = 64, 16
# Plans that the trees choose from in one turn, how many of those are tried, and how many of the
# best ones are changed.
POOL, TRIED_AT_ONCE, PARENTS = 200, 4, 4
# Units given another candidate in a changed plan, at most.
MOST_CHANGED = 4
SMALLEST_LOSS = 1e-12

Places = tuple[int, ...]
"""Which of its candidates, smallest first, each unit has."""


def decide(asked: Question) -> dict[str, Candidate]:
    """Try as many plans as are allowed, and take the best."""
    options = {
        name: sorted(of, key=lambda c: c.cost.weight_bytes)
        for name, of in allowed(asked.candidates).items()
    }
    found = search(asked, list(options.values()), TRIALS)
    best = min(found, key=lambda places: found[places])
    return {n: of[p] for (n, of), p in zip(options.items(), best, strict=True)}


def search(
    asked: Question, options: Sequence[Sequence[Candidate]], trials: int, *, learns: bool = True
) -> dict[Places, float]:
    """Try plans; give what each lost, in the order of trying.

    Args:
        options: Of each unit, smallest first.
        learns: Draw every plan at random where False: what the search is held against.
    """
    draws = random.Random(asked.seed)
    sizes = [[c.cost.weight_bytes for c in of] for of in options]
    features = [_features(of, asked) for of in options]
    found: dict[Places, float] = {}

    def attempt(places: Places) -> None:
        plan = {of[p].unit: of[p] for of, p in zip(options, places, strict=True)}
        found[places] = asked.trial(plan).nats

    for _ in range(20 * trials):  # a small problem has fewer plans than trials
        if len(found) >= trials:
            break
        if len(found) < min(FIRST_TRIALS, trials) or not learns:
            proposed = [_random_plan(sizes, asked.limit, draws)]
        else:
            pool = _pool(found, sizes, asked.limit, draws)
            proposed = _liked(pool, found, features)[: trials - len(found)]
        for places in proposed:
            if places not in found:
                attempt(places)
    return found


def _pool(
    found: dict[Places, float], sizes: Sequence[Sequence[int]], limit: int, draws: random.Random
) -> list[Places]:
    """New plans: half at random, half the best ones with a few changes."""
    parents = sorted(found, key=lambda places: found[places])[:PARENTS]
    made = [_random_plan(sizes, limit, draws) for _ in range(POOL // 2)]
    for number in range(POOL // 2):
        places = list(parents[number % len(parents)])
        for unit in draws.sample(range(len(sizes)), min(len(sizes), MOST_CHANGED)):
            places[unit] = draws.randrange(len(sizes[unit]))
        made.append(_fitted(places, sizes, limit, draws))
    return [places for places in dict.fromkeys(made) if places not in found]


def _liked(
    pool: Sequence[Places],
    found: dict[Places, float],
    features: Sequence[Float64[np.ndarray, "_ 2"]],
) -> list[Places]:
    """Those that trees, fitted to what was found, say lose least."""
    if not pool:
        return []

    def row(places: Places) -> Float64[np.ndarray, " features"]:
        return np.concatenate([of[p] for of, p in zip(features, places, strict=True)])

    lost = np.array([math.log(max(nats, SMALLEST_LOSS)) for nats in found.values()])
    model = boost(np.stack([row(places) for places in found]), lost)
    said = model.predict(np.stack([row(places) for places in pool]))
    return [pool[i] for i in np.argsort(said, kind="stable")[:TRIED_AT_ONCE]]


def _features(of: Sequence[Candidate], asked: Question) -> Float64[np.ndarray, "_ 2"]:
    """Bits per weight, and which treatment, of each candidate of a unit."""
    n_weights = asked.units.named(of[0].unit).n_weights
    kinds = sorted({c.treatment for c in of})
    return np.array(
        [[8 * c.cost.weight_bytes / n_weights, kinds.index(c.treatment)] for c in of], float
    )


def _random_plan(sizes: Sequence[Sequence[int]], limit: int, draws: random.Random) -> Places:
    return _fitted([draws.randrange(len(of)) for of in sizes], sizes, limit, draws)


def _fitted(
    places: list[int], sizes: Sequence[Sequence[int]], limit: int, draws: random.Random
) -> Places:
    """Go down a step at random units until it fits, then up while something fits."""
    total = sum(of[p] for of, p in zip(sizes, places, strict=True))
    while total > limit:
        unit = draws.choice([u for u, p in enumerate(places) if p > 0])
        places[unit] -= 1
        total += sizes[unit][places[unit]] - sizes[unit][places[unit] + 1]
    order = list(range(len(sizes)))
    draws.shuffle(order)
    for unit in order:
        above = places[unit] + 1
        if above < len(sizes[unit]):
            more = sizes[unit][above] - sizes[unit][places[unit]]
            if total + more <= limit:
                places[unit], total = above, total + more
    return tuple(places)

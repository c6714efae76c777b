"""Prices of what treatments do to the units of a session.

Rounded on one half of the statistics and priced on the other; then scaled by two measured factors:
what feedback between rows saves (`row_gain`), and how much more a change does than A and G, taken
as independent, say (`coherence`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from attar.cost import leftover_dtype
from attar.disk import Scratch
from attar.errors import AttarError
from attar.explain import price
from attar.explain.price import bias_change
from attar.explain.probe import Changes
from attar.explain.probe import probe as probe_changes
from attar.explain.statistics import of_unit
from attar.parallel import Work
from attar.records import (
    Batch,
    Curvature,
    Replacement,
    RowWeights,
    Statistics,
    Transform,
    Unit,
    Units,
)
from attar.session import Session
from attar.transform.apply import (
    Facts,
    Treated,
    build_transform,
    check_finite,
    substitutions,
    treat,
)
from attar.transform.factorize_low_rank import FactorizeLowRank
from attar.transform.quantize_entropy import QuantizeEntropy

# Width of the rounding error on which coherence is measured: one that the plan often makes.
REFERENCE_BITS = 4
# Share of the calibration data it is measured on where every position has its prediction.
REFERENCE_SHARE_OF_SEQUENCES = 0.25
# Bits at which feedback between rows is compared with none, range coded, or of fixed width.
GAIN_BITS, GAIN_FIXED_BITS = 3, 4
# Units in the same place of other layers of which it is measured what feedback between rows saves.
GAINS_OF_ALIKE = 5
# Of the widths of range-coded integers, so many are tried.
WIDTHS_TRIED = 5
# Treatments whose errors cancel over what they were fitted to.
FEEDS_BACK = (
    *("quantize_feedback", "quantize_entropy", "quantize_levels", "quantize_llama"),
    *("quantize_codebook", "quantize_low_rank", "quantize_outliers", "quantize_binary"),
)
# Beside these, what is fitted to statistics in other ways.
FITTED = (*FEEDS_BACK, "factorize_low_rank", "zero_n_m", "zero_unstructured")


def price_change(
    statistics: Statistics, treatment: str, bias: Tensor | None, unit: Unit, change: Tensor
) -> tuple[float, Tensor | None]:
    """Price a change that a treatment made of a weight, `rows columns`.

    Args:
        bias: The unit's (`Unit.bias`), `rows`; None where it has none.

    Returns:
        Nats per prediction, and the bias that takes the mean error away, as it will be stored.
    """
    curvatures = statistics.curvatures[unit.name]
    nats = price.damage(change, curvatures) * _coherence(statistics, treatment, unit)
    if bias is None:
        return nats, None
    moved = bias + bias_change(change, curvatures)
    return nats, moved.to(leftover_dtype(unit.bias, moved)).to(bias.dtype)


def price_all(
    weight: Tensor,
    statistics: Statistics,
    unit: Unit,
    treatments: Sequence[tuple[str, Transform]],
) -> Iterator[float | AttarError]:
    """Price each treatment of a unit, rounded on one half of the statistics, on the other.

    Of a large weight some rows stand for all.

    Args:
        weight: The unit's, `rows columns`.
        statistics: Of this unit, at least: see `of_unit`.
    """
    curvatures = statistics.curvatures[unit.name]
    prices = price_weight(unit, weight, curvatures, [t for _, t in treatments])
    for (treatment, _), alone in zip(treatments, prices, strict=True):
        yield (
            alone if isinstance(alone, AttarError) else alone * factor(statistics, treatment, unit)
        )


def price_weight(
    unit: Unit, weight: Tensor, curvatures: Sequence[Curvature], transforms: Sequence[Transform]
) -> Iterator[float | AttarError]:
    """Price treatments of a weight that may be another than the session's, without `factor`."""
    check_finite(unit, weight)
    moment = price.rounding_moment(curvatures, held_out=True)
    sample = price.sample_rows(weight, curvatures) if unit.groups == 1 else None
    rows = price.row_weights(curvatures, held_out=True)
    # What feedback between rows saves is nearly the same share for all, and known already.
    some = weight, curvatures, replace(rows, moment=None)
    if sample is not None:
        few = price.row_weights(curvatures, sample, held_out=True)
        some = weight[sample.rows], price.of_rows(curvatures, sample), few
    tried, prices = _tried(transforms), {}
    # A sample of the rows says nothing about a rank, which is one of all.
    for by_rank, (part, known, told) in ((True, (weight, curvatures, rows)), (False, some)):
        own = [n for n in tried if isinstance(transforms[n], FactorizeLowRank) is by_rank]
        found = treat(part, moment, [transforms[n] for n in own], told, for_price=True)
        for n, made in zip(own, found, strict=True):
            prices[n] = (
                made
                if isinstance(made, AttarError)
                else price.damage(made.dense - part, known, held_out=True)
            )
    yield from _filled(transforms, prices)


def _widths(transforms: Sequence[Transform]) -> list[dict[int, float]]:
    """Place to bits of range-coded integers that differ in nothing else, fewest bits first."""
    alike: dict[QuantizeEntropy, list[tuple[float, int]]] = defaultdict(list)
    for place, transform in enumerate(transforms):
        if isinstance(transform, QuantizeEntropy):
            alike[replace(transform, bits=1)].append((float(transform.bits), place))
    return [{place: bits for bits, place in sorted(own)} for own in alike.values()]


def _tried(transforms: Sequence[Transform]) -> list[int]:
    """Places of those that are really tried: all, but of many widths a few."""
    left_out: set[int] = set()
    for bits in _widths(transforms):
        places = list(bits)
        if len(set(bits.values())) < len(bits):
            continue  # one twice: no curve goes through it
        spread = np.linspace(0, len(places) - 1, min(len(places), WIDTHS_TRIED)).round()
        left_out |= set(places) - {places[int(number)] for number in spread}
    return [place for place in range(len(transforms)) if place not in left_out]


def _filled(
    transforms: Sequence[Transform], prices: Mapping[int, float | AttarError]
) -> Iterator[float | AttarError]:
    """Prices of all: what lies between widths is smooth, and read off the logarithm."""
    filled = dict(prices)
    for bits in _widths(transforms):
        tried = [place for place in bits if place in prices]
        nats = [own for place in tried if isinstance(own := prices[place], float) and own > 0]
        for place in bits.keys() - prices.keys():
            if len(nats) == len(tried):
                curve = PchipInterpolator([bits[one] for one in tried], np.log(nats))
                filled[place] = float(np.exp(curve(bits[place])))
            else:  # zeros, or what the values do not allow
                filled[place] = prices[tried[0]]
    for place in range(len(transforms)):
        yield filled[place]


def factor(statistics: Statistics, treatment: str, unit: Unit) -> float:
    """What was measured of a unit that prices of one weight do not know."""
    return _coherence(statistics, treatment, unit) * _gain(statistics, treatment, unit)


def row_gain(session: Session, statistics: Statistics) -> dict[str, float]:
    """Measure what feedback between rows saves: damage with it over damage without.

    Rounded on the first half of the statistics, priced on the second.
    """

    def work(unit: Unit) -> Work[float | None]:
        own = of_unit(statistics, unit.name)
        return partial(_gain_of_rows, unit, session.weight(unit), own, _of_gain(session, unit))

    alike = _alike(session.units)
    some = [unit for own in alike for unit in own[:: -(-len(own) // GAINS_OF_ALIKE)]]
    gains = session.for_each_unit(work, some, step=lambda unit: f"row gain of {unit.name}")
    known = {u.name: gain for u, gain in zip(some, gains, strict=True) if gain is not None}
    found = {}
    for own in alike:
        measured = [known[unit.name] for unit in own if unit.name in known]
        for unit in own if measured else ():
            found[unit.name] = known.get(unit.name, median(measured))
    return found


def _alike(units: Units) -> list[list[Unit]]:
    """Units of one shape and of one name, but for its numbers: the same place in other layers."""
    alike = defaultdict(list)
    for unit in units:
        alike[unit.kind, unit.shape, re.sub(r"\d+", "", unit.name)].append(unit)
    return list(alike.values())


def _gain_of_rows(
    unit: Unit, weight: Tensor, statistics: Statistics, transform: Transform
) -> float | None:
    curvatures = statistics.curvatures[unit.name]
    rows = price.row_weights(curvatures, held_out=True)
    check_finite(unit, weight)
    if rows.moment is None:
        return None
    moment = price.rounding_moment(curvatures, held_out=True)
    damages = []
    for told in (rows, replace(rows, moment=None)):
        made = next(treat(weight, moment, [transform], told, for_price=True))
        if not isinstance(made, Replacement):
            return None
        damages.append(price.damage(made.dense - weight, curvatures, held_out=True))
    both, alone = damages
    return both / alone if alone > 0 else None


def _of_gain(session: Session, unit: Unit) -> Transform:
    settings = {"bits": GAIN_BITS, "by_worth": session.predicts_everywhere}
    coded = build_transform("quantize_entropy", settings)
    if coded.rejects(unit) is None:
        return coded
    return build_transform("quantize_feedback", {"bits": GAIN_FIXED_BITS, "group_size": 0})


def facts(session: Session, statistics: Statistics, unit: Unit, treatment: str) -> Facts:
    """Take along what treating one unit needs, and nothing of the others."""
    own = of_unit(statistics, unit.name)
    priced = partial(price_change, own, treatment, session.bias(unit))
    return session.weight(unit), partial(known, own), priced


def known(
    statistics: Statistics, unit: Unit, *, held_out: bool = False
) -> tuple[Tensor, RowWeights]:
    """What a treatment is told of a unit; of rows that hang together, where that pays."""
    curvatures = statistics.curvatures[unit.name]
    rows = price.row_weights(curvatures, held_out=held_out)
    if statistics.row_gain.get(unit.name, 1.0) >= 1.0:
        rows = replace(rows, moment=None)
    return price.rounding_moment(curvatures, held_out=held_out), rows


def coherence(session: Session, statistics: Statistics) -> dict[str, dict[str, float]]:
    """Measure how much more rounding errors do than A and G, taken as independent, say.

    Where one prediction has many positions, errors add up over them; error feedback makes
    errors that cancel over what it was fitted to, so it has its own factor. In a language model
    a few tokens with huge inputs and no gradient would fill A with what does not matter.
    """
    settings, share = {"bits": REFERENCE_BITS, "group_size": 0}, 1.0
    references = {"": build_transform("quantize_rtn", settings)}
    if session.predicts_everywhere:
        share = REFERENCE_SHARE_OF_SEQUENCES
    else:
        references["quantize_feedback"] = build_transform("quantize_feedback", settings)
    scratch = Scratch(on_disk=session.on_disk)
    made = [_made_alone(session, statistics, one, scratch) for one in references.values()]
    changes = [_changes(session, [treated for treated, _ in one]) for one in made]
    found = _probe(session, changes, share)
    return {
        kind: _ratios(one, damages)
        for kind, one, damages in zip(references, made, found, strict=True)
    }


def _made_alone(
    session: Session, statistics: Statistics, reference: Transform, scratch: Scratch
) -> list[tuple[Treated, float]]:
    """Treat every unit by the reference, with what that costs by A and G alone."""

    def work(unit: Unit) -> Work[tuple[Treated, float] | None]:
        own = of_unit(statistics, unit.name)
        return partial(
            _priced_alone, unit, session.weight(unit), session.bias(unit), own, reference
        )

    found = (one for one in session.for_each_unit(work) if one is not None)
    return [(treated.moved(scratch), alone) for treated, alone in found]


def _ratios(made: Iterable[tuple[Treated, float]], found: Mapping[str, float]) -> dict[str, float]:
    ratios = {}
    for one, alone in made:
        # Part of the data may not reach every unit; what it does not reach is not free.
        there = found.get(one.unit.name, 0.0)
        ratios[one.unit.name] = there / alone if there > 0 and alone > 0 else 1.0
    return ratios


def _priced_alone(
    unit: Unit, weight: Tensor, bias: Tensor | None, statistics: Statistics, reference: Transform
) -> tuple[Treated, float] | None:
    made = next(treat_held_out(unit, weight, [reference], statistics))
    if not isinstance(made, Replacement):
        return None
    change, curvatures = made.dense - weight, statistics.curvatures[unit.name]
    if bias is not None:
        bias = bias + bias_change(change, curvatures, held_out=True)
    treated = Treated(unit, reference, made.tensors, made.unpacked, bias)
    return treated, price.damage(change, curvatures, held_out=True)


def _changes(session: Session, treated: Iterable[Treated]) -> dict[str, Callable[[], Tensor]]:
    """Parameter name to what makes its change, of weights and of the biases moved with them."""
    changes: dict[str, Callable[[], Tensor]] = {}
    for one in treated:
        changes[f"{one.unit.name}.weight"] = partial(_weight_change, session, one)
        if one.bias is not None:
            changes[one.unit.bias] = partial(torch.sub, one.bias, session.parameter(one.unit.bias))
    return changes


def _weight_change(session: Session, treated: Treated) -> Tensor:
    return treated.weight().sub_(session.parameter(f"{treated.unit.name}.weight"))


def probe(session: Session, treated: Mapping[str, Treated], share: float) -> dict[str, float]:
    """Price each unit's change where all changes have been made, in nats per prediction.

    Args:
        share: Of the calibration batches, taken from the front.
    """
    changes = _changes(session, treated.values())
    return _probe(session, [changes], share, substitutions(treated))[0]


def _probe(
    session: Session, changes: Sequence[Changes], share: float, weights: Changes | None = None
) -> list[dict[str, float]]:
    n = max(1, round(len(session.data.calibration) * share))
    return price_changes(session, changes, session.data.calibration[:n], weights)


def price_changes(
    session: Session,
    changes: Sequence[Changes],
    batches: Sequence[Batch],
    weights: Changes | None = None,
) -> list[dict[str, float]]:
    """Price sets of changes, each for itself, on these data, without taking A and G apart.

    Args:
        weights: Where the model runs; None for its own.

    Returns:
        Of each set, unit name to nats per prediction.
    """
    found = probe_changes(
        session.model,
        changes,
        batches,
        session.divergence,
        seed=session.recipe.seed,
        draws=session.draws,
        progress=session.progress,
        weights=weights,
    )
    return [
        {
            name: one.independent if session.predicts_everywhere else one.coherent
            for name, one in of.items()
        }
        for of in found
    ]


def treat_held_out(
    unit: Unit, weight: Tensor, transforms: Sequence[Transform], statistics: Statistics
) -> Iterator[Replacement | AttarError]:
    """Try treatments on a unit's weight, rounded on the first half of the statistics."""
    check_finite(unit, weight)
    moment, rows = known(statistics, unit, held_out=True)
    return treat(weight, moment, transforms, rows)


def _coherence(statistics: Statistics, treatment: str, unit: Unit) -> float:
    kind = "quantize_feedback" if treatment in FITTED else treatment
    by_unit = statistics.coherence.get(kind, statistics.coherence.get("", {}))
    return by_unit.get(unit.name, 1.0)


def _gain(statistics: Statistics, treatment: str, unit: Unit) -> float:
    return min(1.0, statistics.row_gain.get(unit.name, 1.0)) if treatment in FEEDS_BACK else 1.0

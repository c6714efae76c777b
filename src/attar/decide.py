"""From statistics to a plan that was measured: price, solve, measure, correct, solve again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from attar import int8, pricing, protecting, writing
from attar.activations import roundings
from attar.audit.fidelity import measure
from attar.errors import BudgetError
from attar.explain.gatherer import ALL
from attar.explain.statistics import of_unit
from attar.plan import MENUS
from attar.plan import candidates as menus
from attar.plan.size import check_fits
from attar.plan.solve import weight_bytes
from attar.records import (
    Budget,
    Candidate,
    Plan,
    Receipt,
    Round,
    Statistics,
    Unit,
)
from attar.session import Session
from attar.sites import substituted
from attar.transform.apply import Done, Treated, apply_choices, build_transform, substitutions
from attar.trials import Trials

# Share of the calibration data on which changes are priced again at the compressed point: a
# sequence has hundreds of predictions, a picture has one.
REPRICED_SHARE_OF_SEQUENCES = 0.125
REPRICED_SHARE = 0.5
# Tries to make the folder fit once its exact bytes are known; the second has always been enough.
FITTING_TRIES = 4
# Bytes that a wrong guess of the rest of the folder may leave unused, as a share of the budget.
UNUSED_SHARE = 0.003
# What is said of a unit in the folder grows by a digit here and there from one plan to the next.
BYTES_SPARE_PER_UNIT = 4
# Below this many nats the ratio of measured to predicted damage is noise.
SMALLEST_CORRECTED = 1e-6

Candidates = Mapping[str, Sequence[Candidate]]


@dataclass(frozen=True)
class Decided:
    """A plan with what carrying it out made."""

    plan: Plan
    receipt: Receipt
    treated: Mapping[str, Treated]

    def noting(self, notes: Sequence[str]) -> Decided:
        """The same with more notes in its plan."""
        return replace(self, plan=replace(self.plan, notes=(*self.plan.notes, *notes)))


@dataclass(frozen=True)
class Relevance:
    """What a report shows of the statistics beside the scores.

    Attributes:
        heads: Attention output projection to nats per head.
        slices: Slice label to unit name to nats per prediction.
    """

    heads: Mapping[str, Sequence[float]]
    slices: Mapping[str, Mapping[str, float]]


def explain(session: Session) -> Statistics:
    """Gather A and G of the original, and how far rows and positions hang together."""
    with session.timed("explain"):
        statistics = session.finished.once("statistics", session.gather)
        statistics = replace(statistics, row_gain=pricing.row_gain(session, statistics))
        coherence = session.finished.once(
            "coherence", lambda: pricing.coherence(session, statistics)
        )
        return replace(statistics, coherence=coherence)


def relevance(statistics: Statistics) -> Relevance:
    """Keep the small part of the statistics that is shown."""
    heads = statistics.head_relevance.get(ALL, {})
    labels = [label for label in statistics.unit_relevance if label != ALL]
    return Relevance(
        heads={name: [float(v) for v in values] for name, values in heads.items()},
        slices={label: dict(statistics.unit_relevance[label]) for label in labels},
    )


def price(session: Session, statistics: Statistics) -> Candidates:
    """Try every treatment of the menu on every unit."""
    keep = session.recipe.keep
    menus.check_keep(session.units, keep)
    around = int8.decide_rounded(session)
    only_cut = session.recipe.cut == "only"
    free = [u for u in session.units if not only_cut and not menus.is_kept(u, keep)]
    treatments: dict[str, Sequence[menus.Treatment]] = {u.name: [menus.KEEP] for u in session.units}
    treatments |= {unit.name: menu(session, unit, integers=unit.name in around) for unit in free}
    return int8.with_rounded(price_treatments(session, statistics, treatments), around)


def menu(session: Session, unit: Unit, *, integers: bool = False) -> Sequence[menus.Treatment]:
    """List what may be done to a unit in the form that is written."""
    if session.recipe.to == "gguf":
        return menus.llama_menu(unit, build_transform)
    if session.recipe.to == "onnx":
        return menus.onnx_menu(unit, in_integers=integers)
    if session.recipe.decide in MENUS:
        return MENUS[session.recipe.decide](unit, build_transform)
    # A picture has one prediction, and a sentence: too few to learn from what a row is worth.
    return menus.menu(unit, build_transform, by_worth=session.predicts_everywhere)


def price_treatments(
    session: Session,
    statistics: Statistics,
    treatments: Mapping[str, Sequence[menus.Treatment]],
) -> Candidates:
    """Price these treatments: round on one half of the statistics, price on the other."""
    with session.timed("price"):
        return menus.price_candidates(
            session.units,
            treatments,
            build=build_transform,
            price=lambda unit: partial(
                pricing.price_all, session.weight(unit), of_unit(statistics, unit.name)
            ),
            for_each=lambda work: session.for_each_unit(
                work, step=lambda unit: f"price of {unit.name} for {treatments[unit.name]}"
            ),
            progress=session.progress,
        )


def plan(session: Session, candidates: Candidates, statistics: Statistics) -> Decided:
    """Solve, carry out, measure; see the price again from where that led; solve again.

    The round that measured best is kept. Every round is in the plan, the wrong ones too.

    Raises:
        BudgetError: The smallest model that can be made is larger than the budget.
    """
    budget = Budget(session.budget_bytes(), session.recipe.keep)
    overhead = writing.estimated_overhead(session)
    trials = Trials(session, statistics)
    correction, best, rounds = 1.0, None, []
    for number in range(trials.rounds):
        decided = _fit(trials, candidates, budget, overhead, weighed=number > 0)
        overhead = decided.plan.overhead_bytes
        done = measure_plan(session, decided, correction)
        rounds.append(done)
        if done.predicted_damage > SMALLEST_CORRECTED:
            correction = done.measured_damage / done.predicted_damage
        if best is None or _rank(trials, done) < _rank(trials, best[1]):
            best = (decided, done, correction)
        slices, choices = trials.protected, decided.plan.choices
        trials.protected = protecting.corrected(slices, choices, done)
        if number + 1 < trials.rounds:
            candidates = _seen_from_there(session, candidates, decided)
            best = (_packed(best[0]), *best[1:])  # another plan's codes need the room
    assert best is not None
    decided, done, correction = best
    notes = session.notes + int8.notes(session, decided.plan.choices)
    notes += protecting.notes(trials.protected, decided.plan.choices, done)
    corrected = replace(
        decided.plan,
        predicted_damage=done.predicted_damage * correction,
        rounds=tuple(rounds),
        notes=notes + menus.refusals(candidates),
    )
    return _packed(replace(decided, plan=corrected))


def _packed(decided: Decided) -> Decided:
    """Keep weights as they are stored, and nothing that only makes them faster to read."""
    packed = {name: replace(one, unpacked=None) for name, one in decided.treated.items()}
    return replace(decided, treated=packed)


def follow(session: Session, made: Plan, statistics: Statistics) -> Decided:
    """Carry out a plan that was made before."""
    decided = carry_out(session, made.choices, made.budget, made.overhead_bytes, statistics)
    if decided.plan.weight_bytes > made.budget.weight_bytes:
        over = decided.plan.weight_bytes - made.budget.weight_bytes
        raise BudgetError(
            f"the written folder would be {over:,} bytes over its budget.",
            hint=f"raise weight_bytes in the plan to {decided.plan.weight_bytes}.",
        )
    # Nats written in the file are not believed: an edited treatment left its old price there.
    choices = {
        applied.unit: int8.priced_anew(made.choices[applied.unit], applied.predicted_damage)
        for applied in decided.receipt.applied
    }
    predicted = _predicted(session, choices)
    notes = int8.notes(session, choices)
    priced = replace(decided.plan, choices=choices, predicted_damage=predicted, notes=notes)
    decided = replace(decided, plan=priced)
    rounds = (measure_plan(session, decided, 1.0),)
    return _packed(replace(decided, plan=replace(priced, rounds=rounds)))


def _fit(
    trials: Trials,
    candidates: Candidates,
    budget: Budget,
    overhead: int,
    *,
    weighed: bool,
) -> Decided:
    """Solve and carry out until the folder, weighed, is within the budget.

    Args:
        weighed: Whether `overhead` was weighed, or is a guess that must not refuse a budget.
    """
    session, statistics = trials.session, trials.statistics
    least = trials.smallest(candidates)
    if not weighed and overhead + weight_bytes(least) > budget.weight_bytes:
        overhead = carry_out(session, least, budget, overhead, statistics).plan.overhead_bytes
    fitting, before = None, None
    for _ in range(FITTING_TRIES):
        if weighed or before is not None:
            room = budget.weight_bytes - overhead - weight_bytes(least)
            overhead += max(0, min(BYTES_SPARE_PER_UNIT * len(session.units.units), room))
        choices = solve(trials, candidates, budget, overhead)
        decided = carry_out(session, choices, budget, overhead, statistics, before)
        guessed, overhead, before = overhead, decided.plan.overhead_bytes, decided
        if decided.plan.weight_bytes <= budget.weight_bytes:
            fitting = decided
            if guessed - overhead <= UNUSED_SHARE * budget.weight_bytes:
                return decided
    if fitting is not None:
        return fitting
    raise BudgetError(
        f"no plan was found whose folder fits in {budget.weight_bytes:,} bytes.",
        hint="raise --size a little.",
    )


def solve(
    trials: Trials, candidates: Candidates, budget: Budget, overhead: int
) -> dict[str, Candidate]:
    """Choose for every unit, within what the budget leaves beside the overhead.

    Raises:
        BudgetError: The smallest model that can be made is larger than the budget.
    """
    least = overhead + weight_bytes(trials.smallest(candidates))
    check_fits(least, budget)
    limit = budget.weight_bytes - overhead
    return trials.decide(candidates, limit)


def carry_out(
    session: Session,
    choices: Mapping[str, Candidate],
    budget: Budget,
    overhead: int,
    statistics: Statistics,
    before: Decided | None = None,
) -> Decided:
    """Treat every weight as chosen, and weigh what would be written.

    Args:
        before: What was carried out with the same statistics; what it shares is taken from it.
    """

    with session.timed("transform"):
        treated, applied = apply_choices(
            session.units,
            choices,
            facts=lambda unit: pricing.facts(
                session, statistics, unit, choices[unit.name].treatment
            ),
            for_each=lambda work, left: session.for_each_unit(
                work, left, step=lambda unit: f"treated {_written({unit.name: choices[unit.name]})}"
            ),
            progress=session.progress,
            made={} if before is None else _same(before, choices),
            on_disk=session.on_disk,
        )
    made = Plan(
        model=session.recipe.model,
        budget=budget,
        choices=choices,
        overhead_bytes=overhead,
        predicted_damage=_predicted(session, choices),
        seed=session.recipe.seed,
        data=session.recipe.data or "",
        recipe=session.recipe,
        equalised=session.equalised,
        cuts=session.cuts,
    )
    decided = Decided(made, Receipt(applied, session.units.leftovers), treated)
    weighed = writing.overhead_bytes(session, decided)
    return replace(decided, plan=replace(made, overhead_bytes=weighed))


def _predicted(session: Session, choices: Mapping[str, Candidate]) -> float:
    """Nats per prediction of what was cut, and of what is done to what is left."""
    cut = sum((one.predicted_damage for one in session.cuts), 0.0)
    return cut + sum(choice.predicted_damage or 0.0 for choice in choices.values())


def _written(choices: Mapping[str, Candidate]) -> str:
    """Write down all that treating these units depends on beside the run itself."""
    return json.dumps({name: [c.treatment, dict(c.settings)] for name, c in choices.items()})


def _same(before: Decided, choices: Mapping[str, Candidate]) -> dict[str, Done]:
    """What was made before of the units that are to be treated as they were."""
    old = before.plan.choices
    return {
        applied.unit: (before.treated[applied.unit], applied)
        for applied in before.receipt.applied
        if (choices[applied.unit].treatment, choices[applied.unit].settings)
        == (old[applied.unit].treatment, old[applied.unit].settings)
    }


def measure_plan(session: Session, decided: Decided, correction: float) -> Round:
    """Run the treated model on recovery data beside the original."""
    module, task = session.model.module, session.model.task
    weights, rounds = substitutions(decided.treated), roundings(decided.plan.choices)

    def compressed(batch: object) -> object:
        with substituted(module, weights, rounds):
            return task.forward(module, batch)  # type: ignore[arg-type]

    def damage() -> tuple[float, dict[str, float]]:
        found = measure(
            session.original,
            compressed,  # type: ignore[arg-type]
            session.data.recovery,
            session.divergence,
            progress=session.progress,
            stage="measure",
        )
        return found.mean_divergence, protecting.of_slices(session, found)

    with session.timed("measure"):
        measured, slices = session.finished.once(
            f"damage by slice of {_written(decided.plan.choices)}", damage
        )
    return Round(
        predicted_damage=decided.plan.predicted_damage,
        corrected_damage=decided.plan.predicted_damage * correction,
        measured_damage=measured,
        weight_bytes=decided.plan.weight_bytes,
        slices=slices,
    )


def _rank(trials: Trials, done: Round) -> tuple[float, float]:
    """Of two rounds the one that spares the slices is better, then the one that lost less."""
    return protecting.excess(trials.protected, done), done.measured_damage


def _seen_from_there(session: Session, candidates: Candidates, decided: Decided) -> Candidates:
    """Scale each unit's prices by how its chosen change is priced at the compressed point.

    The damage along the way from the original to the compressed point is that of the mean
    curvature, so each price becomes the mean of the two.
    """
    with session.timed("price again"):
        share = REPRICED_SHARE_OF_SEQUENCES if session.predicts_everywhere else REPRICED_SHARE
        probed = session.finished.once(
            f"prices at {_written(decided.plan.choices)}",
            lambda: pricing.probe(session, decided.treated, share),
        )
    scaled = {}
    for unit in session.units:
        chosen = decided.plan.choices[unit.name]
        here = (chosen.predicted_damage or 0.0) - int8.activation_damage(chosen)
        there = probed.get(unit.name)  # None: part of the data may not reach every unit
        ratio = 0.5 * (1 + there / here) if here > 0 and there is not None else 1.0
        scaled[unit.name] = [int8.scaled(c, ratio) for c in candidates[unit.name]]
    return scaled

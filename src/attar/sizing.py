"""Other sizes from one pricing: a frontier of its own, or what a model that was made could be."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from attar import decide, writing
from attar.decide import BYTES_SPARE_PER_UNIT, SMALLEST_CORRECTED, Candidates, Decided
from attar.errors import BudgetError
from attar.plan.frontier import corrected, spread_sizes
from attar.plan.solve import weight_bytes
from attar.records import Budget, Candidate, Frontier, FrontierPoint, Statistics
from attar.session import Session
from attar.trials import Trials

# Points from the smallest size to these bits per weight, and which of a frontier's own are carried
# out and measured: prices are least to be trusted where most is lost.
POINTS, MOST_BITS = 12, 8
MEASURED = (0, 2, 4, 7, 11)


def frontier(session: Session, candidates: Candidates, statistics: Statistics) -> Frontier:
    """Solve for a row of sizes, from the smallest there is; carry out and measure some of them."""
    overhead = writing.estimated_overhead(session)
    trials, points = Trials(session, statistics), []
    for number, limit in enumerate(_limits(trials, candidates)):
        budget = Budget(overhead + limit, session.recipe.keep)
        choices = decide.solve(trials, candidates, budget, overhead)
        measured = None
        if number in MEASURED:
            decided = decide.carry_out(session, choices, budget, overhead, statistics)
            overhead = decided.plan.overhead_bytes
            measured = decide.measure_plan(session, decided, 1.0).measured_damage
        points.append(_point(choices, overhead + _spare(session), measured))
    found = corrected(points, SMALLEST_CORRECTED)
    return _frontier(session, candidates, found, overhead + _spare(session))


def around(
    session: Session,
    candidates: Candidates,
    decided: Decided,
    statistics: Statistics,
) -> Frontier:
    """Solve for a row of sizes around a plan that was carried out, which alone is measured.

    Deciders that try plans out would take as long again for each size, so they get that one point.
    """
    overhead = decided.plan.overhead_bytes + _spare(session)
    points = []
    if session.recipe.decide == "price":
        trials = Trials(session, statistics)
        for limit in _limits(trials, candidates):
            budget = Budget(overhead + limit, session.recipe.keep)
            with suppress(BudgetError):  # a size at which no plan spares the protected slices
                points.append(_point(decide.solve(trials, candidates, budget, overhead), overhead))
    # The first round was solved from these prices; the one that was kept may have seen others.
    first = decided.plan.rounds[0]
    seen = FrontierPoint(
        first.weight_bytes, first.predicted_damage, first.predicted_damage, first.measured_damage
    )
    found = corrected([*points, seen], SMALLEST_CORRECTED)[:-1]
    ordered = sorted([*found, _made(decided)], key=lambda point: point.weight_bytes)
    return _frontier(session, candidates, tuple(ordered), overhead)


def _limits(trials: Trials, candidates: Candidates) -> list[int]:
    """Bytes of all units' tensors, for each point."""
    most = MOST_BITS * sum(unit.n_weights for unit in trials.session.units) // 8
    return spread_sizes(weight_bytes(trials.smallest(candidates)), most, POINTS)


def _spare(session: Session) -> int:
    """What is spared for longer descriptions, so that the size of a point gives its plan."""
    return BYTES_SPARE_PER_UNIT * len(session.units.units)


def _point(
    choices: Mapping[str, Candidate], overhead: int, measured: float | None = None
) -> FrontierPoint:
    predicted = sum(c.predicted_damage or 0.0 for c in choices.values())
    size = overhead + weight_bytes(choices)
    return FrontierPoint(size, predicted, predicted, measured, choices=choices)


def _made(decided: Decided) -> FrontierPoint:
    """The plan that was carried out, as it was measured."""
    plan = decided.plan
    kept = min(plan.rounds, key=lambda done: done.measured_damage)
    return FrontierPoint(
        plan.weight_bytes,
        kept.predicted_damage,
        plan.predicted_damage,
        kept.measured_damage,
        choices=plan.choices,
        is_made=True,
    )


def _frontier(
    session: Session, candidates: Candidates, points: tuple[FrontierPoint, ...], overhead: int
) -> Frontier:
    return Frontier(
        recipe=session.recipe,
        n_parameters=session.n_parameters,
        bytes_at_16_bits=session.bytes_at_16_bits,
        points=points,
        candidates=candidates,
        equalised=session.equalised,
        cuts=session.cuts,
        overhead_bytes=overhead,
    )

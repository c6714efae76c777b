"""Cut what a plan says, turn by turn, and fit the rest as it was fitted then."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import torch

from attar import cost, cutting, decide
from attar.audit.fidelity import measure
from attar.cut_turns import Narrow, gathered_for, left_whole, opened, without
from attar.errors import PlanError
from attar.records import Batch, Cut, GroupClaim, Narrowed, Statistics, Unit, Units
from attar.session import Session

# Forward passes of which the shortest is taken.
TIMED = 5


def follow(
    session: Session, statistics: Statistics, cuts: Sequence[Cut]
) -> tuple[Session, Statistics]:
    """Cut what a plan cuts, turn by turn, and fit the rest as it was fitted then.

    Raises:
        PlanError: The plan cuts what cannot be cut, or is to be kept.
    """
    if not cuts:
        return session, statistics
    del statistics  # of the model before; they take memory
    narrow = opened(session, {})
    check_cuts(session, narrow, cuts)
    for turn in sorted({cut.turn for cut in cuts}):
        of_turn = tuple(cut for cut in cuts if cut.turn == turn)
        removed = {
            cut.group: tuple(narrow.numbers[cut.group].index(unit) for unit in sorted(cut.units))
            for cut in of_turn
        }
        about, gathered = gathered_for(narrow)
        new = cutting.fit(about, gathered, narrow.groups, removed)
        narrow = without(narrow, removed, new, of_turn)
    return narrow.session, decide.explain(narrow.session)


def units_after(session: Session, cuts: Sequence[Cut]) -> Units:
    """List the units of a session's model as they will be when a plan's cuts are made.

    Raises:
        PlanError: The plan cuts what cannot be cut, or is to be kept.
    """
    if not cuts:
        return session.units
    narrow = opened(session, {})
    check_cuts(session, narrow, cuts)
    removed: dict[str, tuple[int, ...]] = {}
    for cut in cuts:
        removed[cut.group] = tuple(sorted((*removed.get(cut.group, ()), *cut.units)))
    return without(narrow, removed, {}, ()).session.units


def left_of_units(session: Session) -> dict[str, Unit]:
    """Unit name to what a cut left of it; without units that are whole."""
    whole = {unit.name: unit for unit in session.before_cuts.units}
    return {unit.name: unit for unit in session.units if unit.shape != whole[unit.name].shape}


def narrowed(session: Session) -> Narrowed | None:
    """Count and time what cutting alone changed; None where nothing was cut."""
    if not session.cuts:
        return None
    whole = session.before_cuts
    before, after = (cost.count_numbers(one.units, one.units.leftovers) for one in (whole, session))
    return Narrowed(
        numbers=(before, after),
        macs=(cost.total_macs(whole.units), cost.total_macs(session.units)),
        milliseconds=_timed(whole, session),
    )


def _timed(whole: Session, session: Session) -> tuple[float, float]:
    """Milliseconds of a forward pass of both; in turn, so that other work meets both alike."""
    least = [float("inf"), float("inf")]
    for _ in range(TIMED):
        for place, one in enumerate((whole, session)):
            start = time.perf_counter()
            with torch.no_grad():
                one.model.task.forward(one.model.module, one.model.examples)
            least[place] = min(least[place], 1000 * (time.perf_counter() - start))
    return least[0], least[1]


def claims(session: Session, batches: Sequence[Batch]) -> list[GroupClaim]:
    """What cutting alone was predicted to cost, and costs on these data."""
    if not session.cuts:
        return []
    small, task = session.model.module, session.model.task
    found = measure(
        session.original,
        lambda batch: task.forward(small, batch),
        batches,
        session.divergence,
        progress=session.progress,
        stage="audit what was cut",
    )
    left = cost.count_numbers(session.units, session.units.leftovers)
    return [
        GroupClaim(
            group="cut",
            units=tuple(dict.fromkeys(cut.group for cut in session.cuts)),
            predicted_damage=sum(cut.predicted_damage for cut in session.cuts),
            measured_damage=found.mean_divergence,
            bytes_before=cost.FLOAT16_BYTES * (session.n_parameters - left),
            bytes_after=0,
        )
    ]


def check_cuts(session: Session, narrow: Narrow, cuts: Sequence[Cut]) -> None:
    """Refuse a cut that a plan asks for and that cannot be."""
    by_name = {group.name: group for group in narrow.groups}
    gone: dict[str, set[int]] = defaultdict(set)
    for cut in cuts:
        group = by_name.get(cut.group)
        if group is None:
            why = dict(left_whole(session)).get(cut.group, "no units of that name go together")
            raise PlanError(
                f"the plan cuts units of {cut.group!r}, which cannot be: {why}.",
                hint="take its lines out of `cuts`; `attar explain MODEL --units` lists groups.",
            )
        wrong = [unit for unit in cut.units if not 0 <= unit < group.units]
        if wrong or gone[cut.group] & set(cut.units) or len(set(cut.units)) < len(cut.units):
            raise PlanError(
                f"the plan cuts {wrong or 'one unit twice'} of {cut.group!r}, which has the units "
                f"0 to {group.units - 1}.",
                hint="name each unit once.",
            )
        gone[cut.group] |= set(cut.units)
        if len(gone[cut.group]) >= group.units:
            raise PlanError(
                f"the plan cuts all {group.units} units of {cut.group!r}, and the network would "
                "end there.",
                hint="leave at least one.",
            )

"""What an explanation, a plan and a small model were made from, as long as they live."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace

from attar import decide, judging
from attar.explained import UnitScores
from attar.records import Model, Plan, Receipt, Report, Verdict
from attar.session import Session


@dataclass(frozen=True)
class Made:
    """What a plan or a small model came from."""

    model: Model
    explanation: UnitScores
    decided: decide.Decided
    session: Session


_made: dict[int, Made] = {}


def remember(thing: Plan | Model, made: Made) -> None:
    """Keep what `thing` was made from until it is gone; records cannot be keys themselves."""
    _made[id(thing)] = made
    weakref.finalize(thing, _made.pop, id(thing), None)


def made_from(model: Model, thing: Plan | Model) -> Made | None:
    """What a plan or a small model was made from, where that was this model."""
    made = _made.get(id(thing))
    return made if made is not None and made.model is model else None


def judged(session: Session, small: Model, made: Made | None) -> tuple[Verdict, Mapping[str, str]]:
    """Compare, and say what was done to each unit where it was done here."""
    if made is None:
        return judging.judge_models(session, small), {}
    choices = made.decided.plan.choices
    if made.session.cuts:  # its weights are of other shapes than the original's
        own = replace(session, model=made.session.model, units=made.session.units)
        session = replace(own, cuts=made.session.cuts, whole=session)
    verdict = judging.judge_compressed(session, small, made.decided)
    return verdict, {name: choice.treatment for name, choice in choices.items()}


def with_plan(bare: Report, made: Made | None) -> Report:
    """Add what was planned and carried out to a report, where that was done here."""
    if made is None:
        return bare
    relevance = decide.relevance(made.explanation.statistics)
    return replace(
        bare,
        model=made.model.name,
        plan=made.decided.plan,
        receipt=Receipt(made.decided.receipt.applied, bare.receipt.leftovers),
        scores=dict(made.explanation),
        head_relevance=relevance.heads,
        slice_relevance=relevance.slices,
        bytes_after=made.decided.plan.weight_bytes,
    )

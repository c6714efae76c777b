"""Several compressed models against one original: what all of them forget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attar.audit.exemplars import FEWEST_MODELS, find_exemplars
from attar.audit.fidelity import Measured
from attar.audit.policy import OUTCOMES
from attar.judging import naming
from attar.records import Population, Report
from attar.session import Session


def population(
    session: Session,
    names: Sequence[str],
    reports: Sequence[Report],
    measured: Sequence[Measured],
) -> Population:
    """Put the audits of several models together, with the exemplars where they can be told.

    Args:
        names: Of the compressed models.
        measured: Of each of them, on the session's audit data.
    """
    called = naming(session)
    sound = [one for one in measured if np.isfinite(one.divergence).all()]
    # A model that shares some of the labels alone is asked for another choice.
    sound = [one for one in sound if np.array_equal(one.answer_before, sound[0].answer_before)]
    why_not = ""
    if called is None:
        why_not = "outputs that are numbers have no answer that could be forgotten"
    elif len(sound) < FEWEST_MODELS:
        broken = len(measured) - len(sound)
        left_out = f", and {broken} answer NaN, infinity or other labels" if broken else ""
        why_not = (
            f"what compression forgets shows with {FEWEST_MODELS} compressed models or more; "
            f"there are {len(measured)}{left_out}"
        )
    found = None
    if called is not None and not why_not:
        found = find_exemplars(
            sound,
            session.data.audit_slices,
            seed=session.recipe.seed,
            name_of=called.name_of,
            shown=called.shown,
            decode=called.decode,
        )
    return Population(session.model.name, tuple(names), tuple(reports), found, why_not)


def worst(found: Population) -> Report:
    """The report with the worst verdict; the first of several."""
    return max(found.reports, key=lambda report: OUTCOMES.index(report.verdict.outcome))

"""Learn the scales of a session's links end to end, and do it again as a plan says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from attar.equalise.learn import BATCHES_PER_STEP, Learned, Learner
from attar.links import Change, Link
from attar.records import Equalised, Transform, Unit
from attar.session import Session
from attar.tables import build

LINKS, METHOD = "all", "learned"
"""How a plan's line names all links together, and this way to scale them."""

# Passes over the calibration data, and steps where it is small.
LEAST_PASSES, LEAST_STEPS = 4, 100

Steps = list[tuple[Link, Change]]


def learn_scales(
    session: Session, links: Sequence[Link], units: Mapping[str, Unit], bits: int
) -> tuple[Equalised, Steps]:
    """Learn on the calibration data; what is lost before and after is seen on the recovery data.

    Args:
        units: By the parameter name of their weight.
        bits: Of weights meanwhile.
    """
    steps_per_pass = math.ceil(len(session.data.calibration) / BATCHES_PER_STEP)
    passes = max(LEAST_PASSES, math.ceil(LEAST_STEPS / steps_per_pass))
    how = Learned(bits, activations=session.recipe.activations, passes=passes)
    settings = {"bits": bits, "activations": how.activations, "passes": passes}
    learner = _learner(session, links, units, how)
    before = learner.lost(session.data.recovery)
    learner.learn(session.data.calibration, session.progress)
    after = learner.lost(session.data.recovery)
    return Equalised(LINKS, METHOD, settings, before, after), _steps(links, learner)


def learn_again(
    session: Session, links: Sequence[Link], units: Mapping[str, Unit], planned: Equalised
) -> Steps:
    """Learn as a plan says, which gives the same scales.

    Raises:
        SettingError: The plan's settings are none of learning's.
    """
    how: Learned = build({METHOD: Learned}, "method to equalise", planned.method, planned.settings)
    learner = _learner(session, links, units, how)
    learner.learn(session.data.calibration, session.progress)
    return _steps(links, learner)


def whole_bits(units: Iterable[tuple[Unit, Transform]]) -> int:
    """Whole bits per weight, 2 to 8, nearest to what these transforms store."""
    pairs = list(units)
    stored = sum(transform.cost(unit).weight_bytes for unit, transform in pairs)
    n_weights = sum(unit.n_weights for unit, _ in pairs) or 1
    return min(8, max(2, round(8 * stored / n_weights)))


def _learner(
    session: Session, links: Sequence[Link], units: Mapping[str, Unit], how: Learned
) -> Learner:
    learner = Learner(session.model, links, units, session.divergence, how)
    learner.see_ranges(session.data.calibration)
    return learner


def _steps(links: Sequence[Link], learner: Learner) -> Steps:
    changes = learner.changes()
    return [(link, changes[link.name]) for link in links]

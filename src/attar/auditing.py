"""An original that compressed models are held against, in the ways that were asked for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from attar import attributing, behaving, corrupting, drifting, judging, serving
from attar.audit.fidelity import Measured
from attar.audit.policy import Policy, with_policy
from attar.records import Behaviours, Progress, Recipe, Report
from attar.session import open_model, open_recipe


@dataclass(frozen=True)
class Wishes:
    """What an audit is asked for beside the verdict.

    Attributes:
        policy: Limits that the verdict is held to beside its own rule, from `judging.open_policy`.
        attribute: Whether to say which units' changes are responsible for what was lost.
        drift: Whether to say how far explanations of predictions moved.
        reference: A third model that answers the same question, shown beside the drift.
        behaviours: What language models are asked to do beside predicting the audit data.
        corruptions: Whether to say what both answer to corrupted inputs.
    """

    policy: Policy | None = None
    attribute: bool = False
    drift: bool = False
    reference: Recipe | None = None
    behaviours: Behaviours = field(default_factory=Behaviours)
    corruptions: bool = False


class Auditor:
    """The original, its audit data, and all that is read once for every compressed model.

    Raises:
        AttarError: What was asked for does not go together, or with this model.
    """

    def __init__(self, original: Recipe, wishes: Wishes, progress: Progress | None) -> None:
        has_reference = wishes.reference is not None
        drifting.check_asked(wishes.policy, drift=wishes.drift, reference=has_reference)
        self._read = behaving.read_asked(wishes.behaviours)
        self.session = open_recipe(original, progress)
        behaving.check_asked(self.session.model, wishes.behaviours)
        if wishes.corruptions:
            corrupting.check_asked(self.session.model)
        self._wishes = wishes
        self._reference = None if wishes.reference is None else open_model(wishes.reference)

    def against(self, compressed: Recipe) -> tuple[Report, Measured]:
        """Open one compressed model, and compare."""
        session, wishes, other = self.session, self._wishes, open_model(compressed)
        if wishes.drift:
            drifting.check_models(session, other, self._reference)
        verdict, measured = judging.compare_models(session, other)
        verdict = behaving.with_behaviours(session, other, verdict, wishes.behaviours, self._read)
        if wishes.corruptions:
            verdict = corrupting.with_corruptions(session, other, verdict)
        if wishes.attribute:
            treatments = attributing.treatments_of(Path(compressed.model))
            verdict = attributing.with_attribution(session, other, verdict, treatments)
        if wishes.drift:
            verdict = drifting.with_drift(session, other, verdict, self._reference)
        report = serving.audit_report(session, other, verdict, Path(compressed.model))
        if wishes.policy is not None:
            verdict = with_policy(verdict, wishes.policy, report.bytes_after)
        return replace(report, verdict=verdict), measured

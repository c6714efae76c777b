"""The whole product. Read this first: each line calls a stage, and each stage is a folder.

    load → explain → cost → plan → transform → audit → export → report
            Scores    Cost   Plan   Receipt     Verdict
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from attar import decide, judging, writing
from attar.errors import PlanError
from attar.explain import CRITERIA
from attar.export import attar_folder
from attar.memory import peak_bytes
from attar.plan.planfile import plan_to_yaml, read_plan
from attar.records import (
    Batch,
    Model,
    Plan,
    Progress,
    Recipe,
    Report,
    Scores,
    Silent,
    Statistics,
    Verdict,
)
from attar.report.html import write_report
from attar.session import Session, open_model, open_session
from attar.transform.apply import build_transform, materialise


def compress(recipe: Recipe, out: Path, *, force: bool = False, progress: Progress | None = None) -> Report:
    """Write the model the recipe asks for to `out`, with a report on what that cost.

    Raises:
        AttarError: What was found and what to type instead; nothing is written then.
    """
    attar_folder.check_output(out, force=force)
    session = open_session(recipe, open_model(recipe), progress or Silent())
    forecast = judging.forecast_memory(session)
    statistics = decide.explain(session)
    scores = {name: score(session.model, session.units, statistics) for name, score in CRITERIA.items()}
    candidates = decide.price(session, statistics)
    decided = decide.plan(session, candidates, statistics)
    relevance = decide.relevance(statistics)
    del statistics  # the largest thing in memory, and the audit does not need it
    return _finish(session, decided, scores, relevance, out, forecast)


def apply_plan_file(
    path: Path, out: Path, *, recipe: Recipe, force: bool = False, progress: Progress | None = None
) -> Report:
    """Do what a plan.yaml says, edited or not, without deciding again."""
    attar_folder.check_output(out, force=force)
    plan, session = open_plan(path, recipe, progress)
    forecast = judging.forecast_memory(session)
    statistics = decide.explain(session)
    scores = {name: score(session.model, session.units, statistics) for name, score in CRITERIA.items()}
    decided = decide.follow(session, plan, statistics)
    relevance = decide.relevance(statistics)
    del statistics
    return _finish(session, decided, scores, relevance, out, forecast)


def _finish(
    session: Session,
    decided: decide.Decided,
    scores: Mapping[str, Scores],
    relevance: decide.Relevance,
    out: Path,
    forecast: int,
) -> Report:
    """Write the folder, judge what was really written, and report."""
    contents = writing.contents(session, decided)
    with attar_folder.replaced_folder(out) as partial:
        attar_folder.write_files(partial, contents)
        verdict = judging.judge_folder(session, partial, decided)
        report = Report(
            model=session.model.name,
            origin=session.model.origin,
            licence=session.model.licence,
            task=session.model.task.name,
            plan=decided.plan,
            receipt=decided.receipt,
            verdict=verdict,
            units=session.units.units,
            scores=scores,
            head_relevance=relevance.heads,
            slice_relevance=relevance.slices,
            bytes_before=session.bytes_at_16_bits,
            source_bytes=session.model.source_bytes,
            bytes_after=attar_folder.weigh(contents),
            folder=out,
            seconds=dict(session.seconds),
            peak_memory_bytes=peak_bytes(),
            forecast_memory_bytes=forecast,
            provenance=session.provenance(),
        )
        (partial / "report").mkdir()
        attar_folder.write_files(
            partial / "report", {"plan.yaml": plan_to_yaml(decided.plan).encode()}
        )
        write_report(report, partial / "report")
    return report


def plan(recipe: Recipe, *, progress: Progress | None = None) -> tuple[Plan, Session]:
    """Decide only. The plan of the result can be written, edited and applied."""
    session = open_session(recipe, open_model(recipe), progress or Silent())
    statistics = decide.explain(session)
    candidates = decide.price(session, statistics)
    return decide.plan(session, candidates, statistics).plan, session


def explain(recipe: Recipe, *, progress: Progress | None = None) -> tuple[dict[str, Scores], Statistics, Session]:
    """Score every output channel, head, row and layer by every criterion."""
    session = open_session(recipe, open_model(recipe), progress or Silent())
    statistics = decide.explain(session)
    scores = {name: score(session.model, session.units, statistics) for name, score in CRITERIA.items()}
    return scores, statistics, session


def audit(original: Recipe, compressed: Recipe, *, progress: Progress | None = None) -> Verdict:
    """Compare any two models that answer the same question, on the first one's audit data."""
    session = open_session(original, open_model(original), progress or Silent())
    return judging.judge_models(session, open_model(compressed))


def open_plan(path: Path, recipe: Recipe, progress: Progress | None = None) -> tuple[Plan, Session]:
    """Read a plan file with the session it was made in: same model, data and seed."""
    opened: list[Session] = []

    def units_of(named: Mapping[str, Any]) -> Any:
        own = writing.recipe_of_plan(named, recipe)
        opened.append(open_session(own, open_model(own), progress or Silent()))
        return opened[0].units

    made = read_plan(path, units_of, build_transform)
    return made, opened[0]

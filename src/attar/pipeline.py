"""The whole product. Read this first: each line calls a stage, and each stage is a folder.

load → explain → cost → (equalise → cut →) plan → transform (→ heal) → export → audit → report
        Scores    Cost                     Plan   Receipt                        Verdict

What is in brackets is done where the recipe asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from attar import (
    comparing,
    cut_again,
    decide,
    equalising,
    healing,
    judging,
    narrowing,
    protecting,
    sizing,
    writing,
)
from attar.auditing import Auditor, Wishes
from attar.explain import CRITERIA
from attar.export import attar_folder
from attar.heal import parse_wish
from attar.memory import peak_bytes
from attar.plan.candidates import check_keep
from attar.plan.frontier import FRONTIER_FILE, frontier_to_json
from attar.plan.planfile import plan_to_yaml
from attar.records import (
    Frontier,
    Plan,
    Population,
    Progress,
    Recipe,
    Report,
    Scores,
    Statistics,
)
from attar.reopening import Prices, open_plan, open_prices
from attar.report.frontier import frontier_to_html
from attar.report.html import write_report
from attar.resuming import discard
from attar.session import Session, open_recipe
from attar.trials import check_decider

NOTHING_MORE = Wishes()


def compress(
    recipe: Recipe,
    out: Path,
    *,
    force: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the model the recipe asks for to `out`, with a report on what that cost.

    Args:
        restart: Do again what an earlier run that was killed has finished.

    Raises:
        AttarError: What was found and what to type instead; nothing is written then.
    """
    check_recipe(recipe)
    check_output(out, force=force, restart=restart)
    return compress_session(open_recipe(recipe, progress), out)


def check_recipe(recipe: Recipe) -> None:
    """Refuse ways that there are not, or that do not go together, before a model is loaded."""
    writing.check_form(recipe)
    check_decider(recipe)
    protecting.asked(recipe)
    parse_wish(recipe.heal)


def check_output(out: Path, *, force: bool, restart: bool) -> None:
    """Refuse an output folder before any work is done for it; begin anew where that is asked."""
    attar_folder.check_output(out, force=force)
    if restart:
        discard(out)


def compress_session(
    session: Session,
    out: Path,
    priced: Prices | None = None,
    *,
    opens_again: bool = True,
) -> Report:
    """Do what `compress` does with a model and data at hand.

    Args:
        priced: Of a frontier, with what was changed before; None to price now.
        opens_again: Whether the recipe names the model and the data.
    """
    check_wishes(session)
    session = protecting.labelled(session)
    forecast = judging.forecast_memory(session)
    with session.keeping(out) as session:
        statistics = decide.explain(session)
        scores, relevance = score_all(session, statistics), decide.relevance(statistics)
        if priced is None:
            way = narrowing.plan(*equalising.equalise(session, statistics))
        else:
            session, statistics = equalising.follow(session, statistics, priced.equalised)
            session, statistics = cut_again.follow(session, statistics, priced.cuts)
            way = narrowing.solved(session, statistics, priced.candidates)
        sizes = sizing.around(way.session, way.candidates, way.decided, way.statistics)
        sizes = replace(sizes, opens_again=opens_again)
        session, decided = way.session, way.decided
        del statistics, way  # the largest thing in memory, and what follows does not need it
        session, decided = healing.heal(session, decided)
        return finish(session, decided, scores, relevance, out, forecast, sizes)


def apply_plan_file(
    path: Path,
    out: Path,
    *,
    recipe: Recipe,
    force: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Do what a plan.yaml says, edited or not, without deciding again."""
    check_output(out, force=force, restart=restart)
    plan, session = open_plan(path, recipe, progress)
    writing.check_model(session)
    session = protecting.labelled(session)
    forecast = judging.forecast_memory(session)
    with session.keeping(out) as session:
        statistics = decide.explain(session)
        scores, relevance = score_all(session, statistics), decide.relevance(statistics)
        session, decided = follow(session, statistics, plan)
        del statistics
        return finish(session, decided, scores, relevance, out, forecast)


def follow(session: Session, statistics: Statistics, plan: Plan) -> tuple[Session, decide.Decided]:
    """Equalise, cut, treat and heal as a plan says."""
    session, statistics = equalising.follow(session, statistics, plan.equalised)
    session, statistics = cut_again.follow(session, statistics, plan.cuts)
    decided = decide.follow(session, plan, statistics)
    return healing.follow(session, decided, plan)


def finish(
    session: Session,
    decided: decide.Decided,
    scores: Mapping[str, Scores],
    relevance: decide.Relevance,
    out: Path,
    forecast: int,
    sizes: Frontier | None = None,
) -> Report:
    """Write the folder, judge what was really written, and report.

    Args:
        sizes: What else the prices allow; None where a plan was followed without any.
    """
    with attar_folder.replaced_folder(out) as partial:
        # What was written is not kept: the audit reads the folder back.
        bytes_after = attar_folder.write_files(partial, writing.contents(session, decided))
        verdict = judging.judge_folder(session, partial, decided)
        decided = decided.noting(judging.judged_by(session))
        report = Report(
            model=session.model.name,
            origin=session.model.origin,
            licence=session.model.licence,
            task=session.model.task.name,
            plan=decided.plan,
            receipt=decided.receipt,
            verdict=verdict,
            units=session.before_cuts.units.units,
            scores=scores,
            head_relevance=relevance.heads,
            slice_relevance=relevance.slices,
            bytes_before=session.bytes_at_16_bits,
            source_bytes=session.model.source_bytes,
            bytes_after=bytes_after,
            folder=out,
            seconds=dict(session.seconds),
            peak_memory_bytes=peak_bytes(),
            forecast_memory_bytes=forecast,
            provenance=session.provenance(),
            frontier=sizes,
            left=cut_again.left_of_units(session),
            narrowed=cut_again.narrowed(session),
        )
        write_what_was_decided(report, partial / "report")
        write_report(report, partial / "report")
    return report


def write_what_was_decided(report: Report, folder: Path) -> None:
    """Write the plan, and the prices that other sizes can be had from."""
    texts = {"plan.yaml": plan_to_yaml(report.plan)}
    if report.frontier is not None:
        texts[FRONTIER_FILE] = frontier_to_json(report.frontier)
    folder.mkdir()
    attar_folder.write_files(folder, {name: text.encode() for name, text in texts.items()})


def plan(
    recipe: Recipe, out: Path | None = None, *, progress: Progress | None = None
) -> tuple[Plan, Session]:
    """Decide only. The plan of the result can be written, edited and applied.

    Args:
        out: Where it will be written; what is finished is kept beside it meanwhile.
    """
    check_recipe(recipe)
    session = open_recipe(recipe, progress)
    check_wishes(session)
    session = protecting.labelled(session)
    with session.keeping(out) as session:
        way = narrowing.plan(*equalising.equalise(session, decide.explain(session)))
        session, decided = healing.heal(way.session, way.decided)
        return decided.plan, session


def frontier(
    recipe: Recipe, out: Path, *, force: bool, restart: bool = False, progress: Progress | None
) -> Frontier:
    """Price once, and write what the least damage is at every size, as a page and as JSON."""
    check_recipe(recipe)
    writing.check_all_sizes(recipe)
    attar_folder.check_output(out, force=force, holds=(FRONTIER_FILE,), option="--frontier")
    if restart:
        discard(out)
    session = open_recipe(recipe, progress)
    writing.check_model(session)
    check_keep(session.units, recipe.keep)
    with session.keeping(out) as session:
        session, statistics = equalising.equalise(session, decide.explain(session))
        made = sizing.frontier(session, decide.price(session, statistics), statistics)
    with attar_folder.replaced_folder(out) as partial:
        page = frontier_to_html(made, session.units.units, session.model.task.name, str(out))
        texts = {FRONTIER_FILE: frontier_to_json(made), "frontier.html": page}
        attar_folder.write_files(partial, {name: text.encode() for name, text in texts.items()})
    return made


def apply_frontier_file(
    path: Path,
    out: Path,
    *,
    recipe: Recipe,
    force: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compress to any size from the prices of a frontier.

    Args:
        recipe: The size, and what the file does not hold; see `open_plan`.
    """
    check_output(out, force=force, restart=restart)
    priced, session = open_prices(path, recipe, progress)
    return compress_session(session, out, priced)


def check_wishes(session: Session) -> None:
    """Refuse a size, a form or a unit to keep that cannot be, before long work."""
    session.budget_bytes()
    writing.check_model(session)
    check_decider(session.recipe)
    healing.check(session)
    check_keep(session.units, session.recipe.keep)


def explain(
    recipe: Recipe, *, progress: Progress | None = None
) -> tuple[dict[str, Scores], Statistics, Session]:
    """Score every output channel, head, row and layer by every criterion."""
    session = open_recipe(recipe, progress)
    statistics = decide.explain(session)
    scores = score_all(session, statistics)
    return scores, statistics, session


def score_all(session: Session, statistics: Statistics) -> dict[str, Scores]:
    """Score by every criterion of the table."""
    return {
        name: score(session.model, session.units, statistics) for name, score in CRITERIA.items()
    }


def audit(
    original: Recipe,
    compressed: Recipe,
    wishes: Wishes = NOTHING_MORE,
    *,
    out: Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compare any two models that answer the same question, on the first one's audit data.

    Args:
        out: What will be written; what is finished is kept beside it meanwhile.
        restart: Do again what an earlier run that was killed has finished.
    """
    if out is not None and restart:
        discard(out)
    auditor = Auditor(original, [compressed], wishes, progress)
    with auditor.keeping(out):
        return auditor.against(compressed)[0]


def audit_all(
    original: Recipe,
    compressed: Sequence[Recipe],
    wishes: Wishes = NOTHING_MORE,
    *,
    out: Path | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> Population:
    """Compare several models with one original, each as `audit` does, and find what all forget."""
    if out is not None and restart:
        discard(out)
    auditor = Auditor(original, compressed, wishes, progress)
    with auditor.keeping(out):
        reports, measured = zip(*(auditor.against(one) for one in compressed), strict=True)
    names = [one.model for one in compressed]
    return comparing.population(auditor.session, names, reports, measured)

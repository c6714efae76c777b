"""`attar explain`: what the units of a model are worth, or what an answer rests on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attar.command_output import check_file, recipe_of, screen, show, write_json
from attar.options import (
    AcceptLicence,
    Audit,
    Calibration,
    DataPath,
    Degrid,
    Factory,
    JsonFile,
    ModelName,
    Recovery,
    ReportFolder,
    Seed,
    Slices,
    TaskName,
    Threads,
    Workers,
)
from attar.progress import open_progress

if TYPE_CHECKING:
    from attar.records import Recipe


def explain_command(
    model: ModelName,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT",
            help="Explain the answer to it: a text, files, rows of --data. None: the units.",
        ),
    ] = None,
    criterion: Annotated[
        str,
        typer.Option(metavar="NAME", help="price, magnitude, wanda, taylor or activation."),
    ] = "price",
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="How to explain an INPUT; all: by each. Repeat."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Class, token or output; else what the model answers."),
    ] = None,
    report: ReportFolder = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not test what the methods say; sooner done.")
    ] = False,
    json_file: JsonFile = None,
    units: Annotated[
        bool,
        typer.Option(
            "--units",
            help="Also list what can only be cut together, and what no plan decides about.",
        ),
    ] = False,
    try_cut: Annotated[
        str,
        typer.Option(metavar="10%", help="Price, do and measure a cut of a share of each group."),
    ] = "",
    data: DataPath = None,
    slices: Slices = None,
    seed: Seed = 0,
    task: TaskName = None,
    factory: Factory = None,
    degrid: Degrid = None,
    calibration: Calibration = None,
    recovery: Recovery = None,
    audit: Audit = None,
    threads: Threads = 2,
    workers: Workers = "",
    accept_licence: AcceptLicence = False,
) -> None:
    """Say what every unit of a model is worth, or what its answer to an INPUT rests on."""
    recipe = recipe_of(locals())  # first: what is imported would be taken for arguments
    check_file(json_file)
    if inputs and (units or try_cut or slices):
        raise typer.BadParameter(
            "--units, --try-cut and --slices are about the whole model: leave them or the INPUT out"
        )
    if inputs:
        _explain_inputs(recipe, inputs, method or [], target, report, json_file, check=not no_check)
        return
    if method or target or report or no_check:
        raise typer.BadParameter(
            "--method, --target, --report and --no-check are about an INPUT: "
            'attar explain MODEL "some text" --method occlusion'
        )
    _explain_units(recipe, criterion, json_file, units, try_cut)


def _explain_units(
    recipe: Recipe, criterion: str, json_file: Path | None, units: bool, try_cut: str
) -> None:
    from attar import cutting, decide, pipeline, serving
    from attar.explain import check_criterion
    from attar.plan.size import parse_share
    from attar.report.coupled_text import coupled_to_text
    from attar.report.terminal import scores_to_text

    check_criterion(criterion)
    share = parse_share(try_cut) if try_cut else 0.0
    with open_progress() as progress:
        scores, statistics, session = pipeline.explain(recipe, progress=progress)
    chosen = {criterion: scores[criterion]}
    relevance = decide.relevance(statistics)
    show(scores_to_text(session.units, chosen, relevance.slices, **screen()))
    coupled = cutting.find(session) if units or share else None
    trial = cutting.try_cut(session, coupled, share) if coupled and share else None
    if coupled is not None:
        show(coupled_to_text(coupled, trial, **screen()))
    if units:
        lines = [f"  {name}: {why}" for name, why in serving.leftover_reasons(session).items()]
        show("\n".join(["not units, stored as they are:", *(lines or ["  none"])]))
    if json_file is not None:
        write_json(
            json_file,
            serving.explanation_to_json(session, scores, relevance.slices, coupled, trial),
        )


def _explain_inputs(
    recipe: Recipe,
    inputs: list[str],
    methods: list[str],
    target: str | None,
    report: Path | None,
    json_file: Path | None,
    *,
    check: bool,
) -> None:
    import torch

    from attar import explaining
    from attar.explained import Explanations
    from attar.report.explanation import explanations_to_text
    from attar.session import open_model

    explaining.check_methods(methods)
    wish = explaining.Wish(inputs, methods, target, recipe.data, recipe.seed, check)
    with open_progress() as progress:
        with progress.stage(f"load {recipe.model}", 0):
            model = open_model(recipe)
        torch.set_num_threads(recipe.threads)
        found = Explanations(explaining.explain_inputs(model, wish, progress))
    facts = found.to_json()
    show(explanations_to_text(facts, **screen()))
    if json_file is not None:
        write_json(json_file, facts)
    if report is not None:
        show(f"report  {found.report(report)}")

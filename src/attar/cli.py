"""The command line: arguments in, text out. Torch is imported only when a command runs.

Exit codes: 0 done and passed, 1 the verdict is failed, 2 an error in what was typed or given,
3 the verdict is undecided, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attar.cli_audit import audit_command
from attar.cli_explain import explain_command
from attar.cli_measure import bench_command
from attar.cli_view import view_command
from attar.command_output import (
    check_file,
    check_one_of,
    exit_code,
    fail,
    quieten,
    recipe_of,
    screen,
    show,
    terminate,
    write_json,
)
from attar.errors import AttarError
from attar.options import (
    AcceptLicence,
    Activations,
    Audit,
    Biases,
    Calibration,
    Cut,
    DataPath,
    Decide,
    Degrid,
    Equalise,
    Factory,
    Force,
    FrontierFolder,
    Heal,
    JsonFile,
    Keep,
    ModelName,
    Out,
    PlanFile,
    Protect,
    Recovery,
    Restart,
    Rounds,
    Seed,
    Size,
    SizeOrNone,
    Slices,
    TaskName,
    Threads,
    To,
    Workers,
)
from attar.progress import open_progress

if TYPE_CHECKING:
    from attar.records import Recipe

INTERRUPTED = 130
# Typer brings its own copy of click or imports it, by version; this is what all its errors share.
UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="Explain what in a neural network matters, compress the rest under a budget, and show "
    "what changed.",
    epilog="--debug after any command shows where an error comes from.",
    add_completion=False,
    rich_markup_mode=None,  # plain text, and half the start-up time
)


@app.command()
def compress(
    model: ModelName,
    size: Size,
    out: Out,
    data: DataPath = None,
    slices: Slices = None,
    keep: Keep = None,
    protect: Protect = None,
    seed: Seed = 0,
    task: TaskName = None,
    factory: Factory = None,
    degrid: Degrid = None,
    calibration: Calibration = None,
    recovery: Recovery = None,
    audit: Audit = None,
    threads: Threads = 2,
    workers: Workers = "",
    rounds: Rounds = 2,
    to: To = "attar",
    decide: Decide = "price",
    equalise: Equalise = "none",
    activations: Activations = "none",
    biases: Biases = "kept",
    cut: Cut = "off",
    heal: Heal = "none",
    accept_licence: AcceptLicence = False,
    force: Force = False,
    restart: Restart = False,
) -> int:
    """Fit a model into a size, and report what that cost."""
    from attar import pipeline
    from attar.report.terminal import report_to_text

    recipe = recipe_of(locals())
    with open_progress() as progress:
        report = pipeline.compress(recipe, out, force=force, restart=restart, progress=progress)
    show(report_to_text(report, **screen()))
    return exit_code(report.verdict)


@app.command()
def plan(
    model: ModelName,
    size: SizeOrNone = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="plan.yaml to write.")] = None,
    frontier: FrontierFolder = None,
    data: DataPath = None,
    slices: Slices = None,
    keep: Keep = None,
    protect: Protect = None,
    seed: Seed = 0,
    task: TaskName = None,
    factory: Factory = None,
    degrid: Degrid = None,
    calibration: Calibration = None,
    recovery: Recovery = None,
    audit: Audit = None,
    threads: Threads = 2,
    workers: Workers = "",
    rounds: Rounds = 2,
    to: To = "attar",
    decide: Decide = "price",
    equalise: Equalise = "none",
    activations: Activations = "none",
    biases: Biases = "kept",
    cut: Cut = "off",
    heal: Heal = "none",
    accept_licence: AcceptLicence = False,
    force: Force = False,
    restart: Restart = False,
) -> None:
    """Decide only; write a plan to read and edit, or what is lost at every size."""
    from attar import pipeline
    from attar.export.text_file import check_new_file, write_whole
    from attar.plan.planfile import plan_to_yaml
    from attar.report.terminal import plan_to_text
    from attar.resuming import discard

    check_one_of(size, frontier, out, protect)
    recipe = recipe_of({**locals(), "size": size or ""})
    if frontier is not None:
        _plan_all_sizes(recipe, frontier, force=force, restart=restart)
        return
    if out is not None:
        check_new_file(out, force=force)
        if restart:
            discard(out)
    with open_progress() as progress:
        made, session = pipeline.plan(recipe, out, progress=progress)
    if out is not None:
        write_whole(out, plan_to_yaml(made))
    show(plan_to_text(made, session.units.units, **screen()))
    if out is not None:
        show(f"\nplan  {out}\nnext  attar apply {out} --out DIR")


@app.command()
def apply(
    plan_file: PlanFile,
    out: Out,
    size: SizeOrNone = None,
    keep: Keep = None,
    protect: Protect = None,
    factory: Factory = None,
    threads: Threads = 2,
    workers: Workers = "",
    accept_licence: AcceptLicence = False,
    force: Force = False,
    restart: Restart = False,
) -> int:
    """Do what a plan says, without deciding again, or fit a frontier's --size without pricing."""
    from attar import pipeline
    from attar.report.terminal import report_to_text

    if keep and size is None:
        raise typer.BadParameter("--keep goes with --size; in a plan, edit the line of the unit")
    if protect and size is None:
        raise typer.BadParameter("--protect goes with --size; in a plan, edit its recipe")
    recipe = recipe_of({**locals(), "model": "", "size": size or ""})
    do = pipeline.apply_plan_file if size is None else pipeline.apply_frontier_file
    with open_progress() as progress:
        report = do(plan_file, out, recipe=recipe, force=force, restart=restart, progress=progress)
    show(report_to_text(report, **screen()))
    return exit_code(report.verdict)


app.command(name="explain")(explain_command)
app.command(name="audit")(audit_command)
app.command(name="bench")(bench_command)
app.command(name="view")(view_command)


@app.command()
def run(
    model: ModelName,
    inputs: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT|FILES", help="A prompt, texts, or files.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Written at most, by a language model.")
    ] = 64,
    seed: Seed = 0,
    task: TaskName = None,
    factory: Factory = None,
    accept_licence: AcceptLicence = False,
    json_file: JsonFile = None,
) -> None:
    """Continue text, name pictures, compare texts, transcribe."""
    from attar import serving
    from attar.records import Recipe
    from attar.session import open_model

    check_file(json_file)
    recipe = Recipe(model=model, factory=factory, task=task, accept_licence=accept_licence)
    with open_progress() as progress, progress.stage(f"load {model}", 0):
        opened = open_model(recipe)
    answer = serving.run(opened, inputs or [], max_tokens=max_tokens, seed=seed)
    show(answer.text)
    if json_file is not None:
        write_json(json_file, answer.facts)


@app.command()
def models(
    action: Annotated[str | None, typer.Argument(metavar="get", help="Fetch a model.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Which one.")] = None,
    degrid: Degrid = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write it as a Hugging Face folder.")
    ] = None,
    accept_licence: AcceptLicence = False,
) -> None:
    """List the built-in models, or get one."""
    from attar import serving
    from attar.report.terminal import models_to_text

    if action is None:
        show(models_to_text(serving.model_rows(), **screen()))
        return
    if action != "get" or name is None:
        raise typer.BadParameter("`attar models` lists them, `attar models get NAME` fetches one")
    show(serving.describe_model(name))
    if degrid is not None and out is None:
        out = Path(f"{name}-degrid-{degrid}")
    with open_progress() as progress, progress.stage(f"fetch and convert {name}", 0):
        model = serving.get_model(name, degrid=degrid, accept_licence=accept_licence, out=out)
    place = "in the cache" if out is None else f"written to {out}"
    show(f"ready: {model.origin}, {place}")


def _print_version(wanted: bool) -> bool:
    if wanted:
        show(f"attar {version('attar')}")
        raise typer.Exit
    return wanted


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Run before every command; the version is printed by the option itself."""


def _plan_all_sizes(recipe: Recipe, folder: Path, *, force: bool, restart: bool) -> None:
    """Do what `attar plan --frontier` does."""
    from attar import pipeline
    from attar.report.frontier import frontier_to_text

    with open_progress() as progress:
        found = pipeline.frontier(recipe, folder, force=force, restart=restart, progress=progress)
    show(frontier_to_text(found, **screen()))
    then = f"attar apply {folder} --size SIZE --out DIR"
    show(f"\npicture  {folder / 'frontier.html'}\nnext     {then}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; two lines on stderr for a mistake."""
    if arguments is None:  # as a program of its own, a termination cleans up like Ctrl-C
        signal.signal(signal.SIGTERM, terminate)
    typed = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in typed
    typed = [word for word in typed if word != "--debug"] or ["--help"]
    quieten(debug)
    try:
        code = typer.main.get_command(app)(typed, prog_name="attar", standalone_mode=False)
    except AttarError as error:
        if debug:
            raise
        return fail(error.problem, error.hint)
    except UsageError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "attar"
        return fail(error.format_message(), f"type {command} --help")
    except KeyboardInterrupt:
        code = INTERRUPTED
    except MemoryError:
        if debug:
            raise
        return fail("there is not enough memory.", "use a smaller model, or --calibration N")
    if code == INTERRUPTED:
        typer.echo("interrupted; nothing was written.", err=True)
        if arguments is None:  # native threads that were cut short now and then abort a usual exit
            sys.stdout.flush()
            os._exit(INTERRUPTED)
    return int(code or 0)

"""What commands write to: the terminal, and a file of facts."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from attar.errors import Terminated

if TYPE_CHECKING:
    from attar.records import Recipe, Verdict

WRONG = 2  # exit code of a mistake in what was typed or given
NARROWEST, WIDEST = 60, 120  # columns a table still reads well in


def check_file(path: Path | None) -> None:
    """Refuse a file of facts that cannot be written, before long work."""
    from attar.export.text_file import check_new_file

    if path is not None:
        check_new_file(path, force=True)


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write facts as a whole file, or not at all."""
    write_bytes(path, (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file, or nothing."""
    from attar.export.text_file import write_whole

    write_whole(path, content)


def show(text: str) -> None:
    """Write text to stdout."""
    typer.echo(text.rstrip("\n"))


def screen() -> dict[str, Any]:
    """Width and colour of the terminal; no colour where there is none, or where it is unwanted."""
    columns = shutil.get_terminal_size((100, 24)).columns
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return {"width": min(max(columns, NARROWEST), WIDEST), "colour": colour}


def quieten(debug: bool) -> None:
    """Keep libraries' notes out of the output."""
    if not debug:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns when pip is started


def fail(problem: str, hint: str) -> int:
    """Say what is wrong and what to type instead, on stderr; the exit code of a mistake."""
    one_line = [" ".join(text.split()) for text in (problem, hint)]
    typer.echo("error: {}\nhint: {}".format(*one_line), err=True)
    return WRONG


def exit_code(verdict: Verdict) -> int:
    """Say how it went to whoever runs the command: 0 passed, 1 failed, 3 undecided."""
    return {"passed": 0, "failed": 1}.get(verdict.outcome, 3)


def recipe_of(arguments: Mapping[str, Any]) -> Recipe:
    """Pick what a recipe asks for out of a command's arguments."""
    from attar.records import Recipe

    chosen = {name: arguments[name] for name in Recipe.__dataclass_fields__ if name in arguments}
    for name in ("keep", "protect"):
        chosen[name] = tuple(chosen.get(name) or ())
    return Recipe(**chosen)


def check_one_of(
    size: str | None, frontier: Path | None, out: Path | None, protect: list[str] | None
) -> None:
    """Refuse to plan for one size and for all of them, or for none."""
    if frontier is not None and protect:
        raise typer.BadParameter("--protect goes with --size: a small one could spare no slice")
    if (size is None) == (frontier is None):
        raise typer.BadParameter("ask for one --size SIZE, or for all with --frontier DIR")
    if frontier is not None and out is not None:
        raise typer.BadParameter("--frontier DIR is where it is written: leave --out out")


def terminate(_number: int, _frame: object) -> None:
    """Answer a signal by unwinding, so that nothing is left half-written."""
    raise Terminated

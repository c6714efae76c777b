"""`attar bench`: its options, and the table it ends with."""

from __future__ import annotations

from typing import Annotated

import typer

from attar.command_output import check_file, screen, show, write_json
from attar.options import AcceptLicence, Factory, JsonFile, ModelName, TaskName
from attar.progress import open_progress


def bench_command(
    model: ModelName,
    original: Annotated[
        str | None, typer.Argument(metavar="ORIGINAL", help="What it is compared with.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, metavar="N", help="Of the engine.")] = 2,
    rounds: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Processes of each; from 5 on, models are compared."),
    ] = 5,
    prompt: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens read before the first is written.")
    ] = 64,
    tokens: Annotated[
        int, typer.Option(min=2, metavar="N", help="Tokens written, by a language model.")
    ] = 16,
    engine: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only in this engine, for MODEL. Repeat."),
    ] = None,
    factory: Factory = None,
    task: TaskName = None,
    accept_licence: AcceptLicence = False,
    json_file: JsonFile = None,
) -> None:
    """Measure load time, latency, memory and energy in each engine that runs a model."""
    from attar.benching import bench, bench_to_json, compared, too_wide
    from attar.records import Recipe
    from attar.report.bench_text import bench_to_text

    check_file(json_file)
    given = Recipe(model=model, factory=factory, task=task, accept_licence=accept_licence)
    other = None
    if original is not None:
        other = Recipe(model=original, task=task, accept_licence=accept_licence)
    with open_progress() as progress:
        found = bench(
            given,
            other,
            threads=threads,
            rounds=rounds,
            prompt=prompt,
            new_tokens=tokens,
            engines=engine or (),
            progress=progress,
        )
    show(bench_to_text(found, too_wide(found), compared(found), **screen()))
    if json_file is not None:
        write_json(json_file, bench_to_json(found))

"""Does the written folder weigh what was asked for? Ten budgets for each model.

Prices are made once for each model; each budget is then solved, carried out, written and weighed as
`attar compress` does it, with one round of measuring. What a budget buys is not judged here, so
prices are made on little data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from results_file import Bench, Finding, Options, Row, main, number, of_model

from attar import decide, writing
from attar.errors import BudgetError
from attar.export.attar_folder import write_files
from attar.progress import open_progress
from attar.records import Recipe, Statistics
from attar.session import Session, open_recipe

# Targets, as issue 2 states them.
N_BUDGETS = 10
LOWEST_BITS, HIGHEST_BITS = 2.3, 8.0  # per parameter of the whole file
MOST_OVER = 0.0  # share of the budget
MOST_UNDER = 0.01

MODELS = ("smollm2", "efficientnet-lite0", "minilm")
PICTURE_MODELS = ("efficientnet-lite0", "mobilenetv2")
CALIBRATION = {"smollm2": 2048, "minilm": 64}  # tokens, sentences
PICTURES = 16
DEGRID = {"smollm2": 0}


def measure(options: Options) -> Iterator[Row]:
    for name in options.models:
        text, pictures = options.wikitext / "valid.txt", options.data / "imagenet-sample-500"
        recipe = Recipe(
            model=name,
            size="100%",
            data=str(pictures if name in PICTURE_MODELS else text),
            degrid=DEGRID.get(name),
            calibration=8 if options.quick else CALIBRATION.get(name, PICTURES),
            recovery=4,
            audit=1,
            rounds=1,
        )
        with open_progress() as progress:
            session = open_recipe(recipe, progress)
            statistics = decide.explain(session)
            candidates = decide.price(session, statistics)
            for bits in budgets(2 if options.quick else N_BUDGETS):
                sized = replace(session, recipe=replace(recipe, size=f"{bits:.6f}bits"))
                yield {"model": name, "bits": bits, **weighed(sized, candidates, statistics)}


def budgets(n: int) -> list[float]:
    """Bits per parameter, evenly spread by ratio."""
    step = (HIGHEST_BITS / LOWEST_BITS) ** (1 / (n - 1))
    return [LOWEST_BITS * step**i for i in range(n)]


def weighed(session: Session, candidates: decide.Candidates, statistics: Statistics) -> Row:
    """Make a plan, write its folder, and weigh the files on disk."""
    start = time.perf_counter()
    budget = session.budget_bytes()
    try:
        contents = writing.contents(session, decide.plan(session, candidates, statistics))
        refused = ""
    except BudgetError as error:
        contents, refused = {}, error.problem
    with TemporaryDirectory() as folder:
        write_files(Path(folder), contents)
        written = sum(path.stat().st_size for path in Path(folder).iterdir()) or math.nan
    return {
        "budget_bytes": budget,
        "written_bytes": written,
        "share_under": 1 - written / budget,
        "seconds": time.perf_counter() - start,
        "refused": refused,
    }


def check(rows: list[dict[str, str]]) -> list[Finding]:
    findings = []
    for model in MODELS:
        of = of_model(rows, model)
        findings.append(Finding(f"{model}, budgets", len(of), at_least=N_BUDGETS))
        for row in of:
            used = 1 - number(row, "share_under")
            what = f"{model} at {number(row, 'bits'):.2f} bits, written / budget {row['refused']}"
            findings.append(Finding(what, used, at_most=1 + MOST_OVER, at_least=1 - MOST_UNDER))
    return findings


if __name__ == "__main__":
    main(
        Bench(
            name="budget",
            about="The written folder against its budget.",
            models=MODELS,
            quick_models=("mobilenetv2",),
            measure=measure,
            check=check,
        )
    )

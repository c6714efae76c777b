"""Measure a model in each engine that runs it, beside the original, in processes that alternate."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attar import gguf_names, onnx_names
from attar.errors import DataError, ModelError, SettingError
from attar.load.folder import is_attar_folder
from attar.measure.engines import ENGINES, engine_version, engines_of
from attar.measure.spread import is_settled, is_wide, ratio, spread
from attar.records import Bench, BenchRow, Model, Progress, Recipe, Silent, Spread
from attar.session import open_model

LIMIT_SECONDS = 900  # of one process: a model that takes longer is not measured on this machine


@dataclass(frozen=True)
class Subject:
    """One model in one engine, with what its process is told."""

    role: str
    engine: str
    path: Path
    recipe: Recipe
    inputs: Path
    file_bytes: int


def bench(
    given: Recipe,
    original: Recipe | None,
    *,
    threads: int,
    rounds: int,
    prompt: int,
    new_tokens: int,
    engines: Sequence[str] = (),
    progress: Progress | None = None,
) -> Bench:
    """Measure; each round runs every model in every engine once, in turning order.

    Args:
        prompt: Tokens that a language model has read before its first.
        new_tokens: That it writes then, 2 or more.
        engines: Only these, where there are any.

    Raises:
        AttarError: A model that cannot be opened, an engine that is missing or fails.
    """
    progress = progress or Silent()
    _check_engines(engines)
    with tempfile.TemporaryDirectory(prefix="attar-bench-") as scratch:
        subjects, left_out, tasks = [], [], []
        for role, recipe in (("given", given), ("original", original)):
            if recipe is None:
                continue
            with progress.stage(f"check {recipe.model}", 0):
                found, missing, task = _subjects(role, recipe, Path(scratch), prompt, engines)
            subjects += found
            left_out += [line for line in missing if line not in left_out]
            tasks.append(task)
        if len(set(tasks)) > 1:
            raise DataError(
                f"{given.model} answers {tasks[0]} and the original {tasks[1]}.",
                hint="give the model that it was made from",
            )
        numbers = {"threads": threads, "new_tokens": new_tokens}
        figures = _alternate(subjects, numbers, rounds, progress)
    asked = {"threads": threads, "rounds": rounds}
    if tasks[0] == "language":
        asked |= {"prompt_tokens": prompt, "new_tokens": new_tokens}
    rows = tuple(
        BenchRow(
            one.role,
            one.recipe.model,
            one.engine,
            engine_version(one.engine),
            one.file_bytes,
            {name: spread([run[name] for run in runs]) for name in runs[0]},
        )
        for one, runs in zip(subjects, figures, strict=True)
    )
    return Bench(tasks[0], rows, asked, _machine(), tuple(left_out))


def _check_engines(engines: Sequence[str]) -> None:
    for name in engines:
        if name not in ENGINES:
            raise SettingError(
                f"there is no engine {name}.", hint=f"choose one of {', '.join(ENGINES)}"
            )


def _subjects(
    role: str, recipe: Recipe, scratch: Path, prompt: int, only: Sequence[str]
) -> tuple[list[Subject], list[str], str]:
    """Open a model here first, so that a file which is damaged or unsafe meets no engine."""
    path = model_file(recipe.model)
    suffix = path.suffix.lower() if path.is_file() else ""
    able, missing = engines_of(suffix if suffix in (".gguf", ".onnx", ".xml") else "")
    engines = [name for name in able if not only or role == "original" or name in only]
    if not engines:
        raise ModelError(
            f"no engine that was asked for runs {path.name} here.",
            hint=missing[0].partition(": ")[2] if missing else f"give --engine {able[0]}",
        )
    model = open_model(recipe)
    held = scratch / f"{role}.npz"
    np.savez(held, *_one_sample(model, prompt))
    n_bytes = _weigh(path, model)
    found = [Subject(role, name, path, recipe, held, n_bytes) for name in engines]
    return found, missing, model.task.name


def model_file(name: str) -> Path:
    """The one file that an engine opens, where a folder holds one; else what was named."""
    path = Path(name).expanduser()
    if path.is_dir() and not is_attar_folder(path):
        for file in (gguf_names.FILE, onnx_names.FILE):
            if (path / file).is_file():
                return path / file
    return path


def _weigh(path: Path, model: Model) -> int:
    if path.suffix.lower() == ".xml":
        return model.source_bytes  # with the weights that lie beside it
    if path.is_file():
        return path.stat().st_size
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return model.source_bytes


def _one_sample(model: Model, prompt: int) -> list[Any]:
    """Random inputs of the right shape; the same ones for every engine, and every time."""
    drawn = np.random.default_rng(0)
    if model.task.name == "language":
        most = int(model.examples["tokens"].max()) + 1
        return [drawn.integers(0, most, (1, prompt))]
    inputs = []
    for tensor in model.examples.values():
        one = tensor[:1].numpy()
        if np.issubdtype(one.dtype, np.floating):
            one = drawn.standard_normal(one.shape).astype(one.dtype)
        # What a file does not say is zeros: as a mask it would leave nothing to attend to.
        inputs.append(one if one.any() else np.ones_like(one))
    return inputs


def _alternate(
    subjects: Sequence[Subject], numbers: Mapping[str, int], rounds: int, progress: Progress
) -> list[list[dict[str, float]]]:
    """One process after the other; each round begins with another subject."""
    figures: list[list[dict[str, float]]] = [[] for _ in subjects]
    with progress.stage("measure", rounds * len(subjects)) as advance:
        for turn in range(rounds):
            for step in range(len(subjects)):
                at = (turn + step) % len(subjects)
                figures[at].append(_run(subjects[at], numbers))
                advance(1)
    return figures


def _run(one: Subject, numbers: Mapping[str, int]) -> dict[str, float]:
    recipe = {
        name: getattr(one.recipe, name) for name in ("model", "factory", "task", "accept_licence")
    }
    job = {
        "engine": one.engine,
        "path": str(one.path),
        "recipe": recipe,
        "inputs": str(one.inputs),
        **numbers,
    }
    # Threads that wait by spinning take the time of those that work.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    try:
        # -P: a file in the folder where this is typed is no module to import.
        done = subprocess.run(
            [sys.executable, "-P", "-m", "attar.bench_child"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"{one.recipe.model} gave no answer in {one.engine} in {LIMIT_SECONDS} s.",
            hint="ask for fewer tokens: --prompt 16 --tokens 4",
        ) from error
    try:
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise ModelError(
            f"{one.engine} cannot run {one.recipe.model}: {lines[-1]}",
            hint=f"leave it out with --engine, one of {', '.join(ENGINES)}",
        ) from error
    return found


def _machine() -> dict[str, Any]:
    return {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()}


def too_wide(found: Bench) -> dict[tuple[int, str], bool]:
    """By row and figure, whether its quartiles lie too far apart to go by."""
    return {
        (number, name): is_wide(value)
        for number, row in enumerate(found.rows)
        for name, value in row.figures.items()
    }


def compared(found: Bench) -> dict[tuple[int, str], Spread]:
    """By row and figure, the original's time over the row's, where all rounds agree.

    The original is its fastest engine's: a slow one makes anything look fast.
    """
    said = {}
    for number, row in enumerate(found.rows):
        for name, value in row.figures.items():
            others = [
                other.figures[name]
                for other in found.rows
                if other.role == "original" and name in other.figures
            ]
            if row.role == "original" or not others or not name.endswith("_ms"):
                continue
            over = ratio(min(others, key=lambda one: one.median), value)
            if is_settled(over):
                said[number, name] = over
    return said


def bench_to_json(found: Bench) -> dict[str, Any]:
    """The same facts for programs; every value of every round is there."""
    return {"format": "attar bench", **dataclasses.asdict(found)}

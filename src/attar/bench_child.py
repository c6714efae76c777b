"""One process of `attar bench`: open one model in one engine, answer again and again, say how long.

Reads a job as JSON from stdin and writes what it measured as the last line of stdout. A process of
its own, so that neither memory nor caches of another engine are counted.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from attar.measure.energy import between, read_counters
from attar.measure.engines import ENGINES, OPENERS, PYTORCH, Inputs, Once, milliseconds

# Answers that are not counted: the first ones fill caches and choose kernels.
WARM_UPS = 2
# Long enough for a median, short enough that five rounds of four engines end within minutes.
FEWEST, MOST, SECONDS = 3, 200, 2.0


def measure(job: Mapping[str, Any]) -> dict[str, float]:
    """Load and answer.

    Args:
        job: engine, path, recipe (fields of a model's recipe), inputs (.npz), threads, new_tokens.
    """
    with np.load(job["inputs"]) as held:
        inputs = [held[name] for name in held.files]
    open_it = _opener(job["engine"], job["recipe"])
    before = peak_bytes()
    start = time.perf_counter()
    once = open_it(Path(job["path"]), inputs, job["threads"], job["new_tokens"])
    found = {"load_ms": milliseconds(start), "import_bytes": float(before)}
    for _ in range(WARM_UPS):
        once()
    counters, start = read_counters(), time.perf_counter()
    answers = _repeat(once)
    spent = between(counters, read_counters())
    if spent is not None:
        found["answer_mj"] = spent / len(answers)
    for name in answers[0]:
        found[name] = median(answer[name] for answer in answers)
    return {**found, "peak_bytes": float(peak_bytes())}


def _repeat(once: Once) -> list[dict[str, float]]:
    end = time.perf_counter() + SECONDS
    answers = [once() for _ in range(FEWEST)]
    while time.perf_counter() < end and len(answers) < MOST:
        answers.append(once())
    return answers


def _opener(engine: str, recipe: Mapping[str, Any]) -> Callable[[Path, Inputs, int, int], Once]:
    """Import what is needed, which is not part of the time to load."""
    importlib.import_module(ENGINES[engine].module)
    if engine != PYTORCH:
        return OPENERS[engine]
    importlib.import_module("attar.session")
    return lambda _path, inputs, threads, count: _open_pytorch(recipe, inputs, threads, count)


def _open_pytorch(recipe: Mapping[str, Any], inputs: Inputs, threads: int, new_tokens: int) -> Once:
    """Attar's own way to run a model; `inputs` stand for its first sample's."""
    import torch

    from attar.decode import language_step, write_tokens
    from attar.records import Recipe
    from attar.session import open_model

    torch.set_num_threads(threads)
    model = open_model(Recipe(**recipe))
    given = [torch.from_numpy(one) for one in inputs]

    def write() -> dict[str, float]:
        start, each = time.perf_counter(), []
        writing = write_tokens(language_step(model), given[0])
        logits = next(writing)
        first = milliseconds(start)
        for _ in range(new_tokens - 1):
            start = time.perf_counter()
            logits = writing.send(logits.argmax(dim=1))
            each.append(milliseconds(start))
        return {"first_token_ms": first, "token_ms": median(each)}

    def answer() -> dict[str, float]:
        batch = dict(zip(model.examples, given, strict=True))
        start = time.perf_counter()
        with torch.inference_mode():
            model.task.forward(model.module, batch)
        return {"sample_ms": milliseconds(start)}

    return write if model.task.name == "language" else answer


def peak_bytes() -> int:
    """Most memory that this process had at once, mapped files that it read among it.

    From /proc where there is one: what getrusage says of a new process on Linux begins with that of
    the process which started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    from attar import memory

    return memory.peak_bytes()


if __name__ == "__main__":
    result = json.dumps(measure(json.load(sys.stdin)))
    # A server's thread may still be writing; its lines must not follow ours.
    sys.stdout.write("\n" + result + "\n")
    sys.stdout.flush()

"""At the same bytes, what is left of a language model's accuracy?

The same points as `equal_bytes.py` makes, judged by multiple choice: accuracy beside the
original's on the same items, and flips: the share of items answered otherwise than by it. A peer's
points are those nearest in bytes to Attar's; its smallest, where all are larger.

    bench/equal_bytes_tasks.py --models smollm2-0:attar,smollm2-0:llama_cpp
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from equal_bytes import Place, data_of, make, python
from equal_bytes_subjects import SUBJECTS
from peer_environment import version_of
from results_file import Bench, Finding, Options, Row, main, number

JUDGE = Path(__file__).with_name("equal_bytes_tasks_judge.py")
TASKS = ("blimp", "hellaswag", "arc_easy", "piqa")
# Of each tool: Attar at 3.0 and 4.5 bits per parameter, and what of a peer comes nearest.
POINTS: Mapping[str, tuple[str, ...]] = {
    "attar": ("3.0 bits", "4.5 bits"),
    "llama_cpp": ("IQ2_XXS", "IQ3_XXS"),
    "quanto": ("qint2",),
    "hqq": ("2 bits, groups of 64",),
}
MODELS = tuple(f"smollm2-0:{tool}" for tool in POINTS)


def measure(options: Options) -> Iterator[Row]:
    for key in options.models:
        name, tool, *start = key.split(":")
        settings = [s for s in POINTS[tool] if s.startswith(tuple(start or [""]))]
        with tempfile.TemporaryDirectory(prefix="attar-tasks-") as folder:
            data = data_of(SUBJECTS[name], options, Path(folder))
            place = Place(name, Path(folder), data, options)
            for setting in settings[:1] if options.quick else settings:
                yield measure_point(place, tool, setting)


def measure_point(place: Place, tool: str, setting: str) -> Row:
    """Compress once, and let both answer."""
    [facts] = make(place, tool, [setting]).values()
    typed = [facts["weights"], place.facts, str(place.options.data)]
    done = python(JUDGE, typed, place.folder / "tasks.log")
    return {
        "model": place.name,
        "tool": tool,
        "setting": setting,
        "tool_version": version_of(tool),
        "bytes": facts["bytes"],
        "bits_per_parameter": 8 * facts["bytes"] / place.subject.n_parameters,
        **json.loads(done.output.splitlines()[-1]),
    }


def check(rows: list[dict[str, str]]) -> list[Finding]:
    """Attar changes fewer answers than any peer, whose points are all larger."""
    findings = []
    for task in TASKS:
        own = [number(r, f"{task}_flips") for r in rows if r["tool"] == "attar"]
        peers = [number(r, f"{task}_flips") for r in rows if r["tool"] != "attar"]
        if own and peers:
            what = f"{task}: most flips of Attar's points, beside the fewest of a peer's"
            findings.append(Finding(what, max(own), at_most=min(peers)))
    return findings


if __name__ == "__main__":
    main(
        Bench(
            name="equal_bytes_tasks",
            about="Accuracy and changed answers at the same bytes, beside other tools.",
            models=MODELS,
            quick_models=("smollm2-0:quanto",),
            measure=measure,
            check=check,
            key=("model", "tool", "setting"),
        )
    )

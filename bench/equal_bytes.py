"""At the same bytes, which tool stays closest to the original?

Every tool compresses the same model with the same calibration text, in a process and an environment
of its own (`bench/peers/NAME`), and one judge compares what it wrote, decoded, with the original.
Bytes are all that the tool's user must ship: weights, scales, and the tokenizer.

A target is a number of bits per parameter of the whole file. A peer's divergence there is
interpolated between its two nearest points (the logarithm of the divergence against the bytes).
Where its smallest point is larger by more than 2%, it has none there.

    bench/equal_bytes.py --models smollm2-0:attar,smollm2-0:hqq
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from compress_command import Finished, compress, run
from equal_bytes_data import Apart, held_apart
from equal_bytes_subjects import ATTAR, BITS, SETTINGS, SUBJECTS, UNABLE, Subject
from peer_environment import environment, version_of
from results_file import Bench, Finding, Options, Row, main, number

# Targets, as issue 3 states them; `BITS` of equal_bytes_subjects.py too.
OF_BEST_PEER = 0.6
PREDICTED_WITHIN = 1.5
# A point at most so much larger stands for one of the bytes asked for.
WITHIN = 1.02
# Said of rows whose seconds mean something.
ALONE = "alone"

JUDGE = Path(__file__).with_name("equal_bytes_judge.py")
OWN = Path(__file__).with_name("equal_bytes_own.py")


EVERY = (f"{name}:{tool}" for name, s in SUBJECTS.items() for tool in SETTINGS[s.kind])
MODELS = tuple(key for key in EVERY if key not in UNABLE)


@dataclass(frozen=True)
class Place:
    """One model of a run, with its data.

    Attributes:
        name: Key of SUBJECTS.
        folder: For everything of the run that is thrown away after it.
        data: To calibrate and to judge.
    """

    name: str
    folder: Path
    data: Apart
    options: Options

    @property
    def subject(self) -> Subject:
        """The model."""
        return SUBJECTS[self.name]

    @property
    def facts(self) -> str:
        """For the children that need torch."""
        return json.dumps(
            {
                "model": self.subject.model,
                "kind": self.subject.kind,
                "quick": self.options.quick,
                "recipe": self.subject.arguments(self.options, self.data.calibration),
                "judged": {column: str(path) for column, path in self.data.judged.items()},
            }
        )


def measure(options: Options) -> Iterator[Row]:
    """`MODEL:TOOL`, or with `:` and how the names of some settings start after it, once or more."""
    for key in options.models:
        name, tool, *start = key.split(":")
        subject = SUBJECTS[name]
        settings = [s for s in SETTINGS[subject.kind][tool] if s.startswith(tuple(start or [""]))]
        with tempfile.TemporaryDirectory(prefix="attar-equal-bytes-") as folder:
            place = Place(name, Path(folder), data_of(subject, options, Path(folder)), options)
            settings = settings[:1] if options.quick else settings
            together = judged_at_once(tool, options)
            for first in range(0, len(settings), together):
                yield from measure_points(place, tool, settings[first:][:together])


def judged_at_once(tool: str, options: Options) -> int:
    """Points made and judged together, which saves opening the original for each.

    Attar's share their prices too, unless they are timed: then each is one `attar compress`.
    """
    return (1 if options.timing else len(BITS)) if tool.startswith(ATTAR) else 4


def data_of(subject: Subject, options: Options, folder: Path) -> Apart:
    """Text as arrays, where the model is code of one's own, which knows no tokenizer."""
    tokenizer = None
    if subject.task is not None:
        done = python(JUDGE, ["--tokenizer", str(folder), "{}"], folder / "tokenizer.log")
        tokenizer = Path(done.output.splitlines()[-1])
    return held_apart(subject.kind, options, folder, tokenizer)


def measure_points(place: Place, tool: str, settings: Sequence[str]) -> Iterator[Row]:
    """Compress in a process for each setting, and judge what came out."""
    made = make(place, tool, settings)
    found = judge(place, [facts["weights"] for facts in made.values()]) if made else []
    for (setting, facts), judged in zip(made.items(), found, strict=True):
        yield {
            "model": place.name,
            "tool": tool,
            "setting": setting,
            "tool_version": version_of(tool),
            "bytes": facts["bytes"],
            "bits_per_parameter": 8 * facts["bytes"] / place.subject.n_parameters,
            **judged,
            "predicted": facts.get("predicted", ""),
            "seconds": facts["seconds"],
            "peak_memory_mb": facts["peak_bytes"] / 1e6,
            "timed": timed(facts, place.options),
        }


def timed(facts: Mapping[str, Any], options: Options) -> str:
    """Say what the seconds mean: something only for what ran by itself on a quiet machine."""
    if not facts.get("alone", True):
        return "sharing prices"
    return ALONE if options.timing else "perhaps beside other work"


def make(place: Place, tool: str, settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Where the weights of each setting lie, their bytes, and what it took.

    A setting that a peer cannot do is said and left out; the others are measured.
    """
    outs = {setting: place.folder / f"out-{n}" for n, setting in enumerate(settings)}
    for out in outs.values():
        shutil.rmtree(out, ignore_errors=True)
    if not tool.startswith(ATTAR):
        return dict(one for one in (try_peer(place, tool, *pair) for pair in outs.items()) if one)
    form = "attar" if tool == ATTAR else "gguf"
    if len(outs) > 1:
        return run_attar_at_once(place, outs, form)
    return {setting: run_attar(place, setting, out, form) for setting, out in outs.items()}


def run_attar(place: Place, setting: str, out: Path, form: str) -> dict[str, Any]:
    """Compress with this checkout; seconds and memory hold its audit and report too."""
    typed = {**typed_for(place, form), "size": size_of(place, setting)}
    arguments = [part for key, value in typed.items() for part in (f"--{key}", value)]
    done = compress(out, [place.subject.model, "--accept-licence", *arguments])
    report = json.loads((out / "report" / "report.json").read_text("utf-8"))
    return {
        **written(place, out),
        "seconds": done.seconds,
        "peak_bytes": done.peak_bytes,
        "predicted": report["verdict"]["predicted_damage"],
    }


def run_attar_at_once(
    place: Place, outs: Mapping[str, Path], form: str
) -> dict[str, dict[str, Any]]:
    """Compress to several sizes with one pricing pass, which is shared, not repeated."""
    typed = {"model": place.subject.model, **typed_for(place, form)}
    sizes = {str(out): size_of(place, setting) for setting, out in outs.items()}
    python(OWN, [json.dumps(typed), json.dumps(sizes)], place.folder / "own.log")
    return {
        setting: {
            **written(place, out),
            **json.loads((out / "report" / "facts.json").read_text("utf-8")),
            "alone": False,
        }
        for setting, out in outs.items()
    }


def typed_for(place: Place, form: str) -> dict[str, str]:
    """Options of `attar compress` but for its size."""
    return {**place.subject.arguments(place.options, place.data.calibration), "to": form}


def size_of(place: Place, setting: str) -> str:
    """What the folder may weigh, less what its user ships beside it."""
    size = int(float(setting.split()[0]) * place.subject.n_parameters / 8)
    return f"{size - beside(place)}B"


def written(place: Place, out: Path) -> dict[str, Any]:
    shipped = sum(
        f.stat().st_size for f in out.rglob("*") if f.is_file() and f.parent.name != "report"
    )
    return {"weights": f"folder:{out}", "bytes": shipped + beside(place)}


def beside(place: Place) -> int:
    """Bytes of the tokenizer of a model that is code of one's own, which Attar does not write."""
    return 0 if place.subject.task is None else tokenizer_bytes(place)


def tokenizer_bytes(place: Place) -> int:
    """What the model's users ship beside its weights."""
    tokenizer = job_of(place) / "model" / "tokenizer.json"
    return tokenizer.stat().st_size if tokenizer.exists() else 0


def job_of(place: Place) -> Path:
    """What peers are given; made when it is first needed."""
    job = place.folder / "job"
    if not job.exists():
        python(JUDGE, ["--job", str(job), place.facts], place.folder / "job.log")
    return job


def try_peer(place: Place, tool: str, setting: str, out: Path) -> tuple[str, dict[str, Any]] | None:
    """Run a setting of a peer; where it fails, say so and give nothing."""
    try:
        return setting, run_peer(place, tool, setting, out)
    except SystemExit as failed:
        print(f"{place.name}: {tool} cannot do {setting!r}:\n{failed}", flush=True)
        return None


def run_peer(place: Place, tool: str, setting: str, out: Path) -> dict[str, Any]:
    """Compress with a peer, in its own environment."""
    job = job_of(place)
    out.mkdir()
    script = Path(__file__).parent / "peers" / tool / "compress.py"
    peer = [str(environment(tool)), str(script), str(job), setting, str(out)]
    run([*peer, str(time.time())], place.folder / "peer.log")
    facts = json.loads((out / "facts.json").read_text("utf-8"))
    shipped = sum(f.stat().st_size for f in (out / "artifact").rglob("*") if f.is_file())
    if not any((out / "artifact").rglob("*.gguf")):  # a GGUF file has its tokenizer in it
        tokenizers = [*(out / "artifact").rglob("tokenizer.json")]
        shipped += 0 if tokenizers else tokenizer_bytes(place)
    return {**facts, "weights": str(out / "weights.safetensors"), "bytes": shipped}


def judge(place: Place, weights: Sequence[str]) -> list[dict[str, Any]]:
    typed = ["--judge", json.dumps(weights), place.facts]
    done = python(JUDGE, typed, place.folder / "judge.log")
    # Libraries print notes of their own, before, between and after.
    found = [line for line in done.output.splitlines() if line.startswith('{"divergence')]
    return [json.loads(line) for line in found[-len(weights) :]]


def python(script: Path, arguments: Sequence[str], log: Path) -> Finished:
    return run([sys.executable, str(script), *arguments], log)


# ---------------------------------------------------------------------------------------------
# targets


Point = tuple[float, float]
"""Bits per parameter, and divergence."""


def front_of(points: Sequence[Point]) -> list[Point]:
    """Points that no smaller one of the same tool beats, smallest first."""
    front: list[Point] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def at(points: Sequence[Point], bits: float) -> float:
    """Divergence of a tool at so many bits; NaN where all its points are larger.

    Points that a smaller one of the same tool beats are left out; beyond the largest, it stands.
    """
    front = front_of(points)
    if not front:
        return math.nan
    if bits <= front[0][0]:
        return front[0][1] if front[0][0] <= bits * WITHIN else math.nan
    for (b0, d0), (b1, d1) in pairwise(front):
        if b0 <= bits <= b1:
            share = (bits - b0) / (b1 - b0)
            return math.exp((1 - share) * math.log(d0) + share * math.log(d1))
    return front[-1][1]


def own_at(points: Sequence[Point], bits: float) -> float:
    """Attar's divergence with at most so many bits and hardly fewer; NaN where not run."""
    near = [nats for own, nats in points if bits / WITHIN <= own <= bits]
    return min(near, default=math.nan)


def check(rows: list[dict[str, str]]) -> list[Finding]:
    findings = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        findings += check_model(name, own)
        for row in own:
            if row.get("predicted"):
                ratio = number(row, "divergence") / number(row, "predicted")
                findings.append(
                    Finding(
                        f"{name}, {row['setting']}: measured over predicted",
                        ratio,
                        at_most=PREDICTED_WITHIN,
                        at_least=1 / PREDICTED_WITHIN,
                    )
                )
    return findings


def check_model(name: str, rows: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Divergence, seconds and memory beside the best peer's at each of `BITS`."""
    findings = []
    for bits in BITS:
        best = best_peer(rows, bits)
        own = own_at(points_of(rows, ATTAR), bits)
        if best is None or not points_of(rows, ATTAR):
            continue
        tool, nats = best
        where = f"{name}, {bits} bits:"
        what = f"{where} divergence over that of the best peer, {tool}"
        findings.append(Finding(what, own / nats, at_most=OF_BEST_PEER))
        for column in ("seconds", "peak_memory_mb"):
            share = cost_at(rows, ATTAR, bits, column) / cost_at(rows, tool, bits, column)
            findings.append(Finding(f"{where} {column} over those of {tool}", share, at_most=1.0))
    return findings


def points_of(rows: Iterable[Mapping[str, str]], tool: str) -> list[Point]:
    """All points of a tool."""
    own = [row for row in rows if row["tool"] == tool]
    return [(number(row, "bits_per_parameter"), number(row, "divergence")) for row in own]


def best_peer(rows: Sequence[Mapping[str, str]], bits: float) -> tuple[str, float] | None:
    """The peer closest to the original at so many bits; None where none is that small."""
    tools = dict.fromkeys(row["tool"] for row in rows if not row["tool"].startswith(ATTAR))
    found = [(tool, at(points_of(rows, tool), bits)) for tool in tools]
    return min((one for one in found if not math.isnan(one[1])), key=lambda p: p[1], default=None)


def cost_at(rows: Sequence[Mapping[str, str]], tool: str, bits: float, column: str) -> float:
    """Seconds, or memory, of a tool's point that is nearest; NaN where it was not alone."""
    own = [row for row in rows if row["tool"] == tool]
    nearest = min(own, key=lambda row: abs(number(row, "bits_per_parameter") - bits))
    return number(nearest, column) if nearest.get("timed") == ALONE else math.nan


if __name__ == "__main__":
    main(
        Bench(
            name="equal_bytes",
            about="Divergence from the original at the same bytes, beside other tools.",
            models=MODELS,
            quick_models=("minilm:attar", "minilm:quanto"),
            measure=measure,
            check=check,
            key=("model", "tool", "setting"),
        )
    )

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from compress_command import Finished, compress, run
from peer_environment import environment, version_of
from results_file import Bench, Finding, Options, Row, main, number

# Targets, as issue 3 states them.
BITS = (2.25, 2.5, 3.0, 3.5, 4.5, 6.0)
OF_BEST_PEER = 0.6
PREDICTED_WITHIN = 1.5
# A point at most so much larger stands for one of the bytes asked for.
WITHIN = 1.02

JUDGE = Path(__file__).with_name("equal_bytes_judge.py")


@dataclass(frozen=True)
class Subject:
    """One model to compress.

    Attributes:
        model: What `attar compress` is given.
        degrid: Seed, or None.
        kind: Key of SETTINGS.
        n_parameters: Bits are counted over these.
        tokens: Of calibration; None: the default number of samples.
    """

    model: str
    kind: str
    n_parameters: int
    degrid: int | None = None
    tokens: int | None = None

    def arguments(self, options: Options) -> dict[str, str]:
        """Options of `attar compress` but for its size."""
        typed = {"data": str(calibration_data(self, options))}
        if self.degrid is not None:
            typed["degrid"] = str(self.degrid)
        if self.tokens is not None:
            typed["calibration"] = str(512 if options.quick else self.tokens)
        return typed


SUBJECTS: Mapping[str, Subject] = {
    **{
        f"smollm2-{seed}": Subject("smollm2", "language", 134_515_008, seed, 16_384)
        for seed in (0, 1, 2)
    },
    "gemma3-270m-0": Subject("gemma3-270m", "language", 268_098_176, 0, 16_384),
    "minilm": Subject("minilm", "encoder", 22_565_376),
    "efficientnet-lite0": Subject("efficientnet-lite0", "vision", 4_652_008),
    "mobilenetv2": Subject("mobilenetv2", "vision", 3_504_872),
}
ATTAR, ATTAR_GGUF = "attar", "attar_gguf"
# What is tried of each peer: everything its users would reach for at these sizes.
SETTINGS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "language": {
        ATTAR: [f"{bits} bits" for bits in BITS],
        ATTAR_GGUF: ["4.75 bits", "5.25 bits", "6.25 bits"],
        "llama_cpp": [
            *("IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K_M", "IQ4_XS", "IQ4_NL"),
            *("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"),
        ],
        "auto_round": [
            "W2A16G64 200 steps",
            "W3A16G64 200 steps",
            "W4A16G64 200 steps",
            "W8A16G64 0 steps",
            "auto 3.0 bits 200 steps",
        ],
        # Its AWQ asks for pinned memory, which there is none of without a GPU.
        "llm_compressor": ["GPTQ 4 bits", "GPTQ 8 bits"],
        "hqq": [f"{bits} bits, groups of 64" for bits in (2, 3, 4, 8)],
        "quanto": ["qint2", "qint4", "qint8"],
    },
    "encoder": {
        ATTAR: [f"{bits} bits" for bits in BITS],
        "hqq": [f"{bits} bits, groups of 64" for bits in (2, 3, 4, 8)],
        "quanto": ["qint2", "qint4", "qint8"],
    },
    "vision": {
        ATTAR: [f"{bits} bits" for bits in BITS],
    },
}
MODELS = tuple(f"{name}:{tool}" for name, s in SUBJECTS.items() for tool in SETTINGS[s.kind])


def calibration_data(subject: Subject, options: Options) -> Path:
    """WikiText-2's validation text, or pictures."""
    if subject.kind == "vision":
        return options.data / "imagenet-sample-500"
    return options.wikitext / "valid.txt"


def measure(options: Options) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="attar-equal-bytes-") as folder:
        for key in options.models:
            name, tool = key.split(":")
            settings = SETTINGS[SUBJECTS[name].kind][tool]
            for setting in settings[:1] if options.quick else settings:
                yield from measure_point(name, tool, setting, options, Path(folder))


def measure_point(
    name: str, tool: str, setting: str, options: Options, folder: Path
) -> Iterator[Row]:
    """Compress once, and judge what came out."""
    subject, out = SUBJECTS[name], folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    if tool in (ATTAR, ATTAR_GGUF):
        facts = run_attar(subject, setting, options, out, "attar" if tool == ATTAR else "gguf")
    else:
        facts = run_peer(name, tool, setting, options, folder)
    found = judge(name, facts["weights"], options, folder)
    yield {
        "model": name,
        "tool": tool,
        "setting": setting,
        "tool_version": version_of(tool),
        "bytes": facts["bytes"],
        "bits_per_parameter": 8 * facts["bytes"] / subject.n_parameters,
        **found,
        "predicted": facts.get("predicted", ""),
        "seconds": facts["seconds"],
        "peak_memory_mb": facts["peak_bytes"] / 1e6,
    }


def run_attar(
    subject: Subject, setting: str, options: Options, out: Path, form: str
) -> dict[str, Any]:
    """Compress with this checkout; seconds and memory hold its audit and report too."""
    size = int(float(setting.split()[0]) * subject.n_parameters / 8)
    typed = {**subject.arguments(options), "size": f"{size}B", "to": form}
    arguments = [part for key, value in typed.items() for part in (f"--{key}", value)]
    done = compress(out, [subject.model, "--accept-licence", *arguments])
    report = json.loads((out / "report" / "report.json").read_text("utf-8"))
    shipped = sum(
        f.stat().st_size for f in out.rglob("*") if f.is_file() and f.parent.name != "report"
    )
    return {
        "weights": f"folder:{out}",
        "bytes": shipped,
        "seconds": done.seconds,
        "peak_bytes": done.peak_bytes,
        "predicted": report["verdict"]["predicted_damage"],
    }


def run_peer(name: str, tool: str, setting: str, options: Options, folder: Path) -> dict[str, Any]:
    """Compress with a peer, in its own environment."""
    job = folder / f"job-{name}"
    if not job.exists():
        python(JUDGE, ["--job", str(job), *asked(name, options)], folder / "job.log")
    out = folder / "out"
    out.mkdir()
    script = Path(__file__).parent / "peers" / tool / "compress.py"
    peer = [str(environment(tool)), str(script), str(job), setting, str(out)]
    run([*peer, str(time.time())], folder / "peer.log")
    facts = json.loads((out / "facts.json").read_text("utf-8"))
    shipped = sum(f.stat().st_size for f in (out / "artifact").rglob("*") if f.is_file())
    if not any((out / "artifact").rglob("*.gguf")):  # a GGUF file has its tokenizer in it
        tokenizers = [*(out / "artifact").rglob("tokenizer.json")]
        shipped += 0 if tokenizers else (job / "model" / "tokenizer.json").stat().st_size
    return {**facts, "weights": str(out / "weights.safetensors"), "bytes": shipped}


def asked(name: str, options: Options) -> list[str]:
    subject = SUBJECTS[name]
    facts = {
        "model": subject.model,
        "kind": subject.kind,
        "data": str(options.data),
        "quick": options.quick,
        "recipe": subject.arguments(options),
    }
    return [json.dumps(facts)]


def judge(name: str, weights: str, options: Options, folder: Path) -> dict[str, Any]:
    done = python(JUDGE, ["--judge", weights, *asked(name, options)], folder / "judge.log")
    found: dict[str, Any] = json.loads(done.output.splitlines()[-1])
    return found


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
        tools = dict.fromkeys(row["tool"] for row in own)
        points = {
            tool: [
                (number(r, "bits_per_parameter"), number(r, "divergence"))
                for r in own
                if r["tool"] == tool
            ]
            for tool in tools
        }
        findings += check_model(name, points)
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


def check_model(name: str, points: Mapping[str, Sequence[Point]]) -> list[Finding]:
    findings = []
    for bits in BITS:
        peers = {tool: at(of, bits) for tool, of in points.items() if not tool.startswith(ATTAR)}
        peers = {tool: nats for tool, nats in peers.items() if not math.isnan(nats)}
        if ATTAR in points and peers:
            best = min(peers, key=lambda tool: peers[tool])
            share = own_at(points[ATTAR], bits) / peers[best]
            what = f"{name}, {bits} bits: divergence over that of the best peer, {best}"
            findings.append(Finding(what, share, at_most=OF_BEST_PEER))
    return findings


if __name__ == "__main__":
    main(
        Bench(
            name="equal_bytes",
            about="Divergence from the original at the same bytes, beside other tools.",
            models=MODELS,
            quick_models=("minilm:attar", "minilm:quanto"),
            measure=measure,
            check=check,
            key=("model", "tool"),
        )
    )

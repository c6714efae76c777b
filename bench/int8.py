"""Weights and activations in 8 bits: which tool stays closest to the original?

Every tool quantizes the same model with the same samples, in a process and an environment of its
own (`bench/peers/NAME`); its own engine answers, and one judge compares the answers with those of
the original, on samples that nobody calibrated on. Bytes are all files that the engine needs.

    bench/int8.py --models efficientnet-lite0:attar,efficientnet-lite0:onnxruntime
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress_command import compress, run
from equal_bytes import Place, data_of
from equal_bytes_subjects import SUBJECTS
from peer_environment import environment, version_of
from results_file import Bench, Finding, Options, Row, main, number

# As issue 3 states it: changed predictions, or what is lost of embeddings.
OF_BEST_PEER = 0.7
# Peers' files of all but the same bytes count, the larger ones too: that only makes it harder.
WITHIN = 1.1
JUDGE = Path(__file__).with_name("int8_judge.py")
NAMES = ("efficientnet-lite0", "minilm")
STATIC = ("static MinMax", "static Entropy", "static Percentile")
SETTINGS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "efficientnet-lite0": {
        "attar": ("static", "dynamic"),
        "onnxruntime": (*STATIC, "dynamic uint8"),
        "nncf": ("mixed", "performance"),
    },
    "minilm": {
        "attar": ("static", "dynamic", "static equalise auto", "static equalise learned"),
        "onnxruntime": (*STATIC, "dynamic int8"),
        "nncf": ("mixed transformer", "performance transformer"),
    },
}
MODELS = tuple(f"{name}:{tool}" for name in NAMES for tool in SETTINGS[name])
# Of a weight in 8 bits, with scales and graph: what the peers' files have for each parameter.
BITS = 8.6


def measure(options: Options) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="attar-int8-") as folder:
        for key in options.models:
            name, tool, *start = key.split(":")
            own = Path(folder) / name
            own.mkdir(exist_ok=True)
            place = Place(name, own, data_of(SUBJECTS[name], options, own), options)
            settings = [s for s in SETTINGS[name][tool] if s.startswith(tuple(start or [""]))]
            for setting in settings[:1] if options.quick else settings:
                try:
                    yield measure_point(place, tool, setting)
                except SystemExit as failed:  # of a child: a peer that cannot do this model
                    if tool == "attar":
                        raise
                    print(f"{name}: {tool} cannot do {setting!r}:\n{failed}", flush=True)


def measure_point(place: Place, tool: str, setting: str) -> Row:
    """Compress once, and judge what came out."""
    out, job = place.folder / "out", place.folder / "job"
    shutil.rmtree(out, ignore_errors=True)
    if not job.exists():
        child(["--job", str(job), place.facts], place.folder / "job.log")
    facts = run_attar(place, setting) if tool == "attar" else run_peer(place, tool, setting)
    judged = child(["--judge", facts["answers"], place.facts], place.folder / "judge.log")
    return {
        "model": place.name,
        "tool": tool,
        "setting": setting,
        "tool_version": version_of(tool),
        "bytes": facts["bytes"],
        **json.loads(judged.splitlines()[-1]),
        "seconds": facts["seconds"],
        "peak_memory_mb": facts["peak_bytes"] / 1e6,
    }


def run_attar(place: Place, setting: str) -> dict[str, Any]:
    """Compress with this checkout."""
    subject, out = place.subject, place.folder / "out"
    size = int(BITS * subject.n_parameters / 8)
    typed = subject.arguments(place.options, place.data.calibration)
    activations, _, equalise = setting.partition(" equalise ")
    typed |= {"size": f"{size}B", "to": "onnx", "activations": activations}
    typed |= {"equalise": equalise or "none"}
    if place.options.quick:
        typed |= {"calibration": "16", "recovery": "8", "audit": "16", "rounds": "1"}
    arguments = [part for key, value in typed.items() for part in (f"--{key}", value)]
    done = compress(out, [subject.model, "--accept-licence", *arguments])
    shipped = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
    answers = f"onnx:{out / 'model.onnx'}"
    return {"answers": answers, "bytes": shipped, "seconds": done.seconds,
            "peak_bytes": done.peak_bytes}  # fmt: skip


def run_peer(place: Place, tool: str, setting: str) -> dict[str, Any]:
    """Compress with a peer, in its own environment."""
    job, out = place.folder / "job", place.folder / "out"
    out.mkdir()
    script = Path(__file__).parent / "peers" / tool / "compress.py"
    peer = [str(environment(tool)), str(script), str(job), setting, str(out), str(time.time())]
    run(peer, place.folder / "peer.log")
    facts = json.loads((out / "facts.json").read_text("utf-8"))
    shipped = [*(out / "artifact").rglob("*"), *(job / "files").iterdir()]
    total = sum(file.stat().st_size for file in shipped if file.is_file())
    return {**facts, "answers": f"outputs:{out / 'outputs.npy'}", "bytes": total}


def child(arguments: Sequence[str], log: Path) -> str:
    """Do in a process of its own what needs torch."""
    return run([sys.executable, str(JUDGE), *arguments], log).output


def check(rows: list[dict[str, str]]) -> list[Finding]:
    """Ours over the best peer's at equal bytes, of the same kind of ranges or any."""
    findings = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name and row["tool"] == "attar"]
        for row in own:
            peers = [
                r
                for r in rows
                if r["model"] == name
                and r["tool"] != "attar"
                and number(r, "bytes") <= WITHIN * number(row, "bytes")
            ]
            column = "flips" if row.get("flips") else "divergence"
            best = min((number(r, column) for r in peers), default=math.nan)
            share = number(row, column) / best if best > 0 else math.nan
            what = f"{name}, {row['setting']}: {column} over that of the best peer at its bytes"
            findings.append(Finding(what, share, at_most=OF_BEST_PEER))
    return findings


if __name__ == "__main__":
    main(
        Bench(
            name="int8",
            about="Divergence from the original with weights and activations in 8 bits.",
            models=MODELS,
            quick_models=("minilm:onnxruntime",),
            measure=measure,
            check=check,
            key=("model", "tool", "setting"),
        )
    )

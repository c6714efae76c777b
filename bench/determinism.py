"""Same command, same seed: same bytes? On one thread, on two, and on two again.

Every file of the written folder is compared by its sha256 with that of the first run, except the
report, which holds times and memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from compress_command import compress
from results_file import Bench, Finding, Options, Row, main, number, of_model

# Targets, as issue 2 states them.
THREADS = (1, 2, 2)
MOST_DIFFERENT_FILES = 0

SMALL = ("--recovery", "16", "--audit", "16")
SMALL_TEXT = ("--recovery", "512", "--audit", "512")
COMMANDS = {
    "minilm": ("--size", "25%", "--calibration", "64", *SMALL),
    "efficientnet-lite0": ("--size", "4.5MB", "--calibration", "16", *SMALL),
    "smollm2": ("--degrid", "0", "--size", "56MB", "--calibration", "1024", *SMALL_TEXT),
}
QUICK = ("--size", "40%", "--calibration", "8", *SMALL)


def measure(options: Options) -> Iterator[Row]:
    for name in options.models:
        arguments = (name, *(QUICK if options.quick else COMMANDS[name]))
        first: Path | None = None
        with TemporaryDirectory() as folder:
            for number_of_run, threads in enumerate(THREADS):
                out = Path(folder) / f"run{number_of_run}"
                done = compress(out, (*arguments, "--threads", str(threads)))
                first = first or out
                yield {
                    "model": name,
                    "run": number_of_run,
                    "threads": threads,
                    "different_files": len(different_files(first, out)),
                    "differences": "; ".join(differences(first, out)),
                    "model_sha256": sha256(out / "model.safetensors"),
                    "attar_json_sha256": sha256(out / "attar.json"),
                    "seconds": done.seconds,
                    "command": " ".join(("attar compress", *arguments)),
                }


def different_files(one: Path, other: Path) -> list[str]:
    """Names of files that are not the same in both, or only in one; the report is left out."""
    names = {path.name for folder in (one, other) for path in folder.iterdir() if path.is_file()}
    return sorted(name for name in names if sha256(one / name) != sha256(other / name))


def sha256(path: Path) -> str:
    """Hex digest; "" where there is no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def differences(one: Path, other: Path) -> list[str]:
    """Name the files that differ with how far; of attar.json, the fields, units taken together."""
    found = []
    for name in different_files(one, other):
        if name == "attar.json":
            fields = [json.loads((folder / name).read_text("utf-8")) for folder in (one, other)]
            counts = Counter(
                re.sub(r"^units\..*\.", "units.*.", field) for field in different_fields(*fields)
            )
            found += [f"{name}: {field} ({times})" for field, times in counts.items()]
        else:
            found.append(f"{name}: {different_share(one / name, other / name):.2%} of bytes")
    return found


def different_share(one: Path, other: Path) -> float:
    """Share of bytes that differ; 1 where the files are not of the same length."""
    first, second = (path.read_bytes() if path.is_file() else b"" for path in (one, other))
    if len(first) != len(second):
        return 1.0
    differ = np.frombuffer(first, np.uint8) != np.frombuffer(second, np.uint8)
    return float(differ.mean())


def different_fields(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths of values that differ, such as `provenance.threads`."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [path]
    if one == other and list(one) != list(other):
        return [f"order in {path or 'the file'}"]
    names = dict.fromkeys([*one, *other])
    found = [
        different_fields(one.get(name), other.get(name), f"{path}.{name}".lstrip("."))
        for name in names
    ]
    return [field for of in found for field in of]


def check(rows: list[dict[str, str]]) -> list[Finding]:
    findings = []
    for model in COMMANDS:
        of = of_model(rows, model)
        findings.append(Finding(f"{model}, runs", len(of), at_least=len(THREADS)))
        for row in of[1:]:
            what = f"{model}, files that differ, {of[0]['threads']} and {row['threads']} threads"
            what += f" ({row['differences']})" if row["differences"] else ""
            different = number(row, "different_files")
            findings.append(Finding(what, different, at_most=MOST_DIFFERENT_FILES))
        again = {(r["model_sha256"], r["attar_json_sha256"]) for r in of if r["threads"] == "2"}
        what = f"{model}, outcomes of the same run on 2 threads"
        findings.append(Finding(what, len(again) or math.nan, at_most=1))
    return findings


if __name__ == "__main__":
    main(
        Bench(
            name="determinism",
            about="The same command and seed, run again and on other numbers of threads.",
            models=tuple(COMMANDS),
            quick_models=("mobilenetv2",),
            measure=measure,
            check=check,
        )
    )

"""What every bench has: its options, its rows on disk with what they were measured on, its check.

    bench/NAME.py           measure, and write results/NAME.csv as rows come in
    bench/NAME.py --check   compare the stored rows with the targets; the worst figure comes last,
                            and the exit code is 1 when a target is missed
    bench/NAME.py --quick   a tiny version that only shows that the script runs; its rows go to a
                            temporary folder, never to results/

Nothing here imports torch: a child process starts with its parent's peak memory on its account.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("attar", "torch", "numpy", "scipy", "transformers")
MEASURED_ON = ("hardware", "commit", "versions")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """What was typed.

    Attributes:
        models: To measure now; rows of the others are kept.
        shared: Folder that holds `data/`.
        timing: Whether every point is measured alone, so that its seconds can be stored.
    """

    models: tuple[str, ...]
    shared: Path
    quick: bool
    timing: bool = False

    @property
    def data(self) -> Path:
        """Data sets, one folder each."""
        return self.shared / "data"

    @property
    def wikitext(self) -> Path:
        """WikiText-2: prices are made on `valid.txt`, judged on `wiki.test.raw`."""
        return self.data / "wikitext-2"


@dataclass(frozen=True)
class Finding:
    """One figure beside its target: `at_least` or `at_most`."""

    what: str
    value: float
    at_most: float = math.inf
    at_least: float = -math.inf

    @property
    def missed(self) -> bool:
        """Whether it is outside; NaN, which stands for "not measured", is."""
        return not self.at_least <= self.value <= self.at_most

    @property
    def strain(self) -> float:
        """Share of the target that is used up: above 1 where it is missed."""
        if math.isnan(self.value):
            return math.inf
        shares = [0.0]
        if math.isfinite(self.at_most):
            shares.append(_share(self.value, self.at_most))
        if math.isfinite(self.at_least):
            shares.append(_share(self.at_least, self.value))
        return max(shares)

    def line(self) -> str:
        """Say the figure, its target, and which is larger."""
        bounds = [
            f"{word} {bound:.6g}"
            for word, bound in (("at least", self.at_least), ("at most", self.at_most))
            if math.isfinite(bound)
        ]
        value = "not measured" if math.isnan(self.value) else f"{self.value:.6g}"
        return f"{'MISSED' if self.missed else 'ok':6}  {self.what}: {value} ({', '.join(bounds)})"


def _share(part: float, whole: float) -> float:
    if whole > 0:
        return part / whole
    return math.inf if part > whole else 1.0


@dataclass(frozen=True)
class Bench:
    """One script.

    Attributes:
        name: Of the script and of its results.
        about: One line for `--help`.
        models: Measured when none are named.
        quick_models: Measured with `--quick`.
        measure: Yields rows, each with a `model`; called once.
        check: Stored rows to findings.
        key: Columns that say what was measured: rows that agree in them replace older ones.
    """

    name: str
    about: str
    models: tuple[str, ...]
    quick_models: tuple[str, ...]
    measure: Callable[[Options], Iterator[Row]]
    check: Callable[[list[dict[str, str]]], list[Finding]]
    key: tuple[str, ...] = ("model",)


def main(bench: Bench) -> None:
    """Do what was typed, and exit."""
    parser = argparse.ArgumentParser(description=bench.about)
    parser.add_argument("--check", action="store_true", help="compare stored rows with the targets")
    parser.add_argument("--quick", action="store_true", help="a tiny version: does it run?")
    parser.add_argument("--models", default="", help=f"of {','.join(bench.models)}")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument(
        "--timing", action="store_true", help="measure every point alone, on a quiet machine"
    )
    typed = parser.parse_args()
    chosen = tuple(typed.models.split(",")) if typed.models else ()
    known = {*bench.models, *bench.quick_models}
    # A bench may understand more after one more colon, or several.
    if unknown := {m for m in chosen if not known & set(accumulate(m.split(":"), "{}:{}".format))}:
        parser.error(f"this bench has no model {', '.join(sorted(unknown))}")
    table = Table(bench.name, quick=typed.quick, key=bench.key)
    if typed.check:
        sys.exit(_check(bench, table))
    default = bench.quick_models if typed.quick else bench.models
    options = Options(chosen or default, typed.shared, typed.quick, typed.timing)
    for row in bench.measure(options):
        table.add(row)
        print("  ".join(f"{name} {as_text(value)}" for name, value in row.items()), flush=True)
    print(f"written: {table.path}")


def _check(bench: Bench, table: Table) -> int:
    """Print every figure with its target, the worst last."""
    if not table.rows:
        print(f"MISSED  nothing is stored in {table.path.name}: run bench/{bench.name}.py first")
        return 1
    findings = sorted(bench.check(table.rows), key=lambda finding: finding.strain)
    print("\n".join(finding.line() for finding in findings))
    return int(any(finding.missed for finding in findings))


class Table:
    """Rows of one CSV file; those measured again take the place of old ones with the same key.

    Attributes:
        rows: As stored: text.
    """

    def __init__(self, name: str, *, quick: bool = False, key: Sequence[str] = ("model",)) -> None:
        folder = Path(tempfile.gettempdir()) / "attar-bench" if quick else RESULTS
        self.path = folder / f"{name}.csv"
        self.rows: list[dict[str, str]] = []
        self._key = tuple(key)
        self._new: set[tuple[str, ...]] = set()
        if self.path.exists():
            with self.path.open(encoding="utf-8", newline="") as file:
                self.rows = list(csv.DictReader(file))

    def add(self, row: Row) -> None:
        """Write the file again with one row more, whole or not at all."""
        text = {name: as_text(value) for name, value in {**row, **measured_on()}.items()}
        own = self._key_of(text)
        if own not in self._new:
            self.rows = [old for old in self.rows if self._key_of(old) != own]
            self._new.add(own)
        self.rows.append(text)
        self._write()

    def _key_of(self, row: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(row.get(column, "") for column in self._key)

    def _write(self) -> None:
        names = dict.fromkeys(name for row in self.rows for name in row)
        columns = [name for name in names if name not in MEASURED_ON] + list(MEASURED_ON)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self.path)


def as_text(value: Any) -> str:
    """Six significant digits for what was measured, all of them for what was counted."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def number(row: Mapping[str, str], column: str) -> float:
    """A stored figure; NaN where there is none."""
    return float(row.get(column) or "nan")


def of_model(rows: Sequence[dict[str, str]], model: str) -> list[dict[str, str]]:
    """Rows of one model."""
    return [row for row in rows if row["model"] == model]


def median(values: Sequence[float]) -> float:
    """NaN where there is nothing."""
    return statistics.median(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """Largest less smallest; NaN where there is nothing."""
    return max(values) - min(values) if values else math.nan


# ---------------------------------------------------------------------------------------------
# what a row was measured on


@cache
def measured_on() -> dict[str, str]:
    """Hardware, commit and versions, for every row."""
    found = [f"python {platform.python_version()}"]
    found += [f"{package} {version(package)}" for package in PACKAGES]
    return {"hardware": hardware(), "commit": commit(), "versions": ", ".join(found)}


def hardware() -> str:
    """Processor and the cores this process may use."""
    described = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8").splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        described = named[0] if named else described
    allowed = getattr(os, "sched_getaffinity", None)
    cores = len(allowed(0)) if allowed else os.cpu_count()
    return f"{described}, {cores} cores"


def commit() -> str:
    """The commit measured, with a plus where `src` differs from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (
        "+" if git("status", "--porcelain", "--", "src") else ""
    )

"""Run `attar compress` in a fresh process, as a user does, and see what it took.

Imports no torch: a child's peak memory is never less than what its parent held when it started.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What the console script `attar` does, with this very Python.
ATTAR = (sys.executable, "-c", "import sys; from attar.cli import main; sys.exit(main())")
# Exit codes of runs that wrote a model: passed, failed or undecided in its audit.
JUDGED = (0, 1, 3)


@dataclass(frozen=True)
class Finished:
    """One process that ended well.

    Attributes:
        seconds: From its start to its end, Python's own start included.
        peak_bytes: Largest resident size, as the system counted it.
    """

    seconds: float
    peak_bytes: int
    output: str


def compress(out: Path, arguments: Sequence[str]) -> Finished:
    """Compress to `out`, replacing nothing; it holds report/report.json afterwards."""
    command = [*ATTAR, "compress", *arguments, "--out", str(out)]
    return run(command, out.with_suffix(".log"), allowed=JUDGED)


def report_of(out: Path) -> Mapping[str, Any]:
    """Read the facts that the run reported of itself."""
    facts: Mapping[str, Any] = json.loads((out / "report" / "report.json").read_text("utf-8"))
    return facts


def run(command: Sequence[str], log: Path, allowed: Sequence[int] = (0,)) -> Finished:
    """Run a command to its end; what it prints goes to `log`.

    Raises:
        SystemExit: It ended with an exit code that is not allowed; its last lines are shown.
    """
    start = time.perf_counter()
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text("utf-8", errors="replace")
    if child.returncode not in allowed:
        last = "\n".join(text.splitlines()[-20:])
        sys.exit(f"{' '.join(command)}\nended with exit code {child.returncode}:\n{last}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # Linux counts in KiB
    return Finished(seconds, peak, text)

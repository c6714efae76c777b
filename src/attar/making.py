"""One model that is being made by another process, and how far it is."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attar.errors import SettingError

# Exit codes with which a folder was written: passed, failed, undecided.
WRITTEN = (0, 1, 3)
# For a run to put away what it was writing; longer, and it is ended.
STOP_SECONDS = 20.0
# What is imported comes from where `attar` itself would take it, not from the folder one is in.
ATTAR = (sys.executable, "-P", "-c", "from attar.cli import main; raise SystemExit(main())")


class Making:
    """At most one run at a time; the last one is remembered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number = 0
        self._state = "none"
        self._lines: list[str] = []
        self._folder = ""
        self._process: subprocess.Popen[str] | None = None

    def start(self, words: Sequence[str], folder: Path) -> int:
        """Run `attar` with these words, which writes `folder`; say which run it is.

        Raises:
            SettingError: Another one is running.
        """
        with self._lock:
            if self._state == "running":
                raise SettingError(
                    f"{self._folder} is being made.", hint="wait until it is; one at a time."
                )
            self._process = subprocess.Popen(
                [*ATTAR, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            self._number += 1
            self._state, self._lines, self._folder = "running", ["starting …"], str(folder)
            threading.Thread(target=self._follow, args=(self._process,), daemon=True).start()
            return self._number

    def now(self) -> dict[str, Any]:
        """State ("none", "running", "done" or "failed"), the last line it said, and its folder."""
        with self._lock:
            line = self._lines[-1] if self._lines else ""
            if self._state == "failed":
                wrong = [said for said in self._lines if said.startswith(("error: ", "hint: "))]
                line = " ".join(wrong[-2:]).replace("error: ", "", 1) or line
            return {
                "number": self._number,
                "state": self._state,
                "line": line,
                "folder": self._folder,
            }

    def stop(self) -> None:
        """End what is running; it leaves nothing half-written."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _follow(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr as said:
            for line in said:
                with self._lock:
                    self._lines.append(line.rstrip())
        code = process.wait()
        with self._lock:
            self._state = "done" if code in WRITTEN else "failed"

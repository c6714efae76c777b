"""Where long work is: bars with the remaining time on a terminal, plain lines anywhere else.

Both go to stderr, so that stdout holds results only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO, TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from attar.records import Progress

# A shorter stage gets no line of its own when it ends: a reader could not have waited for it.
SHOWN_FROM_SECONDS = 1.0


@runtime_checkable
class Stream(Protocol):
    """What is asked of stderr."""

    def write(self, text: str, /) -> Any:
        """Add text."""

    def flush(self) -> None:
        """Let it be seen."""

    def isatty(self) -> bool:
        """Say whether a person may be looking."""


def open_progress(file: Stream | None = None) -> AbstractContextManager[Progress]:
    """Choose bars or lines by what `file` (stderr) is; leaving the block clears the bars."""
    target = sys.stderr if file is None else file
    return _bars(target) if target.isatty() else _lines(target)


class LineProgress:
    """One line when a stage begins, one with the seconds when it ends."""

    def __init__(self, file: Stream) -> None:
        self._file = file

    @contextmanager
    def stage(self, name: str, total: int | float) -> Iterator[Callable[[int | float], None]]:  # noqa: ARG002
        """Write the lines; what happens between them is not shown."""
        start = time.perf_counter()
        self._write(f"{name} …")
        yield lambda _steps: None
        seconds = time.perf_counter() - start
        if seconds >= SHOWN_FROM_SECONDS:
            self._write(f"{name}: {seconds:.0f} s")

    def note(self, line: str) -> None:
        """Write the line."""
        self._write(line)

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()


class BarProgress:
    """A bar with the remaining time for each running stage, and a line for each that is done."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    @contextmanager
    def stage(self, name: str, total: int | float) -> Iterator[Callable[[int | float], None]]:
        """Show the bar while the stage runs; an interrupted stage leaves no line."""
        start = time.perf_counter()
        task = self._bars.add_task(name, total=total or None)
        try:
            yield lambda steps: self._bars.advance(task, steps)
        finally:
            self._bars.remove_task(task)
        seconds = time.perf_counter() - start
        if seconds >= SHOWN_FROM_SECONDS:
            self._bars.console.print(f"{name}: {seconds:.0f} s", style="dim", highlight=False)

    def note(self, line: str) -> None:
        """Write the line above the bars."""
        self._bars.console.print(line, highlight=False)


@contextmanager
def _lines(file: Stream) -> Iterator[Progress]:
    yield LineProgress(file)


@contextmanager
def _bars(file: Stream) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        # A step of a language model takes seconds: look back far enough to see several.
        TimeRemainingColumn(),
    )
    bars = Progress(
        *columns,
        console=Console(file=cast("IO[str]", file), markup=False, emoji=False),
        transient=True,
        speed_estimate_period=120.0,
    )
    with bars:
        yield BarProgress(bars)

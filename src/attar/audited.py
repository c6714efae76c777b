"""What `attar.audit` gives back: verdicts, and the page that shows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attar.export.text_file import write_whole
from attar.records import Exemplars, Population, Report, Verdict
from attar.report.html import report_to_html
from attar.report.population import population_to_html


@dataclass(frozen=True)
class Audit:
    """A verdict, and the page that shows it."""

    verdict: Verdict
    facts: Report

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "verdict":  # not there yet while it is being copied
            raise AttributeError(name)
        return getattr(self.verdict, name)

    def report(self, path: str | Path) -> Path:
        """Write the page.

        Raises:
            OutputError: It cannot be written.
        """
        write_whole(Path(path), report_to_html(self.facts))
        return Path(path)


@dataclass(frozen=True)
class Audits:
    """Several compressed models against one original, and the page that shows it."""

    facts: Population

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One for each compressed model, in order."""
        return tuple(report.verdict for report in self.facts.reports)

    @property
    def exemplars(self) -> Exemplars | None:
        """What most of the compressed models forget; None with fewer than three."""
        return self.facts.exemplars

    def report(self, path: str | Path) -> Path:
        """Write the page.

        Raises:
            OutputError: It cannot be written.
        """
        write_whole(Path(path), population_to_html(self.facts))
        return Path(path)

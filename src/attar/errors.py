"""Every error a user can meet.

AttarError
├── ModelError        a model that is unknown, unreadable, unsafe or broken
├── DataError         data that is missing, too little, or does not fit the model
├── BudgetError       a budget that cannot be read or cannot be met
├── PlanError         a plan that names what is not there or breaks its budget
├── CutError          a cut that would leave nothing of a layer, or of what cannot be cut
├── SettingError      a setting outside its range
├── OutputError       a folder that exists, cannot be written, or is full
└── WorkerError       workers that cannot be reached, do not fit, or were lost

Each carries what was found (`problem`) and what to type instead (`hint`). The command line prints
the two and exits with code 2.
"""

from __future__ import annotations

from functools import partial
from typing import Any


class AttarError(Exception):
    """What was found and the rule it breaks, with what to type instead.

    Attributes:
        problem: One sentence that names the thing found.
        hint: One sentence that names the next command or setting.
    """

    def __init__(self, problem: str, *, hint: str) -> None:
        super().__init__(f"{problem}\nhint: {hint}")
        self.problem = problem
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Go from one process to another whole."""
        return partial(type(self), hint=self.hint), (self.problem,)


class ModelError(AttarError, ValueError):
    """A model that is unknown, unreadable, unsafe or broken."""


class DataError(AttarError, ValueError):
    """Data that is missing, too little, or does not fit the model."""


class BudgetError(AttarError, ValueError):
    """A budget that cannot be read or cannot be met."""


class PlanError(AttarError, ValueError):
    """A plan that names what is not there or breaks its budget."""


class CutError(AttarError, ValueError):
    """A cut that would leave nothing of a layer, or of what cannot be cut."""


class SettingError(AttarError, ValueError):
    """A setting outside its range."""


class OutputError(AttarError, OSError):
    """A folder that exists, cannot be written, or is full."""


class WorkerError(AttarError, RuntimeError):
    """Workers that cannot be reached, do not fit, or were lost."""


class Terminated(KeyboardInterrupt):
    """The system, not a person at the keyboard, told the run to end (SIGTERM)."""

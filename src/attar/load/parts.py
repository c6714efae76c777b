"""What every reader of a model format hands over: enough to build and describe a `Model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from attar.records import Architecture


@dataclass(frozen=True)
class Parts:
    """A model taken apart.

    Attributes:
        task: Name in `builders.TASKS`.
        state: Tensor name, as the built module calls it, to tensor.
        origin: As in `Model`.
        licence: As in `Model`.
        files: As in `Model`.
        source_bytes: As in `Model`.
    """

    architecture: Architecture
    task: str
    state: Mapping[str, Tensor]
    origin: str
    licence: str
    files: Mapping[str, bytes]
    source_bytes: int

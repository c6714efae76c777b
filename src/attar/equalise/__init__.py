"""Changes of channels that leave the answer as it is: one file per method, and their table."""

from typing import Any

from attar.equalise.fold_hadamard import FoldHadamard
from attar.equalise.fold_karhunen_loeve import FoldKarhunenLoeve
from attar.equalise.fold_reassembly import FoldReassembly
from attar.equalise.fold_scale import FoldScale
from attar.equalise.fold_shift import FoldShift

FOLDS: dict[str, type[Any]] = {
    "fold_hadamard": FoldHadamard,
    "fold_karhunen_loeve": FoldKarhunenLoeve,
    "fold_reassembly": FoldReassembly,
    "fold_scale": FoldScale,
    "fold_shift": FoldShift,
}
"""File name in this folder to the settings that hold its method."""

"""Let a compressed model learn to answer as the original, with what it is stored as in the loop."""

from attar.heal.descend import STEPS_PER_FIT, Descent, State
from attar.heal.parts import Grid, OnGrid, Part, Whole
from attar.heal.wish import METHODS, Wish, parse_wish

__all__ = [
    "METHODS",
    "STEPS_PER_FIT",
    "Descent",
    "Grid",
    "OnGrid",
    "Part",
    "State",
    "Whole",
    "Wish",
    "parse_wish",
]

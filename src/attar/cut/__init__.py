"""Find what can only be cut together, and make a network that is really narrower."""

from attar.cut.find import find_coupled
from attar.cut.narrower import narrower
from attar.cut.surgery import cut_out

__all__ = ["cut_out", "find_coupled", "narrower"]

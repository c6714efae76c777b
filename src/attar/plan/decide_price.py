"""Least sum of prices within the bytes: our own way, and the default.

The prices are made on statistics, before anything is asked; see `solve.py`.
"""

from attar.plan.solve import solve
from attar.records import Candidate, Question


def decide(asked: Question) -> dict[str, Candidate]:
    """Solve the integer program over prices."""
    return solve(asked.candidates, asked.limit, asked.protected)

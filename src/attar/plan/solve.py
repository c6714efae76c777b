"""Choose one candidate per unit so that the least behaviour is lost within the bytes.

A multiple-choice knapsack, solved as an integer program by HiGHS (through scipy).
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from attar.errors import BudgetError
from attar.records import Candidate, Protected

# The solver stops when it has proved the plan to be within this share of the best one.
RELATIVE_GAP = 1e-3
# A unit's bytes may fall short of the best use of the budget by this share: fewer nodes to visit.
NODE_LIMIT = 20_000
# The file descriptor.
STDOUT = 1
_SILENCE = threading.RLock()


def smallest(candidates: Mapping[str, Sequence[Candidate]]) -> dict[str, Candidate]:
    """Take the fewest bytes for every unit."""
    return {
        name: min(usable(options), key=lambda c: c.cost.weight_bytes)
        for name, options in candidates.items()
    }


def weight_bytes(choices: Mapping[str, Candidate]) -> int:
    """Bytes of the units' tensors."""
    return sum(choice.cost.weight_bytes for choice in choices.values())


def allowed(candidates: Mapping[str, Sequence[Candidate]]) -> dict[str, list[Candidate]]:
    """Leave out what was refused."""
    return {
        name: [c for c in options if c.refused is None and c.predicted_damage is not None]
        for name, options in candidates.items()
    }


def usable(options: Sequence[Candidate]) -> list[Candidate]:
    """Leave out what was refused and what costs more than another that loses no more."""
    priced = [c for c in options if c.refused is None and c.predicted_damage is not None]
    priced.sort(key=lambda c: (c.cost.weight_bytes, c.predicted_damage))
    kept: list[Candidate] = []
    for candidate in priced:
        if not kept or _damage(candidate) < _damage(kept[-1]):
            kept.append(candidate)
    return kept


def solve(
    candidates: Mapping[str, Sequence[Candidate]],
    limit: int,
    protected: Sequence[Protected] = (),
) -> dict[str, Candidate]:
    """Minimise the sum of predicted damage within `limit` bytes (units' tensors only).

    Args:
        protected: Slices that may lose only so much, each one line of the program.

    Raises:
        BudgetError: Even the smallest candidates need more, or no plan within the bytes spares the
            slices; names the smallest that is reachable.
    """
    options = {name: usable(of) for name, of in candidates.items()}
    least = weight_bytes(smallest(candidates))
    if least > limit:
        raise BudgetError(
            f"no plan fits: the weights alone need {least:,} bytes at their smallest, "
            f"and the budget leaves {limit:,}.",
            hint="raise --size by at least the difference, or allow --keep fewer units.",
        )
    flat = [c for of in options.values() for c in of]
    nats = np.array([_damage(c) for c in flat])
    # Kilobytes and a largest damage of one keep the program's numbers near one.
    kilobytes = np.array([c.cost.weight_bytes for c in flat]) / 1000
    one_each = _one_each([len(of) for of in options.values()])
    with quiet():
        result = milp(
            nats / max(float(nats.max()), 1e-30),
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(kilobytes[None, :], -np.inf, limit / 1000),
                *(_spared(one, flat, nats) for one in protected),
            ],
            options={"mip_rel_gap": RELATIVE_GAP, "node_limit": NODE_LIMIT},
        )
    if result.x is None and protected:
        raise _none_spares(candidates, limit, protected)
    assert result.x is not None, result.message
    chosen, start = {}, 0
    for name, of in options.items():
        chosen[name] = of[int(np.argmax(result.x[start : start + len(of)]))]
        start += len(of)
    return _spend_the_rest(chosen, options, limit)


def slice_damage(one: Protected, choices: Mapping[str, Candidate]) -> float:
    """What choices are predicted to lose on a slice, before any correction, nats."""
    return sum((_lost_there(one, choice) for choice in choices.values()), 0.0)


def _lost_there(one: Protected, candidate: Candidate) -> float:
    return _damage(candidate) * _share(one, candidate.unit)


def _share(one: Protected, unit: str) -> float:
    """How many times as much as on all data a change of a unit loses on a slice."""
    everywhere = one.everywhere[unit]
    return one.there[unit] / everywhere if everywhere > 0 else 1.0


def _spared(one: Protected, flat: Sequence[Candidate], nats: np.ndarray) -> LinearConstraint:
    """Build the constraint that a slice loses no more than it may; numbers near one."""
    shares = np.array([_share(one, c.unit) for c in flat])
    return LinearConstraint((one.correction * shares * nats / one.nats)[None, :], -np.inf, 1)


def _none_spares(
    candidates: Mapping[str, Sequence[Candidate]], limit: int, protected: Sequence[Protected]
) -> BudgetError:
    """Say how little each slice could lose within the bytes, were it asked for alone."""
    least = []
    for one in protected:
        best = solve_by(candidates, limit, partial(_lost_there, one))
        nats = one.correction * slice_damage(one, best)
        least.append(f"{one.label} {nats:.3g} of {one.nats:g}")
    return BudgetError(
        f"no plan of this size spares the protected slices; the least that each could lose by "
        f"itself, in nats: {', '.join(least)}.",
        hint="raise --size, or let --protect SLICE:NATS lose more.",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what HiGHS now and then prints to stdout, whatever its settings say.

    One thread at a time: a second would take the first one's silence for what was there before.
    """
    with _SILENCE, _silenced():
        yield


@contextmanager
def _silenced() -> Iterator[None]:
    library = ctypes.CDLL(None) if os.name == "posix" else None
    sys.stdout.flush()
    try:
        kept = os.dup(STDOUT)
    except OSError:  # nothing is open there
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDOUT)
    try:
        yield
    finally:
        if library is not None:
            library.fflush(None)
        os.dup2(kept, STDOUT)
        os.close(kept)
        os.close(nowhere)


def solve_by(
    candidates: Mapping[str, Sequence[Candidate]], limit: int, loss: Callable[[Candidate], float]
) -> dict[str, Candidate]:
    """Minimise the sum of another loss than the predicted damage; see `solve`."""
    if not candidates:
        return {}
    priced = {
        name: [replace(c, predicted_damage=loss(c)) for c in options]
        for name, options in candidates.items()
    }
    back = {
        id(new): old
        for name, options in candidates.items()
        for new, old in zip(priced[name], options, strict=True)
    }
    return {name: back[id(chosen)] for name, chosen in solve(priced, limit).items()}


def _one_each(counts: Sequence[int]) -> csr_array:
    """Build the constraint that each unit takes exactly one of its candidates."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))


def _spend_the_rest(
    chosen: dict[str, Candidate],
    options: Mapping[str, Sequence[Candidate]],
    limit: int,
) -> dict[str, Candidate]:
    """Use what the solver's gap left over: take the step that saves most nats, while one fits."""
    left = limit - weight_bytes(chosen)
    while True:
        steps = [
            (_damage(chosen[name]) - _damage(option), name, option)
            for name, of in options.items()
            for option in of
            if 0 < option.cost.weight_bytes - chosen[name].cost.weight_bytes <= left
        ]
        steps = [step for step in steps if step[0] > 0]
        if not steps:
            return chosen
        _, name, option = max(steps, key=lambda step: (step[0], step[1]))
        left -= option.cost.weight_bytes - chosen[name].cost.weight_bytes
        chosen = {**chosen, name: option}


def _damage(candidate: Candidate) -> float:
    assert candidate.predicted_damage is not None
    return candidate.predicted_damage

"""One width for all, and finer groups for the few weights that have outliers; nothing is run.

Every unit is rounded to nearest at one width with one scale for each row. The units whose rows
reach furthest beyond what is usual in them, a few percent at most, get a scale for each group of
columns. Which they are is read from the weights alone.

Source: Qin 2024, The uniqueness of LLaMA3-70B with per-channel quantization: An empirical study,
https://arxiv.org/abs/2408.15301 (the mixed strategy: under 3% of the layers, by their weights). We
differ in three ways. A unit's outliers are measured, as the mean over rows of max² / mean², where
the paper looks at the distributions and names the layers. The width is the widest that fits the
bytes, where the paper has 8 bits. Activations are a matter of `--activations`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from torch import Tensor

from attar.plan.candidates import Build, Treatment, group_sizes
from attar.plan.solve import allowed, smallest, weight_bytes
from attar.records import Candidate, Question, Unit

# At most this share of the units gets finer groups, and one may in a small network.
SHARE = 0.03
# Outliers this many times those of the median unit make a weight vulnerable.
VULNERABLE = 3.0
WIDTHS = (8, 6, 5, 4, 3, 2)

Options = Mapping[str, Sequence[Candidate]]


def menu(unit: Unit, build: Build) -> list[Treatment]:
    """List round-to-nearest at every width, with one scale for a row and with the finest groups."""
    sizes = dict.fromkeys((0, group_sizes(unit.columns)[0]))
    treatments: list[Treatment] = [
        ("quantize_rtn", {"bits": bits, "group_size": size, "symmetric": True})
        for bits in WIDTHS
        for size in sizes
    ]
    return [one for one in treatments if build(*one).rejects(unit) is None]


def decide(asked: Question) -> dict[str, Candidate]:
    """Take the widest width at which all units fit; drop finer groups before going narrower."""
    options = allowed(asked.candidates)
    fine = vulnerable({name: asked.weight(name) for name in options})
    for bits in WIDTHS:
        for count in range(len(fine), -1, -1):
            plan = {name: _at(of, bits, fine=name in fine[:count]) for name, of in options.items()}
            if weight_bytes(plan) <= asked.limit:
                return plan
    return smallest(asked.candidates)


def vulnerable(weights: Mapping[str, Tensor]) -> list[str]:
    """Name the weights with outliers beyond the usual, the worst first."""
    found = {name: outliers(weight) for name, weight in weights.items()}
    usual = median(found.values())
    most = math.ceil(SHARE * len(found))
    worst = sorted(found, key=lambda name: -found[name])[:most]
    return [name for name in worst if found[name] > VULNERABLE * usual]


def outliers(weight: Tensor) -> float:
    """Mean over rows of the largest square over the mean square.

    Rounding a row to its own largest errs by a share of the row that grows with this.

    Args:
        weight: `rows columns`.
    """
    squares = weight.double().square()
    mean = squares.mean(1)
    used = mean > 0
    return float((squares.amax(1)[used] / mean[used]).mean()) if bool(used.any()) else 0.0


def _at(options: Sequence[Candidate], bits: int, *, fine: bool) -> Candidate:
    """The coarsest grid of these bits, or the finest; of a unit without, the narrowest there is."""
    of_width = [c for c in options if c.settings.get("bits") == bits] or list(options)
    choose = max if fine else min
    return choose(of_width, key=lambda c: c.cost.weight_bytes)

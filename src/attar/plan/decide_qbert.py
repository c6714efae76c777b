"""Two widths: the wider for units whose curvature has the largest eigenvalue.

A unit's worth is |mean| + spread, over parts of the data, of the largest eigenvalue of its
curvature. All units get a narrow width, and then, the worthiest first, a wide one while it fits.

Source: Shen et al. 2020, Q-BERT: Hessian based ultra low precision quantization of BERT,
https://arxiv.org/abs/1909.05840, section 3.1, eq. 4. We differ in three ways. The curvature is the
Kronecker-factored Fisher information, whose largest eigenvalue is the product of those of its
factors, found by power iteration as in the paper; no labels are needed. There are two parts of the
data, not ten. The widths lie a bit below and a bit above the widest that all units could have
within the bytes, where the paper's are set by hand.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attar.plan.solve import allowed, weight_bytes
from attar.records import Candidate, Curvature, Question, Units

# Bits below and above the widest width that all units could have, and by how much what is stored
# beside the codes may differ from unit to unit.
BITS_APART, SLACK = 1.0, 0.25
ITERATIONS = 50

Options = Mapping[str, Sequence[Candidate]]


def decide(asked: Question) -> dict[str, Candidate]:
    """Rank units, then widen from the top while it fits."""
    options = {
        name: [c for c in of if c.treatment.startswith("quantize")] or of
        for name, of in allowed(asked.candidates).items()
    }
    worth = {u.name: worth_of(asked.statistics.curvatures[u.name]) for u in asked.units}
    even = _even_bits(options, asked.units, asked.limit)
    narrow = at_width(options, asked.units, even - BITS_APART + SLACK)
    wide = at_width(options, asked.units, even + BITS_APART + SLACK)
    if weight_bytes(narrow) > asked.limit:  # what is pinned, or cannot be narrow, takes the room
        narrow = at_width(options, asked.units, 0.0)
    left = asked.limit - weight_bytes(narrow)
    chosen = dict(narrow)
    for name in sorted(worth, key=lambda unit: -worth[unit]):
        more = wide[name].cost.weight_bytes - narrow[name].cost.weight_bytes
        if 0 < more <= left:
            chosen[name], left = wide[name], left - more
    return chosen


def worth_of(curvatures: Sequence[Curvature]) -> float:
    """|mean| + spread over the two halves of the data of the largest eigenvalue."""
    halves = torch.zeros(2, dtype=torch.float64)
    for curvature in curvatures:
        rows_first = curvature.rows if curvature.rows_first is None else curvature.rows_first
        pairs = ((rows_first, curvature.first), (curvature.rows_second, curvature.second))
        for half, (rows, columns) in enumerate(pairs):
            halves[half] += largest_eigenvalue(rows) * largest_eigenvalue(columns)
    return float(halves.mean().abs() + halves.std(correction=0))


def largest_eigenvalue(factor: Tensor) -> float:
    """Largest over the groups of one factor.

    Args:
        factor: `groups side side`, symmetric and without negative eigenvalues, or a diagonal.
    """
    if factor.dim() == 1:
        return float(factor.max())
    matrices = factor.double()
    vector = torch.ones(len(matrices), matrices.shape[1], 1, dtype=torch.float64)
    for _ in range(ITERATIONS):
        moved = matrices @ vector
        vector = moved / moved.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return float((vector.mT @ matrices @ vector).max())


def _even_bits(options: Options, units: Units, limit: int) -> float:
    """Find the widest width within which every unit fits."""
    widths = sorted({bits(c, units) for of in options.values() for c in of})
    fitting = [w for w in widths if weight_bytes(at_width(options, units, w)) <= limit]
    return max(fitting, default=widths[0])


def at_width(options: Options, units: Units, width: float) -> dict[str, Candidate]:
    """Take the widest candidate of each unit within so many stored bits per weight."""
    chosen = {}
    for name, of in options.items():
        narrowest = min(of, key=lambda c: c.cost.weight_bytes)
        within = [c for c in of if bits(c, units) <= width]
        chosen[name] = max(within, key=lambda c: c.cost.weight_bytes, default=narrowest)
    return chosen


def bits(candidate: Candidate, units: Units) -> float:
    """Stored bits per weight."""
    return 8 * candidate.cost.weight_bytes / units.named(candidate.unit).n_weights

"""Relevance: the more of an answer is traced back through a unit, the wider it is stored.

A unit's contribution is the relevance at its output, summed over channels without its sign, as a
share of that of all units. Within the bytes, the sum of contribution · 4^−bits is least: each bit
more halves the step of a rounding error and quarters its square.

Source: Ranjan and Savakis 2024, LRP-QViT: Mixed-precision vision transformer quantization via
layer-wise relevance propagation, https://arxiv.org/abs/2401.11243 (contribution scores, mixed
precision); Bach et al. 2015, On pixel-wise explanations for non-linear classifier decisions by
layer-wise relevance propagation, https://doi.org/10.1371/journal.pone.0130140, eq. 58 (epsilon
rule); Ancona et al. 2018, https://arxiv.org/abs/1711.06104, proposition 1: with epsilon gone to 0,
relevance is the output times its gradient, which is what we gather. We differ in four ways. The
gradient is that of the log-probability of answers drawn from the model, where the paper traces the
logit of one class. Relevance passes through softmax, products and norms by their gradients, where
the paper has rules of their own. Bits are shared out by the least sum above, and over the menu's
candidates, not over a few widths. Activations stay as they are, so its clipping of their channels
is not here.
"""

from collections.abc import Mapping

from attar.plan.decide_qbert import bits
from attar.plan.solve import allowed, solve_by
from attar.records import Candidate, Question, Statistics


def decide(asked: Question) -> dict[str, Candidate]:
    """Share out bytes by contribution."""
    worth = contributions(asked.statistics, list(asked.candidates))
    options = {
        name: [c for c in of if c.treatment.startswith("quantize")] or of
        for name, of in allowed(asked.candidates).items()
    }
    return solve_by(options, asked.limit, lambda c: worth[c.unit] * 4.0 ** -bits(c, asked.units))


def contributions(statistics: Statistics, names: list[str]) -> Mapping[str, float]:
    """Share of each unit; the mean for a table that is only looked up, of which none is known."""
    found = {
        name: float(statistics.channel_taylor[name].double().sum())
        for name in names
        if name in statistics.channel_taylor
    }
    mean = sum(found.values()) / len(found) if found else 1.0
    whole = (mean or 1.0) * len(names)
    return {name: found.get(name, mean) / whole for name in names}

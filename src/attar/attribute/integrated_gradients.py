"""Integrated gradients: parts that sum to what the whole input changed.

    eᵢ = (xᵢ − x'ᵢ) ∫₀¹ ∂f(x' + t(x − x')) / ∂xᵢ dt,        and the eᵢ sum to f(x) − f(x')

so nothing is counted twice or left out.

Source: Sundararajan, Taly and Yan 2017, Axiomatic attribution for deep networks,
https://arxiv.org/abs/1703.01365, eq. 1 and proposition 1 (completeness). The integral is by the
midpoint rule; they sum at the right end of each step (eq. 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attar.attribute.question import POINTS_AT_ONCE, Asked, Explained, Question, Way
from attar.records import Batch

# How near the parts must come to summing to the whole, as a share, and steps taken for it at most.
NEAR, MOST_STEPS = 0.05, 64


@dataclass(frozen=True)
class IntegratedGradients:
    """Gradients along the straight path from the baseline.

    Attributes:
        steps: Of the sum that stands for the integral, >= 1; 0: as the question's way says, and
            twice as many again and again while the parts do not sum to what they should.
    """

    steps: int = 0
    complete = True

    def __call__(self, question: Question) -> Tensor:
        """Explain; in the shape of the question's map."""
        if self.steps:
            return along_path(question, self.steps)
        steps, whole = question.way.steps, question.whole_change()
        found = along_path(question, steps)
        while abs(float(found.sum()) - whole) > NEAR * abs(whole) and 2 * steps <= MOST_STEPS:
            steps *= 2
            found = along_path(question, steps)
        return found


def integrated_gradients(model: Explained, sample: Batch, asked: Asked, way: Way) -> Tensor:
    """Explain one prediction of a batch of one; in the shape of the question's map.

    Raises:
        DataError: No gradient of the answer reaches the input.
    """
    return along_path(Question(model, sample, asked, way), way.steps)


def along_path(question: Question, steps: int) -> Tensor:
    """Sum the slopes at the middles of the path's steps."""
    middles = (torch.arange(steps) + 0.5) / steps
    total = torch.zeros_like(question.point[0])
    for points in torch.split(middles, POINTS_AT_ONCE):
        slopes = question.slopes(question.between(points))
        total = total + (question.change * slopes).sum(0) / steps
    return question.to_map(total[None])[0]

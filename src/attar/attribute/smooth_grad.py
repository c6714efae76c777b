"""Gradients of many noisy copies of the input, averaged.

    e = mean over n copies of  (x − x') · ∂f/∂x at x + noise,     noise ~ N(0, σ²)

Source: Smilkov et al. 2017, SmoothGrad: removing noise by adding noise,
https://arxiv.org/abs/1706.03825, section 3.1. They average the gradient alone; here it is
multiplied by x − x' (their section 3.3), so that the sign says for or against the answer.
σ is a share of the range of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attar.attribute.question import POINTS_AT_ONCE, Question


@dataclass(frozen=True)
class SmoothGrad:
    """Averaged gradient times the input's distance from the baseline.

    Attributes:
        copies: With noise, >= 1.
        noise: Standard deviation, as a share of the largest less the smallest number of x.
    """

    copies: int = 32
    noise: float = 0.1
    complete = False

    def __call__(self, question: Question) -> Tensor:
        """Explain; in the shape of the question's map."""
        draws = question.draws()
        x = question.point
        spread = self.noise * float(x.max() - x.min())
        total = torch.zeros_like(x[0])
        for start in range(0, self.copies, POINTS_AT_ONCE):
            n = min(POINTS_AT_ONCE, self.copies - start)
            noise = torch.randn(n, *x.shape[1:], generator=draws, dtype=x.dtype)
            total = total + question.slopes(x + spread * noise).sum(0) / self.copies
        return question.to_map(question.change * total)[0]

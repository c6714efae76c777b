"""Shapley values by sampled orders: what a feature adds to those before it, averaged over orders.

Every order is also walked in reverse, which takes away much of the variance. The values of each
order sum to f(x) − f(x') exactly, and so do their means.

Source: Štrumbelj and Kononenko 2010, An efficient explanation of individual classifications using
game theory, https://www.jmlr.org/papers/v11/strumbelj10a.html, eq. 4 and algorithm 1; the baseline
takes the place of their drawn samples. Reversed orders: Mitchell et al. 2022, Sampling permutations
for Shapley value estimation, https://arxiv.org/abs/2104.12199, section 2.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attar.attribute.features import spread
from attar.attribute.occlusion import answers_with
from attar.attribute.question import Question


@dataclass(frozen=True)
class ShapleySampling:
    """Mean of what each feature adds.

    Attributes:
        orders: Drawn, each walked in both directions, >= 1.
    """

    orders: int = 8
    complete = True

    def __call__(self, question: Question) -> Tensor:
        """Explain; in the shape of the question's map, each feature spread over its places."""
        draws = question.draws()
        n = question.n_features
        values = torch.zeros(n, dtype=torch.float64)
        for _ in range(self.orders):
            order = torch.randperm(n, generator=draws)
            for one in (order, order.flip(0)):
                added = answers_with(question, _growing(one)).diff()
                values[one] += added / (2 * self.orders)
        return spread(values, question.features)


def _growing(order: Tensor) -> Tensor:
    """Sets of the first 0, 1, … features of an order, `features + 1  features`."""
    n = len(order)
    rank = torch.empty(n, dtype=torch.long)
    rank[order] = torch.arange(n)
    return rank[None] < torch.arange(n + 1)[:, None]

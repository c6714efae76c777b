"""Shapley values as the weighted least squares line through answers to sampled sets of features.

    minimise  Σ_S w(|S|) (f(S) − f(x') − Σ_{i in S} vᵢ)²   so that  Σ vᵢ = f(x) − f(x')
    w(s) = (n − 1) / (C(n, s) · s · (n − s))

Sizes of sets are drawn as often as all sets of that size weigh together, so that each drawn set
counts once; every set comes with its complement.

Source: Lundberg and Lee 2017, A unified approach to interpreting model predictions,
https://arxiv.org/abs/1705.07874, theorem 2; the paired draws: Covert and Lee 2021, Improving
KernelSHAP, https://arxiv.org/abs/2012.01536, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attar.attribute.features import spread
from attar.attribute.occlusion import answers_with
from attar.attribute.question import Question

# Of the diagonal: fewer sets than features leave some directions open.
DAMPING = 1e-9


@dataclass(frozen=True)
class KernelShap:
    """Shapley values by regression.

    Attributes:
        sets: Of features that are asked for, >= 2; 0: 2 · features + 128.
    """

    sets: int = 0
    complete = True

    def __call__(self, question: Question) -> Tensor:
        """Explain; in the shape of the question's map, each feature spread over its places."""
        draws = question.draws()
        n = question.n_features
        ends = torch.tensor([[False] * n, [True] * n])
        empty, whole = answers_with(question, ends)
        if n == 1:
            return spread((whole - empty)[None], question.features)
        there = drawn_sets(n, self.sets or 2 * n + 128, draws)
        gains = answers_with(question, there) - empty
        return spread(solved(there.double(), gains, whole - empty), question.features)


def drawn_sets(n: int, sets: int, draws: torch.Generator) -> Tensor:
    """Sets of features and their complements, `sets features`."""
    sizes = torch.arange(1, n, dtype=torch.float64)
    size = 1 + torch.multinomial(
        1 / (sizes * (n - sizes)), max(1, sets // 2), replacement=True, generator=draws
    )
    rank = torch.rand(len(size), n, generator=draws).argsort(1).argsort(1)
    own = rank < size[:, None]
    return torch.cat([own, ~own])


def solved(there: Tensor, gains: Tensor, whole: Tensor) -> Tensor:
    """Least squares under the one constraint, by its Lagrange multiplier."""
    n = there.shape[1]
    squares = there.T @ there / len(there)
    squares += DAMPING * squares.diagonal().mean() * torch.eye(n, dtype=there.dtype)
    right = there.T @ gains / len(there)
    ones = torch.ones(n, dtype=there.dtype)
    free, along = torch.linalg.solve(squares, torch.stack([right, ones], 1)).T
    found: Tensor = free - along * (free.sum() - whole) / along.sum()
    return found

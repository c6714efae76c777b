"""The straight line that is closest to the model near the input.

    minimise  Σ_S π(S) (f(S) − b − Σ_{i in S} vᵢ)² + ridge · |v|²,    π(S) = exp(−d(S)² / width²)

d is the cosine distance of S from the set of all features.

Source: Ribeiro, Singh and Guestrin 2016, "Why should I trust you?",
https://arxiv.org/abs/1602.04938, eq. 1 and 2, section 3.4 and algorithm 1. They choose K features
by Lasso first; here all keep their value. Width and draws are those of their code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attar.attribute.features import spread
from attar.attribute.occlusion import answers_with
from attar.attribute.question import Question


@dataclass(frozen=True)
class Lime:
    """A local linear model of which features are there.

    Attributes:
        sets: Of features that are asked for, >= 1; 0: 2 · features + 128.
        width: Of the kernel, in cosine distance.
        ridge: Times the weight of all sets.
    """

    sets: int = 0
    width: float = 0.25
    ridge: float = 1e-3
    complete = False

    def __call__(self, question: Question) -> Tensor:
        """Explain; in the shape of the question's map, each feature spread over its places."""
        draws = question.draws()
        n = question.n_features
        there = torch.rand(self.sets or 2 * n + 128, n, generator=draws) < 0.5
        there[0] = True
        answers = answers_with(question, there)
        share = there.double().mean(1)
        near = torch.exp(-((1 - share.sqrt()) ** 2) / self.width**2)
        near = near / near.sum()
        own = there.double() - near @ there.double()
        squares = (near[:, None] * own).T @ own + self.ridge * torch.eye(n, dtype=torch.float64)
        right = own.T @ (near * (answers - near @ answers))
        return spread(torch.linalg.solve(squares, right), question.features)

"""What the answer loses when one feature after the other is taken away.

Source: Zeiler and Fergus 2014, Visualizing and understanding convolutional networks,
https://arxiv.org/abs/1311.2901, section 4.2. They slide a grey square over the picture; here the
features (squares of pixels, tokens, columns) do not overlap, and stand at the baseline.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attar.attribute.features import spread
from attar.attribute.question import Question


@dataclass(frozen=True)
class Occlusion:
    """f(x) less f with one feature at the baseline."""

    complete = False

    def __call__(self, question: Question) -> Tensor:
        """Explain; in the shape of the question's map, each feature spread over its places."""
        n = question.n_features
        there = torch.cat([torch.ones(1, n, dtype=torch.bool), ~torch.eye(n, dtype=torch.bool)])
        answers = answers_with(question, there)
        return spread(answers[0] - answers[1:], question.features)


def answers_with(question: Question, there: Tensor) -> Tensor:
    """f for many sets of features, `sets`, a few at a time."""
    parts = torch.split(there, 64)
    return torch.cat([question.answers(question.present(part)) for part in parts])

"""What the answer would change if it were a straight line from the input to the baseline.

Source: Shrikumar et al. 2016, Not just a black box, https://arxiv.org/abs/1605.01713, section 2
(gradient times input). With a baseline that is not zero, x − x' takes the place of x.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attar.attribute.question import Question


@dataclass(frozen=True)
class InputXGradient:
    """Gradient at the input times the input's distance from the baseline."""

    complete = False

    def __call__(self, question: Question) -> Tensor:
        """Explain; in the shape of the question's map."""
        return question.to_map(question.change * question.slopes(question.point))[0]

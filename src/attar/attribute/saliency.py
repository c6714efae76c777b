"""How fast the answer changes with each part of the input, whatever its direction.

Source: Simonyan, Vedaldi and Zisserman 2014, Deep inside convolutional networks,
https://arxiv.org/abs/1312.6034, section 3.1. They take the largest of a pixel's channels; here the
absolute slopes of its channels, or of a token's vector, are summed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attar.attribute.question import Question


@dataclass(frozen=True)
class Saliency:
    """Absolute gradient at the input."""

    complete = False

    def __call__(self, question: Question) -> Tensor:
        """Explain; in the shape of the question's map, without a sign."""
        return question.to_map(question.slopes(question.point).abs())[0]

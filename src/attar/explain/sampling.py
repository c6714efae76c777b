"""Answers sampled from the model itself, and the way back from them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from attar.divergence import Divergence

# Predictions whose gradient is drawn at once: each takes a few times the width of an answer.
PREDICTIONS_AT_ONCE = 128


def drawn_gradient(
    divergence: Divergence, outputs: Tensor, mask: Tensor, generator: torch.Generator
) -> Tensor:
    """Gradient of an answer sampled for every prediction, a few predictions at a time.

    Args:
        outputs: `samples predictions width`, without a graph.
        mask: Which of them are predictions; the gradient is 0 elsewhere.
    """
    return of_predictions(
        outputs, mask, lambda at: divergence.sampled_gradient(outputs[at], generator)
    )


def of_predictions(
    outputs: Tensor, mask: Tensor, make: Callable[[tuple[Tensor, ...]], Tensor]
) -> Tensor:
    """Fill the shape of the outputs, 0 where there is no prediction, a few predictions at a time.

    Args:
        make: Places of some predictions to what stands there, `predictions width`.
    """
    filled = torch.zeros_like(outputs)
    for where in torch.split(mask.nonzero(), PREDICTIONS_AT_ONCE):
        at = where.unbind(1)
        filled[at] = make(at)
    return filled


def go_back(
    edge: GradientEdge, kept: list[Tensor], draw: Callable[[Tensor], Tensor], draws: int
) -> None:
    """Run the gradients of sampled answers backward.

    Args:
        edge: Where the outputs were made.
        kept: The outputs, without a graph. A language model's are large and the way back does not
            need them: they are taken out before it, and should be held nowhere else.
        draw: Outputs to the gradient of one sampled answer for each prediction.
    """
    for left in reversed(range(draws)):
        gradient = draw(kept[0])
        if left == 0:
            kept.clear()
        torch.autograd.backward(edge, gradient, retain_graph=left > 0)

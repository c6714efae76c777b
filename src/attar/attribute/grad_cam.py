"""Where the last maps of a convolutional network speak for the answer.

    e = relu(Σ_k α_k A_k),    α_k = mean over places of ∂f/∂A_k,    A the last map of convolutions

enlarged to the size of the picture.

Source: Selvaraju et al. 2017, Grad-CAM, https://arxiv.org/abs/1610.02391, eq. 1 and 2. f is the
log-probability here; they follow the score before the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from attar.attribute.question import Question
from attar.errors import DataError
from attar.sites import Call, tracked


@dataclass(frozen=True)
class GradCam:
    """Maps of the last convolution, weighted by their gradients."""

    complete = False

    def __call__(self, question: Question) -> Tensor:
        """Explain; in the shape of the picture, nowhere negative.

        Raises:
            DataError: No picture, or a network without a map of convolutions.
        """
        if question.point.dim() != 4:
            raise _refused(question, "explains pictures")
        maps: list[Tensor] = []

        def visit(call: Call) -> Tensor:
            output = call.run()
            if call.operation != "convolution" or output.dim() != 4 or output.shape[-1] == 1:
                return output
            maps.append(output if output.requires_grad else tracked(output))
            return maps[-1].clone()

        with torch.enable_grad():
            answer = question.run(question.point, visit)
        if not maps:
            raise _refused(question, "needs maps of convolutions")
        (gradient,) = torch.autograd.grad(answer.sum(), maps[-1])
        weights = gradient.mean((2, 3), keepdim=True)
        seen = (weights * maps[-1].detach()).sum(1, keepdim=True).relu()
        size = tuple(question.point.shape[-2:])
        return interpolate(seen, size=size, mode="bilinear", align_corners=False)[0, 0]


def _refused(question: Question, why: str) -> DataError:
    return DataError(
        f"grad_cam {why}, which {question.model.name} has none of.",
        hint="use --method integrated_gradients.",
    )

"""Which units one prediction rests on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import torch
from torch import Tensor

from attar.attribute.question import Asked, Explained
from attar.records import Batch
from attar.sites import Call, substituted, tracked, watched


def unit_relevance(
    model: Explained, sample: Batch, asked: Asked, units: Collection[str]
) -> dict[str, float]:
    """Sum |output × gradient| over the outputs of each unit, for one prediction of one sample.

    The gradient is that of the number asked for, at the sample itself. The criterion `taylor` takes
    the same product, of the gradients of sampled answers, by channel.
    """
    sums: dict[str, float] = defaultdict(float)

    def visit(call: Call) -> Tensor:
        unit, output = call.name.removesuffix(".weight"), call.run()
        if unit not in units:
            return output
        if not output.requires_grad:
            output = tracked(output)
        kept = output.detach().clone()  # the model may go on to change it in place

        def meet(gradient: Tensor) -> None:
            sums[unit] += float((kept * gradient).abs().double().sum())

        output.register_hook(meet)  # type: ignore[no-untyped-call]
        return output

    with (
        torch.enable_grad(),
        substituted(model.module, model.weights),
        watched(model.module, visit),
    ):
        asked.of(model.task.forward(model.module, sample)).sum().backward()  # type: ignore[no-untyped-call]
    return dict(sums)

"""Price given changes where the model now stands, without keeping any A or G.

A forward and backward pass over a little data, in which each weight's change is also multiplied
with what enters the weight: 1/2 · E[(g·dW x)²], the same second-order damage as `price`, but for
one change only, with no Kronecker assumption, and at any point (the compressed one, say).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from threading import Lock

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from attar.disk import Stash, lies_on_disk
from attar.divergence import Divergence
from attar.explain.moments import POSITIONS_AT_ONCE
from attar.explain.sampling import drawn_gradient, go_back, tracked
from attar.explain.statistics import pieces
from attar.memory import release
from attar.parallel import in_order
from attar.records import Batch, Model, Progress
from attar.sites import Call, bias_name, substituted, watched

# Language models go back one at a time: there the outputs' gradient, the change and the decoded
# weight of a large vocabulary meet.
_one_goes_back = Lock()

Changes = Mapping[str, Callable[[], Tensor]]
"""Parameter name to a function that makes its change, in the shape the module holds."""


@dataclass(frozen=True)
class Probed:
    """Damage of one unit's change, nats per prediction.

    Attributes:
        independent: Positions of one sample taken as independent, as `price` takes them.
        coherent: Positions of one sample summed first, so that a steady shift counts in full.
    """

    independent: float
    coherent: float


def probe(
    model: Model,
    changes: Changes,
    batches: Sequence[Batch],
    divergence: Divergence,
    *,
    seed: int,
    draws: int,
    progress: Progress,
    weights: Changes | None = None,
) -> dict[str, Probed]:
    """Price every weight's change, with its bias's, where the model runs with `weights`.

    Args:
        weights: Parameter name to what makes the weight to use, as for `sites.substituted`: a
            compressed point. None: the model's own.
        draws: Answers sampled per prediction.

    Returns:
        Unit name to damage.
    """

    def price_batch(number: int) -> tuple[dict[str, list[float]], int]:
        generator = torch.Generator().manual_seed(seed * len(batches) + number)
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        predictions = 0
        for piece, _ in pieces(batches[number], (), model):
            stash = Stash(on_disk=lies_on_disk(model.module))
            with substituted(model.module, weights or {}):
                outputs = _run(model, piece, changes, sums, stash)
            mask = piece.get("mask", torch.ones(outputs.shape[:2], dtype=torch.bool))
            predictions += int(mask.sum())
            edge, kept = get_gradient_edge(outputs), [outputs.detach()]
            del outputs
            draw = partial(drawn_gradient, divergence, mask=mask, generator=generator)
            with _one_goes_back if model.task.name == "language" else nullcontext():
                go_back(edge, kept, draw, draws)
            del edge
            stash.close()
            release()
        return sums, predictions

    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    predictions = 0
    with progress.stage("price again", len(batches)) as advance:
        for sums, seen in in_order(price_batch, range(len(batches))):
            predictions += seen
            for name, (alone, joint) in sums.items():
                total[name] = [total[name][0] + alone, total[name][1] + joint]
            advance(1)
    scale = 0.5 / (predictions * draws)
    return {name: Probed(scale * alone, scale * joint) for name, (alone, joint) in total.items()}


def _run(
    model: Model, batch: Batch, changes: Changes, sums: dict[str, list[float]], stash: Stash
) -> Tensor:
    """Run forward; the sums grow when the result is run backward."""
    samples = len(next(iter(batch.values())))

    def visit(call: Call) -> Tensor:
        output = call.run()
        make = changes.get(call.name)
        if make is None:
            return output
        if not output.requires_grad:
            output = tracked(output)
        plain = {k: v for k, v in call.arguments.items() if k not in ("bias", "input")}
        entered = stash.put(call.input.detach())
        moved_bias = changes.get(bias_name(call.name))
        if moved_bias is not None:
            plain["bias"] = moved_bias()

        @torch.no_grad()
        def move(x: Tensor, change: Tensor) -> Tensor:
            return call.function(**{**plain, "input": x, "weight": change})

        # What is moved is as large as the output, so a language model's is made on the way back;
        # another model may have overwritten the input by then.
        later = model.task.name == "language"
        moved = None if later else move(call.input.detach(), make())

        def meet(g: Tensor) -> None:
            if moved is None:
                slopes = _slopes_by_parts(move, entered(), make(), g)
            else:
                slopes = (moved * g).sum(1 if call.operation == "convolution" else -1)
            _add(sums[call.name.removesuffix(".weight")], slopes, samples)

        output.register_hook(meet)  # type: ignore[no-untyped-call]
        return output

    ready = {
        name: t.detach().clone().requires_grad_() if t.is_floating_point() else t
        for name, t in batch.items()
    }
    with torch.enable_grad(), stash.of_autograd(), watched(model.module, visit):
        return model.task.forward(model.module, ready)


def _slopes_by_parts(
    move: Callable[[Tensor, Tensor], Tensor], x: Tensor, change: Tensor, g: Tensor
) -> Tensor:
    """g·dW x of a linear map or an embedding, at each position, a few at a time."""
    inputs = x.flatten() if g.dim() == x.dim() + 1 else x.flatten(0, -2)  # tokens, or vectors
    gradients = torch.split(g.flatten(0, -2), POSITIONS_AT_ONCE)
    parts = zip(torch.split(inputs, POSITIONS_AT_ONCE), gradients, strict=True)
    return torch.cat([move(part, change).mul_(gradient).sum(-1) for part, gradient in parts])


def _add(total: list[float], slopes: Tensor, samples: int) -> None:
    """Add the squares of g·dW x: of each position, and of each sample's sum."""
    slopes = slopes.reshape(samples if slopes.numel() % samples == 0 else slopes.numel(), -1)
    total[0] += float(slopes.double().square().sum())
    total[1] += float(slopes.double().sum(1).square().sum())

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
from attar.divergence import Divergence, predictions_mask
from attar.explain.moments import NUMBERS_AT_ONCE
from attar.explain.sampling import drawn_gradient, go_back
from attar.explain.statistics import pieces
from attar.memory import release
from attar.parallel import in_order
from attar.records import Batch, Model, Progress
from attar.sites import Call, bias_name, substituted, tracked, watched

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


Sums = dict[str, list[float]]
Met = Callable[[str, Tensor], None]
"""Told, on the way back, a unit and g·dW x of its change, `samples positions`."""


def probe(
    model: Model,
    changes: Sequence[Changes],
    batches: Sequence[Batch],
    divergence: Divergence,
    *,
    seed: int,
    draws: int,
    progress: Progress,
    weights: Changes | None = None,
) -> list[dict[str, Probed]]:
    """Price every weight's change, with its bias's, where the model runs with `weights`.

    Args:
        changes: One or several of each weight, each set priced for itself: one way back does for
            all of them.
        weights: Parameter name to what makes the weight to use, as for `sites.substituted`: a
            compressed point. None: the model's own.
        draws: Answers sampled per prediction.

    Returns:
        Of each set, unit name to damage.
    """

    def price_batch(number: int) -> tuple[list[Sums], int]:
        generator = torch.Generator().manual_seed(seed * len(batches) + number)
        sums, predictions = _none_yet(changes), 0
        met = [partial(_add, of) for of in sums]
        for piece, _ in pieces(batches[number], (), model):
            stash = Stash(on_disk=lies_on_disk(model.module))
            with substituted(model.module, weights or {}):
                outputs = run_meeting(model, piece, changes, met, stash)
            mask = predictions_mask(outputs, piece)
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

    totals, predictions = _none_yet(changes), 0
    with progress.stage("price again", len(batches)) as advance:
        for found, seen in in_order(price_batch, range(len(batches))):
            predictions += seen
            _grow(totals, found)
            advance(1)
    return [_probed(total, 0.5 / (predictions * draws)) for total in totals]


def _probed(total: Sums, scale: float) -> dict[str, Probed]:
    return {name: Probed(scale * alone, scale * joint) for name, (alone, joint) in total.items()}


def _grow(totals: Sequence[Sums], found: Sequence[Sums]) -> None:
    for total, sums in zip(totals, found, strict=True):
        for name, (alone, joint) in sums.items():
            total[name] = [total[name][0] + alone, total[name][1] + joint]


def _none_yet(changes: Sequence[Changes]) -> list[Sums]:
    return [defaultdict(lambda: [0.0, 0.0]) for _ in changes]


def run_meeting(
    model: Model, batch: Batch, changes: Sequence[Changes], met: Sequence[Met], stash: Stash
) -> Tensor:
    """Run forward; when the result is run backward, the gradient meets what each change moves.

    Args:
        changes: One or several of each weight.
        met: What is told of each of these sets.
    """
    samples = len(next(iter(batch.values())))

    def visit(call: Call) -> Tensor:
        output = call.run()
        made = [
            (_Moved(call, own), tell)
            for own, tell in zip(changes, met, strict=True)
            if call.name in own
        ]
        if not made:
            return output
        if not output.requires_grad:
            output = tracked(output)
        # What is moved is as large as the output, so a language model's is made on the way back;
        # another model may have overwritten the input by then.
        later = model.task.name == "language"
        entered = stash.put(call.input.detach()) if later else None
        moved = [] if later else [one.whole(call.input.detach()) for one, _ in made]

        def meet(g: Tensor) -> None:
            for place, (one, tell) in enumerate(made):
                if entered is not None:
                    slopes = one.slopes_by_parts(entered(), g)
                else:
                    slopes = (moved[place] * g).sum(1 if call.operation == "convolution" else -1)
                tell(call.name.removesuffix(".weight"), _by_sample(slopes, samples))

        output.register_hook(meet)  # type: ignore[no-untyped-call]
        return output

    ready = {
        name: t.detach().clone().requires_grad_() if t.is_floating_point() else t
        for name, t in batch.items()
    }
    with torch.enable_grad(), stash.of_autograd(), watched(model.module, visit):
        return model.task.forward(model.module, ready)


def _by_sample(slopes: Tensor, samples: int) -> Tensor:
    """As `samples positions`; what all samples share is a sample each."""
    return slopes.reshape(samples if slopes.numel() % samples == 0 else slopes.numel(), -1)


class _Moved:
    """What a change of a weight, and of its bias, does to what the weight makes."""

    def __init__(self, call: Call, changes: Changes) -> None:
        self._call, self._make = call, changes[call.name]
        self._moved_bias = changes.get(bias_name(call.name))

    @torch.no_grad()
    def whole(self, x: Tensor) -> Tensor:
        """All of it."""
        return self._on(x, self._make(), self._bias())

    @torch.no_grad()
    def slopes_by_parts(self, x: Tensor, g: Tensor) -> Tensor:
        """g·dW x of a linear map or an embedding, at each position, a few at a time."""
        change, bias = self._make(), self._bias()
        inputs = x.flatten() if g.dim() == x.dim() + 1 else x.flatten(0, -2)  # tokens, or vectors
        at_once = max(1, NUMBERS_AT_ONCE // g.shape[-1])
        gradients = torch.split(g.flatten(0, -2), at_once)
        parts = zip(torch.split(inputs, at_once), gradients, strict=True)
        return torch.cat(
            [self._on(part, change, bias).mul_(gradient).sum(-1) for part, gradient in parts]
        )

    def _bias(self) -> Tensor | None:
        return None if self._moved_bias is None else self._moved_bias()

    def _on(self, x: Tensor, change: Tensor, bias: Tensor | None) -> Tensor:
        given = {k: v for k, v in self._call.arguments.items() if k not in ("bias", "input")}
        if bias is not None:
            given["bias"] = bias
        return self._call.function(**{**given, "input": x, "weight": change})


def _add(sums: Sums, name: str, slopes: Tensor) -> None:
    """Add the squares of g·dW x: of each position, and of each sample's sum."""
    sums[name][0] += float(slopes.double().square().sum())
    sums[name][1] += float(slopes.double().sum(1).square().sum())

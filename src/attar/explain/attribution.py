"""How much of a measured divergence each unit's change is responsible for.

The divergence D is followed along the straight path from the original weights to the other's. Each
unit gets the part of the way that its own change makes:

    share of unit u = ∫₀¹ ⟨∇ᵤ D(W + tΔ), Δᵤ⟩ dt,        and the shares sum to D(W + Δ)

so what two units do together is split between them, and nothing is counted twice or left out, as
it would be if units were restored one at a time. Three points of the path give the integral.

At the other's end of the path, slope s = ⟨∇ᵤ D, Δᵤ⟩ and half the curvature d along Δᵤ say what
taking a part of one unit's change back would return: (1 − a) s − (1 − a)² d, if a of it is left.

Source: Sundararajan, Taly and Yan 2017, Axiomatic attribution for deep networks,
https://arxiv.org/abs/1703.01365, eq. 1 and proposition 1 (integrated gradients, completeness). They
follow inputs; here weights are followed. The integral is by Gauss and Legendre's rule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from attar.disk import Stash, lies_on_disk
from attar.divergence import Divergence, predictions_mask
from attar.explain.probe import Changes, run_meeting
from attar.explain.sampling import of_predictions
from attar.explain.statistics import pieces
from attar.memory import release
from attar.parallel import in_order
from attar.records import Batch, Model, Progress
from attar.sites import substituted

# Points of the path; exact where the divergence is a polynomial of degree six along it. Kinks, as
# of ReLU, leave an error of a percent or so.
POINTS = 3

PerSample = dict[str, Tensor]
"""Unit name to nats of each sample, summed over its predictions."""


def shares_of(
    model: Model,
    changes: Changes,
    batches: Sequence[Batch],
    divergence: Divergence,
    *,
    progress: Progress,
    points: int = POINTS,
) -> PerSample:
    """Split the divergence of the changed model over the units that changed.

    Args:
        changes: Parameter name to a function that makes its change; units' weights and biases.
        points: Of the path.
    """
    nodes, weights = np.polynomial.legendre.leggauss(points)
    total: PerSample = {}
    for node, weight in zip(nodes, weights, strict=True):
        at = 0.5 * (1 + float(node))
        found = slopes_at(model, changes, at, batches, divergence, progress=progress)
        for name, slopes in found.items():
            total[name] = total.get(name, torch.zeros(())) + 0.5 * float(weight) * slopes
    return total


def slopes_at(
    model: Model,
    changes: Changes,
    at: float,
    batches: Sequence[Batch],
    divergence: Divergence,
    *,
    progress: Progress,
) -> PerSample:
    """Slope of the divergence along each unit's change, where so much of all changes is made."""
    moved = {name: partial(_moved, model, name, change, at) for name, change in changes.items()}

    def follow(number: int) -> list[PerSample]:
        found = []
        for piece, _ in pieces(batches[number], (), model):
            with torch.no_grad():
                before = model.task.forward(model.module, piece)
            found.append(_slopes(model, piece, before, changes, moved, divergence))
            release()
        return found

    parts: dict[str, list[Tensor]] = defaultdict(list)
    with progress.stage("attribute", len(batches)) as advance:
        for found in in_order(follow, range(len(batches))):
            for piece in found:
                for name, slopes in piece.items():
                    parts[name].append(slopes)
            advance(1)
    return {name: torch.cat(slopes) for name, slopes in parts.items()}


def _moved(model: Model, name: str, change: Callable[[], Tensor], at: float) -> Tensor:
    return torch.add(model.module.get_parameter(name).detach(), change(), alpha=at)


def _slopes(
    model: Model,
    batch: Batch,
    before: Tensor,
    changes: Changes,
    moved: Changes,
    divergence: Divergence,
) -> PerSample:
    samples = len(next(iter(batch.values())))
    weights = [name for name in changes if name.endswith(".weight")]
    sums: PerSample = {
        name.removesuffix(".weight"): torch.zeros(samples, dtype=torch.float64) for name in weights
    }

    def tell(name: str, slopes: Tensor) -> None:
        # What all samples share (a table of positions, say) is dealt to them evenly.
        own = slopes.double().sum(1)
        sums[name] += own if len(own) == samples else own.sum() / samples

    stash = Stash(on_disk=lies_on_disk(model.module))
    with substituted(model.module, moved):
        outputs = run_meeting(model, batch, [changes], [tell], stash)
    mask = predictions_mask(outputs, batch)
    edge, after = get_gradient_edge(outputs), outputs.detach()
    del outputs
    gradient = of_predictions(after, mask, lambda at: divergence.slope(before[at], after[at]))
    torch.autograd.backward(edge, gradient)
    stash.close()
    return sums

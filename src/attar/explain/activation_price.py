"""What it costs to round a tensor while the model runs, and the range that costs least.

    damage = 1/2 · E[(Σ g·e(x))²],   e(x) = rounded(x) − x

where the sum runs over all numbers of one sample's tensor and g is the gradient there of the
log-likelihood of an answer sampled from the model. That is 1/2 · E[dyᵀ G dy] with dy = W e(x),
without taking G as independent of x, or positions or the units that read x of each other.

e depends on x alone. So the gradients are summed by what x is, in one histogram for each sample;
the sum under any range is then the product of that histogram with e at its bins, and many ranges
are tried in one pass. Bins are narrow beside the steps, and 0 lies in the middle of one, for it is
the commonest value and rounds exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from attar.activations import activation_of, rounded
from attar.divergence import Divergence, predictions_mask
from attar.explain.sampling import drawn_gradient, go_back
from attar.explain.statistics import pieces
from attar.memory import release
from attar.parallel import in_order
from attar.records import Activation, Batch, Model, PricedActivation, Progress
from attar.sites import Call, watched

BINS = 8192
# Parts of the range seen that are tried for each of its ends. At the low end also 0: what a
# following ReLU takes away need not be told apart.
FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
INPUT, OUTPUT = "input", "output"

Key = tuple[str, str]
"""A tensor: "input" and the first unit that reads it, or "output" and the unit that makes it."""


@dataclass
class Place:
    """One tensor that may be rounded.

    Attributes:
        units: Those that read it; of an output, the one that makes it.
        by_row: Whether all of them are linear maps, so that each row may have a range of its own.
        low: Smallest number seen, 0 at most.
        high: Largest number seen, 0 at least.
    """

    units: list[str] = field(default_factory=list)
    low: float = 0.0
    high: float = 0.0
    by_row: bool = True


class _Readers:
    """Lives over one forward pass: which tensor was read before, and what is known of it."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], tuple[Tensor, object]] = {}

    def known(self, x: Tensor, make: Callable[[], object]) -> object:
        """Give what was made at the first reading of this very tensor, unchanged since."""
        mark = (id(x), x._version)
        if mark not in self._seen:
            self._seen[mark] = (x, make())  # kept, so that no other tensor gets its id
        return self._seen[mark][1]


def find_places(
    model: Model, names: Sequence[str], batches: Sequence[Batch], progress: Progress
) -> dict[Key, Place]:
    """Run forward, and see which units read one tensor and how large its numbers are.

    Args:
        names: Units around which tensors may be rounded.
    """

    def look(batch: Batch) -> dict[Key, Place]:
        found: dict[Key, Place] = {}
        readers = _Readers()

        def visit(call: Call) -> Tensor:
            output, name = call.run(), call.name.removesuffix(".weight")
            if name in names:
                first = str(readers.known(call.input, lambda: name))
                for key, x in (((INPUT, first), call.input), ((OUTPUT, name), output)):
                    place = found.setdefault(key, Place())
                    place.by_row &= call.operation == "linear"
                    _see(place, name, x)
            return output

        with torch.no_grad(), watched(model.module, visit):
            model.task.forward(model.module, batch)
        return found

    places: dict[Key, Place] = {}
    with progress.stage("ranges", len(batches)) as advance:
        for found in in_order(look, batches):
            for key, seen in found.items():
                known = places.setdefault(key, Place())
                known.units += [name for name in seen.units if name not in known.units]
                known.low, known.high = min(known.low, seen.low), max(known.high, seen.high)
                known.by_row &= seen.by_row
            advance(1)
    return places


def _see(place: Place, name: str, x: Tensor) -> None:
    low, high = (float(end) for end in x.aminmax())
    place.low, place.high = min(place.low, low), max(place.high, high)
    if name not in place.units:
        place.units.append(name)


@dataclass(frozen=True)
class Trials:
    """Ranges to try at one place, with what each does to what lies in each bin.

    Attributes:
        width: Of a bin.
        first: Number of the first bin; that of number n has its middle at n · width.
        errors: e(x) at the middle of each bin.
    """

    activations: tuple[Activation, ...]
    width: float
    first: int
    errors: Float[Tensor, "trials bins"]


def trials_of(place: Place) -> Trials:
    """List the ranges tried, the whole range first."""
    lows = [0.0] if place.low == 0 else [factor * place.low for factor in (*FACTORS, 0.0)]
    highs = [0.0] if place.high == 0 else [factor * place.high for factor in FACTORS]
    tried = tuple(activation_of(*ends) for ends in product(lows, highs))
    width = (place.high - place.low) / BINS or 1.0
    first, last = round(place.low / width), round(place.high / width)
    middles = torch.arange(first, last + 1) * width
    errors = torch.stack([rounded(middles, one) - middles for one in tried])
    return Trials(tried, width, first, errors)


def slopes(
    x: Float[Tensor, "samples numbers"], g: Float[Tensor, "samples numbers"], trials: Trials
) -> Float[Tensor, "trials samples"]:
    """Σ g·e(x) of each sample under each range tried."""
    bins = trials.errors.shape[1]
    # Samples lie one after the other; data not seen when ranges were found may lie outside.
    number = (x / trials.width).round_().sub_(trials.first).clamp_(0, bins - 1).long()
    number += bins * torch.arange(len(x))[:, None]
    sums = torch.bincount(number.flatten(), g.flatten(), minlength=bins * len(x))
    return trials.errors @ sums.float().view(len(x), bins).T


def price_activations(
    model: Model,
    places: Mapping[Key, Place],
    batches: Sequence[Batch],
    divergence: Divergence,
    *,
    dynamic: bool,
    seed: int,
    draws: int,
    progress: Progress,
) -> dict[Key, PricedActivation]:
    """Find the rounding of each tensor that costs least, every other tensor left as it is.

    Args:
        places: From `find_places`, on the same data.
        dynamic: Take the range of each sample instead of choosing one.
        draws: Answers sampled per prediction.
    """
    tried: dict[Key, Trials | Activation] = {
        key: Activation(by_row=place.by_row) if dynamic else trials_of(place)
        for key, place in places.items()
    }

    def price_batch(number: int) -> tuple[dict[Key, Tensor], int]:
        generator = torch.Generator().manual_seed(seed * len(batches) + number)
        sums: dict[Key, Tensor] = {}
        predictions = 0
        for piece, _ in pieces(batches[number], (), model):
            outputs = _run(model, piece, places, tried, sums)
            mask = predictions_mask(outputs, piece)
            predictions += int(mask.sum())
            draw = partial(drawn_gradient, divergence, mask=mask, generator=generator)
            go_back(get_gradient_edge(outputs), [outputs.detach()], draw, draws)
            release()
        return sums, predictions

    total: dict[Key, Tensor] = {}
    predictions = 0
    with progress.stage("price activations", len(batches)) as advance:
        for sums, seen in in_order(price_batch, range(len(batches))):
            predictions += seen
            for key, squares in sums.items():
                total[key] = total[key] + squares if key in total else squares
            advance(1)
    return {
        key: _best(places[key], tried[key], 0.5 * squares / (predictions * draws))
        for key, squares in total.items()
    }


def _best(place: Place, tried: Trials | Activation, damages: Tensor) -> PricedActivation:
    least = int(damages.argmin())
    activation = tried if isinstance(tried, Activation) else tried.activations[least]
    return PricedActivation(tuple(place.units), activation, float(damages[least]))


def _run(
    model: Model,
    batch: Batch,
    places: Mapping[Key, Place],
    tried: Mapping[Key, Trials | Activation],
    sums: dict[Key, Tensor],
) -> Tensor:
    """Run forward; the sums grow when the result is run backward."""
    samples = len(next(iter(batch.values())))
    key_of = {name: key for key, at in places.items() if key[0] == INPUT for name in at.units}
    readers = _Readers()

    def meet(key: Key, x: Tensor, g: Tensor) -> None:
        count, one = samples if x.numel() % samples == 0 else 1, tried[key]
        if isinstance(one, Activation):
            squares = ((rounded(x, one) - x) * g).reshape(count, -1).sum(1)[None]
        else:
            squares = slopes(x.reshape(count, -1), g.reshape(count, -1), one)
        added = squares.double().square().sum(1)
        sums[key] = sums[key] + added if key in sums else added

    def visit(call: Call) -> Tensor:
        name = call.name.removesuffix(".weight")
        if name not in key_of:
            return call.run()
        x = readers.known(call.input, lambda: _tapped(call.input, partial(meet, key_of[name])))
        output = call.reading(x).run()  # type: ignore[arg-type]
        if (OUTPUT, name) in places:
            made = output.detach().clone()  # what follows may change it in place
            output.register_hook(lambda g: meet((OUTPUT, name), made, g))  # type: ignore[no-untyped-call]
        return output

    ready = {
        name: t.detach().clone().requires_grad_() if t.is_floating_point() else t
        for name, t in batch.items()
    }
    with torch.enable_grad(), watched(model.module, visit):
        return model.task.forward(model.module, ready)


def _tapped(x: Tensor, meet: Callable[[Tensor, Tensor], None]) -> Tensor:
    """A copy of a tensor that only the units watched read, so that their gradients meet there."""
    own = x if x.requires_grad else x.detach().requires_grad_()
    copy = own.clone()
    value = copy.detach()
    copy.register_hook(lambda g: meet(value, g))  # type: ignore[no-untyped-call]
    return copy

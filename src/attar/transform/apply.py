"""Carry a plan out: treat every unit's weight and write the receipt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attar.disk import Scratch, give_back, lies_on_disk, lying
from attar.errors import ModelError, SettingError
from attar.parallel import Work
from attar.records import (
    Applied,
    Candidate,
    Progress,
    Replacement,
    RowWeights,
    Transform,
    Unit,
    Units,
    Unpacked,
)
from attar.tables import build
from attar.transform import TRANSFORMS
from attar.transform.factorize_low_rank import FactorizeLowRank, factorize_all
from attar.transform.quantize_entropy import QuantizeEntropy, trials
from attar.transform.quantize_feedback import QuantizeFeedback, quantize_all

Known = Callable[[Unit], tuple[Tensor | None, RowWeights | None]]
"""What a treatment is told of a unit: see `Transform.apply`."""
Price = Callable[[Unit, Tensor], tuple[float, Tensor | None]]
"""Nats per prediction of adding a change (`rows columns`) to a unit's weight, and the unit's bias
beside it, `rows`; None where it has none of its own."""
Facts = tuple[Tensor, Known, Price]
"""The weight (`rows columns`) of one unit, and what is known of that unit."""


@dataclass(frozen=True)
class Treated:
    """A unit's weight as stored; decoded each time it is asked for, so memory holds codes only.

    Attributes:
        unpacked: See `Replacement`.
        bias: What stands in for the unit's bias, `rows`; None where that stays as it is.
    """

    unit: Unit
    transform: Transform
    tensors: Mapping[str, Tensor]
    unpacked: Unpacked | None = None
    bias: Tensor | None = None

    def moved(self, scratch: Scratch) -> Treated:
        """The same with what is large in this scratch."""
        tensors = {name: scratch.moved(tensor) for name, tensor in self.tensors.items()}
        unpacked = None if self.unpacked is None else self.unpacked.moved(scratch.moved)
        return replace(self, tensors=tensors, unpacked=unpacked)

    def weight(self) -> Tensor:
        """Decode to the shape the module holds."""
        if self.unpacked is not None:
            return self.unpacked.dense().view(self.unit.shape)
        decoded = self.transform.decode(self.tensors, self.unit.rows, self.unit.columns)
        give_back(*self.tensors.values())
        return decoded.view(self.unit.shape)


Done = tuple[Treated, Applied]


def build_transform(treatment: str, settings: Mapping[str, object]) -> Transform:
    """Build a transform from its name and settings in a plan.

    Raises:
        SettingError: The name is not in the table, or a setting is not one of the transform's.
    """
    transform: Transform = build(TRANSFORMS, "treatment", treatment, settings)
    return transform


def treat(
    weight: Tensor,
    moment: Tensor | None,
    transforms: Sequence[Transform],
    rows: RowWeights | None = None,
    *,
    for_price: bool = False,
) -> Iterator[Replacement | SettingError]:
    """Apply several treatments to one weight, in order; those of one kind may share passes.

    A treatment that the weight's values do not allow gives its error in place of a replacement.

    Args:
        for_price: Range-coded integers may miss their bytes by a little, and are not stored.
    """
    shared: dict[type, Iterator[Replacement | SettingError]] = {
        QuantizeFeedback: quantize_all(
            weight, moment, [t for t in transforms if isinstance(t, QuantizeFeedback)], rows
        ),
        FactorizeLowRank: factorize_all(
            weight, moment, [t for t in transforms if isinstance(t, FactorizeLowRank)], rows
        ),
    }
    if for_price:
        shared[QuantizeEntropy] = trials(
            weight, moment, rows, [t for t in transforms if isinstance(t, QuantizeEntropy)]
        )
    failed: dict[type, SettingError] = {}  # what the values do not allow once, they never allow
    for transform in transforms:
        kind = type(transform)
        try:
            if kind in shared:
                yield failed.get(kind) or next(shared[kind])
            else:
                yield transform.apply(weight, moment, rows)
        except SettingError as error:
            if kind in shared:
                failed[kind] = error
            yield error


def treat_as_chosen(unit: Unit, choice: Candidate, facts: Facts) -> Done:
    """Treat one unit's weight, and say what was done.

    Raises:
        ModelError: The weight is not finite.
    """
    weight, known, price = facts
    check_finite(unit, weight)
    transform = build_transform(choice.treatment, choice.settings)
    replacement = transform.apply(weight, *known(unit))
    change = replacement.dense - weight
    nats, bias = price(unit, change)
    applied = Applied(
        unit=unit.name,
        treatment=choice.treatment,
        settings=dict(choice.settings),
        stored_bytes=sum(t.nbytes for t in replacement.tensors.values()),
        predicted_damage=nats,
        relative_error=float(change.norm() / weight.norm().clamp(min=1e-30)),
    )
    treated = Treated(unit, transform, replacement.tensors, replacement.unpacked, bias)
    return treated, applied


def apply_choices(
    units: Units,
    choices: Mapping[str, Candidate],
    *,
    facts: Callable[[Unit], Facts],
    for_each: Callable[[Callable[[Unit], Work[Done]], Sequence[Unit]], Iterable[Done]],
    progress: Progress,
    made: Mapping[str, Done],
    on_disk: bool = False,
) -> tuple[dict[str, Treated], tuple[Applied, ...]]:
    """Treat every unit as chosen. The module is left as it is.

    Args:
        for_each: Does a piece of work for each of these units, in order; may do several at once.
        made: Units that were treated as chosen before; they are not treated again.
        on_disk: Keep what is made in scratch files.

    Raises:
        ModelError: A weight is not finite.
    """

    def work(unit: Unit) -> Work[Done]:
        return partial(treat_as_chosen, unit, choices[unit.name], facts(unit))

    scratch = Scratch(on_disk=on_disk)
    left = [unit for unit in units if unit.name not in made]
    done = dict(made)
    with progress.stage("transform", len(left)) as advance:
        for treated, applied in for_each(work, left):
            done[applied.unit] = treated.moved(scratch), applied
            advance(1)
    ordered = {unit.name: done[unit.name] for unit in units}
    return {name: t for name, (t, _) in ordered.items()}, tuple(a for _, a in ordered.values())


def check_finite(unit: Unit, weight: Tensor) -> None:
    """Refuse a weight with NaN or infinity, by name."""
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(
            f"weight {unit.name} holds NaN or infinity.",
            hint="the model is broken before compression; load or train it again.",
        )


def substitutions(treated: Mapping[str, Treated]) -> dict[str, Callable[[], Tensor]]:
    """Parameter name to the function that makes its replacement, for `sites.substituted`."""
    weights = {name + ".weight": one.weight for name, one in treated.items()}
    return weights | {name: partial(_same, bias) for name, bias in biases(treated).items()}


def biases(treated: Mapping[str, Treated]) -> dict[str, Tensor]:
    """Parameter name to what stands in for it, of the biases that took up a mean error."""
    return {one.unit.bias: one.bias for one in treated.values() if one.bias is not None}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def materialise(module: nn.Module, treated: Mapping[str, Treated]) -> nn.Module:
    """Copy a module with every treated weight put in place, dense; ties stay ties.

    What takes the place of a weight on disk lies on disk too.
    """
    scratch = Scratch(on_disk=lies_on_disk(module))
    in_place: dict[int, Any] = {}
    for name, parameter in module.named_parameters():
        one = treated.get(name.removesuffix(".weight"))
        if one is not None:
            weight = lying(scratch.moved(one.weight()))
            in_place[id(parameter)] = nn.Parameter(weight, requires_grad=False)
    copy = deepcopy(module, in_place)
    parameters = dict(copy.named_parameters())
    for name, bias in biases(treated).items():
        parameters[name].data = bias
    return copy

"""Price cuts of coupled units at all that reads them, fit the rest again, measure a real cut."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from attar.audit.fidelity import measure
from attar.coupling import CoupledGroup, CoupledUnits, CutPrice, CutTrial, Member
from attar.cut import cut_out, find_coupled
from attar.cut.find import Run, check_same
from attar.cut.refit import (
    DAMPING_FRACTION,
    Reader,
    cheapest_first,
    held_out_damping,
    refitted,
    weighted,
)
from attar.cut.surgery import Removed, masked
from attar.explain.price import bias_change
from attar.load.units import list_units
from attar.pricing import price_changes
from attar.records import Curvature, Statistics, Unit
from attar.session import Session


def find(session: Session) -> CoupledUnits:
    """Find what can only be cut together, as the model stands after its norms were folded."""
    with session.timed("units"), session.progress.stage("find what goes together", 0):
        return find_coupled(session.model.module, runner(session))


def try_cut(session: Session, coupled: CoupledUnits, share: float) -> CutTrial:
    """Choose the cheapest share of each group, price it, cut all of it, and measure.

    Chosen and fitted on calibration data; priced and measured on recovery data.

    Args:
        share: Of the units of each group, above 0 and below 1.

    Raises:
        CutError: All cut at once, the model does not answer as with zeros there.
    """
    # A cut moves a bias where there is one, whatever rounding does.
    session = replace(session, units=list_units(session.model))
    with session.timed("explain"):
        statistics = session.gather()
    module, groups = session.model.module, coupled.groups
    with session.timed("price"):
        counts = {one.name: min(int(share * one.units + 0.5), one.units - 1) for one in groups}
        cut = [one for one in groups if counts[one.name] and not unknown(session, one)]
        removed = {
            one.name: cheapest_first(list(readers(session, statistics, one)), counts[one.name])[0]
            for one in cut
        }
        together = fit(session, statistics, cut, removed)
        alone = [fit(session, statistics, [one], removed) for one in cut]
        plain = [masked(module, [one], removed) for one in cut]
        predicted, *nats = _nats(session, [together, *alone, *plain])
    with session.timed("measure"):
        check_same(module, runner(session), groups, removed)
        small = cut_out(module, groups, removed, together)
        return CutTrial(
            share=share,
            prices={
                one.name: CutPrice(
                    units=tuple(removed[one.name]),
                    weights=one.weights * counts[one.name],
                    refitted=nats[number],
                    plain=nats[len(cut) + number],
                )
                for number, one in enumerate(cut)
            },
            weights=_count(module) - _count(small),
            of_weights=_count(module),
            predicted=predicted,
            measured=measured(session, small),
            measured_plain=measured(session, cut_out(module, groups, removed)),
        )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def runner(session: Session) -> Run:
    """What runs a module on the session's examples."""
    model = session.model
    return lambda module: model.task.forward(module, model.examples)


def unknown(session: Session, group: CoupledGroup) -> bool:
    """Say whether something reads the group that no statistics are kept of."""
    names = {unit.name + ".weight" for unit in session.units}
    return any(one.reads and one.parameter not in names for one in group.members)


def readers(
    session: Session,
    statistics: Statistics,
    group: CoupledGroup,
    factors: Mapping[str, float] | None = None,
) -> Iterator[Reader]:
    """All that reads a group, with what is known of what enters it.

    Args:
        factors: Unit name to what its prices are multiplied with; 1 where it is not named.
    """
    for member in group.members:
        if member.reads:
            unit = session.units.named(member.parameter.removesuffix(".weight"))
            terms = statistics.curvatures[unit.name]
            moment, damping = _moment(terms), damping_of(session, statistics, unit)
            root = math.sqrt((factors or {}).get(unit.name, 1.0))
            for term in terms:
                known = term.columns
                diagonal = known if known.dim() == 1 else known[0].diagonal()
                yield Reader(
                    weight=root * weighted(session.weight(unit), term.rows),
                    moment=diagonal if moment is None else moment,
                    columns=_columns(member, unit),
                    damping=damping,
                )


def damping_of(session: Session, statistics: Statistics, unit: Unit) -> float:
    """What is added to the power of each column that enters a unit, as a fraction of their mean.

    A language model's sequences hold thousands of predictions, so there it is the least.
    """
    terms = statistics.curvatures[unit.name]
    if session.predicts_everywhere or _moment(terms) is None:
        return DAMPING_FRACTION
    (term,) = terms
    weight = weighted(session.weight(unit), term.rows)
    return held_out_damping(weight, term.first[0], term.second[0])


def _moment(terms: Sequence[Curvature]) -> Tensor | None:
    """A of what enters a weight; None where it is not known as one matrix."""
    first = terms[0].first
    whole = len(terms) == 1 and first.dim() == 3 and len(first) == 1
    return terms[0].columns[0] if whole else None


def _columns(member: Member, unit: Unit) -> Tensor:
    """Columns of a unit's weight that go with each coupled unit."""
    inside = torch.Size(unit.shape[2:]).numel()
    return (member.indices[:, :, None] * inside + torch.arange(inside)).flatten(1)


def _gone(session: Session, groups: Sequence[CoupledGroup], removed: Removed) -> dict[Unit, Tensor]:
    """All columns that go of each weight that reads."""
    found: dict[Unit, list[Tensor]] = defaultdict(list)
    for group in groups:
        numbers = list(removed.get(group.name, ()))
        for member in group.members if numbers else ():
            if member.reads:
                unit = session.units.named(member.parameter.removesuffix(".weight"))
                found[unit].append(_columns(member, unit)[numbers].flatten())
    return {unit: torch.cat(parts) for unit, parts in found.items()}


def fit(
    session: Session, statistics: Statistics, groups: Sequence[CoupledGroup], removed: Removed
) -> dict[str, Tensor]:
    """Fit all that reads what is cut again; biases take the mean error up.

    Returns:
        Parameter name to the new tensor, in its old shape: zeros in columns that are to go.
    """
    new: dict[str, Tensor] = {}
    for unit, gone in _gone(session, groups, removed).items():
        weight, terms = session.weight(unit), statistics.curvatures[unit.name]
        moment = _moment(terms)
        damping = damping_of(session, statistics, unit)
        fitted = refitted(weight, torch.ones(1) if moment is None else moment, gone, damping)
        new[unit.name + ".weight"] = fitted.reshape(unit.shape)
        bias = session.bias(unit)
        if bias is not None and len(terms) == 1 and terms[0].means is not None:
            new[unit.bias] = bias + bias_change(fitted - weight, terms)
    return new


def price_fits(session: Session, made: Sequence[Mapping[str, Tensor]]) -> list[dict[str, float]]:
    """Price what sets of new parameters change, each set for itself, on recovery data.

    Returns:
        Of each set, unit name to nats per prediction.
    """
    changes = [
        {name: partial(torch.sub, t, session.parameter(name)) for name, t in new.items()}
        for new in made
    ]
    return price_changes(session, changes, session.data.recovery)


def _nats(session: Session, made: Sequence[Mapping[str, Tensor]]) -> list[float]:
    return [sum(damages.values()) for damages in price_fits(session, made)]


def measured(session: Session, small: nn.Module) -> float:
    """Nats per prediction between the original and a module, on recovery data."""
    model = session.original
    found = measure(
        model,
        lambda batch: model.task.forward(small, batch),
        session.data.recovery,
        session.divergence,
        progress=session.progress,
        stage="measure",
    )
    return float(found.mean_divergence)

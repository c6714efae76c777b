"""Price cuts of coupled units at all that reads them, fit the rest again, measure a real cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from attar.audit.fidelity import measure
from attar.coupling import CoupledGroup, CoupledUnits, CutPrice, CutTrial, Member
from attar.cut import cut_out, find_coupled
from attar.cut.find import Run, check_same
from attar.cut.refit import Reader, cheapest_first, refitted, weighted
from attar.cut.surgery import Removed
from attar.explain.price import bias_change, damage
from attar.load.units import list_units
from attar.records import Curvature, Statistics, Unit
from attar.session import Session


def find(session: Session) -> CoupledUnits:
    """Find what can only be cut together, as the model stands after its norms were folded."""
    with session.timed("units"), session.progress.stage("find what goes together", 0):
        return find_coupled(session.model.module, _runner(session))


def try_cut(session: Session, coupled: CoupledUnits, share: float) -> CutTrial:
    """Price the cheapest share of each group, cut all of it, and measure.

    Args:
        share: Of the units of each group, above 0 and below 1.

    Raises:
        CutError: All cut at once, the model does not answer as with zeros there.
    """
    # A cut moves a bias where there is one, whatever rounding does.
    session = replace(session, units=list_units(session.model))
    with session.timed("explain"):
        statistics = session.gather()
    with session.timed("price"):
        prices: dict[str, CutPrice] = {}
        for group in coupled.groups:
            found = None if _unknown(session, group) else _priced(session, statistics, group, share)
            if found is not None:
                prices[group.name] = found
    removed = {name: one.units for name, one in prices.items()}
    with session.timed("measure"):
        check_same(session.model.module, _runner(session), coupled.groups, removed)
        fitted = fit(session, statistics, coupled.groups, removed)
        small = cut_out(session.model.module, coupled.groups, removed, fitted)
        plain = cut_out(session.model.module, coupled.groups, removed)
        return CutTrial(
            share=share,
            prices=prices,
            weights=_count(session.model.module) - _count(small),
            of_weights=_count(session.model.module),
            predicted=_nats(session, statistics, coupled.groups, removed),
            measured=_measured(session, small),
            measured_plain=_measured(session, plain),
        )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _runner(session: Session) -> Run:
    model = session.model
    return lambda module: model.task.forward(module, model.examples)


def _unknown(session: Session, group: CoupledGroup) -> bool:
    """Say whether something reads the group that no statistics are kept of."""
    names = {unit.name + ".weight" for unit in session.units}
    return any(one.reads and one.parameter not in names for one in group.members)


def _priced(
    session: Session, statistics: Statistics, group: CoupledGroup, share: float
) -> CutPrice | None:
    count = min(int(share * group.units + 0.5), group.units - 1)
    if not count:
        return None
    units = cheapest_first(list(_readers(session, statistics, group)), count)[0]
    removed = {group.name: units}
    return CutPrice(
        units=tuple(units),
        weights=group.weights * count,
        refitted=_nats(session, statistics, [group], removed),
        plain=_nats(session, statistics, [group], removed, fits=False),
    )


def _readers(session: Session, statistics: Statistics, group: CoupledGroup) -> Iterator[Reader]:
    """All that reads a group, with what was seen of the first half of the data."""
    for member in group.members:
        if member.reads:
            unit = session.units.named(member.parameter.removesuffix(".weight"))
            weight, columns = session.weight(unit), _columns(member, unit)
            for term in statistics.curvatures[unit.name]:
                rows = term.rows if term.rows_first is None else 2 * term.rows_first
                moment = _moment(statistics.curvatures[unit.name])
                diagonal = term.first if term.first.dim() == 1 else term.first[0].diagonal()
                yield Reader(
                    weighted(weight, rows), diagonal if moment is None else moment, columns
                )


def _moment(terms: Sequence[Curvature], *, held_out: bool = True) -> Tensor | None:
    """A of the first half, or of all; None where it is not known as one matrix."""
    first = terms[0].first
    if len(terms) > 1 or first.dim() != 3 or len(first) > 1:
        return None
    return first[0] if held_out else terms[0].columns[0]


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


def _change(
    session: Session,
    statistics: Statistics,
    unit: Unit,
    gone: Tensor,
    *,
    fits: bool,
    held_out: bool,
) -> Tensor:
    weight = session.weight(unit)
    moment = _moment(statistics.curvatures[unit.name], held_out=held_out) if fits else None
    return refitted(weight, torch.ones(1) if moment is None else moment, gone) - weight


def _nats(
    session: Session,
    statistics: Statistics,
    groups: Sequence[CoupledGroup],
    removed: Removed,
    *,
    fits: bool = True,
) -> float:
    """Price a cut on the second half of the data, fitted on the first."""
    total = 0.0
    for unit, gone in _gone(session, groups, removed).items():
        change = _change(session, statistics, unit, gone, fits=fits, held_out=True)
        total += damage(change, statistics.curvatures[unit.name], held_out=True)
    return total


def fit(
    session: Session, statistics: Statistics, groups: Sequence[CoupledGroup], removed: Removed
) -> dict[str, Tensor]:
    """Fit all that reads what is cut again, on all data; biases take the mean error up."""
    new: dict[str, Tensor] = {}
    for unit, gone in _gone(session, groups, removed).items():
        change = _change(session, statistics, unit, gone, fits=True, held_out=False)
        new[unit.name + ".weight"] = (session.weight(unit) + change).reshape(unit.shape)
        terms, bias = statistics.curvatures[unit.name], session.bias(unit)
        if bias is not None and len(terms) == 1 and terms[0].means is not None:
            new[unit.bias] = bias + bias_change(change, terms)
    return new


def _measured(session: Session, small: nn.Module) -> float:
    model = session.model
    found = measure(
        model,
        lambda batch: model.task.forward(small, batch),
        session.data.recovery,
        session.divergence,
        progress=session.progress,
        stage="measure",
    )
    return float(found.mean_divergence)

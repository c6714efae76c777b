"""One turn of cutting: choose units by cost over worth, fit what reads the rest, measure, cut."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from attar import cutting
from attar.audit.fidelity import measure
from attar.coupling import CoupledGroup
from attar.cut import cut_out, narrower
from attar.cut.choose import Offer, choose
from attar.cut.find import check_same
from attar.cut.narrower import numbers_each, numbers_gone
from attar.cut.refit import cheapest_first
from attar.errors import CutError
from attar.explain.probe import Changes
from attar.load.units import list_units
from attar.parallel import in_order
from attar.plan import candidates as menus
from attar.records import Batch, Cut, Statistics
from attar.session import Session
from attar.sites import substituted

# Of the worth of all that should go, what may go in one turn: the rest is priced again after it.
SHARES_PER_TURN = (1 / 3, 1 / 6, 1 / 12, 1 / 24)
# Of each group's units, those on which it is found how much more cuts do than A and G say.
PROBED_SHARE = 0.1
# Of the recovery data, on what the cut of each group is measured alone.
ALONE_SHARE = 0.25
# Of a group's units, what goes at most in one turn.
MOST_OF_A_GROUP = 0.5
# Of a measured ratio of damages, what is believed at most.
LARGEST_COHERENCE = 1e4


@dataclass(frozen=True)
class Narrow:
    """A model on its way to be narrower.

    Attributes:
        groups: As they are by now.
        counts: Group to how many units it has in the original.
        numbers: Group to the number in the original of each unit that is left.
        factors: Unit name to how much more cuts of what it reads cost than A and G say.
        damage: Measured after the last cut, nats per prediction on recovery data.
    """

    session: Session
    groups: tuple[CoupledGroup, ...]
    counts: Mapping[str, int]
    numbers: Mapping[str, tuple[int, ...]]
    factors: Mapping[str, float]
    damage: float = 0.0

    @property
    def turn(self) -> int:
        """Of the last cut; 0 before any."""
        return max((cut.turn for cut in self.session.cuts), default=0)


@dataclass(frozen=True)
class Worth:
    """What is returned for each number of a weight that goes.

    Attributes:
        of_unit: Unit name to nats, or bytes.
        of_rest: Of any other number.
        at_most: Highest cost over worth that goes.
        shares: Of the worth of all that should go, what may go now; of several the one that
            measures to gain most, and none where none gains.
        enough: Worth of all that goes from which on no more does.
    """

    of_unit: Mapping[str, float]
    of_rest: float
    at_most: float = 1.0
    shares: tuple[float, ...] = SHARES_PER_TURN
    enough: float = float("inf")


def opened(session: Session, factors: Mapping[str, float]) -> Narrow:
    """Find what may be cut of a session's model: all groups that are priced and not pinned."""
    groups, left = [], []
    for group, why in _judged(session):
        if why is None:
            groups.append(group)
        else:
            left.append((group.name, why))
    counts = {group.name: group.units for group in groups}
    numbers = {name: tuple(range(count)) for name, count in counts.items()}
    notes = (*session.notes, *_notes(left))
    return Narrow(replace(session, notes=notes), tuple(groups), counts, numbers, factors)


def _judged(session: Session) -> Iterator[tuple[CoupledGroup, str | None]]:
    """Each group, with why it is left whole; None where it may be cut."""
    module = session.model.module
    stored = module.state_dict()
    kept = {
        name
        for unit in session.units
        if menus.is_kept(unit, session.recipe.keep)
        for name in (unit.name, *unit.coupled)
    }
    for group in cutting.find(session).groups:
        held = [one.parameter for one in group.members]
        why = None
        if any(name.rpartition(".")[0] in kept for name in held):
            why = "it is kept"
        elif cutting.unknown(session, group):
            why = "something reads it that no statistics are kept of"
        elif any(name not in stored for name in held):
            why = "it goes with a table that no file holds"
        yield group, why


def left_whole(session: Session) -> Iterator[tuple[str, str]]:
    """Name of what cannot be cut, and why."""
    yield from cutting.find(session).pinned.items()
    yield from ((group.name, why) for group, why in _judged(session) if why is not None)


def _notes(left: Iterable[tuple[str, str]]) -> Iterator[str]:
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, why in left:
        reasons[why].append(name)
    for why, names in reasons.items():
        yield f"not cut: {len(names)} group(s) such as {names[0]}: {why}."


def turn(narrow: Narrow, worth: Worth) -> tuple[Narrow, bool]:
    """Choose what goes, fit what reads the rest, and cut; False where nothing should go."""
    session = narrow.session
    about, gathered = gathered_for(narrow)
    with session.timed("cut"):
        if narrow.turn == 0:
            narrow = replace(narrow, factors=_coherent(narrow, about, gathered))

        def offer(group: CoupledGroup) -> Offer | None:
            return _offer(narrow, about, gathered, group, worth)

        offers = [one for one in in_order(offer, narrow.groups) if one is not None and one.units]
        try:
            tried = _best_share(narrow, about, gathered, offers, worth)
            if tried is None:
                return narrow, False
            removed, new, damage = tried
            check_same(about.model.module, cutting.runner(about), narrow.groups, removed)
        except CutError as error:
            notes = (*session.notes, f"not cut any further: {error.problem}")
            return replace(narrow, session=replace(session, notes=notes)), False
        priced = cutting.price_fits(about, [new])[0]
        alone = _each_alone(narrow, about, removed, new)
    cuts = tuple(_cuts(narrow, removed, priced, alone))
    factors = _corrected(narrow, offers, removed, priced)
    return replace(without(narrow, removed, new, cuts), factors=factors, damage=damage), True


Chosen = dict[str, tuple[int, ...]]


def _best_share(
    narrow: Narrow, about: Session, statistics: Statistics, offers: Sequence[Offer], worth: Worth
) -> tuple[Chosen, dict[str, Tensor], float] | None:
    """Fit, cut and measure shares of what should go; give the one that gains most.

    Returns:
        Group to numbers of units, the tensors that were fitted again, and nats per prediction of
        all cuts so far; None where nothing should go, or none of these measures to be worth it.
    """
    total = _worth(choose(offers, at_most=worth.at_most, enough=worth.enough), offers)
    best, most, before = None, 0.0, -1
    for share in worth.shares:
        removed = choose(offers, at_most=worth.at_most, enough=share * min(total, worth.enough))
        count = sum(len(numbers) for numbers in removed.values())
        if count in (0, before):
            continue
        before = count
        new = cutting.fit(about, statistics, narrow.groups, removed)
        small = cut_out(about.model.module, narrow.groups, removed, new)
        damage = cutting.measured(about, small)
        gain = _worth(removed, offers) - (damage - narrow.damage)
        if len(worth.shares) == 1:
            return removed, new, damage
        if gain > most:
            best, most = (removed, new, damage), gain
    return best


def _worth(removed: Mapping[str, Sequence[int]], offers: Sequence[Offer]) -> float:
    return sum((len(removed.get(one.group, ())) * one.worth for one in offers), 0.0)


def _coherent(narrow: Narrow, about: Session, statistics: Statistics) -> dict[str, float]:
    """Measure how much more cuts do than A and G, taken as independent, say of them.

    What a channel adds is mostly of one sign, so over the positions of a picture it adds up, far
    more than rounding errors do. The cheapest tenth of each group is taken, all at once and each
    reader priced by itself, on recovery data.
    """

    def cheapest(group: CoupledGroup) -> Offer:
        count = min(max(1, round(PROBED_SHARE * group.units)), group.units - 1)
        read = list(cutting.readers(about, statistics, group, narrow.factors))
        units, added = cheapest_first(read, count)
        return Offer(group.name, tuple(sorted(units)), tuple(added), 1.0)

    some = [group for group in narrow.groups if group.units > 1]
    offers = list(in_order(cheapest, some))
    removed = {offer.group: offer.units for offer in offers}
    new = cutting.fit(about, statistics, narrow.groups, removed)
    return _corrected(narrow, offers, removed, cutting.price_fits(about, [new])[0])


def gathered_for(narrow: Narrow) -> tuple[Session, Statistics]:
    """The session with the biases that a cut moves, whatever rounding does, and its statistics."""
    about = replace(narrow.session, units=list_units(narrow.session.model))
    with about.timed("explain"):
        return about, about.finished.once("statistics to cut", about.gather)


def _offer(
    narrow: Narrow, about: Session, statistics: Statistics, group: CoupledGroup, worth: Worth
) -> Offer | None:
    each = numbers_each(about.model.module, group.members)
    returned = 0.0
    for name, count in each.items():
        returned += count * worth.of_unit.get(name.removesuffix(".weight"), worth.of_rest)
    count = min(max(1, int(MOST_OF_A_GROUP * group.units)), group.units - 1)
    if count < 1 or returned <= 0:
        return None
    read = list(cutting.readers(about, statistics, group, narrow.factors))
    units, added = cheapest_first(read, count, stop=worth.at_most * returned)
    return Offer(group.name, tuple(units), tuple(added), returned)


def _reading(group: CoupledGroup) -> list[str]:
    """Names of the units that read a group."""
    return list(
        dict.fromkeys(one.parameter.removesuffix(".weight") for one in group.members if one.reads)
    )


def _each_alone(
    narrow: Narrow, about: Session, removed: Mapping[str, Sequence[int]], new: Mapping[str, Tensor]
) -> dict[str, float]:
    """Measure what the cut of each group alone costs on a little of the recovery data."""
    module, task, found = about.model.module, about.model.task, {}
    batches = about.data.recovery[: max(1, round(ALONE_SHARE * len(about.data.recovery)))]
    for group in narrow.groups:
        if group.name not in removed:
            continue
        units = [about.units.named(name) for name in _reading(group)]
        names = {name for unit in units for name in (f"{unit.name}.weight", unit.bias)}
        tensors = {name: partial(Tensor.detach, new[name]) for name in names if name in new}

        def cut(batch: Batch, tensors: Changes = tensors) -> Tensor:
            with substituted(module, tensors):
                return task.forward(module, batch)

        found[group.name] = measure(
            about.model, cut, batches, about.divergence, progress=about.progress, stage="measure"
        ).mean_divergence
    return found


def _cuts(
    narrow: Narrow,
    removed: Mapping[str, Sequence[int]],
    priced: Mapping[str, float],
    alone: Mapping[str, float],
) -> Iterator[Cut]:
    """Write down what goes; the price of what reads several groups is split among them."""
    by_name = {group.name: group for group in narrow.groups}
    shared: dict[str, int] = defaultdict(int)
    for name in removed:
        for reader in _reading(by_name[name]):
            shared[reader] += 1
    gone = numbers_gone(narrow.session.model.module, narrow.groups, removed)
    for name, numbers in removed.items():
        group, known = by_name[name], narrow.numbers[name]
        nats = sum(priced.get(reader, 0.0) / shared[reader] for reader in _reading(group))
        yield Cut(
            turn=narrow.turn + 1,
            group=name,
            kind=group.kind,
            units=tuple(known[number] for number in numbers),
            of=narrow.counts[name],
            weights=gone[name],
            predicted_damage=nats,
            measured_damage=alone[name],
        )


def _corrected(
    narrow: Narrow,
    offers: Sequence[Offer],
    removed: Mapping[str, Sequence[int]],
    priced: Mapping[str, float],
) -> dict[str, float]:
    """Correct the prices of cuts by what was found on data that neither choice nor fit has seen."""
    by_name = {group.name: group for group in narrow.groups}
    factors = dict(narrow.factors)
    for offer in offers:
        count = len(removed.get(offer.group, ()))
        said = sum(offer.added[:count])
        names = _reading(by_name[offer.group])
        seen = sum(priced.get(reader, 0.0) for reader in names)
        if count and said > 0 and seen > 0:
            ratio = min(max(seen / said, 1 / LARGEST_COHERENCE), LARGEST_COHERENCE)
            for reader in names:
                factors[reader] = factors.get(reader, 1.0) * ratio
    return factors


def without(
    narrow: Narrow,
    removed: Mapping[str, Sequence[int]],
    new: Mapping[str, Tensor],
    cuts: tuple[Cut, ...],
) -> Narrow:
    """Cut, and number everything anew."""
    session = narrow.session
    small = cut_out(session.model.module, narrow.groups, removed, new)
    model = replace(session.model, module=small.requires_grad_(False))
    units = list_units(model)
    units = units if session.recipe.biases == "moved" else units.without_biases()
    done = (*session.cuts, *cuts)
    where = json.dumps([[cut.turn, cut.group, cut.units] for cut in done])
    after = replace(
        session,
        model=model,
        units=units,
        cuts=done,
        whole=session.before_cuts,
        finished=session.before_cuts.finished.within(f"after the cuts {where}"),
    )
    numbers = {
        name: tuple(n for place, n in enumerate(known) if place not in set(removed.get(name, ())))
        for name, known in narrow.numbers.items()
    }
    return replace(
        narrow, session=after, groups=narrower(small, narrow.groups, removed), numbers=numbers
    )

"""Make a model narrower by price: cut what is worth less than its bytes, and follow a plan's cuts.

Rounding alone meets the budget first. It says what a byte is worth there, in nats, and how many
bytes each weight takes; so it says what the bytes of a channel, a neuron or a head would return if
the weights that stay had them. Units that cost less than that go, the cheapest for their worth
first, a share of them in a turn; what reads the others is fitted again, and then everything is
gathered, priced, solved and measured anew with the network that is really smaller. As long as that
measures better than what came before, there is another turn.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from attar import cost, cutting, decide, writing
from attar.coupling import CoupledGroup
from attar.cut import cut_out, narrower
from attar.cut.choose import Offer, choose
from attar.cut.find import check_same
from attar.cut.narrower import numbers_each
from attar.cut.refit import cheapest_first
from attar.decide import Candidates, Decided
from attar.errors import BudgetError, CutError, PlanError
from attar.load.units import list_units
from attar.parallel import in_order
from attar.plan import candidates as menus
from attar.plan.solve import weight_bytes
from attar.records import Budget, Contender, Cut, Statistics, Unit, Units
from attar.session import Session
from attar.trials import Trials

# Of the worth of all that should go, what goes in one turn: the rest is priced again after it.
SHARE_PER_TURN = 1 / 3
MOST_TURNS = 6
# Of a group's units, what goes at most in one turn.
MOST_OF_A_GROUP = 0.5
# Of the bytes that are to go, what goes in one turn where nothing is rounded.
SHARE_OF_BYTES = 0.25
# Change of the units' bytes over which a byte's worth is taken.
MARGIN = 0.02
# Of the measured ratio of a prediction, what is believed at most.
LARGEST_CORRECTION = 10.0


@dataclass(frozen=True)
class Way:
    """A way to meet the budget that was carried out and measured.

    Attributes:
        cut_damage: Measured after the last cut, before rounding.
    """

    session: Session
    statistics: Statistics
    candidates: Candidates
    decided: Decided
    cut_damage: float = 0.0

    @property
    def measured(self) -> float:
        """Nats per prediction on recovery data, against the original."""
        return min(done.measured_damage for done in self.decided.plan.rounds)

    @property
    def correction(self) -> float:
        """Measured over predicted damage of the round that was kept."""
        best = min(self.decided.plan.rounds, key=lambda done: done.measured_damage)
        if best.predicted_damage <= decide.SMALLEST_CORRECTED:
            return 1.0
        ratio = best.measured_damage / best.predicted_damage
        return min(max(ratio, 1 / LARGEST_CORRECTION), LARGEST_CORRECTION)


@dataclass(frozen=True)
class Narrow:
    """A model on its way to be narrower.

    Attributes:
        groups: As they are by now.
        counts: Group to how many units it has in the original.
        numbers: Group to the number in the original of each unit that is left.
        factors: Unit name to how much more cuts of what it reads cost than A and G say.
    """

    session: Session
    groups: tuple[CoupledGroup, ...]
    counts: Mapping[str, int]
    numbers: Mapping[str, tuple[int, ...]]
    factors: Mapping[str, float]

    @property
    def turn(self) -> int:
        """Of the last cut; 0 before any."""
        return max((cut.turn for cut in self.session.cuts), default=0)


def plan(session: Session, statistics: Statistics) -> Way:
    """Meet the budget as the recipe asks: by rounding, by cutting, or by what measures best.

    Raises:
        BudgetError: The smallest model that can be made is larger than the budget.
    """
    if session.recipe.cut == "only":
        return _only_cut(session)
    best = _rounded(session, statistics)
    if session.recipe.cut == "off":
        return best
    ways = [best]
    narrow = opened(session, statistics.coherence.get("", {}))
    while narrow.turn < MOST_TURNS:
        narrow, done = _turn(narrow, _worth_of(best))
        if not done:
            break
        way = _rounded_after(narrow.session)
        ways.append(way)
        if way.measured >= best.measured:
            break
        best = way
    return _with_contenders(best, ways)


def follow(
    session: Session, statistics: Statistics, cuts: Sequence[Cut]
) -> tuple[Session, Statistics]:
    """Cut what a plan cuts, turn by turn, and fit the rest as it was fitted then.

    Raises:
        PlanError: The plan cuts what cannot be cut, or is to be kept.
    """
    if not cuts:
        return session, statistics
    del statistics  # of the model before; they take memory
    narrow = opened(session, {})
    check_cuts(session, narrow, cuts)
    for turn in sorted({cut.turn for cut in cuts}):
        of_turn = tuple(cut for cut in cuts if cut.turn == turn)
        removed = {
            cut.group: tuple(narrow.numbers[cut.group].index(unit) for unit in sorted(cut.units))
            for cut in of_turn
        }
        about, gathered = _gathered(narrow)
        new = cutting.fit(about, gathered, narrow.groups, removed)
        narrow = _without(narrow, removed, new, of_turn)
    return narrow.session, decide.explain(narrow.session)


def units_after(session: Session, cuts: Sequence[Cut]) -> Units:
    """List the units of a session's model as they will be when a plan's cuts are made.

    Raises:
        PlanError: The plan cuts what cannot be cut, or is to be kept.
    """
    if not cuts:
        return session.units
    narrow = opened(session, {})
    check_cuts(session, narrow, cuts)
    removed: dict[str, tuple[int, ...]] = {}
    for cut in cuts:
        removed[cut.group] = tuple(sorted((*removed.get(cut.group, ()), *cut.units)))
    return _without(narrow, removed, {}, ()).session.units


def left_of_units(session: Session) -> dict[str, Unit]:
    """Unit name to what a cut left of it; without units that are whole."""
    whole = {unit.name: unit for unit in session.before_cuts.units}
    return {unit.name: unit for unit in session.units if unit.shape != whole[unit.name].shape}


def check_cuts(session: Session, narrow: Narrow, cuts: Sequence[Cut]) -> None:
    """Refuse a cut that a plan asks for and that cannot be."""
    by_name = {group.name: group for group in narrow.groups}
    gone: dict[str, set[int]] = defaultdict(set)
    for cut in cuts:
        group = by_name.get(cut.group)
        if group is None:
            why = dict(_left_whole(session)).get(cut.group, "no units of that name go together")
            raise PlanError(
                f"the plan cuts units of {cut.group!r}, which cannot be: {why}.",
                hint="take its lines out of `cuts`; `attar explain MODEL --units` lists groups.",
            )
        wrong = [unit for unit in cut.units if not 0 <= unit < group.units]
        if wrong or gone[cut.group] & set(cut.units) or len(set(cut.units)) < len(cut.units):
            raise PlanError(
                f"the plan cuts {wrong or 'one unit twice'} of {cut.group!r}, which has the units "
                f"0 to {group.units - 1}.",
                hint="name each unit once.",
            )
        gone[cut.group] |= set(cut.units)
        if len(gone[cut.group]) >= group.units:
            raise PlanError(
                f"the plan cuts all {group.units} units of {cut.group!r}, and the network would "
                "end there.",
                hint="leave at least one.",
            )


# ---------------------------------------------------------------------------------------------
# what may go


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


def _left_whole(session: Session) -> Iterator[tuple[str, str]]:
    yield from cutting.find(session).pinned.items()
    yield from ((group.name, why) for group, why in _judged(session) if why is not None)


def _notes(left: Iterable[tuple[str, str]]) -> Iterator[str]:
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, why in left:
        reasons[why].append(name)
    for why, names in reasons.items():
        yield f"not cut: {len(names)} group(s) such as {names[0]}: {why}."


# ---------------------------------------------------------------------------------------------
# one turn


@dataclass(frozen=True)
class Worth:
    """What is returned for each number of a weight that goes.

    Attributes:
        of_unit: Unit name to nats, or bytes.
        of_rest: Of any other number.
        at_most: Highest cost over worth that goes.
        share: Of the worth of all that should go, what goes now.
        enough: Worth of all that goes from which on no more does.
    """

    of_unit: Mapping[str, float]
    of_rest: float
    at_most: float = 1.0
    share: float = SHARE_PER_TURN
    enough: float = float("inf")


def _turn(narrow: Narrow, worth: Worth) -> tuple[Narrow, bool]:
    """Choose what goes, fit what reads the rest, and cut; False where nothing should go."""
    session = narrow.session
    about, gathered = _gathered(narrow)
    with session.timed("cut"):
        offers = list(
            in_order(lambda one: _offer(narrow, about, gathered, one, worth), narrow.groups)
        )
        some = [offer for offer in offers if offer is not None and offer.units]
        removed = choose(some, at_most=worth.at_most, enough=worth.enough)
        if worth.share < 1:
            total = sum(len(removed[one.group]) * one.worth for one in some if one.group in removed)
            removed = choose(some, at_most=worth.at_most, enough=worth.share * total)
        if not removed:
            return narrow, False
        new = cutting.fit(about, gathered, narrow.groups, removed)
        try:
            check_same(about.model.module, cutting.runner(about), narrow.groups, removed)
        except CutError as error:
            notes = (*session.notes, f"not cut any further: {error.problem}")
            return replace(narrow, session=replace(session, notes=notes)), False
        priced = _priced(about, new)
    cuts = tuple(_cuts(narrow, removed, priced))
    factors = _corrected(narrow, some, removed, priced)
    return replace(_without(narrow, removed, new, cuts), factors=factors), True


def _gathered(narrow: Narrow) -> tuple[Session, Statistics]:
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


def _priced(about: Session, new: Mapping[str, Tensor]) -> dict[str, float]:
    return cutting.price_fits(about, [new])[0]


def _reading(group: CoupledGroup) -> list[str]:
    """Names of the units that read a group."""
    return list(
        dict.fromkeys(one.parameter.removesuffix(".weight") for one in group.members if one.reads)
    )


def _cuts(
    narrow: Narrow, removed: Mapping[str, Sequence[int]], priced: Mapping[str, float]
) -> Iterator[Cut]:
    """Write down what goes; the price of what reads several groups is split among them."""
    by_name = {group.name: group for group in narrow.groups}
    shared: dict[str, int] = defaultdict(int)
    for name in removed:
        for reader in _reading(by_name[name]):
            shared[reader] += 1
    for name, numbers in removed.items():
        group, known = by_name[name], narrow.numbers[name]
        nats = sum(priced.get(reader, 0.0) / shared[reader] for reader in _reading(group))
        yield Cut(
            turn=narrow.turn + 1,
            group=name,
            kind=group.kind,
            units=tuple(known[number] for number in numbers),
            of=narrow.counts[name],
            weights=group.weights * len(numbers),
            predicted_damage=nats,
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
            ratio = min(max(seen / said, 1 / LARGEST_CORRECTION), LARGEST_CORRECTION)
            for reader in names:
                factors[reader] = factors.get(reader, 1.0) * ratio
    return factors


def _without(
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


# ---------------------------------------------------------------------------------------------
# rounding, after cuts or without


def _rounded(session: Session, statistics: Statistics) -> Way:
    return solved(session, statistics, decide.price(session, statistics))


def solved(session: Session, statistics: Statistics, candidates: Candidates) -> Way:
    """Meet the budget with what was priced."""
    return Way(session, statistics, candidates, decide.plan(session, candidates, statistics))


def _rounded_after(session: Session) -> Way:
    """Gather, price and decide with the network that was cut.

    What trains the smaller network against the original belongs before this: it is given a session
    and gives one back.
    """
    damage = _cut_damage(session)
    return replace(_rounded(session, decide.explain(session)), cut_damage=damage)


def _cut_damage(session: Session) -> float:
    def measured() -> float:
        return cutting.measured(session, session.model.module)

    with session.timed("measure"):
        return session.finished.once("damage of the cuts", measured)


def _worth_of(way: Way) -> Worth:
    """What numbers that go return at a plan: their bytes to others, and their own rounding."""
    session, choices = way.session, way.decided.plan.choices
    nats_per_byte = _worth_of_a_byte(way)
    of_unit = {}
    for unit in session.units:
        chosen = choices[unit.name]
        nats = nats_per_byte * chosen.cost.weight_bytes + (chosen.predicted_damage or 0.0)
        of_unit[unit.name] = way.correction * nats / unit.n_weights
    return Worth(of_unit, way.correction * nats_per_byte * cost.FLOAT16_BYTES)


def _worth_of_a_byte(way: Way) -> float:
    """Nats that one more byte saves at a plan."""
    trials = Trials(way.session, way.statistics)
    plan = way.decided.plan
    used = weight_bytes(plan.choices)
    least = weight_bytes(trials.smallest(way.candidates))
    sizes = [max(least, int(used * (1 - MARGIN))), int(used * (1 + MARGIN))]
    found = []
    for size in sizes:
        budget = Budget(plan.overhead_bytes + size, plan.budget.keep)
        choices = decide.solve(trials, way.candidates, budget, plan.overhead_bytes)
        nats = sum(choice.predicted_damage or 0.0 for choice in choices.values())
        found.append((weight_bytes(choices), nats))
    (fewer, dear), (more, cheap) = found
    return max(0.0, dear - cheap) / max(1, more - fewer)


def _with_contenders(best: Way, ways: Sequence[Way]) -> Way:
    listed = tuple(
        Contender(
            turns=max((cut.turn for cut in way.session.cuts), default=0),
            n_parameters=cost.count_numbers(way.session.units, way.session.units.leftovers),
            cut_damage=way.cut_damage,
            measured_damage=way.measured,
            weight_bytes=way.decided.plan.weight_bytes,
            is_chosen=way is best,
        )
        for way in ways
    )
    decided = best.decided
    return replace(best, decided=replace(decided, plan=replace(decided.plan, contenders=listed)))


# ---------------------------------------------------------------------------------------------
# cutting alone


def _only_cut(session: Session) -> Way:
    """Cut until everything in 16 bits fits, and round nothing more.

    Raises:
        BudgetError: What cannot be cut is larger than the budget.
    """
    narrow = opened(session, {})
    while (over := _bytes_over(narrow.session)) > 0:
        size = _bytes_over(narrow.session) + session.budget_bytes()
        worth = Worth(
            of_unit={},
            of_rest=cost.FLOAT16_BYTES,
            at_most=float("inf"),
            share=1.0,
            enough=min(over, SHARE_OF_BYTES * size),
        )
        narrow, done = _turn(narrow, worth)
        if not done:
            raise BudgetError(
                f"cutting alone leaves at least {size:,} bytes, and the budget is "
                f"{session.budget_bytes():,}.",
                hint="use --cut auto, which rounds as well, or raise --size.",
            )
    return _rounded_after(narrow.session)


def _bytes_over(session: Session) -> int:
    """What the folder would weigh in 16 bits beyond the budget."""
    kept = sum(cost.FLOAT16_BYTES * unit.n_weights for unit in session.units)
    return writing.estimated_overhead(session) + kept - session.budget_bytes()

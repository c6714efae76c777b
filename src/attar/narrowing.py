"""Make a model narrower by price: cut what is worth less than its bytes, and follow a plan's cuts.

Rounding alone meets the budget first. It says what a byte is worth there, in nats, and how many
bytes each weight takes; so it says what the bytes of a channel, a neuron or a head would return if
the weights that stay had them. Units that cost less than that go, the cheapest for their worth
first, a share of them in a turn; what reads the others is fitted again, and then everything is
gathered, priced, solved and measured anew with the network that is really smaller. As long as that
measures better than what came before, there is another turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from attar import cost, decide, writing
from attar.cut_turns import Narrow, Worth, opened, turn
from attar.decide import Candidates, Decided
from attar.errors import BudgetError
from attar.plan.solve import weight_bytes
from attar.records import Budget, Contender, Statistics
from attar.session import Session
from attar.trials import Trials

# Of the bytes that are to go, what goes in one turn where nothing is rounded.
SHARE_OF_BYTES = 0.25
# Change of the units' bytes over which a byte's worth is taken.
MARGIN = 0.02
# Turns at most; each must have measured better than the one before it.
MOST_TURNS = 6
# Of the measured ratio of a plan's damage, what is believed at most.
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


def plan(session: Session, statistics: Statistics) -> Way:
    """Meet the budget as the recipe asks: by rounding, by cutting, or by what measures best.

    Raises:
        BudgetError: The smallest model that can be made is larger than the budget.
    """
    if session.recipe.cut == "only":
        return _only_cut(session)
    candidates = decide.price(session, statistics)
    try:
        best = solved(session, statistics, candidates)
    except BudgetError:
        if session.recipe.cut == "off":
            raise
        return _cut_first(session, statistics, candidates)
    if session.recipe.cut == "off":
        return best
    ways, narrow = [best], opened(session, {})
    while narrow.turn < MOST_TURNS:
        narrow, done = turn(narrow, worth_of(best))
        if not done:
            break
        way = rounded_after(narrow)
        ways.append(way)
        if way.measured >= best.measured:
            break
        best = way
    return _with_contenders(best, ways)


def solved(session: Session, statistics: Statistics, candidates: Candidates) -> Way:
    """Meet the budget with what was priced."""
    return Way(session, statistics, candidates, decide.plan(session, candidates, statistics))


def rounded_after(narrow: Narrow) -> Way:
    """Gather, price and decide with the network that was cut."""
    session = narrow.session
    statistics = decide.explain(session)
    way = solved(session, statistics, decide.price(session, statistics))
    return replace(way, cut_damage=narrow.damage)


def worth_of(way: Way) -> Worth:
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
    decided = best.decided.noting(list(_notes(best, ways)))
    return replace(best, decided=replace(decided, plan=replace(decided.plan, contenders=listed)))


def _notes(best: Way, ways: Sequence[Way]) -> Iterator[str]:
    """Say what was cut, and what the other ways measured."""
    alone, cuts = ways[0], best.session.cuts
    if len(ways) == 1:
        yield "nothing was cut: no share of what could go measured to be worth its bytes."
    elif not cuts:
        yield (
            f"nothing was cut: rounding alone measured {alone.measured:.3g} nats on recovery data, "
            f"and with a cut before it {min(way.measured for way in ways[1:]):.3g}."
        )
    else:
        measured = f"with rounding {best.measured:.3g}, and {alone.measured:.3g} by rounding alone"
        yield f"{_said(best)}; {measured}."


def _said(way: Way) -> str:
    """What a way cut, and what that measured."""
    session, cuts = way.session, way.session.cuts
    left = cost.count_numbers(session.units, session.units.leftovers)
    return (
        f"cut: {sum(len(cut.units) for cut in cuts)} units of {len({cut.group for cut in cuts})} "
        f"groups, {1 - left / session.n_parameters:.1%} of all numbers, which measured "
        f"{way.cut_damage:.3g} nats on recovery data"
    )


def _cut_until_it_fits(
    session: Session, bytes_each: Mapping[str, float], why: str, hint: str
) -> Narrow:
    """Cut the units that cost least for their bytes until what is left fits the budget.

    Args:
        bytes_each: Unit name to bytes that one number of its weight takes.
        why: Said where it cannot: "... leaves at least".

    Raises:
        BudgetError: What cannot be cut is larger than the budget.
    """
    narrow, budget = opened(session, {}), session.budget_bytes()
    while True:
        left = sum(bytes_each[unit.name] * unit.n_weights for unit in narrow.session.units)
        size = int(writing.estimated_overhead(narrow.session) + left)
        if size <= budget:
            return narrow
        worth = Worth(
            of_unit=bytes_each,
            of_rest=float(cost.FLOAT16_BYTES),
            at_most=float("inf"),
            shares=(1.0,),
            enough=float(min(size - budget, SHARE_OF_BYTES * size)),
        )
        narrow, done = turn(narrow, worth)
        if not done:
            raise BudgetError(
                f"{why} at least {size:,} bytes, and the budget is {budget:,}.", hint=hint
            )


def _only_cut(session: Session) -> Way:
    """Cut until everything in 16 bits fits, and round nothing more."""
    each = dict.fromkeys((unit.name for unit in session.units), float(cost.FLOAT16_BYTES))
    hint = "use --cut auto, which rounds as well, or raise --size."
    way = rounded_after(_cut_until_it_fits(session, each, "cutting alone leaves", hint))
    return _noting(way, _said(way) + ".")


def _noting(way: Way, note: str) -> Way:
    return replace(way, decided=way.decided.noting([note]))


def _cut_first(session: Session, statistics: Statistics, candidates: Candidates) -> Way:
    """Cut until the fewest bits fit, where they do not fit for the whole model."""
    least = Trials(session, statistics).smallest(candidates)
    each = {
        unit.name: least[unit.name].cost.weight_bytes / unit.n_weights for unit in session.units
    }
    why, hint = "cutting and the fewest bits leave", "raise --size."
    way = rounded_after(_cut_until_it_fits(session, each, why, hint))
    return _noting(way, _said(way) + "; rounding alone does not fit the budget.")

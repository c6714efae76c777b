"""Choose changes of channels by price, fold them into the session's module, and follow a plan's.

A change is tried where it can be folded exactly (`equalise/`). What it does to the statistics is
known exactly too, so nothing is gathered again: the rounding that the plan would use is done with
and without the change on one half of the statistics, and priced on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from attar import decide, learning, pricing, writing
from attar.equalise import FOLDS
from attar.equalise.facts import (
    ChangedCurvatures,
    Facts,
    Fold,
    Side,
    changed_curvature,
    channel_ranges,
    facts_of,
    sides,
)
from attar.equalise.find import find_links, gains_first, put
from attar.errors import AttarError, PlanError
from attar.links import GAIN, Change, Found, Link, folded
from attar.parallel import in_order
from attar.plan import candidates as menus
from attar.records import Equalised, Statistics, Transform, Unit
from attar.session import Session, state_hash
from attar.tables import build
from attar.transform.apply import build_transform

# What a change must save of the price of the units it touches: less is noise of the statistics.
LEAST_SAVED = 0.03
# Bits per weight that changes are priced at where no size is known yet.
USUAL_BITS = 4.0
# Calibration batches whose ranges are taken.
RANGE_BATCHES = 4
# What is rounded to price a change: not zeroed, corrected, or kept.
ROUNDINGS = ("quantize_llama", "quantize_entropy", "quantize_feedback")
OPTIONS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    *(("fold_scale", {"alpha": a}) for a in (0.25, 0.5, 0.75)),
    *(("fold_scale", {"alpha": a, "beta": a}) for a in (0.25, 0.5)),
    *(("fold_shift", {"centre": c}) for c in ("middle", "mean")),
    ("fold_shift", {"cap": 2.0}),
    ("fold_reassembly", {"theta": 4.0}),
    ("fold_hadamard", {"seed": 0}),
    ("fold_karhunen_loeve", {"spread": True}),
)

Option = tuple[str, Mapping[str, Any]]
Step = tuple[Link, Change]


def build_fold(method: str, settings: Mapping[str, Any]) -> Fold:
    """Build a method from its name and settings in a plan.

    Raises:
        SettingError: The name is not in the table, or a setting is not one of the method's.
    """
    fold: Fold = build(FOLDS, "method to equalise", method, settings)
    return fold


def best_change(
    link: Link, facts: Facts, options: Iterable[Option], price: Callable[[Change], float]
) -> tuple[Option, Change, float] | None:
    """Try methods on a link; give the cheapest, or None where none is allowed.

    Args:
        price: Nats of what comes after the change: of rounded weights, of rounded activations, or
            of both.
    """
    best: tuple[Option, Change, float] | None = None
    for method, settings in options:
        fold = build_fold(method, settings)
        if fold.refuses(link) is not None:
            continue
        change = fold.change(link, facts)
        nats = price(change)
        if best is None or nats < best[2]:
            best = ((method, settings), change, nats)
    return best


@dataclass
class Work:
    """A session whose module is being changed, with the statistics as they are by then."""

    session: Session
    statistics: Statistics
    found: Found
    units: Mapping[str, Unit]
    ranges: Mapping[str, tuple[Tensor, Tensor]]
    sides: dict[str, list[Side]]

    def state(self) -> dict[str, Tensor]:
        """Parameters as they are."""
        return {name: p.detach() for name, p in self.session.model.module.named_parameters()}

    def facts(self, link: Link, after: Sequence[Step] = ()) -> Facts:
        """What is known of a link's channels, after changes that are not folded yet."""
        state, statistics = self.state(), self.statistics
        changed: dict[str, list[Side]] = {}
        for step in after:
            state.update(folded(*step, state))
            for name, side in sides(*step, self.units):
                changed.setdefault(name, []).append(side)
        curvatures = ChangedCurvatures(statistics.curvatures, changed)
        later = replace(statistics, curvatures=curvatures)
        return facts_of(link, state, self.units, later, self.ranges)

    def fold(self, link: Link, change: Change) -> None:
        """Change the module, and the statistics with it."""
        for name, side in sides(link, change, self.units):
            self.sides.setdefault(name, []).append(side)
        put(dict(self.session.model.module.named_parameters()), link, change)


def open_work(session: Session, statistics: Statistics) -> Work:
    """Find the links of a session's model, and what their channels range over."""
    model = session.model
    found = find_links(model.module, lambda: model.task.forward(model.module, model.examples))
    units = {f"{unit.name}.weight": unit for unit in session.units}
    known = [link for link in found.links if all(w in units for w in link.weights)]
    stream = found.stream
    if stream is not None and any(w not in units for w in stream.link.weights):
        stream = None
    ranges = channel_ranges(
        model.module,
        lambda batch: model.task.forward(model.module, batch),
        session.data.calibration[:RANGE_BATCHES],
        [link for link in known if link.can_shift],
    )
    changes: dict[str, list[Side]] = {}
    later = replace(statistics, curvatures=ChangedCurvatures(statistics.curvatures, changes))
    return Work(
        session, later, replace(found, links=tuple(known), stream=stream), units, ranges, changes
    )


def equalise(session: Session, statistics: Statistics) -> tuple[Session, Statistics]:
    """Fold every change that pays into the session's module, in place.

    Returns:
        The session, which knows what was changed, and the statistics as they are now.
    """
    if session.recipe.equalise == "none":
        return session, statistics
    before = state_hash(session.model.module)
    with session.timed("equalise"):
        work = open_work(session, statistics)
        reference = _reference(session)
        done = [*_turn_stream(work, reference), *_change_links(work, reference)]
        if session.recipe.equalise == "learned":
            done += _learn(work, reference)
    notes = (*session.notes, *_notes(work.found, done))
    return _after(session, before, tuple(done), notes), work.statistics


def _after(
    session: Session, before: str, done: tuple[Equalised, ...], notes: tuple[str, ...]
) -> Session:
    writing.weights_changed(session)
    return replace(session, equalised=done, notes=notes, original_sha256=before)


def follow(
    session: Session, statistics: Statistics, planned: Sequence[Equalised]
) -> tuple[Session, Statistics]:
    """Fold the changes of a plan into the session's module, in place and in order.

    Raises:
        PlanError: The plan names a link that the model does not have, or asks it for what it
            cannot have.
    """
    if not planned:
        return session, statistics
    before = state_hash(session.model.module)
    with session.timed("equalise"):
        work = open_work(session, statistics)
        for step in _first(work, planned):
            work.fold(*step)
        # Each was chosen as if it were the only one, so all are worked out before any is folded.
        alone = [one for one in planned if one.link not in ("stream", learning.LINKS)]
        for step in [_step(work, one) for one in alone]:
            work.fold(*step)
        for one in planned:
            if one.link == learning.LINKS:
                for step in learning.learn_again(session, work.found.links, work.units, one):
                    work.fold(*step)
    return _after(session, before, tuple(planned), session.notes), work.statistics


def _first(work: Work, planned: Sequence[Equalised]) -> Iterator[Step]:
    """Turn the stream as planned, after the gains in front of what reads it."""
    turned = [one for one in planned if one.link == "stream"]
    if turned and work.found.stream is not None:
        yield from gains_first(work.found.stream)
    for one in turned:
        yield _step(work, one)


def _step(work: Work, one: Equalised) -> Step:
    fold, stream = build_fold(one.method, one.settings), work.found.stream
    known = [*work.found.links, *([] if stream is None else [stream.link])]
    link = next((link for link in known if link.name == one.link), None)
    if link is None:
        reason = work.found.refused.get(one.link, "nothing of that name writes channels")
        raise PlanError(
            f"the plan equalises {one.link!r}, which cannot be: {reason}.",
            hint="take its line out of `equalised`.",
        )
    refused = fold.refuses(link)
    if refused is not None:
        raise PlanError(
            f"the plan equalises {one.link!r} with {one.method}, which cannot be: it {refused}.",
            hint="choose another method, or take its line out of `equalised`.",
        )
    return link, fold.change(link, work.facts(link))


# ---------------------------------------------------------------------------------------------
# what pays


def _reference(session: Session) -> dict[str, tuple[str, Transform]]:
    """Choose the rounding whose size is nearest to what the budget leaves each weight."""
    bits = USUAL_BITS
    if session.recipe.size:
        n_weights = sum(unit.n_weights for unit in session.units)
        left = session.budget_bytes() - writing.estimated_overhead(session)
        bits = max(1.0, 8 * left / n_weights)
    chosen = {}
    for unit in session.units:
        built = [
            (treatment, build_transform(treatment, settings))
            for treatment, settings in decide.menu(session, unit)
            if treatment in ROUNDINGS
        ]
        fitting = [one for one in built if one[1].rejects(unit) is None]
        if fitting and not menus.is_kept(unit, session.recipe.keep):
            chosen[f"{unit.name}.weight"] = min(
                fitting,
                key=lambda one, unit=unit: abs(  # type: ignore[misc]
                    8 * one[1].cost(unit).weight_bytes / unit.n_weights - bits
                ),
            )
    return chosen


def _change_links(
    work: Work, reference: Mapping[str, tuple[str, Transform]]
) -> Iterator[Equalised]:
    """Try every link as if it were the only one; then fold all that pay."""

    def choose(link: Link) -> tuple[Link, Option, Change, float, float] | None:
        touched = [name for name in link.weights if name in reference]
        if not touched:
            return None
        prices = _Prices(work, reference, touched)
        before = prices.of([])
        best = best_change(
            link, work.facts(link), OPTIONS, lambda change: prices.of([(link, change)])
        )
        if best is None or best[2] > (1 - LEAST_SAVED) * before:
            return None
        return link, best[0], best[1], before, best[2]

    links = work.found.links
    with work.session.progress.stage("equalise", len(links)) as advance:
        chosen = []
        for one in in_order(choose, links):
            chosen.append(one)
            advance(1)
    for one in chosen:
        if one is not None:
            link, (method, settings), change, before, after = one
            work.fold(link, change)
            yield Equalised(link.name, method, settings, before, after)


def _turn_stream(work: Work, reference: Mapping[str, tuple[str, Transform]]) -> Iterator[Equalised]:
    """Turn the residual stream if all that touches it, together, loses less."""
    stream = work.found.stream
    if stream is None:
        return
    first = gains_first(stream)
    prices = _Prices(work, reference, [w for w in stream.link.weights if w in reference])
    before = prices.of([])
    facts = work.facts(stream.link, first)
    best = best_change(
        stream.link, facts, OPTIONS, lambda change: prices.of([*first, (stream.link, change)])
    )
    if best is not None and best[2] <= (1 - LEAST_SAVED) * before:
        for step in (*first, (stream.link, best[1])):
            work.fold(*step)
        yield Equalised("stream", *best[0], before, best[2])


def _learn(work: Work, reference: Mapping[str, tuple[str, Transform]]) -> Iterator[Equalised]:
    """Learn all scales together, and fold them where held-out data loses less."""
    bits = learning.whole_bits((work.units[w], of[1]) for w, of in reference.items())
    done, steps = learning.learn_scales(work.session, work.found.links, work.units, bits)
    if done.damage_after <= (1 - LEAST_SAVED) * done.damage_before:
        for step in steps:
            work.fold(*step)
        yield done


class _Prices:
    """Prices of the reference rounding of some units, with changes made and without."""

    def __init__(
        self,
        work: Work,
        reference: Mapping[str, tuple[str, Transform]],
        weights: Sequence[str],
    ) -> None:
        self._work, self._reference, self._weights = work, reference, weights
        self._known: dict[str, float] = {}

    def of(self, steps: Sequence[Step]) -> float:
        """Nats per prediction of all units together; infinite where a weight cannot be rounded."""
        state = self._work.state()
        changed: dict[str, list[Side]] = {}
        moved: set[str] = set()
        for link, change in steps:
            state.update(folded(link, change, state))
            for name, side in sides(link, change, self._work.units):
                changed.setdefault(name, []).append(side)
            moved |= _moved(link, change)
        return sum(self._price(w, state[w], changed, alike=w not in moved) for w in self._weights)

    def _price(
        self, name: str, weight: Tensor, changed: Mapping[str, Sequence[Side]], *, alike: bool
    ) -> float:
        if alike and name in self._known:
            return self._known[name]
        unit, statistics = self._work.units[name], self._work.statistics
        curvatures = statistics.curvatures[unit.name]
        for side in changed.get(unit.name, ()):
            curvatures = tuple(changed_curvature(one, side) for one in curvatures)
        treatment, transform = self._reference[name]
        flat = weight.reshape(unit.rows, unit.columns)
        alone = next(iter(pricing.price_weight(unit, flat, curvatures, [transform])))
        if isinstance(alone, AttarError):
            return float("inf")
        price = alone * pricing.factor(statistics, treatment, unit)
        if alike:
            self._known[name] = price
        return price


def _moved(link: Link, change: Change) -> set[str]:
    """Say whose rounding may change: a row's scale follows a factor of the row."""
    read = {reader.weight for reader in link.readers}
    if change.write.places is None:
        return read
    return read | {writer.weight for writer in link.writers if writer.side != GAIN}


def _notes(found: Found, done: Sequence[Equalised]) -> Iterator[str]:
    """Say in a few lines what was folded, what it saved, and what could not be."""
    for method in FOLDS:
        own = [one for one in done if one.method == method]
        if own:
            before, after = (
                sum(getattr(o, f"damage_{w}") for o in own) for w in ("before", "after")
            )
            yield (
                f"equalised: {method} on {len(own)} link(s) such as {own[0].link}; the price of "
                f"what they touch fell from {before:.3g} to {after:.3g} nats."
            )
    for one in done:
        if one.link == learning.LINKS:
            yield (
                f"equalised: scales of {len(found.links)} link(s) learned with "
                f"{one.settings['bits']} bits; held-out data lost {one.damage_before:.3g} nats "
                f"before, {one.damage_after:.3g} after."
            )
    unpaid = len(found.links) - sum(one.method in FOLDS and one.link != "stream" for one in done)
    if unpaid:
        yield f"equalised: nothing pays on {unpaid} link(s)."
    reasons: dict[str, list[str]] = {}
    for name, reason in found.refused.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        yield f"not equalised: {len(names)} such as {names[0]}: {reason}."

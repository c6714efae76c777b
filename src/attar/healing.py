"""Let what a plan made learn to answer as the original, in the form in which it is stored."""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attar import decide
from attar.cost import leftover_dtype
from attar.decide import Decided
from attar.errors import SettingError
from attar.heal import STEPS_PER_FIT, Descent, Grid, OnGrid, Part, State, Whole, Wish, parse_wish
from attar.records import Healed, Model, Plan
from attar.session import Session
from attar.transform.apply import Treated, biases
from attar.transform.keep_float import KeepFloat
from attar.transform.on_grid import fits, opened, with_levels

# Of a step of the grid, what one step of Adam moves a weight: where it moves more, most of what a
# few batches ask for is chance, and weights that leave their levels do harm.
RATE = 0.003
# Of floats, as a share of their root mean square, over that.
RATE_OF_FLOATS = 0.3
# At the recovery data.
LOOKS = 10
# A run that is slower than its first steps were is ended after so much of its time.
OVERRUN = 1.2


def check(session: Session) -> None:
    """Refuse what cannot learn, before long work.

    Raises:
        SettingError: With the reason.
    """
    if parse_wish(session.recipe.heal) is None:
        return
    why = ""
    if session.on_disk:
        why = f"the weights of {session.model.name} stay on disk"
    elif session.recipe.activations != "none":
        why = "activations are rounded to 8 bits"
    elif session.recipe.to == "gguf":
        why = "what llama.cpp reads is not on a grid that can be learned"
    if why:
        raise SettingError(f"{why}, so that nothing can be healed.", hint="leave --heal out.")


def heal(session: Session, decided: Decided) -> tuple[Session, Decided]:
    """Do as the recipe asks.

    Returns:
        A session whose model has what no plan decides about as it was learned, and what was made.
    """
    wish = parse_wish(session.recipe.heal)
    if wish is None:
        return session, decided
    with session.timed("heal"):
        return _Healing(session, decided, wish).done()


def follow(session: Session, decided: Decided, made: Plan) -> tuple[Session, Decided]:
    """Take the steps that a plan says, with the same result."""
    healed = made.healed
    if healed is None:
        return session, decided
    with session.timed("heal"):
        wish = Wish(healed.method, steps=healed.of)
        return _Healing(session, decided, wish, until=healed.steps).done()


@dataclass(frozen=True)
class Best:
    """What was learned by the step that measured best."""

    damage: float
    step: int
    learned: Mapping[str, Tensor]


class _Healing:
    """One model that learns.

    Args:
        until: Steps after which it ends, whatever it measures; None for the step that measured
            best.
    """

    def __init__(
        self, session: Session, decided: Decided, wish: Wish, until: int | None = None
    ) -> None:
        self._session, self._decided, self._wish, self._until = session, decided, wish, until
        self._finished = session.finished.within("healed")
        tensors = _tensors(session, decided.treated)
        self._parts: dict[str, Part] = {}
        for name, treated in decided.treated.items():
            unit = session.units.named(name)
            if (part := _part(treated, session.weight(unit))) is not None:
                self._parts[f"{name}.weight"] = part
        for left in session.units.leftovers:
            if left.name in tensors:
                self._parts[left.name] = Whole(tensors[left.name], RATE_OF_FLOATS)
        self._descent = Descent(
            session.original,
            session.model,
            self._parts,
            {name: t for name, t in tensors.items() if name not in self._parts},
            batches=[*session.data.calibration, *session.data.more],
            divergence=session.divergence,
            rate=RATE,
            seed=session.recipe.seed,
        )

    def done(self) -> tuple[Session, Decided]:
        """Learn, and store what was learned."""
        descent, recovery = self._descent, self._session.data.recovery
        of = self._steps()
        before = self._finished.once("start", lambda: descent.lost(recovery))
        best = Best(before, 0, _copied(descent.state.learned))
        last = of if self._until is None else self._until
        begin = time.perf_counter()
        for end in self._ends(of, last):
            best = self._turn(end, of, best)
            if self._too_late(time.perf_counter() - begin):
                break
        healed = Healed(self._wish.method, best.step, of, before, best.damage)
        if not healed.steps:  # no look measured better
            made = replace(self._decided.plan, healed=healed)
            return self._session, replace(self._decided, plan=made).noting([_note(healed)])
        with torch.no_grad():
            for name, part in self._parts.items():
                part.learned.copy_(best.learned[name])
        descent.fit()
        return self._stored(healed)

    def _ends(self, of: int, last: int) -> list[int]:
        """Steps after which there is a look; those before what an earlier run kept are left out."""
        each = max(STEPS_PER_FIT, -(-of // LOOKS) // STEPS_PER_FIT * STEPS_PER_FIT)
        ends = [*range(each, last, each), *([last] if last else [])]
        kept = [place for place, end in enumerate(ends) if self._finished.has(_step(end, of))]
        return ends[max(kept, default=0) :]

    def _steps(self) -> int:
        if self._wish.steps is not None:
            return self._wish.steps
        seconds = self._wish.seconds or 0.0
        steps = self._finished.once("steps", lambda: self._descent.steps_in(seconds))
        return max(STEPS_PER_FIT, steps // STEPS_PER_FIT * STEPS_PER_FIT)

    def _too_late(self, seconds: float) -> bool:
        limit = self._wish.seconds
        return limit is not None and seconds > OVERRUN * limit

    def _turn(self, end: int, of: int, best: Best) -> Best:
        """Take steps and look, or take what a run that was killed had kept of it."""
        descent, start = self._descent, self._descent.state.done
        name = f"heal, {best.damage:.3g} nats at step {start} of {of}"

        def go() -> tuple[Any, ...]:
            with self._session.progress.stage(name, end - start) as advance:
                descent.go(end - start, of, advance)
                lost = descent.lost(self._session.data.recovery)
            state, found = descent.state, best
            learned = _copied(state.learned)
            if lost < best.damage or self._until is not None:
                found = Best(lost, end, learned)
            return learned, state.first, state.second, found.damage, found.step, found.learned

        learned, first, second, *found = self._finished.once(_step(end, of), go)
        if descent.state.done != end:
            descent.go_on_from(State(learned, first, second, end))
        self._finished.forget(_step(start, of))
        return Best(*found)

    def _stored(self, healed: Healed) -> tuple[Session, Decided]:
        """Put what was learned into a model, and into what is stored of its weights."""
        session, parts = self._session, self._parts
        module = deepcopy(session.model.module)
        for left in session.units.leftovers:
            if left.name in parts:
                tensor = parts[left.name].tensor().detach()
                stored = tensor.to(leftover_dtype(left.name, tensor)).float()
                module.get_parameter(left.name).data = stored
        treated = {}
        for name, one in self._decided.treated.items():
            bias = one.bias if one.unit.bias not in parts else None
            treated[name] = replace(_closed(one, parts.get(f"{name}.weight")), bias=bias)
        model: Model = replace(session.model, module=module.requires_grad_(False))
        session = replace(session, model=model, whole=session.before_cuts, finished=self._finished)
        plan = replace(self._decided.plan, healed=healed)
        decided = replace(self._decided, plan=plan, treated=treated)
        done = decide.measure_plan(session, decided, 1.0)
        done = replace(done, predicted_damage=done.measured_damage)
        done = replace(done, corrected_damage=healed.damage_after)
        plan = replace(plan, predicted_damage=healed.damage_after, rounds=(*plan.rounds, done))
        return session, replace(decided, plan=plan).noting([_note(healed)])


def _part(treated: Treated, weight: Tensor) -> Part | None:
    """What is learned of a weight; None where it is stored in a way that stays as it is."""
    grid = opened(treated)
    if grid is None:
        is_float = isinstance(treated.transform, KeepFloat)
        return Whole(treated.weight(), RATE_OF_FLOATS) if is_float else None
    ends, shape = (grid.lowest, grid.highest), treated.unit.shape
    within = partial(fits, treated) if grid.is_coded else None
    return OnGrid(Grid(grid.levels, weight / grid.step, grid.step, *ends, shape, within))


def _closed(treated: Treated, part: Part | None) -> Treated:
    """Store what was learned."""
    if part is None:
        return treated
    if isinstance(part, OnGrid):
        return with_levels(treated, part.levels())
    weight = part.tensor().detach().reshape(treated.unit.rows, treated.unit.columns)
    made = treated.transform.apply(weight, None)
    return replace(treated, tensors=made.tensors, unpacked=made.unpacked)


def _tensors(session: Session, treated: Mapping[str, Treated]) -> dict[str, Tensor]:
    """Every parameter of what was made, as it would be read back."""
    state = {n: p.detach() for n, p in session.model.module.named_parameters()}
    kept = session.leftovers(biases(treated))
    as_stored = {name: kept[name].float() for name in kept if name in state}
    weights = {f"{name}.weight": one.weight() for name, one in treated.items()}
    return {**state, **as_stored, **weights}


def _note(healed: Healed) -> str:
    return (
        f"healed ({healed.method}, {healed.steps} of {healed.of} steps): on recovery data "
        f"{healed.damage_before:.3g} nats before, {healed.damage_after:.3g} after"
    )


def _step(end: int, of: int) -> str:
    return f"step {end} of {of}"


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}

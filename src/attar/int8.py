"""Decide what is rounded to 8 bits while the model runs, by price, and put it on the candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from attar import writing
from attar.explain.activation_price import OUTPUT, find_places, price_activations
from attar.plan.candidates import is_kept
from attar.plan.int8_share import choose_rounded
from attar.records import Activation, Candidate, Unit
from attar.session import Session

# Share of the calibration data on which activations are priced.
PRICED_SHARE = 0.5


@dataclass(frozen=True)
class Around:
    """What is rounded around one unit; the price of a shared input is split over its readers."""

    input: Activation | None = None
    output: Activation | None = None


Rounded = Mapping[str, Around]


def decide_rounded(session: Session) -> Rounded:
    """Price every tensor that may be rounded, and choose; no unit where none is asked for."""
    if session.recipe.activations == "none":
        return {}
    dynamic = session.recipe.activations == "dynamic"
    able = [unit for unit in session.units if may_be_int8(unit, session.recipe.keep)]
    macs = {unit.name: unit.macs for unit in able}
    with session.timed("price activations"):
        share = max(1, round(len(session.data.calibration) * PRICED_SHARE))
        batches = session.data.calibration[:share]
        places = find_places(session.model, list(macs), batches, session.progress)
        # A range of each call comes with a product in floats.
        read_by = {} if dynamic else _read_by(session, list(macs))
        alone = {name for name, readers in read_by.items() if readers is None}
        places = {k: at for k, at in places.items() if k[0] != OUTPUT or k[1] in alone}
        priced = price_activations(
            session.model,
            places,
            batches,
            session.divergence,
            dynamic=dynamic,
            seed=session.recipe.seed,
            draws=session.draws,
            progress=session.progress,
        )
    chosen = choose_rounded(
        priced, macs, {name: readers for name, readers in read_by.items() if readers is not None}
    )
    around = {name: Around() for name in macs}
    for key in chosen:
        one = priced[key]
        activation = replace(one.activation, damage=one.damage / len(one.units))
        for name in one.units:
            around[name] = replace(around[name], **{key[0]: activation})
    return {name: one for name, one in around.items() if one.input is not None}


def may_be_int8(unit: Unit, keep: Sequence[str]) -> bool:
    """Say whether a unit can multiply in integers: it multiplies, and is not pinned."""
    return "embedding" not in unit.uses and not is_kept(unit, keep)


def _read_by(session: Session, names: Sequence[str]) -> dict[str, frozenset[str] | None]:
    """Units that must round the product of each convolution; None where others read it too."""
    return {
        name: found if found is not None and found.issubset(names) else None
        for name, found in writing.readers(session).items()
        if name in names
    }


def with_rounded(
    candidates: Mapping[str, Sequence[Candidate]], around: Rounded
) -> dict[str, Sequence[Candidate]]:
    """Put what is rounded on the candidates that an engine multiplies in integers.

    The others of the unit are held to cost as much, though they round nothing: or else the solver
    would take fewer bits to be spared what was asked for.
    """
    return {
        name: [_around(c, around[name]) for c in of] if name in around else of
        for name, of in candidates.items()
    }


def _around(candidate: Candidate, around: Around) -> Candidate:
    if candidate.predicted_damage is None:
        return candidate
    both = replace(candidate, input=around.input, output=around.output)
    damage = candidate.predicted_damage + activation_damage(both)
    return replace(both if writing.is_int8(candidate) else candidate, predicted_damage=damage)


def activation_damage(candidate: Candidate) -> float:
    """Nats per prediction that rounding around a unit costs, as priced when it was chosen."""
    sides = (candidate.input, candidate.output)
    return sum((side.damage for side in sides if side is not None), 0.0)


def priced_anew(candidate: Candidate, damage: float) -> Candidate:
    """Put another price on what happens to the weight."""
    return replace(candidate, predicted_damage=damage + activation_damage(candidate))


def scaled(candidate: Candidate, ratio: float) -> Candidate:
    """Scale the price of what happens to the weight alone."""
    if candidate.predicted_damage is None:
        return candidate
    around = activation_damage(candidate)
    damage = (candidate.predicted_damage - around) * ratio + around
    return replace(candidate, predicted_damage=damage)


def notes(session: Session, choices: Mapping[str, Candidate]) -> tuple[str, ...]:
    """Say how much is multiplied in integers, and what is not."""
    if session.recipe.activations == "none":
        return ()
    units = [unit for unit in session.units if "embedding" not in unit.uses]
    done = [unit for unit in units if choices[unit.name].input is not None]
    left = [unit.name for unit in units if choices[unit.name].input is None]
    macs = sum(unit.macs for unit in units) or 1
    share = sum(unit.macs for unit in done) / macs
    damage = sum(activation_damage(choice) for choice in choices.values())
    line = (
        f"{session.recipe.activations} int8: {len(done)} of {len(units)} units, {share:.1%} of all "
        f"multiplications, are done in 8 bits; rounding what enters them costs {damage:.3g} nats"
    )
    return (line, f"left in floats: {', '.join(left)}") if left else (line,)

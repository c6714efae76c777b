"""Read what `attar plan` wrote, and open the session it was made in: same model, data and seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from attar import cut_again
from attar.decide import Candidates
from attar.errors import PlanError
from attar.load.model import is_factory
from attar.plan.candidates import Build, pinned
from attar.plan.frontier import FRONTIER_FILE, read_prices
from attar.plan.planfile import read_plan
from attar.records import Cut, Equalised, Plan, Progress, Recipe, Units
from attar.session import Session, open_recipe
from attar.transform.apply import build_transform

Made = TypeVar("Made")
Read = Callable[[Callable[[Recipe, Sequence[Cut]], Units], Build], Made]


def open_plan(path: Path, recipe: Recipe, progress: Progress | None = None) -> tuple[Plan, Session]:
    """Read a plan file with the session it was made in: same model, data and seed.

    Args:
        recipe: What a plan does not hold: the accepted licence, the code of a factory model, and
            how much is done at once.
    """
    return _reopened(lambda *ask: read_plan(path, *ask), recipe, progress)


@dataclass(frozen=True)
class Prices:
    """What a frontier's file holds.

    Attributes:
        equalised: What was changed before prices were made.
        cuts: What was cut before prices were made.
    """

    candidates: Candidates
    equalised: tuple[Equalised, ...] = ()
    cuts: tuple[Cut, ...] = ()


def open_prices(
    path: Path, recipe: Recipe, progress: Progress | None = None
) -> tuple[Prices, Session]:
    """Read a frontier's prices and what was changed before, with the session of both.

    Args:
        path: The file, its folder, or the folder of a model with a report that holds it.
        recipe: The size, more pins, and what the file does not hold; see `open_plan`.
    """
    places = [path / FRONTIER_FILE, path / "report" / FRONTIER_FILE] if path.is_dir() else [path]
    file = next((place for place in places if place.exists()), places[0])
    (candidates, equalised, cuts), session = _reopened(
        lambda *ask: read_prices(file, *ask), recipe, progress
    )
    kept = pinned(candidates, session.units, recipe.keep)
    return Prices(kept, equalised, cuts), session


def _reopened(read: Read[Made], recipe: Recipe, progress: Progress | None) -> tuple[Made, Session]:
    """Open the session a file was made in, and read the file with its units."""
    opened: list[Session] = []

    def units_of(planned: Recipe, cuts: Sequence[Cut]) -> Units:
        own = replace(
            planned,
            size=recipe.size or planned.size,
            keep=(*planned.keep, *recipe.keep),
            protect=recipe.protect or planned.protect,
            accept_licence=recipe.accept_licence,
            factory=recipe.factory,
            threads=recipe.threads,
            workers=recipe.workers,
        )
        if is_factory(planned.model):
            own = replace(own, model=_named_code(planned.model, recipe.factory), factory=None)
        opened.append(open_recipe(own, progress))
        return cut_again.units_after(opened[0], cuts)

    made = read(units_of, build_transform)
    return made, opened[0]


def _named_code(planned: str, typed: str | None) -> str:
    if typed != planned:
        raise PlanError(
            f"the plan is for code of your own, {planned}, which is not run just because a file "
            "names it.",
            hint=f"name the code: --factory {planned}",
        )
    return planned

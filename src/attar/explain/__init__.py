"""explain: model, units, statistics → Scores. One file per criterion; the table names them all."""

from collections.abc import Callable

from attar.errors import SettingError
from attar.explain import activation, magnitude, price, taylor, wanda
from attar.records import Model, Scores, Statistics, Units

Criterion = Callable[[Model, Units, Statistics], Scores]

CRITERIA: dict[str, Criterion] = {
    "price": price.score,
    "magnitude": magnitude.score,
    "wanda": wanda.score,
    "taylor": taylor.score,
    "activation": activation.score,
}


def check_criterion(name: str) -> None:
    """Refuse a criterion that is not there.

    Raises:
        SettingError: With those that are.
    """
    if name not in CRITERIA:
        raise SettingError(
            f"there is no criterion {name!r}.", hint=f"use one of {', '.join(CRITERIA)}."
        )

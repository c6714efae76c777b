"""explain: model, units, statistics → Scores. One file per criterion; the table names them all."""

from collections.abc import Callable

from attar.explain import activation, magnitude, price, taylor, wanda
from attar.records import Model, Scores, Statistics, Units
from attar.tables import check_name

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
    check_name(CRITERIA, "criterion", name)

"""explain: model, units, statistics → Scores. One file per criterion; the table names them all."""

from collections.abc import Callable

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

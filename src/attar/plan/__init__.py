"""plan: candidates, bytes → one for each unit. One file per decider; the table names them all."""

from collections.abc import Callable

from attar.plan import (
    decide_granularity,
    decide_lrp,
    decide_mixdq,
    decide_ohq,
    decide_price,
    decide_qbert,
    decide_quantune,
)
from attar.plan.candidates import Build, Treatment
from attar.records import Candidate, Question, Unit

Decider = Callable[[Question], dict[str, Candidate]]

DECIDERS: dict[str, Decider] = {
    "price": decide_price.decide,
    "ohq": decide_ohq.decide,
    "mixdq": decide_mixdq.decide,
    "qbert": decide_qbert.decide,
    "lrp": decide_lrp.decide,
    "granularity": decide_granularity.decide,
    "quantune": decide_quantune.decide,
}

MENUS: dict[str, Callable[[Unit, Build], list[Treatment]]] = {
    "granularity": decide_granularity.menu,
}
"""Deciders that choose among treatments of their own, in the form that can hold any."""

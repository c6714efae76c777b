"""Rounding, zeroing and low rank at equal bytes, on real weights: what each loses.

Statistics of the whole model are gathered once; then the units of a few blocks are treated, each by
every way at every size, rounded on one half of the statistics and priced on the other.
`results/rank_and_zeros.csv` has one row per model, part, way and size. The menus in
`plan/candidates.py` come from it: what it shows to win is tried by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from results_file import Bench, Finding, Options, Row, main

from attar import decide, pricing
from attar.explain.price import damage
from attar.plan.candidates import Treatment
from attar.progress import open_progress
from attar.records import Recipe, Replacement, Statistics, Unit
from attar.session import Session, open_recipe
from attar.transform.apply import build_transform

SIZES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
ROUNDED = "rounded, range coded"
NORMS = {"low rank": "price", "low rank by outputs": "outputs", "low rank by weights": "weights"}
SCORES = ("obs", "wanda", "magnitude")
FACTOR_BITS, KEPT_BITS, BITS_OF_SCALE = 2.75, 4, 16 / 64
# Bits to the pattern and the bits of what is kept that come nearest without taking more.
PATTERNS = {1.5: (1, 4, 3), 2.0: (1, 4, 5), 2.5: (2, 4, 3), 3.0: (2, 4, 4), 4.0: (2, 4, 6)}
WAYS = (ROUNDED, *NORMS, *(f"zeroed by {score}" for score in SCORES), "n of 4 by obs")


@dataclass(frozen=True)
class Setup:
    """How one model is measured.

    Attributes:
        parts: In the names of the units that are treated together.
        calibration: Tokens or samples.
        text: Whether it reads text.
    """

    parts: tuple[str, ...]
    calibration: int
    text: bool = True
    degrid: int | None = None


SETUPS = {
    "minilm": Setup((".layer.3.attention.", ".layer.3.intermediate.", "word_embeddings"), 256),
    "smollm2": Setup((".layers.15.self_attn.", ".layers.15.mlp."), 4096, degrid=0),
    "mobilenetv2": Setup(("features.12.", "features.17.", "features.18."), 128, text=False),
}


def treatment(way: str, bits: float, unit: Unit, *, by_worth: bool) -> Treatment | None:
    """What this way does to a unit in so many bits for each weight; None where it cannot."""
    if way == ROUNDED:
        return "quantize_entropy", {"bits": bits, "by_worth": by_worth}
    if way in NORMS:
        rank = int(bits * unit.n_weights / FACTOR_BITS / (unit.rows + unit.columns))
        settings = {"rank": max(1, rank), "bits": FACTOR_BITS, "minimise": NORMS[way]}
        return "factorize_low_rank", settings
    if way.startswith("n of"):
        if bits not in PATTERNS:
            return None
        n_kept, m, kept_bits = PATTERNS[bits]
        return "zero_n_m", {"n_kept": n_kept, "m": m, "bits": kept_bits}
    kept = (bits - 1) / (KEPT_BITS + BITS_OF_SCALE)  # the mask takes one bit
    if not 0 < kept < 1:
        return None
    score = way.removeprefix("zeroed by ")
    return "zero_unstructured", {"kept_fraction": kept, "bits": KEPT_BITS, "score": score}


def measure(options: Options) -> Iterator[Row]:
    for name in options.models:
        setup = SETUPS[name]
        recipe = Recipe(
            model=name,
            degrid=setup.degrid,
            data=str(options.wikitext / "valid.txt") if setup.text else None,
            accept_licence=True,
            calibration=32 if options.quick else setup.calibration,
            recovery=1,
            audit=1,
        )
        with open_progress() as progress:
            session = open_recipe(recipe, progress)
            statistics = decide.explain(session)
            for part in setup.parts:
                # Only what every way may treat, so that all have the same weights.
                own = [u for u in session.units if part in u.name and _whole(u)]
                for bits in SIZES:
                    for way in WAYS:
                        row = of_way(session, statistics, own, way, bits)
                        yield {"model": name, "part": part, "way": way, "bits": bits, **row}


def _whole(unit: Unit) -> bool:
    coded = build_transform("quantize_entropy", {"bits": 2})
    return unit.groups == 1 and coded.rejects(unit) is None


def of_way(
    session: Session, statistics: Statistics, units: list[Unit], way: str, bits: float
) -> Row:
    """Bytes and price of one way over these units; empty where it refuses any."""
    price, stored = 0.0, 0
    for unit in units:
        chosen = treatment(way, bits, unit, by_worth=session.predicts_everywhere)
        if chosen is None or build_transform(*chosen).rejects(unit):
            return {"units": 0, "bits_per_weight": "", "price": ""}
        transform, weight = build_transform(*chosen), session.weight(unit)
        (made,) = pricing.treat_held_out(unit, weight, [transform], statistics)
        if not isinstance(made, Replacement):
            return {"units": 0, "bits_per_weight": "", "price": ""}
        # By R and C alone: what is measured besides (coherence) is not known for each way.
        change = made.dense - weight
        price += damage(change, statistics.curvatures[unit.name], held_out=True)
        stored += transform.cost(unit).weight_bytes
    n_weights = sum(unit.n_weights for unit in units)
    return {"units": len(units), "bits_per_weight": 8 * stored / n_weights, "price": price}


def check(rows: list[dict[str, str]]) -> list[Finding]:
    """Whether the menus hold what wins, and leave out what never does."""
    prices = {
        (row["model"], row["part"], row["way"], float(row["bits"])): float(row["price"])
        for row in rows
        if row["price"]
    }

    def least(way: str, sizes: tuple[float, ...]) -> float:
        """Least share, over parts, of what rounding loses in the same bytes."""
        shares = [
            nats / prices[model, part, ROUNDED, bits]
            for (model, part, own, bits), nats in prices.items()
            if own == way and bits in sizes and (model, part, ROUNDED, bits) in prices
        ]
        return min(shares, default=float("nan"))

    zeroed = min(least(way, SIZES) for way in WAYS if way.startswith(("zeroed", "n of")))
    return [
        Finding(
            "low rank over rounding at 1 bit, best part", least("low rank", (1.0,)), at_most=0.7
        ),
        Finding("zeroing over rounding, best part and size", zeroed, at_least=1.0),
    ]


if __name__ == "__main__":
    main(
        Bench(
            name="rank_and_zeros",
            about="rounding, zeroing and low rank at equal bytes, on real weights",
            models=tuple(SETUPS),
            quick_models=("minilm",),
            measure=measure,
            check=check,
            key=("model", "part", "way", "bits"),
        )
    )

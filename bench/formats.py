"""What each format costs and loses on real weights: bytes, price and seconds of every treatment.

Statistics of the whole model are gathered once; then every linear map of one block in the middle is
treated, rounded on one half of the statistics as `attar compress` does it, and priced on the other.
`results/formats.csv` has one row per model and treatment. It has no target: it is where the menus
in `plan/candidates.py` come from. Seconds are one run's, beside whatever else the machine did.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

from results_file import Bench, Finding, Options, Row, main

from attar import decide, pricing
from attar.plan.candidates import Treatment
from attar.progress import open_progress
from attar.records import Recipe, Replacement, Statistics, Unit
from attar.session import Session, open_recipe
from attar.transform.apply import build_transform

LANGUAGE_MODEL_BITS = (2, 3, 4)


@dataclass(frozen=True)
class Setup:
    """How one model is measured.

    Attributes:
        block: In the names of its units.
        calibration: Tokens or samples.
    """

    block: str
    calibration: int
    degrid: int | None = None


SETUPS = {
    "smollm2": Setup(".layers.15.", 8192, degrid=0),
    "minilm": Setup(".layer.3.", 256),
}


def treatments(*, by_worth: bool) -> list[Treatment]:
    """Every format at two to four bits."""
    found: list[Treatment] = []
    for bits in LANGUAGE_MODEL_BITS:
        found += [
            ("quantize_rtn", {"bits": bits, "group_size": 64}),
            ("quantize_feedback", {"bits": bits, "group_size": 64}),
            ("quantize_codebook", {"bits": bits, "group_size": 64}),
            ("quantize_outliers", {"bits": bits, "group_size": 64, "outlier_fraction": 0.005}),
            ("quantize_entropy", {"bits": bits + 0.25, "by_worth": by_worth}),
            ("quantize_entropy", {"bits": bits + 0.25, "by_worth": by_worth, "trellis": True}),
        ]
    found += [("quantize_levels", {"levels": name, "group_size": 64}) for name in ("nf4", "fp4")]
    names = ("IQ2_S", "Q2_K", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_K", "IQ4_NL")
    return [*found, *(("quantize_llama", {"type": name}) for name in names)]


def measure(options: Options) -> Iterator[Row]:
    for name in options.models:
        setup = SETUPS[name]
        recipe = Recipe(
            model=name,
            degrid=setup.degrid,
            data=str(options.wikitext / "valid.txt"),
            accept_licence=True,
            calibration=64 if options.quick else setup.calibration,
            recovery=1,
            audit=1,
        )
        with open_progress() as progress:
            session = open_recipe(recipe, progress)
            statistics = decide.explain(session)
            units = [u for u in session.units if setup.block in u.name and u.kind == "linear"]
            for treatment in treatments(by_worth=session.predicts_everywhere):
                yield {"model": name, **of_treatment(session, statistics, units, treatment)}


def of_treatment(
    session: Session, statistics: Statistics, units: list[Unit], treatment: Treatment
) -> Row:
    """Bytes, price and seconds over the units that this treatment does not refuse."""
    transform = build_transform(*treatment)
    chosen = [unit for unit in units if transform.rejects(unit) is None]
    price, start = 0.0, time.perf_counter()
    for unit in chosen:
        weight = session.weight(unit)
        (made,) = pricing.treat_held_out(unit, weight, [transform], statistics)
        assert isinstance(made, Replacement), made
        price += pricing.price_change(statistics, treatment[0], None, unit, made.dense - weight)[0]
    weights = sum(unit.n_weights for unit in chosen)
    stored = sum(transform.cost(unit).weight_bytes for unit in chosen)
    return {
        "treatment": treatment[0],
        "settings": json.dumps(treatment[1]),
        "units": len(chosen),
        "bytes": stored,
        "bits_per_weight": 8 * stored / weights if weights else 0.0,
        "price": price,
        "seconds": time.perf_counter() - start,
    }


def check(rows: list[dict[str, str]]) -> list[Finding]:
    """Every format has a row for every model."""
    return [
        Finding(
            f"{model}, treatments measured",
            len({(row["treatment"], row["settings"]) for row in rows if row["model"] == model}),
            at_least=len(treatments(by_worth=True)),
        )
        for model in SETUPS
    ]


if __name__ == "__main__":
    main(
        Bench(
            name="formats",
            about="bytes, price and seconds of every format, on real weights",
            models=tuple(SETUPS),
            quick_models=("minilm",),
            measure=measure,
            check=check,
            key=("model", "treatment", "settings"),
        )
    )

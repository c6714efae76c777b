"""Which way to choose candidates loses least in the same bytes?

Every decider of the table gets the same candidates, prices, statistics and size. What its plan
loses is measured on audit data, which none of them has seen.

    bench/deciders.py --models minilm
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from kept_outputs import keep_outputs, measured_damage
from results_file import Bench, Finding, Options, Row, main, number, of_model

from attar import decide
from attar.plan import DECIDERS
from attar.progress import open_progress
from attar.records import Recipe
from attar.session import open_recipe
from attar.transform.apply import substitutions

# Bits per parameter of the whole folder.
BITS = (2.5, 3.5)
RECIPES: Mapping[str, Recipe] = {
    "efficientnet-lite0": Recipe("efficientnet-lite0"),
    "minilm": Recipe("minilm", calibration=64, recovery=32, audit=64),
    "mobilenetv2": Recipe("mobilenetv2", calibration=8, recovery=4, audit=4, rounds=1),
}
PICTURE_MODELS = ("efficientnet-lite0", "mobilenetv2")
# The default stays ours as long as no other loses less than this share of what it loses.
OF_OTHERS = 1.0


def measure(options: Options) -> Iterator[Row]:
    for name in options.models:
        pictures, text = options.data / "imagenet-sample-500", options.wikitext / "valid.txt"
        recipe = replace(RECIPES[name], data=str(pictures if name in PICTURE_MODELS else text))
        with open_progress() as progress:
            session = open_recipe(recipe, progress)
            statistics = decide.explain(session)
            candidates = decide.price(session, statistics)
            kept = keep_outputs(session, session.data.audit)
            for bits in BITS[:1] if options.quick else BITS:
                for decider in ("price", "qbert") if options.quick else DECIDERS:
                    start = time.perf_counter()
                    asked = replace(recipe, size=f"{bits}bits", decide=decider)
                    own = replace(session, recipe=asked)
                    decided = decide.plan(own, candidates, statistics)
                    seconds = time.perf_counter() - start
                    yield {
                        "model": name,
                        "bits_per_parameter": bits,
                        "decider": decider,
                        "bytes": decided.plan.weight_bytes,
                        "divergence": measured_damage(kept, substitutions(decided.treated)),
                        "on_recovery": decided.plan.predicted_damage,
                        "seconds": seconds,
                    }


def check(rows: list[dict[str, str]]) -> list[Finding]:
    """Ours against the best other way at each size."""
    findings = []
    for model in ("minilm",):
        for bits in BITS:
            of = {
                row["decider"]: number(row, "divergence")
                for row in of_model(rows, model)
                if number(row, "bits_per_parameter") == bits
            }
            others = [value for name, value in of.items() if name != "price"]
            ratio = of["price"] / min(others) if "price" in of and others else float("nan")
            what = f"{model} at {bits} bits, ours / best of {len(others)} others"
            findings.append(Finding(what, ratio, at_most=OF_OTHERS))
    return findings


if __name__ == "__main__":
    main(
        Bench(
            name="deciders",
            about="Ways to choose candidates, in the same bytes.",
            models=("minilm", "efficientnet-lite0"),
            quick_models=("mobilenetv2",),
            measure=measure,
            check=check,
            key=("model", "bits_per_parameter", "decider"),
        )
    )

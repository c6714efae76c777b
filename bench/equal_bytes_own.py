"""Child of `equal_bytes.py`: Attar at several sizes from one pricing pass: RECIPE SIZES, as JSON.

Prices do not depend on the size, so each folder holds the bytes that `attar compress` writes
(`attar plan --frontier` and `attar apply --size` are the same on the command line). Seconds of a
point are those of its own stages and of the pricing that it shares.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from attar import decide, equalising, pipeline
from attar.memory import peak_bytes
from attar.records import Recipe
from attar.session import open_recipe


def main() -> None:
    typed, sizes = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    numbers = {n: int(v) for n, v in typed.items() if v.isdigit()}
    recipe = Recipe(**{**typed, **numbers}, size="100%", accept_licence=True)
    opened = open_recipe(recipe)
    session, statistics = equalising.equalise(opened, decide.explain(opened))
    priced = decide.price(session, statistics), session.equalised
    shared = session.seconds["price"]
    for folder, size in sizes.items():
        # Opened again: what was equalised is folded into the module in place.
        sized = open_recipe(replace(recipe, size=size))
        sized.seconds["price"] = shared
        report = pipeline.compress_session(sized, Path(folder), priced)
        facts = {
            "seconds": sum(report.seconds.values()),
            "peak_bytes": peak_bytes(),
            "predicted": report.verdict.predicted_damage,
        }
        (Path(folder) / "report" / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()

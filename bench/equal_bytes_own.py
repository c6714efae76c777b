"""Child of `equal_bytes.py`: Attar at several sizes from one pricing pass: RECIPE SIZES, as JSON.

Statistics and prices do not depend on the size, so each folder holds the bytes that
`attar compress` writes (`attar plan --frontier` and `attar apply --size` are the same on the
command line). Seconds of a point are those of its own stages and of those that it shares.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from attar import decide, equalising, judging, pipeline
from attar.memory import peak_bytes
from attar.records import Recipe
from attar.session import open_recipe


def main() -> None:
    typed, sizes = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    numbers = {n: int(v) for n, v in typed.items() if v.isdigit()}
    recipe = Recipe(**{**typed, **numbers}, size="100%", accept_licence=True)
    opened = open_recipe(recipe)
    forecast = judging.forecast_memory(opened)
    session, statistics = equalising.equalise(opened, decide.explain(opened))
    scores, relevance = pipeline.score_all(session, statistics), decide.relevance(statistics)
    candidates = decide.price(session, statistics)
    for folder, size in sizes.items():
        sized = replace(session, recipe=replace(recipe, size=size), seconds=dict(session.seconds))
        decided = decide.plan(sized, candidates, statistics)
        report = pipeline.finish(sized, decided, scores, relevance, Path(folder), forecast)
        facts = {
            "seconds": sum(report.seconds.values()),
            "peak_bytes": peak_bytes(),
            "predicted": report.verdict.predicted_damage,
        }
        (Path(folder) / "report" / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()

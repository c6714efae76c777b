"""Rounding alone, cutting and rounding, and cutting alone, at the same bytes, on audit data.

    python bench/cut.py mobilenetv2 2.25 2.5 3
    python bench/cut.py --show

Each way is carried out as `attar compress --cut auto` does, one turn of cutting after the other
also where the first did not pay, and measured on data that nothing was chosen by.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from attar import cost, cut_again, decide, narrowing
from attar.audit.fidelity import measure
from attar.cut_turns import opened, turn
from attar.errors import AttarError
from attar.narrowing import Way
from attar.records import Recipe
from attar.resuming import Finished
from attar.session import Session, open_recipe
from attar.sites import substituted
from attar.transform.apply import substitutions

RESULTS = Path(__file__).parent / "results" / "cut.jsonl"


def on_audit(session: Session, way: Way) -> tuple[float, float]:
    """Nats per prediction of all of a way, and of what it cut alone."""
    module, task = way.session.model.module, way.session.model.task
    weights, found = substitutions(way.decided.treated), []
    for made in (weights, {}):

        def run(batch, made=made):  # type: ignore[no-untyped-def]
            with substituted(module, made):
                return task.forward(module, batch)

        found.append(
            measure(
                session.model,
                run,
                session.data.audit,
                session.divergence,
                progress=session.progress,
            ).mean_divergence
        )
    return found[0], found[1]


def line(session: Session, way: Way, bits: float, name: str, start: float) -> dict[str, object]:
    own = way.session
    damage, cut = on_audit(session, way)
    narrowed = cut_again.narrowed(own)
    return {
        "model": session.model.name,
        "bits": bits,
        "way": name,
        "nats": damage,
        "nats_on_recovery": way.measured,
        "predicted": way.decided.plan.rounds[0].predicted_damage,
        "cut_nats": cut,
        "cut_predicted": way.decided.plan.cut_damage,
        "bytes": way.decided.plan.weight_bytes,
        "numbers": cost.count_numbers(own.units, own.units.leftovers),
        "macs": cost.total_macs(own.units),
        "milliseconds": None if narrowed is None else narrowed.milliseconds,
        "seconds": time.perf_counter() - start,
    }


def store(found: dict[str, object]) -> None:
    print(json.dumps(found), flush=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(found) + "\n")


def run(model: str, sizes: list[float], turns: int, only: bool) -> None:
    whole = open_recipe(Recipe(model=model, cut="auto", size="3bits"))
    with tempfile.TemporaryDirectory() as folder:
        whole = replace(whole, finished=Finished(Path(folder)))  # prices do not depend on the size
        statistics = decide.explain(whole)
        candidates = decide.price(whole, statistics)
        for bits in sizes:
            start = time.perf_counter()
            session = replace(whole, recipe=replace(whole.recipe, size=f"{bits}bits"))
            try:
                best = narrowing.solved(session, statistics, candidates)
            except AttarError as error:
                store({"model": model, "bits": bits, "way": "rounded", "refused": error.problem})
                continue
            store(line(session, best, bits, "rounded", start))
            narrow = opened(session, {})
            for number in range(turns):
                start = time.perf_counter()
                narrow, done = turn(narrow, narrowing.worth_of(best))
                if not done:
                    store({"model": model, "bits": bits, "way": f"turn {number + 1}: nothing pays"})
                    break
                way = narrowing.rounded_after(narrow)
                store(line(session, way, bits, f"{number + 1} turn(s), rounded", start))
                if way.measured >= best.measured:
                    break
                best = way
            if only:
                start = time.perf_counter()
                asked = replace(session, recipe=replace(session.recipe, cut="only"))
                try:
                    store(line(session, narrowing.plan(asked, statistics), bits, "only", start))
                except AttarError as error:
                    store({"model": model, "bits": bits, "way": "only", "refused": error.problem})


def show() -> None:
    """Print what is stored as a table."""
    for text in RESULTS.read_text().splitlines():
        one = json.loads(text)
        nats = f"{one['nats']:.4g}" if "nats" in one else one.get("refused", "")
        print(f"{one['model']:20} {one['bits']:5} {one['way']:24} {nats}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("bits", nargs="*", type=float)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", action="store_true")
    parser.add_argument("--show", action="store_true")
    asked = parser.parse_args()
    if asked.show:
        show()
    elif asked.model and asked.bits:
        run(asked.model, asked.bits, asked.turns, asked.only)
    else:
        sys.exit("name a model and bits per parameter, or --show")

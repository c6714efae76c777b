"""Rounding alone, cutting and rounding, and cutting alone, at the same bytes, on audit data.

Each way is carried out as `attar compress --cut auto` does, and measured on data that nothing was
chosen by. A turn that measures worse on recovery data than what came before is stored all the same:
it is what the command would not write. `--models mobilenetv2:2.5` measures one size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from results_file import Bench, Finding, Options, Row, main, number, of_model
from torch import Tensor

from attar import cost, cut_again, decide, narrowing
from attar.audit.fidelity import measure as compare
from attar.cut_turns import opened, turn
from attar.errors import AttarError
from attar.narrowing import Way
from attar.records import Batch, Recipe
from attar.resuming import Finished
from attar.session import Session, open_recipe
from attar.sites import substituted
from attar.transform.apply import substitutions

# Bits per parameter of the original, of the whole folder. Target, as issue 4 states it.
SIZES = (2.0, 2.5, 3.0)
MODELS = ("mobilenetv2", "efficientnet-lite0", "minilm")
MOST_TURNS = 2
LARGEST_SHARE = 1.0
QUICK_SAMPLES = 16


def measure(options: Options) -> Iterator[Row]:
    for typed in options.models:
        model, _, bits = typed.partition(":")
        sizes = (float(bits),) if bits else SIZES[1:2] if options.quick else SIZES
        for size in sizes:
            yield from measured(model, size, QUICK_SAMPLES if options.quick else None)


def measured(model: str, bits: float, samples: int | None) -> Iterator[Row]:
    """One size of one model, every way."""
    few = Recipe(model, f"{bits}bits", calibration=samples, recovery=samples, audit=samples)
    session = open_recipe(replace(few, cut="auto"))
    with TemporaryDirectory() as folder:
        session = replace(session, finished=Finished(Path(folder)))
        start = time.perf_counter()
        statistics = decide.explain(session)
        try:
            best = narrowing.solved(session, statistics, decide.price(session, statistics))
        except AttarError as error:
            yield {"model": model, "bits": bits, "way": "rounded", "said": error.problem}
            return
        yield row(session, best, bits, "rounded", start)
        narrow = opened(session, {})
        for count in range(1, MOST_TURNS + 1):
            start = time.perf_counter()
            narrow, done = turn(narrow, narrowing.worth_of(best))
            if not done:
                yield {"model": model, "bits": bits, "way": f"turn {count}", "said": "nothing pays"}
                break
            way = narrowing.rounded_after(narrow)
            yield row(session, way, bits, f"turn {count}", start)
            if way.measured >= best.measured:
                break
            best = way
    asked = replace(session, recipe=replace(session.recipe, cut="only"), finished=Finished())
    start = time.perf_counter()
    try:
        yield row(session, narrowing.plan(asked, statistics), bits, "only", start)
    except AttarError as error:
        yield {"model": model, "bits": bits, "way": "only", "said": error.problem}


def row(session: Session, way: Way, bits: float, name: str, start: float) -> Row:
    """What a way makes of the model, and loses."""
    own, weights = way.session, substitutions(way.decided.treated)
    narrowed = cut_again.narrowed(own)
    before, after = narrowed.milliseconds if narrowed else ("", "")
    return {
        "model": session.model.name,
        "bits": bits,
        "way": name,
        "nats": on_audit(session, own, weights),
        "nats_of_cut": on_audit(session, own, {}) if own.cuts else 0.0,
        "nats_of_cut_predicted": way.decided.plan.cut_damage,
        "nats_on_recovery": way.measured,
        "bytes": way.decided.plan.weight_bytes,
        "numbers": cost.count_numbers(own.units, own.units.leftovers),
        "macs": cost.total_macs(own.units),
        "milliseconds_before": before,
        "milliseconds": after,
        "seconds": time.perf_counter() - start,
    }


def on_audit(session: Session, own: Session, weights: Mapping[str, Callable[[], Tensor]]) -> float:
    """Nats per prediction between the original and a model with these weights."""
    module, task = own.model.module, own.model.task

    def run(batch: Batch) -> Tensor:
        with substituted(module, weights):
            return task.forward(module, batch)

    return compare(
        session.model, run, session.data.audit, session.divergence, progress=session.progress
    ).mean_divergence


def check(rows: list[dict[str, str]]) -> list[Finding]:
    findings = []
    for model in MODELS:
        for bits in SIZES:
            of = {r["way"]: r for r in of_model(rows, model) if float(r["bits"]) == bits}
            alone = number(of.get("rounded", {}), "nats")
            cut = [number(r, "nats") for way, r in of.items() if way.startswith("turn")]
            least = min((nats for nats in cut if nats == nats), default=float("nan"))
            what = f"{model}, {bits} bits, cut and rounded over rounded alone"
            findings.append(Finding(what, least / alone, at_most=LARGEST_SHARE))
    return findings


if __name__ == "__main__":
    main(
        Bench(
            name="cut",
            about="Rounding alone, cutting and rounding, and cutting alone, at the same bytes.",
            models=MODELS,
            quick_models=("mobilenetv2",),
            measure=measure,
            check=check,
            key=("model", "bits", "way"),
        )
    )

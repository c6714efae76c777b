"""Is the price of one change what the change costs? Predicted against measured divergence.

For each model: statistics are gathered once, on calibration data, as `attar compress` does it. Then
(unit, treatment) pairs are drawn with a fixed seed, each is priced by the product's own function
(`decide.price_treatments`), and the change that was priced is made in the model, alone, and
measured on text, pictures or sound that no price has seen. Beside the price stand other criteria
for the same changes:

    local       trace(dW A dWᵀ): what GPTQ- and AWQ-style tools minimise
    relative    the same over trace(W A Wᵀ)
    magnitude   ‖dW‖²
    wanda       Σ |dW| · sqrt(E[x²])

First-order Taylor, |Σ g·dy|, is left out: it needs a backward pass over the data for each pair, and
with answers sampled from the model itself its mean is zero.

`results/price_accuracy.csv` has one row per model, `price_accuracy_pairs.csv` one per pair.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from input_moments import input_moments
from kept_outputs import Kept, keep_outputs, measured_damage, other_data
from results_file import Bench, Finding, Options, Row, Table, main, number, of_model
from scipy.stats import spearmanr
from torch import Tensor

from attar import decide, pricing
from attar.explain.price import damage
from attar.plan.candidates import Treatment, group_sizes
from attar.progress import open_progress
from attar.records import Batch, Curvature, Progress, Recipe, Replacement, Statistics, Unit, Units
from attar.session import Session, open_recipe
from attar.transform.apply import build_transform

# Targets, as issue 2 states them. Whisper's decoder is a language model, and is held to the same.
LANGUAGE_MODELS = ("smollm2", "gemma3-270m", "whisper-base")
OTHER_MODELS = ("minilm", "efficientnet-lite0", "mobilenetv2")
RANK_OF_LANGUAGE_MODELS = 0.95
RANK_OF_OTHER_MODELS = 0.90
RATIO = (0.67, 1.5)
PAIRS = 60

N_PAIRS = 64  # drawn: a few more than the target asks for, as a refused one is left out
SEED = 0
CRITERIA = ("price", "local", "relative", "magnitude", "wanda")
KINDS = (
    *(("quantize_rtn", bits) for bits in (2, 3, 4)),
    *(("quantize_feedback", bits) for bits in (2, 3, 4)),
    ("zero_n_m", 4),
    ("zero_unstructured", 4),
)


@dataclass(frozen=True)
class Setup:
    """How one model is measured.

    Attributes:
        source: "wikitext" (prices on the validation text, measured on the test text), "halves" (of
            the raw test text: the validation text at hand is cut into words and spells rare ones
            `<unk>`, which Gemma's tokenizer takes for its own and which is another kind of text to
            any language model), or a folder of the data, which Attar splits itself.
        measured: Tokens, pictures, sentences or windows that damage is measured on.
        calibration: Of the same for statistics; None for the product's default.
    """

    source: str
    measured: int
    calibration: int | None = None
    degrid: int | None = None


SETUPS: Mapping[str, Setup] = {
    "smollm2": Setup("halves", measured=2048, degrid=0),
    "gemma3-270m": Setup("halves", measured=512, calibration=8192),
    # Windows differ widely: the median ratio lies between 0.85 and 1.84 on four or six of them.
    "whisper-base": Setup("speech/librispeech_test-other", measured=18, calibration=20),
    "minilm": Setup("wikitext", measured=128),
    "efficientnet-lite0": Setup("imagenet-sample-500", measured=64),
    "mobilenetv2": Setup("imagenet-sample-500", measured=64),
}


@dataclass(frozen=True)
class Pair:
    """One unit with one treatment."""

    unit: Unit
    treatment: Treatment


def measure(options: Options) -> Iterator[Row]:
    pairs_table = Table("price_accuracy_pairs", quick=options.quick)
    for name in options.models:
        start = time.perf_counter()
        with TemporaryDirectory() as folder, open_progress() as progress:
            session, batches = open_measured(name, options, Path(folder), progress)
            rows = measure_pairs(name, session, batches, 8 if options.quick else N_PAIRS)
        for row in rows:
            pairs_table.add(row)
        yield {"model": name, **summary(rows), "seconds": time.perf_counter() - start}


def open_measured(
    name: str, options: Options, folder: Path, progress: Progress
) -> tuple[Session, Sequence[Batch]]:
    """Open a model with its calibration data, and the batches it is measured on."""
    setup = SETUPS[name]
    calibration, measured = setup.calibration, setup.measured
    if options.quick:
        calibration, measured = 8, 8
    recipe = Recipe(
        model=name,
        degrid=setup.degrid,
        accept_licence=True,
        calibration=calibration,
        recovery=1,
        audit=1,
        seed=SEED,
    )
    if setup.source not in ("wikitext", "halves"):
        source = str(options.data / setup.source)
        session = open_recipe(replace(recipe, data=source, audit=measured), progress)
        return session, session.data.audit
    seen, unseen = options.wikitext / "valid.txt", options.wikitext / "wiki.test.raw"
    if setup.source == "halves":
        seen, unseen = write_halves(unseen, folder)
    session = open_recipe(replace(recipe, data=str(seen)), progress)
    return session, other_data(session, unseen, measured)


def write_halves(source: Path, folder: Path) -> tuple[Path, Path]:
    """Cut a text in two at the article nearest its middle."""
    text = source.read_text(encoding="utf-8")
    articles = [found.start() for found in re.finditer(r"^ = [^=]+ = *$", text, re.MULTILINE)]
    middle = min(articles, key=lambda at: abs(at - len(text) // 2))
    paths = folder / "first.txt", folder / "second.txt"
    for path, half in zip(paths, (text[:middle], text[middle:]), strict=True):
        path.write_text(half, encoding="utf-8")
    return paths


# ---------------------------------------------------------------------------------------------
# which pairs


def draw_pairs(units: Units, n: int) -> list[Pair]:
    """Draw different pairs: every embedding first, then units without replacement, roles in turn.

    When no unit is left, all are there again, for another treatment.
    """
    draws = random.Random(SEED)
    pairs: list[Pair] = []
    deck = [unit for unit in units if unit.kind == "embedding"]
    while len(pairs) < n:
        deck = deck or shuffled_by_role(units, draws)
        unit = deck.pop(0)
        left = [pair for pair in pairs_of(unit, draws) if pair not in pairs]
        if left:
            pairs.append(draws.choice(left))
    return pairs


def shuffled_by_role(units: Units, draws: random.Random) -> list[Unit]:
    """Shuffle units so that roles (q_proj, say) take turns as long as they last."""
    by_role: dict[str, list[Unit]] = {}
    for unit in units:
        role = re.sub(r"\d+", "", unit.name.rpartition(".")[2]).strip("._")
        by_role.setdefault(role or unit.kind, []).append(unit)
    for of in by_role.values():
        draws.shuffle(of)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_role.values()))
    return [unit for unit in turns if unit is not None]


def pairs_of(unit: Unit, draws: random.Random) -> list[Pair]:
    """Give a unit each kind of treatment that it allows, with a group size drawn for it."""
    found: list[Treatment] = []
    for method, bits in KINDS:
        settings: dict[str, Any] = {"bits": bits}
        if method.startswith("quantize"):
            settings["group_size"] = draws.choice(group_sizes(unit.columns))
        found.append((method, settings))
    return [Pair(unit, t) for t in found if build_transform(*t).rejects(unit) is None]


# ---------------------------------------------------------------------------------------------
# what each pair costs


def measure_pairs(
    name: str, session: Session, batches: Sequence[Batch], n: int
) -> list[dict[str, Any]]:
    """Price and measure each pair, one at a time; a pair that is refused has no row."""
    statistics = decide.explain(session)
    pairs = draw_pairs(session.units, n)
    prices = price_pairs(session, statistics, pairs)
    kept = keep_outputs(session, batches)
    inputs = input_moments(session, list({pair.unit.name: pair.unit for pair in pairs}.values()))
    rows = []
    with session.progress.stage("measure pairs", len(pairs)) as advance:
        for pair, price in zip(pairs, prices, strict=True):
            transform = build_transform(*pair.treatment)
            weight = session.weight(pair.unit)
            (made,) = pricing.treat_held_out(pair.unit, weight, [transform], statistics)
            if price is not None and isinstance(made, Replacement):
                rows.append(
                    {
                        "model": name,
                        "unit": pair.unit.name,
                        "treatment": pair.treatment[0],
                        "settings": json.dumps(pair.treatment[1]),
                        "measured": measure_alone(kept, pair.unit, made),
                        "price": price,
                        **other_criteria(
                            pair.unit, weight, made.dense - weight, statistics, inputs
                        ),
                    }
                )
            advance(1)
    return rows


def price_pairs(
    session: Session, statistics: Statistics, pairs: Sequence[Pair]
) -> list[float | None]:
    """Let the product price the pairs; None where it refuses."""
    treatments: dict[str, list[Treatment]] = {}
    for pair in pairs:
        treatments.setdefault(pair.unit.name, []).append(pair.treatment)
    drawn = tuple(unit for unit in session.units if unit.name in treatments)
    only_drawn = replace(session, units=Units(drawn, session.units.leftovers))
    candidates = decide.price_treatments(only_drawn, statistics, treatments)
    found = {
        (c.unit, c.treatment, json.dumps(c.settings)): c.predicted_damage
        for of in candidates.values()
        for c in of
    }
    return [found[p.unit.name, p.treatment[0], json.dumps(p.treatment[1])] for p in pairs]


def measure_alone(kept: Kept, unit: Unit, made: Replacement) -> float:
    """Nats per prediction with this one weight changed."""
    return measured_damage(kept, {f"{unit.name}.weight": lambda: made.dense.view(unit.shape)})


def other_criteria(
    unit: Unit, weight: Tensor, change: Tensor, statistics: Statistics, inputs: Mapping[str, Tensor]
) -> dict[str, float]:
    """Say what the other criteria make of a change, on the data that the price is made on."""
    curvatures = statistics.curvatures[unit.name]
    plain = [
        _inputs_only(c, unit, use, inputs) for c, use in zip(curvatures, unit.uses, strict=True)
    ]
    local = 2 * damage(change, plain)
    # An embedding that is only looked up has no input norm.
    power = statistics.column_power.get(unit.name, torch.ones(unit.columns))
    return {
        "local": local,
        "relative": local / max(2 * damage(weight, plain), 1e-30),
        "magnitude": float(change.double().square().sum()),
        "wanda": float((change.abs() @ power.sqrt()).double().sum()),
    }


def _inputs_only(
    curvature: Curvature, unit: Unit, operation: str, inputs: Mapping[str, Tensor]
) -> Curvature:
    """Keep what a use says of its inputs: A, or how often each row of an embedding is met."""
    if operation == "embedding":
        ones = torch.ones(unit.columns)
        return Curvature(curvature.rows, ones, ones)
    return Curvature(torch.ones(unit.rows), inputs[unit.name], inputs[unit.name])


# ---------------------------------------------------------------------------------------------
# how well that agrees


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rank correlations with what was measured, and the quartiles of measured over predicted."""
    measured = np.array([row["measured"] for row in rows])
    ranks = {}
    for criterion in CRITERIA:
        said = np.array([row[criterion] for row in rows])
        ranks[f"rank_{criterion}"] = float(spearmanr(said, measured).statistic)
    price = np.array([row["price"] for row in rows])
    ratio = measured[price > 0] / price[price > 0]
    low, middle, high = (float(q) for q in np.quantile(ratio, [0.25, 0.5, 0.75]))
    quartiles = {"ratio_median": middle, "ratio_low": low, "ratio_high": high}
    return {"pairs": len(rows), **ranks, **quartiles}


def check(rows: list[dict[str, str]]) -> list[Finding]:
    findings = []
    for model in (*LANGUAGE_MODELS, *OTHER_MODELS):
        row = (of_model(rows, model) or [{}])[0]
        rank = RANK_OF_LANGUAGE_MODELS if model in LANGUAGE_MODELS else RANK_OF_OTHER_MODELS
        low, high = RATIO
        findings += [
            Finding(f"{model}, rank correlation", number(row, "rank_price"), at_least=rank),
            Finding(
                f"{model}, median of measured / predicted",
                number(row, "ratio_median"),
                at_least=low,
                at_most=high,
            ),
            Finding(f"{model}, pairs", number(row, "pairs"), at_least=PAIRS),
        ]
    return findings


if __name__ == "__main__":
    main(
        Bench(
            name="price_accuracy",
            about="Predicted against measured divergence of single changes.",
            models=tuple(SETUPS),
            quick_models=("mobilenetv2",),
            measure=measure,
            check=check,
        )
    )

"""Does the audit find what is wrong with a compressed model, and how long does it take?

Faults are planted in copies of small networks that were really trained (`audit_networks.py`), and
the audit is asked who is to blame. What a plan's way back returns is predicted and measured. Two
language models are compared on 100,000 tokens beside two bare forward passes over them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import audit_networks as networks
import numpy as np
from results_file import Bench, Finding, Options, Row, main, number, of_model
from scipy.stats import spearmanr

# Targets, as issue 6 states them.
FOUND, FALSE_ALARMS, RANK, TIMES = 0.95, 0.05, 0.9, 1.3

PLANTS, PER_NETWORK = 100, 10
SAMPLES = {"classify": 1500, "language": 300}
COUNTS = {"classify": (300, 100, 1000), "language": (80, 20, 200)}
# A slice is blamed if chance would hardly make it lose so much more than the rest.
ALPHA = 0.05
SPEED_TOKENS, SPEED_QUICK, TIMED = 100_000, 2_000, 3

Plant = Callable[[networks.Trained, np.random.Generator], networks.Plant]
FAULTS: dict[str, tuple[Callable[[int, int], networks.Trained], Plant]] = {
    "one layer of twenty in 3 bits": (networks.classifier, networks.bad_layer),
    "one class damaged": (networks.classifier, networks.damaged_class),
    "one language damaged": (networks.speaker, networks.damaged_language),
    "one head removed": (networks.speaker, networks.removed_head),
    "embedding truncated": (networks.speaker, networks.truncated_embedding),
    "untouched classifier": (networks.classifier, networks.untouched),
    "untouched language model": (networks.speaker, networks.untouched),
}
BY_SLICE = ("one class damaged", "one language damaged")
UNTOUCHED = ("untouched classifier", "untouched language model")
SPEED, RETURNS = "two language models of 135M", "ways back"
MODELS = (*FAULTS, RETURNS, SPEED)


def measure(options: Options) -> Iterator[Row]:
    plants = 4 if options.quick else PLANTS
    for name in options.models:
        start = time.perf_counter()
        if name == SPEED:
            yield {"model": name, **speed(options)}
        elif name == RETURNS:
            rank, pairs = ways_back(plants)
            yield {"model": name, "plants": pairs, "rank_correlation": rank}
        else:
            yield {"model": name, **found_share(name, plants)} | {
                "seconds": time.perf_counter() - start
            }


def found_share(fault: str, plants: int) -> dict[str, float]:
    """Plant a fault so many times, and count how often the report names it first."""
    train, plant = FAULTS[fault]
    named = localised = alarms = 0
    for number_ in range(plants):
        if number_ % PER_NETWORK == 0:
            trained = train(number_ // PER_NETWORK, SAMPLES[train_task(train)])
        planted = plant(trained, np.random.default_rng(number_))
        verdict = audited(trained, planted.module, seed=number_, attribute=fault not in BY_SLICE)
        blamed = [one.label for one in verdict.slices if one.p_worse < ALPHA]
        alarms += bool(blamed)
        if fault in BY_SLICE:
            named += bool(blamed) and blamed[0] == planted.culprit
        elif verdict.responsible:
            first = verdict.responsible[0]
            named += first.unit == planted.culprit
            localised += first.unit == planted.culprit and first.where == planted.where
    return {
        "plants": plants,
        "named_first": named / plants,
        "and_where": localised / plants,
        "slices_blamed": alarms / plants,
    }


def train_task(train: Callable[[int, int], networks.Trained]) -> str:
    return "classify" if train is networks.classifier else "language"


def audited(trained: networks.Trained, module: object, *, seed: int, attribute: bool) -> object:
    """Audit as `attar audit` does, of modules at hand."""
    from dataclasses import replace

    from attar import attributing, judging
    from attar.load.model import load_model
    from attar.records import Recipe, Silent
    from attar.session import open_session

    data = {n: a for n, a in trained.arrays.items()}
    inputs = {n: a for n, a in data.items() if n not in ("labels", "answers")}
    import torch

    examples = {name: torch.from_numpy(array[:2]) for name, array in inputs.items()}
    model = load_model(trained.module, examples=examples, task=trained.task)
    calibration, recovery, audit = COUNTS[trained.task]
    recipe = Recipe(
        "planted", task=trained.task, seed=seed, slices="labels",
        calibration=calibration, recovery=recovery, audit=audit,
    )  # fmt: skip
    session = open_session(recipe, model, Silent(), data)
    other = replace(model, module=module)
    verdict = judging.judge_models(session, other)
    return attributing.with_attribution(session, other, verdict, {}) if attribute else verdict

"""Does the audit find what is wrong with a compressed model, and how long does it take?

Faults are planted in copies of small networks that were really trained (`audit_networks.py`), and
the audit is asked who is to blame. What a plan's way back returns is predicted and measured. Two
language models are compared on 100,000 tokens beside two bare forward passes over them.

A number after a colon plants so many faults, or compares so many tokens: `--models "one head
removed:20"`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from statistics import median

import audit_networks as networks
import numpy as np
import torch
from results_file import Bench, Finding, Options, Row, main, number, of_model
from scipy.stats import spearmanr

from attar import attributing, judging
from attar.load.model import load_model
from attar.matching import TOKENIZER as TOKENIZER_FILE
from attar.records import Recipe, Silent, Verdict
from attar.session import open_recipe, open_session

# Targets, as issue 6 states them.
FOUND, FALSE_ALARMS, RANK, TIMES = 0.95, 0.05, 0.9, 1.3

PLANTS, PER_NETWORK = 100, 10
SAMPLES = {"classify": 750, "language": 300}
COUNTS = {"classify": (100, 50, 600), "language": (80, 20, 200)}
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
    "shuffled tokenizer": (networks.speaker, networks.shuffled_tokenizer),
    "untouched classifier": (networks.classifier, networks.untouched),
    "untouched language model": (networks.speaker, networks.untouched),
}
BY_CLASS, BY_SLICE = ("one class damaged",), ("one language damaged",)
TOKENIZER = "shuffled tokenizer"
UNTOUCHED = ("untouched classifier", "untouched language model")
SPEED, RETURNS = "two language models of 135M", "ways back"
MODELS = (*FAULTS, RETURNS, SPEED)


def measure(options: Options) -> Iterator[Row]:
    for asked in options.models:
        name, _, number_ = asked.partition(":")
        plants = int(number_) if number_ else (4 if options.quick else PLANTS)
        start = time.perf_counter()
        if name == SPEED:
            tokens = SPEED_QUICK if options.quick else SPEED_TOKENS
            yield {"model": name, **speed(options, int(number_ or tokens))}
        elif name == RETURNS:
            rank, pairs = ways_back(plants)
            yield {"model": name, "plants": pairs, "rank_correlation": rank}
        else:
            yield {"model": name, **found_share(name, plants)} | {
                "seconds": time.perf_counter() - start
            }


@cache
def trained_by(train: Callable[[int, int], networks.Trained], seed: int) -> networks.Trained:
    """One network for all faults: training takes longer than finding some of them."""
    return train(seed, SAMPLES[train_task(train)])


def found_share(fault: str, plants: int) -> dict[str, float]:
    """Plant a fault so many times, and count how often the report names it first."""
    train, plant = FAULTS[fault]
    named = localised = alarms = 0
    for number_ in range(plants):
        if number_ % PER_NETWORK == 0:
            trained = trained_by(train, number_ // PER_NETWORK)
        planted = plant(trained, np.random.default_rng(number_))
        attribute = fault not in (*BY_SLICE, *BY_CLASS, TOKENIZER)
        verdict = audited(trained, planted, seed=number_, attribute=attribute)
        found = verdict.classes if fault in BY_CLASS else verdict.slices
        blamed = [one.label for one in found if one.p_worse < ALPHA]
        alarms += any(one.p_worse < ALPHA for one in verdict.classes + verdict.slices)
        if fault == TOKENIZER:
            named += verdict.reasons[0].startswith("the tokenizer of planted is at fault")
        elif not attribute:
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


def audited(
    trained: networks.Trained, planted: networks.Plant, *, seed: int, attribute: bool
) -> Verdict:
    """Audit as `attar audit` does, of modules at hand."""
    examples = {
        name: torch.from_numpy(array[:2])
        for name, array in trained.arrays.items()
        if name not in ("labels", "answers")
    }
    model = load_model(trained.module, examples=examples, task=trained.task)
    if trained.task == "language":
        own = networks.tokenizer(networks.Plant(trained.module, "").numbers)
        model = replace(model, files={TOKENIZER_FILE: own})
    calibration, recovery, audit = COUNTS[trained.task]
    recipe = Recipe(
        "planted", task=trained.task, seed=seed, slices="labels",
        calibration=calibration, recovery=recovery, audit=audit,
    )  # fmt: skip
    session = open_session(recipe, model, Silent(), trained.arrays)
    other = replace(model, module=planted.module, name="planted")
    if trained.task == "language":
        other = replace(other, files={TOKENIZER_FILE: networks.tokenizer(planted.numbers)})
    verdict = judging.judge_models(session, other)
    return attributing.with_attribution(session, other, verdict, {}) if attribute else verdict


# ---------------------------------------------------------------------------------------------
# ways back, and time


def ways_back(plants: int) -> tuple[float, int]:
    """Compare what halving a layer's error is predicted to return with what it does.

    Returns:
        Rank correlation over all layers of all plants, and how many pairs there were.
    """
    tried, attributing.TRIED = attributing.TRIED, 10**6
    try:
        predicted, returned = [], []
        for seed in range(max(1, plants // PER_NETWORK)):
            for train in (networks.classifier, networks.speaker):
                trained = trained_by(train, seed)
                module = networks.unevenly_rounded(trained, np.random.default_rng(seed))
                verdict = audited(trained, networks.Plant(module, ""), seed=seed, attribute=True)
                predicted += [one.returned for one in verdict.responsible]
                returned += [one.measured for one in verdict.responsible]
    finally:
        attributing.TRIED = tried
    return float(spearmanr(predicted, returned).statistic), len(predicted)


def speed(options: Options, tokens: int) -> dict[str, float]:
    """Time an audit of two language models beside two bare forward passes over the same tokens."""
    text = str(options.wikitext / "wiki.test.raw")
    recipe = Recipe("smollm2", data=text, calibration=512, recovery=512, audit=tokens)
    session = open_recipe(recipe)
    other = open_recipe(recipe).model
    for parameter in other.module.parameters():
        if parameter.dim() == 2:
            parameter.data = networks.rounded(parameter.data, 8)
    batches, forward = session.data.audit, session.model.task.forward

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                for model in (session.model, other):
                    forward(model.module, batch)

    seconds: dict[str, list[float]] = {"bare": [], "audit": []}
    for _ in range(1 if options.quick else TIMED):
        for name, work in (("bare", bare), ("audit", lambda: judging.judge_models(session, other))):
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["audit"], seconds["bare"], strict=True)]
    return {
        "tokens": sum(int(batch["tokens"].numel()) for batch in batches),
        "seconds": median(seconds["audit"]),
        "bare_seconds": median(seconds["bare"]),
        "times": median(ratios),
        "times_spread": max(ratios) - min(ratios),
    }


def check(rows: list[dict[str, str]]) -> list[Finding]:
    findings = []
    for fault in FAULTS:
        row = (of_model(rows, fault) or [{}])[0]
        if fault in UNTOUCHED:
            alarms = number(row, "slices_blamed")
            findings.append(Finding(f"{fault}: a slice is blamed", alarms, at_most=FALSE_ALARMS))
        else:
            share = number(row, "named_first")
            findings.append(Finding(f"{fault}: named first", share, at_least=FOUND))
    row = (of_model(rows, RETURNS) or [{}])[0]
    rank = number(row, "rank_correlation")
    findings.append(Finding("what a way back returns: rank correlation", rank, at_least=RANK))
    row = (of_model(rows, SPEED) or [{}])[0]
    times = number(row, "times")
    findings.append(Finding(f"{SPEED}: seconds over two passes", times, at_most=TIMES))
    return findings


if __name__ == "__main__":
    main(
        Bench(
            name="audit",
            about="Does the audit find planted faults, and how long does it take?",
            models=MODELS,
            quick_models=MODELS,
            measure=measure,
            check=check,
        )
    )

"""Children of `equal_bytes.py` that need torch: write a job for peers, and judge what they made.

--tokenizer FOLDER {}     print where the tokenizer of MPNet lies
--job FOLDER FACTS        the model, and what it is calibrated on, as peers read it
--judge LIST FACTS        print a line of JSON for each of these weights: how far from the original
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mpnet
import torch
from equal_bytes_job import opened, own_code, write_job
from kept_outputs import other_data
from results_file import as_text
from safetensors.torch import load_file
from torch import nn

from attar.audit.fidelity import measure
from attar.audit.verdict import judge
from attar.records import Batch, Recipe, Silent
from attar.session import Session, open_model

# Tokens, sentences, pictures and windows of sound, by column.
JUDGED = {
    "language": {"": 8_192, "_news": 4_096},
    "encoder": {"": 512, "_news": 512},
    "vision": {"": 248},
    "speech": {"": 14, "_digits": 26},
}
QUICK_JUDGED = 64


def judged(answers: Sequence[str], facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Compare each with the original on data that nothing was fitted to."""
    session = opened(facts)
    data = judging_data(session, facts)
    if facts["kind"] != "language":  # whose answers are too large to be kept
        session = remembering(session)
    for weights in answers:
        module = other_module(session, weights, facts)
        yield {
            f"{name}{column}": value
            for column, batches in data.items()
            for name, value in compare(session, module, batches).items()
        }


def other_module(session: Session, weights: str, facts: Mapping[str, Any]) -> nn.Module:
    """What a tool wrote: a folder of Attar's, or the weights of a peer."""
    kind, _, folder = weights.rpartition(":")
    if kind == "folder":
        return open_model(Recipe(model=folder, **own_code(facts))).module
    return with_weights(session, load_file(weights))


def remembering(session: Session) -> Session:
    """Let the original answer each batch once."""
    model, known = session.model, dict[int, torch.Tensor]()
    forward = model.task.forward

    def answer(module: nn.Module, batch: Batch) -> torch.Tensor:
        if module is not model.module:
            return forward(module, batch)
        if id(batch) not in known:
            known[id(batch)] = forward(module, batch)
        return known[id(batch)]

    return replace(session, model=replace(model, task=replace(model.task, forward=answer)))


def with_weights(session: Session, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of the original with other weights; every one must be given, and fit."""
    module = copy.deepcopy(session.model.module)
    prefix = "encoder." if session.model.task.name == "embed" else ""
    given = {f"{prefix}{name}": weight for name, weight in weights.items()}
    names = {name for name, _ in module.named_parameters()}
    if unknown := set(given) ^ names:
        sys.exit(f"weights missing or unknown: {', '.join(sorted(unknown)[:5])}")
    module.load_state_dict(given, strict=False)
    return module


def judging_data(session: Session, facts: Mapping[str, Any]) -> dict[str, Sequence[Batch]]:
    """Batches to judge on, by what their columns are called."""
    n = JUDGED[facts["kind"]]
    found = {}
    for column, path in facts["judged"].items():
        count = QUICK_JUDGED if facts["quick"] else n[column]
        found[column] = other_data(session, Path(path), min(count, n[column]))
    return found


def compare(session: Session, module: nn.Module, batches: Sequence[Batch]) -> dict[str, Any]:
    forward = session.model.task.forward
    measured = measure(
        session.model,
        lambda batch: forward(module, batch),
        batches,
        session.divergence,
        progress=Silent(),
    )
    verdict = judge(measured, family=session.divergence.family, predicted_damage=0.0, seed=0)
    found = {
        "divergence": verdict.divergence.value,
        "divergence_low": verdict.divergence.low,
        "divergence_high": verdict.divergence.high,
    }
    if verdict.flips is not None:
        found["flips"] = verdict.flips.value
    if verdict.perplexity_ratio is not None:
        found["perplexity_ratio"] = verdict.perplexity_ratio.value
    if verdict.cosine is not None:
        found["cosine"] = verdict.cosine.value
    return {name: float(as_text(value)) for name, value in found.items()}


if __name__ == "__main__":
    what, where, typed = sys.argv[1:]
    if what == "--tokenizer":
        print(mpnet.folder() / "tokenizer.json")
    elif what == "--job":
        write_job(Path(where), json.loads(typed))
    else:
        for line in judged(json.loads(where), json.loads(typed)):
            print(json.dumps(line))

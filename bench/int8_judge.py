"""Children of `int8.py` that need torch: write a job for peers, and judge answers.

--job FOLDER FACTS        the model as ONNX in floats, what to calibrate on, and what to answer
--judge ANSWERS FACTS     print one line of JSON: how far these answers are from the original's
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from equal_bytes_judge import judging_data, opened
from results_file import as_text
from torch import Tensor

from attar.audit.fidelity import measure
from attar.audit.verdict import judge
from attar.export.onnx_graph import export_floats
from attar.load.onnx_model import read_onnx
from attar.records import Batch, Silent
from attar.session import Session

NAMES = ("pixels", "tokens", "attention")


def write_job(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what a user of a peer would have at hand."""
    session = opened(facts)
    model = session.model
    (folder / "files").mkdir(parents=True)
    exported = export_floats(model.module, model.examples, model.task.name)
    (folder / "model.onnx").write_bytes(exported.SerializeToString())
    for name, content in model.files.items():
        (folder / "files" / name).write_bytes(content)
    np.savez(folder / "calibration.npz", **arrays(session.data.calibration))
    np.savez(folder / "judged.npz", **arrays(judged_batches(session, facts)))


def judged_batches(session: Session, facts: Mapping[str, Any]) -> Sequence[Batch]:
    return judging_data(session, facts)[""]


def arrays(batches: Sequence[Batch]) -> dict[str, Any]:
    """All samples together, those of fewer tokens filled up with what the mask leaves out."""
    found = {}
    for name in NAMES:
        if name in batches[0]:
            longest = max(batch[name].shape[1] for batch in batches)
            found[name] = np.concatenate([filled(batch[name], longest) for batch in batches])
    return found


def filled(x: Tensor, longest: int) -> np.ndarray:
    if x.dim() == 2 and x.shape[1] < longest:
        x = torch.nn.functional.pad(x, (0, longest - x.shape[1]))
    return x.to(torch.float32 if x.is_floating_point() else torch.int64).numpy()


def judged(answers: str, facts: Mapping[str, Any]) -> dict[str, float]:
    """Compare with the original, on samples that nobody calibrated on."""
    session = opened(facts)
    batches = judged_batches(session, facts)
    measured = measure(
        session.model, forward(answers, session, batches), batches, session.divergence,
        progress=Silent(),
    )  # fmt: skip
    verdict = judge(measured, family=session.divergence.family, predicted_damage=0.0, seed=0)
    found = {"divergence": verdict.divergence, "flips": verdict.flips, "cosine": verdict.cosine}
    return {
        f"{name}{end}": float(as_text(value))
        for name, estimate in found.items()
        if estimate is not None
        for end, value in (
            ("", estimate.value), ("_low", estimate.low), ("_high", estimate.high)
        )
    }  # fmt: skip


def forward(answers: str, session: Session, batches: Sequence[Batch]) -> Callable[[Batch], Tensor]:
    """Answers of a file that onnxruntime runs, or those that a peer's engine gave."""
    kind, _, path = answers.partition(":")
    if kind == "onnx":
        model = read_onnx(Path(path))
        return lambda batch: session.model.task.forward(model.module, batch)
    outputs, start, held = torch.from_numpy(np.load(path)).float(), 0, {}
    for batch in batches:
        count = len(next(iter(batch.values())))
        held[id(batch)] = outputs[start : start + count].unsqueeze(1)
        start += count
    return lambda batch: held[id(batch)]


if __name__ == "__main__":
    what, where, typed = sys.argv[1:]
    if what == "--job":
        write_job(Path(where), json.loads(typed))
    else:
        print(json.dumps(judged(where, json.loads(typed))))

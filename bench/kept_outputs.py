"""The original's outputs on the measuring data, kept, so that many changes are measured against one
pass over it. The divergence is the product's own; only the second run of the original is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attar.divergence import predictions_mask
from attar.load.data import DataSizes, load_data
from attar.records import Batch, Silent
from attar.session import Session
from attar.sites import substituted

# Predictions compared at once: few enough that their logits stay small.
ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class Kept:
    """Batches, and what the original answers to them: `predictions width` for each batch."""

    session: Session
    batches: Sequence[Batch]
    outputs: tuple[Tensor, ...]


def keep_outputs(session: Session, batches: Sequence[Batch]) -> Kept:
    """Run the original once; float32 logits are held, 200 MB for 1,024 tokens of SmolLM2."""
    with torch.no_grad():
        return Kept(session, batches, tuple(_answers(session, batch) for batch in batches))


def measured_damage(kept: Kept, weight_of: Mapping[str, Callable[[], Tensor]]) -> float:
    """Mean divergence with other weights, nats per prediction.

    Args:
        weight_of: Parameter name to the weight to use, as for `sites.substituted`.
    """
    session, total, predictions = kept.session, 0.0, 0
    with torch.no_grad(), substituted(session.model.module, weight_of):
        for batch, before in zip(kept.batches, kept.outputs, strict=True):
            after = _answers(session, batch)
            for p, q in zip(before.split(ROWS_AT_ONCE), after.split(ROWS_AT_ONCE), strict=True):
                total += float(session.divergence.between(p, q).double().sum())
            predictions += len(before)
    return total / predictions


def other_data(session: Session, source: Path, n: int) -> Sequence[Batch]:
    """Batches of data that no price has seen: tokens of a language model, samples of any other."""
    sizes = DataSizes(calibration=1, recovery=1, audit=n)
    found = load_data(
        session.model, str(source), seed=session.recipe.seed, sizes=sizes, progress=Silent()
    )
    return found.audit


def _answers(session: Session, batch: Batch) -> Tensor:
    outputs = session.model.task.forward(session.model.module, batch)
    mask = predictions_mask(outputs, batch)
    return outputs[mask]

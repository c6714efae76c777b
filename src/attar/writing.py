"""What goes into the written folder, and how many bytes of it are not units' tensors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from attar.export import attar_folder
from attar.load.folder import VERSION

if TYPE_CHECKING:
    from attar.decide import Decided
    from attar.session import Session

# In attar.json and in the header of model.safetensors, for one unit, before any plan is known.
BYTES_PER_UNIT = 520
BYTES_PER_LEFTOVER = 120


def contents(session: Session, decided: Decided) -> dict[str, bytes]:
    """Make every file of the folder in memory."""
    tensors = {
        f"{name}/{part}": tensor
        for name, treated in decided.treated.items()
        for part, tensor in treated.tensors.items()
    }
    tensors.update(session.leftovers())
    return attar_folder.file_contents(tensors, _description(session, decided), session.model.files)


def overhead_bytes(session: Session, decided: Decided) -> int:
    """Weigh everything in the folder that is not a unit's tensors."""
    stored = sum(t.nbytes for one in decided.treated.values() for t in one.tensors.values())
    return attar_folder.weigh(contents(session, decided)) - stored


def estimated_overhead(session: Session) -> int:
    """Guess that weight before there is a plan; corrected as soon as there is one."""
    kept = sum(tensor.nbytes for tensor in session.leftovers().values())
    files = attar_folder.weigh(attar_folder.file_contents({}, {}, session.model.files))
    described = len(json.dumps(_about_model(session)))
    per_unit = BYTES_PER_UNIT * len(session.units.units)
    return kept + files + described + per_unit + BYTES_PER_LEFTOVER * len(session.units.leftovers)


def _about_model(session: Session) -> dict[str, Any]:
    model = session.model
    return {
        "attar": VERSION,
        "model": model.name,
        "origin": model.origin,
        "licence": model.licence,
        "source_bytes": model.source_bytes,
        "task": model.task.name,
        "builder": model.architecture.builder,
        "config": dict(model.architecture.config),
        "folded": list(session.folded),
        "examples": {
            name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
            for name, t in model.examples.items()
        },
        "provenance": session.provenance(),
    }


def _description(session: Session, decided: Decided) -> dict[str, Any]:
    """Plan and receipt in one: what each unit's tensors are, and what they should cost."""
    units = {}
    for applied in decided.receipt.applied:
        unit = session.units.named(applied.unit)
        units[applied.unit] = {
            "treatment": applied.treatment,
            **applied.settings,
            "shape": list(unit.shape),
            "nats": float(f"{applied.predicted_damage:.3e}"),
        }
    return {
        **_about_model(session),
        "weight_bytes": decided.plan.budget.weight_bytes,
        "keep": list(decided.plan.budget.keep),
        "units": units,
    }

"""E[x xᵀ] of what enters each weight, all positions alike: what other tools round against.

Attar itself counts an input by the gradient that answers it, so its own statistics do not serve.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attar.explain import moments
from attar.explain.gatherer import curvature_shapes
from attar.explain.statistics import pieces
from attar.records import Batch, Unit
from attar.session import Session
from attar.sites import Call, watched


def input_moments(session: Session, units: Sequence[Unit]) -> dict[str, Tensor]:
    """Take the mean over the calibration data, in the shape of a curvature's columns.

    A weight that is only looked up has none.
    """
    shapes = {
        f"{unit.name}.weight": curvature_shapes(unit, operation)[1]
        for unit in units
        for operation in unit.uses
        if operation != "embedding"
    }
    totals = {name: torch.zeros(shape) for name, shape in shapes.items()}
    seen = dict.fromkeys(totals, 0)
    samples = 0

    def visit(call: Call) -> Tensor:
        if call.name in totals and call.operation != "embedding":
            x = moments.inputs_of(call, samples, moments.POSITIONS_AT_MOST)
            moments.add_second_moment(totals[call.name], x)
            seen[call.name] += x.shape[0] * x.shape[2]
        return call.run()

    with (
        torch.no_grad(),
        session.progress.stage("inputs", len(session.data.calibration)) as advance,
    ):
        for batch in session.data.calibration:
            for piece, _ in pieces(batch, (), session.model):
                samples = _size(piece)
                with watched(session.model.module, visit):
                    session.model.task.forward(session.model.module, piece)
            advance(1)
    return {
        name.removesuffix(".weight"): total / max(1, seen[name]) for name, total in totals.items()
    }


def _size(piece: Batch) -> int:
    return len(next(iter(piece.values())))

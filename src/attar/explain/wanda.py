"""Wanda: each weight times the norm of the input it meets.

Source: Sun et al. 2024, A simple and effective pruning approach for large language models,
https://arxiv.org/abs/2306.11695, eq. 1; a channel's score is the sum over its weights. An embedding
has no input norm but one: its score is the norm of the row.
"""

import torch

from attar.disk import dense
from attar.records import Model, Scores, Statistics, Units


def score(model: Model, units: Units, statistics: Statistics) -> Scores:
    """Sum over a row of |w| · sqrt(E[x²]), in output units."""
    weights = dict(model.module.named_parameters())
    channels = {}
    for unit in units:
        weight = dense(weights[unit.name + ".weight"]).flatten(1).abs()
        power = statistics.column_power.get(unit.name, torch.ones(unit.columns))
        channels[unit.name] = weight @ power.sqrt()
    totals = {name: float(values.sum()) for name, values in channels.items()}
    return Scores(criterion="wanda", nats=False, channels=channels, totals=totals)

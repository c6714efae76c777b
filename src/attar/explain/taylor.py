"""Taylor: first-order change of the log-likelihood when a channel is muted.

Source: Molchanov et al. 2017, Pruning convolutional neural networks for resource efficient
inference, https://arxiv.org/abs/1611.06440, eq. 8. We differ in the answer whose likelihood is
taken: sampled from the model, so that no labels are needed.
"""

import torch

from attar.records import Model, Scores, Statistics, Units


def score(model: Model, units: Units, statistics: Statistics) -> Scores:
    """Mean of |Σ over positions of g·y| per prediction; an embedding used only to look up: 0."""
    del model
    channels = {
        unit.name: statistics.channel_taylor.get(unit.name, torch.zeros(unit.rows))
        for unit in units
    }
    totals = {name: float(values.sum()) for name, values in channels.items()}
    return Scores(criterion="taylor", nats=False, channels=channels, totals=totals)

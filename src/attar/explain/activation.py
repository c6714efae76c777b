"""Activation: how large a channel's output is on average.

Source: Hu et al. 2016, Network trimming, https://arxiv.org/abs/1607.03250, eq. 1, with the mean
absolute value in place of the share of zeros, which is constant where no ReLU follows.
"""

import torch

from attar.records import Model, Scores, Statistics, Units


def score(model: Model, units: Units, statistics: Statistics) -> Scores:
    """Mean of |y| over positions, in output units; an embedding used only to look up: 0."""
    del model
    channels = {
        unit.name: statistics.channel_activation.get(unit.name, torch.zeros(unit.rows))
        for unit in units
    }
    totals = {name: float(values.mean()) for name, values in channels.items()}
    return Scores(criterion="activation", nats=False, channels=channels, totals=totals)

"""Magnitude: the norm of the weights that make an output channel. Looks at no data.

Source: Li et al. 2017, Pruning filters for efficient ConvNets, https://arxiv.org/abs/1608.08710,
section 3.1, with the L2 instead of the L1 norm.
"""

from attar.disk import dense
from attar.records import Model, Scores, Statistics, Units


def score(model: Model, units: Units, statistics: Statistics) -> Scores:
    """Norm of each row, in weight units; a unit's total is the norm of the whole weight."""
    del statistics
    weights = dict(model.module.named_parameters())
    channels, totals = {}, {}
    for unit in units:
        weight = dense(weights[unit.name + ".weight"]).flatten(1)
        channels[unit.name], totals[unit.name] = weight.norm(dim=1), float(weight.norm())
    return Scores(criterion="magnitude", nats=False, channels=channels, totals=totals)

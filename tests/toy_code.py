"""Code of a user's own: what `toy_code:classifier` names on a command line."""

import os
import signal
from pathlib import Path

import numpy as np
import torch
from torch import nn

from attar.parallel import one_thread

SIDE = 16


def classifier():
    """A module with a norm to fold, and two samples that it accepts."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(SIDE, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(),
        nn.Linear(48, 10),
    )  # fmt: skip
    with one_thread():  # the last bits of a norm depend on the number of threads
        module(3 * samples(256))  # so that the norm has something to do
    return module.eval(), {"inputs": samples(2)}


def regressor():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(SIDE, 32), nn.Tanh(), nn.Linear(32, 3)), {"inputs": samples(2)}


def broken():
    """One weight is not a number."""
    module, examples = classifier()
    module[3].weight.data[1, 2] = float("nan")
    return module, examples


def samples(count, seed=0):
    return torch.randn(count, SIDE, generator=torch.Generator().manual_seed(seed))


def save_data(path, count=100, side=SIDE):
    draws = np.random.default_rng(0)
    np.savez(path, inputs=draws.standard_normal((count, side), dtype=np.float32))
    return path


def die_once(marker, work):
    """Kill the process that does this piece, the first time; then do it."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return work()
    return os.kill(os.getpid(), signal.SIGKILL)


def die(_work):
    os.kill(os.getpid(), signal.SIGKILL)


def fail_as(error, marker):
    """Add a letter to a file, and fail."""
    with Path(marker).open("a") as file:
        file.write("x")
    raise error


def other():
    """The same layers with other weights."""
    module, examples = classifier()
    torch.manual_seed(7)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module, examples


def overflowing():
    """The classifier with finite weights that are too large for what they read."""
    module, examples = classifier()
    for layer in (module[0], module[3]):
        layer.weight.data.mul_(1e30)
    return module, examples


def uneven():
    """The classifier with channels of very different size, and the answers it had."""
    module, examples = classifier()
    with torch.no_grad():
        module[5].weight.mul_(20)
        for writer, reader in ((module[3], module[5]),):
            by = torch.exp(2 * torch.randn(len(writer.weight)))
            writer.weight.mul_(by[:, None])
            writer.bias.mul_(by)
            reader.weight.div_(by)
    return module, examples


def redundant():
    """The classifier with hidden numbers of which many nearly say what others say."""
    module, examples = classifier()
    with torch.no_grad():
        for layer, kept in ((module[0], 20), (module[3], 16)):
            rows = torch.arange(len(layer.weight)) % kept
            layer.weight.copy_(layer.weight[rows] * (1 + 0.02 * torch.randn(len(rows), 1)))
            layer.bias.copy_(layer.bias[rows])
        norm = module[1]
        for own in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            own.copy_(own[torch.arange(len(own)) % 20])
    return module, examples

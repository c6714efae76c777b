"""Copies of a model that run side by side, each with other parameters put in."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from queue import SimpleQueue

import torch
from torch import Tensor, nn
from torch.func import functional_call

from attar.records import Batch, Model
from attar.sites import NOT_ROUNDED, Roundings, substituted


class Copies:
    """One copy for each thread: parameters are put into a module, so each needs one of its own."""

    def __init__(self, model: Model) -> None:
        self._free: SimpleQueue[_Copy] = SimpleQueue()
        for _ in range(torch.get_num_threads()):
            self._free.put(_Copy(model))

    def answer(
        self, batch: Batch, tensors: Mapping[str, Tensor], around: Roundings = NOT_ROUNDED
    ) -> Tensor:
        """Run a batch; gradients reach what the tensors are made of.

        Args:
            tensors: Parameter name to what stands in for it.
            around: What is done to tensors around weights.

        Returns:
            `samples predictions width`.
        """
        named = {f"inside.{name}": tensor for name, tensor in tensors.items()}
        copy = self._free.get()
        try:
            found: Tensor = functional_call(copy, named, (batch, around))
        finally:
            self._free.put(copy)
        return found


class _Copy(nn.Module):
    """A copy of a model as one call."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.inside, self._task = deepcopy(model.module), model.task

    def forward(self, batch: Batch, around: Roundings) -> Tensor:
        """Answer with what enters the units rounded."""
        with substituted(self.inside, {}, around):
            return self._task.forward(self.inside, batch)

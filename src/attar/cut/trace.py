"""Follow what each channel meets on its way through a model, and join what meets.

Every tensor carries, at each place, the node of the parameter that the place hangs on: if that row
is cut, the place is gone. Operations that only move numbers are done to the nodes too. Where two
tensors meet place by place, their nodes go together. What is computed along a dimension (a norm, a
softmax, a product with numbers that are no parameter) holds together all that lies along it, so a
head goes as a whole, and a residual stream that is normalised does not go at all. An operation that
is not known here fixes what enters it, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from attar.cut.meet import Operation, Split, follow
from attar.cut.nodes import BIAS, CONVOLUTION_GROUP, NONE, READ, Nodes
from attar.sites import OPERATIONS, arguments_of, flat

READS_NUMBERS = {"item", "tolist", "__bool__", "numpy", "__float__", "__int__"}


class Tracer(TorchFunctionMode):
    """Lives over one run of a model; `nodes` over as many as it takes until nothing more joins."""

    def __init__(self, module: nn.Module, nodes: Nodes) -> None:
        super().__init__()
        self.nodes = nodes
        self.splits: list[Split] = []
        self.readers: set[tuple[str, int]] = set()
        self.names = {id(p): name for name, p in module.named_parameters()}
        self.buffers = {id(b): name for name, b in module.named_buffers()}
        self._modules = {id(m): name for name, m in module.named_modules()}
        self.inside: list[str] = [""]
        self._carried: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Trace what runs, and know which module runs."""

        def enter(module: nn.Module, _args: Any) -> None:
            self.inside.append(self._modules.get(id(module), ""))

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            self.inside.pop()

        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
        try:
            with torch.no_grad(), self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def where(self) -> str:
        """The module that runs now, for people."""
        return self.inside[-1] or "the model itself"

    def places(self, tensor: Any) -> Tensor | None:
        """Nodes at the places of a tensor; None where there are none."""
        held = self._carried.get(id(tensor))
        if held is not None:
            return held[1]
        name = self.names.get(id(tensor))
        if name is None or not tensor.dim():
            return None
        # A parameter that meets others: along its last dimension of more than one number.
        dim = max((d for d, size in enumerate(tensor.shape) if size > 1), default=0)
        return along(self.nodes.of(name, dim, tensor.shape[dim]), dim, tensor.shape)

    def end(self, answer: Tensor) -> None:
        """Fix what the answer is made of."""
        places = self.places(answer)
        if places is not None:
            self.nodes.fix(places, "they are the answer")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        output = func(*args, **kwargs)
        tensors = [one for one in flat([*args, *kwargs.values()]) if isinstance(one, Tensor)]
        if func in OPERATIONS:
            self._read(OPERATIONS[func], arguments_of(func, args, kwargs), output)
        elif not any(isinstance(one, Tensor) for one in flat([output])):
            if name in READS_NUMBERS:
                self.fix(tensors, f"the code of {self.where} looks at them ({name})")
        elif any(self.places(one) is not None for one in tensors):
            follow(self, Operation(func, name, args, kwargs, tensors, output))
        return output

    # ------------------------------------------------------------------ what writes and what reads

    def _read(self, operation: str, given: Mapping[str, Any], output: Tensor) -> None:
        weight, x, bias = given["weight"], given["input"], given.get("bias")
        name = self.names.get(id(weight))
        if name is None:
            self.fix([x, weight], f"{self.where} computes the weight that reads them")
            return
        if operation == "embedding":
            self.keep(output, along(self.nodes.of(name, 1, weight.shape[1]), -1, output.shape))
            return
        dim = -1 if operation == "linear" else 1
        groups = 1 if operation == "linear" else int(given.get("groups", 1))
        rows = self.nodes.of(name, 0, len(weight))
        entered = self.lines(x, dim, f"they are mixed up where {name} reads them")
        if entered is not None and groups == 1:
            self.nodes.join(entered, self.nodes.of(name, 1, weight.shape[1]), READ)
            self.readers.add((name, 1))
        elif entered is not None:
            self._read_by_groups(entered.reshape(groups, -1), rows.reshape(groups, -1))
        elif groups > 1:
            self.nodes.fix(rows, f"{name} reads the input of the model in groups")
        if bias is not None:
            added = self.names.get(id(bias))
            if added is None:
                self.nodes.fix(rows, f"{self.where} computes what is added to them")
            else:
                self.nodes.join(self.nodes.of(added, 0, len(rows)), rows, BIAS)
        self.keep(output, along(rows, dim, output.shape))

    def _read_by_groups(self, entered: Tensor, rows: Tensor) -> None:
        """Let each group of a convolution go as a whole, with what enters it."""
        why = CONVOLUTION_GROUP if entered.shape[1] > 1 else "convolved by itself"
        self.nodes.hold(entered, 1, why)
        self.nodes.fix_where(rows, (entered == NONE).any(1, keepdim=True).expand_as(rows), why)
        self.nodes.join(rows, entered[:, :1].expand_as(rows), why)

    def lines(self, x: Tensor, dim: int, why: str) -> Tensor | None:
        """Nodes along one dimension, where they are the same everywhere else."""
        places = self.places(x)
        if places is None:
            return None
        for other in range(places.dim()):
            if other != dim % places.dim() and self.nodes.varies(places, other):
                self.nodes.fix(places, why)
                return None
        return places.movedim(dim, -1).reshape(-1, places.shape[dim])[0]

    def fix(self, tensors: Sequence[Tensor], why: str) -> None:
        """Let nothing go of what is in these tensors."""
        for one in tensors:
            places = self.places(one)
            if places is not None:
                self.nodes.fix(places, why)

    def keep(self, tensor: Tensor, places: Tensor | None) -> None:
        """Remember nodes; the tensor is held so that no other gets its id."""
        if places is not None:
            assert places.shape == tensor.shape
            self._carried[id(tensor)] = (tensor, places)


def along(nodes: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """Lay nodes along one dimension of a shape."""
    sizes = [1] * len(shape)
    sizes[dim] = len(nodes)
    return nodes.reshape(sizes).expand(shape)

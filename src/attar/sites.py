"""Watch, or stand in for, the operations that read a weight.

A site is a call of `linear`, `conv1d/2d/3d` or `embedding` whose weight argument is a parameter of
the model. Calls are intercepted by identity of the parameter, not by the class of the module, so
that subclasses with a forward of their own (padding, sharing) and tied weights are seen as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attar.disk import DiskWeight

OPERATIONS: dict[Any, str] = {
    F.linear: "linear",
    torch.conv1d: "convolution",
    torch.conv2d: "convolution",
    torch.conv3d: "convolution",
    F.embedding: "embedding",
}
# Names of operations, as torch calls them: what only moves numbers, and what pools pictures.
MOVES = {
    *("view", "reshape", "transpose", "permute", "contiguous", "clone", "detach", "expand"),
    *("unsqueeze", "squeeze", "flatten", "__getitem__", "repeat_interleave", "chunk", "split"),
    *("unbind", "narrow", "view_as", "swapaxes", "movedim", "repeat", "reshape_as", "unflatten"),
}
POOLS = {"avg_pool2d", "adaptive_avg_pool2d", "avg_pool1d", "adaptive_avg_pool1d"}
# Positions of the arguments in each signature.
_ARGUMENTS = {
    "linear": ("input", "weight", "bias"),
    "convolution": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "embedding": ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"),
}


@dataclass(frozen=True)
class Call:
    """One call of an operation that reads a watched weight.

    Attributes:
        name: Parameter name of the weight.
        operation: "linear", "convolution" or "embedding".
        arguments: By name, as the operation names them.
    """

    name: str
    operation: str
    arguments: Mapping[str, Any]
    function: Callable[..., Tensor]

    @property
    def input(self) -> Tensor:
        """What the weight is applied to."""
        tensor: Tensor = self.arguments["input"]
        return tensor

    def run(self, **other: Tensor) -> Tensor:
        """Carry the call out, with other arguments where some are given."""
        return self.function(**{**self.arguments, **other})

    def reading(self, x: Tensor) -> Call:
        """Make the same call of another input."""
        return replace(self, arguments={**self.arguments, "input": x})


Visit = Callable[[Call], Tensor]


class _Watch(TorchFunctionMode):
    """Hand each call that reads a watched weight to `visit`; let every other call through."""

    def __init__(self, names: Mapping[int, str], visit: Visit) -> None:
        super().__init__()
        self._names = names
        self._visit = visit

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = OPERATIONS.get(func)
        if operation is None:
            return func(*args, **kwargs)
        arguments = arguments_of(func, args, kwargs)
        name = self._names.get(id(arguments.get("weight")))
        if name is None:
            return func(*args, **kwargs)
        return self._visit(Call(name, operation, arguments, func))


def arguments_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name the arguments of one of the operations."""
    return dict(zip(_ARGUMENTS[OPERATIONS[func]], args, strict=False)) | dict(kwargs)


def flat(things: Any) -> list[Any]:
    """Open lists and tuples."""
    return [
        inner for one in things for inner in (flat(one) if isinstance(one, list | tuple) else [one])
    ]


@contextmanager
def watched(module: nn.Module, visit: Visit) -> Iterator[None]:
    """Send every call that reads a parameter of `module` through `visit`.

    A tied parameter goes by the first of its names.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    with _Watch(names, visit):
        yield


@dataclass(frozen=True)
class Roundings:
    """What is done to tensors around a weight while the model runs; keys are parameter names.

    Attributes:
        inputs: To what the weight is multiplied with.
        outputs: To the product.
    """

    inputs: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    outputs: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


NOT_ROUNDED = Roundings()


@contextmanager
def substituted(
    module: nn.Module,
    tensor_of: Mapping[str, Callable[[], Tensor]],
    roundings: Roundings = NOT_ROUNDED,
) -> Iterator[None]:
    """Run `module` with other weights and biases, without copying or changing it.

    Args:
        module: Left as it is.
        tensor_of: Parameter name to a function that makes the tensor to use, in the shape the
            module holds; called at each use, so that it may decode instead of hold. Of biases,
            those of units (`Unit.bias`).
        roundings: Of what enters and leaves weights.
    """

    def visit(call: Call) -> Tensor:
        bias = tensor_of.get(bias_name(call.name))
        if bias is not None:
            call = replace(call, arguments={**call.arguments, "bias": bias()})
        if (rounded := roundings.inputs.get(call.name)) is not None:
            call = call.reading(rounded(call.input))
        make = tensor_of.get(call.name)
        output = call.run() if make is None else _run_with(call, make)
        rounded = roundings.outputs.get(call.name)
        return output if rounded is None else rounded(output)

    with watched(module, visit):
        yield


def bias_name(weight_name: str) -> str:
    """Name the parameter that a layer adds where it adds one."""
    return weight_name.removesuffix("weight") + "bias"


def _run_with(call: Call, make: Callable[[], Tensor]) -> Tensor:
    """Run with a made weight; what autograd would keep of it is made again on the way back."""
    weight = make()
    if isinstance(weight, DiskWeight):
        return call.run(weight=weight)  # autograd keeps none of its numbers
    address = weight.data_ptr()  # not the weight itself, which the hook would keep

    def pack(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        return (saved.shape, saved.stride()) if saved.data_ptr() == address else saved

    def unpack(kept: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        return kept if isinstance(kept, Tensor) else make().as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return call.run(weight=weight)


def patches(call: Call, at_most: int | None = None) -> Tensor:
    """Unfold the input of a convolution into the vectors its weight is multiplied with.

    Args:
        at_most: Take no more positions than this, evenly spread along every side.

    Returns:
        `samples groups positions columns`, columns = in/groups * kernel size.
    """
    weight: Tensor = call.arguments["weight"]
    groups = int(call.arguments.get("groups", 1))
    kernel = weight.shape[2:]
    x = call.input
    stride = _per_side(call.arguments.get("stride", 1), len(kernel))
    dilation = _per_side(call.arguments.get("dilation", 1), len(kernel))
    x = F.pad(x, _padding(call.arguments.get("padding", 0), kernel, dilation))
    for side, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        # unfold has no dilation: take a wider window and drop what lies between.
        x = x.unfold(2 + side, (size - 1) * gap + 1, step)[..., ::gap]
    if at_most is not None:
        x = _spread(x, len(kernel), at_most)
    samples, channels = x.shape[:2]
    positions = x.shape[2 : 2 + len(kernel)].numel()
    x = x.reshape(samples, groups, channels // groups, positions, kernel.numel())
    return x.transpose(2, 3).reshape(samples, groups, positions, -1)


def _spread(x: Tensor, sides: int, at_most: int) -> Tensor:
    """Keep every n-th position along each side; the smallest n for which few enough are left."""
    step = 1
    while math.prod(-(-size // step) for size in x.shape[2 : 2 + sides]) > at_most:
        step += 1
    return x[(slice(None), slice(None), *[slice(None, None, step)] * sides)]


def _per_side(value: Any, sides: int) -> tuple[int, ...]:
    return (int(value),) * sides if isinstance(value, int) else tuple(int(v) for v in value)


def _padding(padding: Any, kernel: torch.Size, dilation: tuple[int, ...]) -> list[int]:
    """Amounts for `F.pad`, last side first."""
    if padding == "valid":
        padding = 0
    amounts: list[int] = []
    if padding == "same":
        for size, gap in zip(reversed(kernel), reversed(dilation), strict=True):
            total = (size - 1) * gap
            amounts += [total // 2, total - total // 2]
        return amounts
    for amount in reversed(_per_side(padding, len(kernel))):
        amounts += [amount, amount]
    return amounts


def tracked(output: Tensor) -> Tensor:
    """Start the graph at a tensor nothing before it needs gradients for.

    The copy is not a leaf, so that the model may go on to change it in place.
    """
    return output.detach().requires_grad_().clone()

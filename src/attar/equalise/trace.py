"""Find links by running a model once and following every channel from what writes it.

Each tensor carries, for every writer whose channels are in it, the number of the channel at each
place. Operations that only move numbers are done to those numbers too; operations that a factor
passes (ReLU, a product with something else, pooling, attention's sum over values) keep them. Where
anything else reads a channel, a change of it would show, and it is not free. So layouts of heads,
shared key-value heads and fused projections need no table of names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attar.links import GAIN, ROWS, Link, Reader, Writer, comes_whole
from attar.sites import MOVES, OPERATIONS, POOLS, arguments_of, flat

NONE = -1  # of a place that holds no channel of a writer
# Names of operations, as torch calls them: what leaves numbers as good as they are, ...
SAME = {"to", "float", "type_as", "dropout", "identity", "requires_grad_"}
# ... lets a positive factor of each channel pass, ...
HOMOGENEOUS = {"relu", "relu_", "leaky_relu", "abs", "max_pool2d", "max_pool1d"}
PRODUCTS = {"mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"}
QUOTIENTS = {"div", "__truediv__", "true_divide"}
# ... and sums over places of one channel.
SUMS = {"mean", "sum"}


@dataclass
class Source:
    """What is known of one writer so far."""

    writer: Writer
    kind: str
    channels: int
    free: Tensor
    linear: bool = True
    shift: bool = True
    heads: Tensor | None = None
    readers: list[Reader] = field(default_factory=list)
    reason: str = "nothing reads it"


Carried = dict[str, Tensor]
"""Name of a writer's parameter to the channel at each place of a tensor."""


class Tracer(TorchFunctionMode):
    """Lives over one run of a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.sources: dict[str, Source] = {}
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._carried: dict[int, tuple[Tensor, Carried]] = {}
        self._calls: dict[str, int] = {}
        self._gains: dict[int, tuple[str, float]] = {}

    def carried(self, tensor: Any) -> Carried:
        """Channels in a tensor."""
        held = self._carried.get(id(tensor))
        return {} if held is None else held[1]

    def refuse(self, tensor: Any, reason: str) -> None:
        """Hold fast every channel in a tensor."""
        for name, places in self.carried(tensor).items():
            source = self.sources[name]
            seen: Tensor = torch.unique(places)
            source.free[seen[seen >= 0].long()] = False
            source.reason = reason

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        output = func(*args, **kwargs)
        inputs = [one for one in flat([*args, *kwargs.values()]) if isinstance(one, Tensor)]
        if func in OPERATIONS:
            self._read(OPERATIONS[func], arguments_of(func, args, kwargs), output)
        elif name in PRODUCTS or name in QUOTIENTS:
            self._multiply(name, args, output)
        elif name in ("add", "__add__", "__radd__", "add_", "__iadd__"):
            self._add(args, inputs, output)
        elif func is F.scaled_dot_product_attention or name in ("matmul", "__matmul__", "bmm"):
            self._attend(func, [*args, *kwargs.values()], output)
        elif func is F.layer_norm or func is getattr(F, "rms_norm", None):
            self._norm(func, args, kwargs, output)
        elif name in SAME and (gain := self._gain(inputs[0])) is not None:
            self._gains[id(output)] = gain  # a gain in another precision
            self._keep(output, {})
        elif any(self.carried(one) for one in inputs):
            self._pass(func, name, args, kwargs, output)
        return output

    # ------------------------------------------------------------------ what writes and what reads

    def _read(self, operation: str, given: Mapping[str, Any], output: Tensor) -> None:
        weight = given["weight"]
        name = self._names.get(id(weight))
        x = given["input"]
        if name is not None:
            self._calls[name] = self._calls.get(name, 0) + 1
        if name is None or operation == "embedding":
            self.refuse(x, f"they enter {operation}, whose weight is no parameter")
            return
        bias = given.get("bias")
        bias_name = None if bias is None else self._names.get(id(bias))
        dim = -1 if operation == "linear" else 1
        groups = 1 if operation == "linear" else int(given.get("groups", 1))
        padded = operation != "linear" and given.get("padding", 0) not in (0, (0,), (0, 0), "valid")
        for source_name, places in self.carried(x).items():
            source, reached = self.sources[source_name], constant_along_others(places, dim)
            if reached is None:
                self.refuse(x, f"they are mixed up where {name} reads them")
                break
            source.shift &= bias_name is not None and operation == "linear" and not padded
            source.readers.append(Reader(name, reached, bias_name, groups))
        if bias is not None and bias_name is None:
            return  # what is added is made elsewhere: the rows cannot be changed alone
        kind = "linear" if operation == "linear" else "convolution"
        self._write(name, Writer(name, ROWS, bias_name), kind, output, dim)

    def _write(self, name: str, writer: Writer, kind: str, output: Tensor, dim: int) -> None:
        channels = output.shape[dim]
        if name in self.sources or self._calls.get(name, 0) > 1:
            if name in self.sources:
                self.sources[name].free[:] = False
                self.sources[name].reason = "it is used more than once"
            return
        has_bias = writer.bias is not None
        free = torch.ones(channels, dtype=torch.bool)
        self.sources[name] = Source(writer, kind, channels, free, shift=has_bias)
        shape = [1] * output.dim()
        shape[dim] = channels
        numbers = torch.arange(channels, dtype=torch.int32).reshape(shape).expand(output.shape)
        self._keep(output, {**self.carried(output), name: numbers})

    def _norm(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        self.refuse(given["input"], "they enter a norm")
        weight, bias = given.get("weight"), given.get("bias")
        name = self._names.get(id(weight))
        bias_name = self._names.get(id(bias))
        if name is not None and weight is not None and weight.dim() == 1:
            own_bias = bias_name if func is F.layer_norm else None
            self._write(name, Writer(name, GAIN, own_bias), "norm", output, -1)

    def _multiply(self, name: str, args: tuple[Any, ...], output: Tensor) -> None:
        left, right = args[0], args[1]
        if name in QUOTIENTS:
            self.refuse(right, "something is divided by them")
        elif self.carried(left).keys() & self.carried(right).keys():
            self.refuse(left, "they are multiplied with each other")
        gain = self._gain(left) or self._gain(right)
        found: Carried = {}
        for one, other in ((left, right), (right, left)):
            plain = not isinstance(other, Tensor)
            for source, places in self.carried(one).items():
                self.sources[source].shift &= False
                # One number for all channels of a place passes a rotation as well.
                self.sources[source].linear &= plain or other.dim() == 0 or other.shape[-1] == 1
                self.sources[source].kind = "product" if not plain else self.sources[source].kind
                found[source] = places.expand(output.shape)
        if found:
            self._keep(output, found)
        if gain is not None and name not in QUOTIENTS and output.dim() > 1:
            self._write(gain[0], Writer(gain[0], GAIN, None, gain[1]), "norm", output, -1)

    def _gain(self, tensor: Any) -> tuple[str, float] | None:
        """Say which parameter a factor is, and what was added to it."""
        if not isinstance(tensor, Tensor) or tensor.dim() != 1:
            return None
        if id(tensor) in self._names:
            return self._names[id(tensor)], 0.0
        return self._gains.get(id(tensor))

    def _add(self, args: tuple[Any, ...], inputs: list[Tensor], output: Tensor) -> None:
        numbers = [one for one in args if isinstance(one, int | float)]
        known = self._gain(inputs[0]) if len(inputs) == 1 else None
        if known is not None and len(numbers) == 1:  # Gemma's gain is 1 + weight
            self._gains[id(output)] = (known[0], known[1] + numbers[0])
            self._keep(output, {})
            return
        for one in inputs:
            self.refuse(one, "something is added to them")

    # ------------------------------------------------------------------ what lets channels pass

    def _pass(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        if not any(isinstance(one, Tensor) for one in flat([output])):
            if name in ("item", "tolist", "__bool__", "numpy"):
                self._refuse_all(args, f"the code looks at them ({name})")
            return
        passes = self._how(func, name, args, kwargs)
        if passes is None:
            self._refuse_all([*args, *kwargs.values()], f"they enter {name}")
            return
        for source, places in self.carried(_first(args)).items():
            made = passes(places)
            for tensor, own in zip(flat([output]), flat([made]), strict=True):
                if own is None:
                    self._refuse_all(args, f"they are mixed up in {name}")
                    return
                self._keep(tensor, {**self.carried(tensor), source: own})

    def _how(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Callable[[Tensor], Any] | None:
        """Find what an operation does to the numbers of channels; None where they do not pass."""
        first, rest = args[0] if args else None, args[1:]
        if name in MOVES and isinstance(first, Tensor):
            return lambda places: func(places, *rest, **kwargs)
        if name in SAME or (name in HOMOGENEOUS and not name.startswith("max_pool")):
            self._mark(first, linear=name in SAME, shift=name in SAME)
            return lambda places: places
        if name in POOLS or name in HOMOGENEOUS:
            self._mark(first, linear=False, shift=False)
            return lambda places: _pooled(places, func, args, kwargs)
        if name in SUMS:
            self._mark(first, shift=name == "mean")
            return lambda places: _summed(places, func, rest, kwargs)
        return None

    def _mark(self, tensor: Any, *, linear: bool = True, shift: bool = True) -> None:
        for name in self.carried(tensor):
            self.sources[name].linear &= linear
            self.sources[name].shift &= shift

    def _refuse_all(self, things: Any, reason: str) -> None:
        for one in flat(things):
            self.refuse(one, reason)

    def _keep(self, tensor: Tensor, channels: Carried) -> None:
        """Remember channels; the tensor is held so that no other gets its id."""
        self._carried[id(tensor)] = (tensor, channels)

    def _attend(self, func: Any, given: list[Any], output: Tensor) -> None:
        """Let values through attention, which adds places up with shares that sum to one."""
        is_whole = func is F.scaled_dot_product_attention
        *others, value = given[: 3 if is_whole else 2]
        for other in (*others, *given[3:]):
            self.refuse(other, "they enter attention")
        found: Carried = {}
        for name, places in self.carried(value).items():
            source, per_head = self.sources[name], _constant_along(places, -2)
            if per_head is None or not _alike(per_head) or per_head.dim() < 3:
                self.refuse(value, "they are mixed up in attention")
                return
            source.kind = "values"
            source.shift &= is_whole  # shares that are given may sum to anything
            heads = per_head[:1]
            source.heads = torch.unique(heads.reshape(-1, heads.shape[-1]), dim=0)
            if heads.dim() == 4:
                heads = heads.repeat_interleave(output.shape[1] // heads.shape[1], 1)
            found[name] = heads.expand(output.shape)
        self._keep(output, found)

    # ------------------------------------------------------------------ what was found

    def links(self) -> tuple[list[Link], dict[str, str]]:
        """Sum up: links that have a reader, and the reasons of the others."""
        links, refused = [], {}
        for name, source in self.sources.items():
            holder = name.removesuffix(".weight")
            shared = [r.weight for r in source.readers if self._calls.get(r.weight, 0) > 1]
            if shared:
                refused[holder] = f"{shared[0]} is used more than once"
            elif not source.readers or not bool(source.free.any()):
                refused[holder] = source.reason
            else:
                links.append(_link(holder, source))
        return links, refused


def _link(holder: str, source: Source) -> Link:
    link = Link(
        name=holder,
        kind=source.kind,
        writers=(source.writer,),
        readers=tuple(source.readers),
        channels=source.channels,
        free=source.free,
        blocks=None,
        can_shift=source.shift,
    )
    if not source.linear or source.writer.side == GAIN or not bool(source.free.all()):
        return link
    blocks = torch.arange(source.channels)[None] if source.heads is None else source.heads.long()
    if all(comes_whole(reader, blocks) for reader in source.readers):
        return Link(**{**vars(link), "blocks": blocks})
    return link


def _first(args: tuple[Any, ...]) -> Any:
    return args[0][0] if args and isinstance(args[0], list | tuple) else args[0] if args else None


def constant_along_others(places: Tensor, dim: int) -> Tensor | None:
    """Take the numbers along one dimension, if they are the same everywhere else."""
    lines = places.movedim(dim, -1).reshape(-1, places.shape[dim])
    return lines[0].long() if bool((lines == lines[:1]).all()) else None


def _constant_along(places: Tensor, dim: int) -> Tensor | None:
    """Drop a dimension along which the numbers do not change."""
    first = places.narrow(dim, 0, 1)
    return first if bool((places == first).all()) else None


def _alike(places: Tensor) -> bool:
    return bool((places == places[:1]).all())


def _pooled(
    places: Tensor, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Keep the channel of each picture; the sides become those of the pooled one."""
    sides = tuple(range(2, places.dim()))
    first = places[(slice(None), slice(None), *[slice(0, 1)] * len(sides))]
    if not bool((places == first).all()):
        return None
    pooled = func(torch.zeros(places.shape), *args[1:], **kwargs)
    return first.expand(pooled.shape)


def _summed(
    places: Tensor, func: Any, rest: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """Drop dimensions along which the channel stays the same."""
    least = places.double()
    mean = least.mean(*rest, **kwargs)
    wide = least.mean(*rest, **{**kwargs, "keepdim": True})
    del func
    return mean.round().to(places.dtype) if bool((least == wide).all()) else None

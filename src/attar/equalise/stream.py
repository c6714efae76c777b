"""Find the residual stream, and say whether it can be turned as a whole.

Everything that is added up is one stream. It can be turned by any rotation if linear maps and
tables write it, and linear maps read it, plain or through norms that divide by its length: a
rotation does not change a length. A norm's gain must first go into what reads the norm, which a
table that is also the head does not allow unless the gain is the same for all channels.

Source: Ashkboos et al. 2024, SliceGPT, https://arxiv.org/abs/2401.15024, theorem 1. There a
LayerNorm is first made into such a norm; here it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attar.equalise.trace import PRODUCTS, QUOTIENTS, SAME, constant_along_others
from attar.links import COLUMNS, ROWS, Link, Reader, Stream, Writer
from attar.sites import MOVES, OPERATIONS, arguments_of, flat

ADDS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
SQUARES = {"pow", "__pow__", "square"}
LENGTHS = {"mean", "sum", "norm", "vector_norm"}


class Tag(NamedTuple):
    """What a tensor is to a stream: itself, its "square", or "normed" by a gain."""

    kind: str
    group: Group
    gain: str | None = None


@dataclass(eq=False)
class Group:
    """What is added up, as far as known; one of those joined to it stands for all."""

    size: int
    writers: list[Writer] = field(default_factory=list)
    readers: list[tuple[Reader, str | None]] = field(default_factory=list)
    reason: str | None = None
    joined: Group | None = None

    def top(self) -> Group:
        """The one that stands for all."""
        return self if self.joined is None else self.joined.top()

    def join(self, other: Group) -> Group:
        """Make one of two."""
        one, two = self.top(), other.top()
        if one is not two:
            one.writers += two.writers
            one.readers += two.readers
            one.reason = one.reason or two.reason
            two.joined = one
        return one


class StreamTracer(TorchFunctionMode):
    """Lives over one run of a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._parameters = dict(module.named_parameters())
        self._names = {id(p): name for name, p in self._parameters.items()}
        self._tags: dict[int, tuple[Tensor, Tag | None]] = {}
        self._gains: dict[int, str] = {}
        self._groups: list[Group] = []
        self._calls: dict[str, int] = {}

    def tag(self, thing: Any) -> Tag | None:
        """What a tensor is to a stream."""
        held = self._tags.get(id(thing))
        return None if held is None else held[1]

    def end(self, answer: Tensor) -> None:
        """Say which tensor is the answer."""
        self._refuse([answer], "it is the answer")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if any(isinstance(one, Tensor) for one in flat([output])):
            name = getattr(func, "__name__", str(func))
            tensors = [one for one in flat([*args, *kwargs.values()]) if isinstance(one, Tensor)]
            self._follow(func, name, args, kwargs, tensors, output)
        return output

    def _follow(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tensors: Sequence[Tensor],
        output: Any,
    ) -> None:
        tags = [tag for one in tensors if (tag := self.tag(one)) is not None]
        if func in OPERATIONS:
            self._read(OPERATIONS[func], arguments_of(func, args, kwargs), output)
        elif name in ADDS:
            self._add(args, tensors, tags, output)
        elif not tags:
            if name in SAME and (gain := self._gain(tensors[0])) is not None:
                self._gains[id(output)] = gain  # in another precision
                self._keep(output, None)
        else:
            self._pass(func, name, args, kwargs, tensors, output)

    def _pass(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tensors: Sequence[Tensor],
        output: Any,
    ) -> None:
        """Follow a stream through anything but a sum and what reads it."""
        tags = [tag for one in tensors if (tag := self.tag(one)) is not None]
        if name in (*MOVES, *SAME):
            places = torch.arange(tensors[0].shape[-1]).expand(tensors[0].shape)
            moved = func(places, *args[1:], **kwargs) if name in MOVES else places
            if isinstance(moved, Tensor) and _keeps_last(moved, places.shape[-1]):
                self._keep(output, tags[0])
            else:
                self._refuse(tensors, f"{name} takes it apart")
        elif name in PRODUCTS or name in QUOTIENTS:
            self._multiply(tensors, tags, output)
        elif name in SQUARES and tags[0].kind == "stream" and args[1:] in ((2,), (2.0,), ()):
            self._keep(output, tags[0]._replace(kind="square"))
        elif func is getattr(F, "rms_norm", None):
            self._normed(args, kwargs, tags[0], output)
        elif not (name in LENGTHS and tags[0].kind == "square" and output.shape[-1] == 1):
            self._refuse(tensors, f"it enters {name}")

    def _read(self, operation: str, given: Mapping[str, Any], output: Tensor) -> None:
        name, x = self._names.get(id(given["weight"])), given["input"]
        bias = given.get("bias")
        bias_name = None if bias is None else self._names.get(id(bias))
        if name is None or operation == "convolution" or (bias is not None and bias_name is None):
            self._refuse([x], f"it enters a {operation}")
            return
        use = f"{name}:{operation}"
        self._calls[use] = self._calls.get(use, 0) + 1
        tag = self.tag(x)
        if tag is not None and tag.kind == "square":
            self._refuse([x], "its square enters a linear map")
        elif tag is not None and operation == "linear":
            reader = Reader(name, torch.arange(x.shape[-1]), bias_name)
            tag.group.top().readers.append((reader, tag.gain))
        side = ROWS if operation == "linear" else COLUMNS
        group = Group(output.shape[-1], [Writer(name, side, bias_name)])
        if self._calls[use] > 1:
            group.reason = f"{name} is used more than once"
        self._groups.append(group)
        self._keep(output, Tag("stream", group))

    def _add(
        self,
        args: tuple[Any, ...],
        tensors: Sequence[Tensor],
        tags: Sequence[Tag],
        output: Tensor,
    ) -> None:
        numbers = [one for one in args if isinstance(one, int | float)]
        gain = self._gain(tensors[0])
        if len(tensors) == 1 and gain is not None and len(numbers) == 1:
            self._gains[id(output)] = gain
            self._keep(output, None)
        elif len(tags) == 2 and all(tag.kind == "stream" for tag in tags):
            self._keep(output, Tag("stream", tags[0].group.join(tags[1].group)))
        else:
            self._refuse(tensors, "something is added to it that no linear map or table makes")

    def _multiply(self, tensors: Sequence[Tensor], tags: Sequence[Tag], output: Tensor) -> None:
        tag, others = tags[0], [one for one in tensors if self.tag(one) is None]
        if len(tags) == 2 and tags[0] == tags[1] and tensors[0] is tensors[1]:
            self._keep(output, tag._replace(kind="square"))
        elif len(tags) > 1 or tag.kind != "stream":
            self._refuse(tensors, "it is multiplied with something of its own")
        elif not others or others[0].dim() == 0 or others[0].shape[-1] == 1:
            self._keep(output, tag)
        elif (gain := self._gain(others[0])) is not None:
            self._keep(output, Tag("normed", tag.group, gain))
        else:
            self._refuse(tensors, "its channels are multiplied one by one")

    def _gain(self, tensor: Tensor) -> str | None:
        return self._gains.get(id(tensor), self._names.get(id(tensor)))

    def _normed(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], tag: Tag, output: Tensor
    ) -> None:
        weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        gain = None if weight is None else self._gain(weight)
        whole = output.shape[-1] == tag.group.top().size and tag.kind == "stream"
        if not whole or (weight is not None and gain is None):
            self._refuse([args[0]], "it enters a norm of parts of it")
            return
        self._keep(output, Tag("stream" if gain is None else "normed", tag.group, gain))

    def _refuse(self, tensors: Sequence[Any], reason: str) -> None:
        for one in tensors:
            tag = self.tag(one)
            if tag is not None:
                group = tag.group.top()
                group.reason = group.reason or reason

    def _keep(self, tensor: Tensor, tag: Tag | None) -> None:
        self._tags[id(tensor)] = (tensor, tag)

    def stream(self, norms: Sequence[Link]) -> tuple[Stream | None, str | None]:
        """Sum up.

        Args:
            norms: Links found, the gains' among them.

        Returns:
            The stream, or None and the reason.
        """
        tops = [group for group in self._groups if group.joined is None]
        found = max(tops, key=lambda group: len(group.writers), default=None)
        if found is None or len(found.writers) < 2:
            reasons = [group.reason for group in tops if group.reason is not None]
            return None, reasons[0] if reasons else "nothing is added up"
        reason = found.reason or self._tied(found)
        if reason is None and not found.readers:
            reason = "no linear map reads it"
        if reason is not None:
            return None, reason
        chosen, gains = [], []
        for gain in dict.fromkeys(gain for _, gain in found.readers if gain is not None):
            link = next((one for one in norms if one.writers[0].weight == gain), None)
            value = self._value(gain, norms)
            if _uniform(value):
                continue
            if link is None or not bool(link.free.all()) or bool((value == 0).any()):
                return None, f"the gain {gain} cannot go into what reads its norm"
            chosen.append(link)
            gains.append(value.double())
        writers = tuple(dict.fromkeys(found.writers))
        readers = tuple(reader for reader, _ in found.readers)
        whole = torch.arange(found.size)[None]
        free = torch.ones(found.size, dtype=torch.bool)
        link = Link("stream", "stream", writers, readers, found.size, free, whole)
        return Stream(link, tuple(chosen), tuple(gains)), None

    def _value(self, gain: str, norms: Sequence[Link]) -> Tensor:
        offsets = [w.offset for one in norms for w in one.writers if w.weight == gain]
        return self._parameters[gain].detach() + (offsets[0] if offsets else 0.0)

    def _tied(self, group: Group) -> str | None:
        tables = {writer.weight for writer in group.writers if writer.side == COLUMNS}
        for reader, gain in group.readers:
            if reader.weight not in tables or gain is None:
                continue
            if not _uniform(self._parameters[gain].detach()):
                return f"the head is the table {reader.weight}, which {gain} cannot go into"
        return None


def _uniform(gain: Tensor) -> bool:
    return bool((gain == gain[0]).all())


def _keeps_last(moved: Tensor, size: int) -> bool:
    """Say whether the last dimension still is the whole stream in order."""
    line = constant_along_others(moved, -1)
    return line is not None and len(line) == size and bool((line == torch.arange(size)).all())

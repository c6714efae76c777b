"""What each operation does to the nodes of what enters it; those not listed here fix them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.cut.nodes import NONE, NORM, NORM_GROUP, ONE_HEAD
from attar.sites import MOVES, POOLS, flat

if TYPE_CHECKING:
    from attar.cut.trace import Tracer

# One number after the other, each by itself; and numbers that are not those of the tensor.
EACH = {
    *("zeros_like", "ones_like", "empty_like", "full_like"),
    *("relu", "relu_", "relu6", "gelu", "silu", "silu_", "sigmoid", "sigmoid_", "tanh", "tanh_"),
    *("hardswish", "hardsigmoid", "hardtanh", "hardtanh_", "leaky_relu", "elu", "mish", "softplus"),
    *("exp", "log", "sqrt", "rsqrt", "abs", "neg", "__neg__", "sin", "cos", "erf", "square"),
    *("clamp", "clamp_", "clamp_min", "clip", "to", "float", "double", "type_as", "type"),
    *("dropout", "identity", "requires_grad_", "reciprocal", "__rpow__", "log_sigmoid", "softsign"),
}
# Several tensors, place by place.
MEETINGS = {
    *("add", "__add__", "__radd__", "add_", "__iadd__", "sub", "__sub__", "__rsub__", "sub_"),
    *("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply", "div", "__truediv__"),
    *("true_divide", "__rtruediv__", "rsub", "where", "maximum", "minimum", "masked_fill"),
    *("masked_fill_", "pow", "__pow__", "lerp", "addcmul"),
}
SUMS = {"add", "radd", "iadd", "sub", "rsub", "isub"}
# Something of all places along the dimensions that are named.
ALONG = {
    *("mean", "sum", "softmax", "log_softmax", "amax", "amin", "var", "std", "cumsum"),
    *("logsumexp", "normalize", "norm", "vector_norm"),
}


@dataclass(frozen=True)
class Split:
    """Channels that a module divides into blocks.

    Attributes:
        module: Its name.
        blocks: A node of each block.
        width: Channels of one block.
    """

    module: str
    blocks: Tensor
    width: int


@dataclass(frozen=True)
class Operation:
    """One call, and what came out of it."""

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensors: Sequence[Tensor]
    output: Any

    def given(self, *names: str) -> dict[str, Any]:
        """Arguments by name."""
        return dict(zip(names, self.args, strict=False)) | dict(self.kwargs)


def follow(tracer: Tracer, call: Operation) -> None:
    """Take the nodes of what enters a call to what leaves it."""
    rule = RULES.get(call.name)
    if call.name in EACH and call.output.shape != call.tensors[0].shape:
        rule = None
    try:
        if rule is not None:
            rule(tracer, call)
            return
    except (RuntimeError, TypeError, IndexError, KeyError):  # arguments of a kind not thought of
        pass
    why = f"they enter {call.name} in {tracer.where}, which is not understood"
    tracer.fix(call.tensors, why)


def each(tracer: Tracer, call: Operation) -> None:
    """Keep every place where it is."""
    tracer.keep(call.output, tracer.places(call.tensors[0]))


def meet(tracer: Tracer, call: Operation) -> None:
    """Join what meets at one place; what meets plain numbers must keep its size."""
    carried = [(one, tracer.places(one)) for one in call.tensors]
    known = [places for _, places in carried if places is not None]
    shape = call.output.shape
    widest = max(known, key=Tensor.numel).expand(shape)
    for one, places in carried:
        for dim in range(-one.dim(), 0) if places is None else ():
            if one.shape[dim] > 1:
                why = f"{call.name} with numbers that are no parameter, in {tracer.where}"
                tracer.nodes.hold(widest, dim, why)
    why = "added" if call.name.strip("_") in SUMS else "multiplied"
    for places in known:
        widest = _meet_two(tracer, widest, places, shape, why)
    tracer.keep(call.output, widest)


def _meet_two(tracer: Tracer, left: Tensor, right: Tensor, shape: torch.Size, why: str) -> Tensor:
    grown = [d for d in range(-right.dim(), 0) if right.shape[d] == 1 and shape[d] > 1]
    grown += list(range(-len(shape), -right.dim()))
    if any(tracer.nodes.varies(left, dim) for dim in grown):
        tracer.nodes.fix(right, f"{tracer.where} has them once for several channels")
        return left
    right = right.expand(shape)
    tracer.nodes.join(left, right, why)
    half = (left == NONE) != (right == NONE)
    for one in (left, right):
        tracer.nodes.fix_where(one, half, f"they meet what cannot go, in {tracer.where}")
    return torch.where(left == NONE, right, left) if bool(half.any()) else left


def attend(tracer: Tracer, call: Operation) -> None:
    """Hold each head together, and the query, key and value of one head."""
    given = call.given("query", "key", "value", "attn_mask")
    wide: list[Tensor] = []
    for part in ("query", "key", "value"):
        places = tracer.places(given[part])
        if places is None:
            continue
        if places.dim() < 3 or tracer.nodes.varies(places, -2):
            tracer.fix(call.tensors, f"they are mixed up in the attention of {tracer.where}")
            return
        tracer.nodes.hold(places, -1, ONE_HEAD)
        one = places.narrow(-2, 0, 1)
        wide.append(one.repeat_interleave(call.output.shape[-3] // one.shape[-3], -3))
    for one in wide[:-1]:
        tracer.nodes.join(one[..., :1], wide[-1][..., :1], ONE_HEAD)
    mask = given.get("attn_mask")
    for dim in range(-mask.dim(), -2) if isinstance(mask, Tensor) else ():
        if mask is not None and mask.shape[dim] > 1:
            tracer.nodes.hold(wide[-1], dim, f"a mask for each head in {tracer.where}")
    if tracer.places(given["value"]) is not None:
        tracer.keep(call.output, wide[-1].expand(call.output.shape))


def multiply(tracer: Tracer, call: Operation) -> None:
    """Let channels pass a product of matrices; what it sums over goes as a whole."""
    left, right = call.tensors[:2]
    why = f"summed over in {tracer.where}"
    if min(left.dim(), right.dim()) < 2:
        tracer.fix(call.tensors, why)
        return
    sides: list[Tensor] = []
    for one, summed in ((left, -1), (right, -2)):
        places = tracer.places(one)
        if places is not None:
            tracer.nodes.hold(places, summed, why)
            sides.append(places.narrow(summed, 0, 1).expand(call.output.shape))
    if len(sides) > 1:
        tracer.nodes.join(sides[0], sides[1], ONE_HEAD if call.output.dim() > 3 else why)
    tracer.keep(call.output, sides[-1])


def normalise_all(tracer: Tracer, call: Operation) -> None:
    """Hold together what a norm is taken over."""
    given = call.given("input", "normalized_shape", "weight", "bias")
    places = tracer.places(given["input"])
    if places is not None:
        for dim in range(-len(given["normalized_shape"]), 0):
            tracer.nodes.hold(places, dim, f"{tracer.where} normalises over them")
        _norm_numbers(tracer, given, -1)
        tracer.keep(call.output, places)


def normalise_groups(tracer: Tracer, call: Operation) -> None:
    """Hold each group of channels together."""
    given = call.given("input", "num_groups", "weight", "bias")
    line = tracer.lines(given["input"], 1, f"they are mixed up in {tracer.where}")
    if line is not None:
        tracer.nodes.hold(line.reshape(given["num_groups"], -1), 1, NORM_GROUP)
        _norm_numbers(tracer, given, 1)
        tracer.keep(call.output, tracer.places(given["input"]))


def normalise_each(tracer: Tracer, call: Operation) -> None:
    """Let each channel go by itself, with its numbers."""
    given = call.given("input", "running_mean", "running_var", "weight", "bias")
    _norm_numbers(tracer, given, 1)
    tracer.keep(call.output, tracer.places(given["input"]))


def _norm_numbers(tracer: Tracer, given: Mapping[str, Any], dim: int) -> None:
    line = tracer.lines(given["input"], dim, f"they are mixed up in {tracer.where}")
    for part in ("weight", "bias", "running_mean", "running_var"):
        own = given.get(part)
        if own is None or line is None:
            continue
        known = tracer.names.get(id(own)) or tracer.buffers.get(id(own))
        if known is None:
            tracer.nodes.fix(line, f"{tracer.where} computes its {part}")
        else:
            tracer.nodes.join(line, tracer.nodes.of(known, 0, len(own)), NORM)


def reduce(tracer: Tracer, call: Operation) -> None:
    """Hold together what is summed up, compared or normalised along a dimension."""
    x, output = call.args[0], call.output
    places = tracer.places(x)
    if places is None:
        return
    # Where the dimension is not the second argument, all dimensions are on the safe side.
    second = {"normalize": (*call.args[2:3], 1), "norm": (None,)}
    given = call.kwargs.get("dim", second.get(call.name, (*call.args[1:2], None))[0])
    given = (given,) if isinstance(given, int) else given
    named = given if isinstance(given, list | tuple) else range(places.dim())
    dims = sorted({dim % places.dim() for dim in named}, reverse=True)
    for dim in dims:
        tracer.nodes.hold(places, dim, f"{call.name} along them in {tracer.where}")
    if output.shape != places.shape:
        for dim in dims:
            places = places.narrow(dim, 0, 1)
            places = places if output.dim() == x.dim() else places.squeeze(dim)
    tracer.keep(output, places)


def pool(tracer: Tracer, call: Operation) -> None:
    """Keep the channel of each picture; the sides become those of the pooled one."""
    places = tracer.places(call.args[0])
    if places is None:
        return
    sides = int(call.name[-2]) if call.name.endswith("d") else places.dim() - 2
    dims = range(places.dim() - sides, places.dim())
    if any(tracer.nodes.varies(places, dim) for dim in dims):
        tracer.nodes.fix(places, f"they are mixed up by {call.name} in {tracer.where}")
        return
    corner = places
    for dim in dims:
        corner = corner.narrow(dim, 0, 1)
    tracer.keep(call.output, corner.expand(call.output.shape))


def pad(tracer: Tracer, call: Operation) -> None:
    """Put nothing around channels, and widen what is the same along a dimension."""
    given = call.given("input", "pad")
    places, amounts = tracer.places(given["input"]), given["pad"]
    if places is None:
        return
    for number in range(len(amounts) // 2):
        dim, own = -1 - number, list(amounts[2 * number : 2 * number + 2])
        if tracer.nodes.varies(places, dim):
            places = F.pad(places, [0, 0] * number + own, value=NONE)
        else:
            sizes = list(places.shape)
            sizes[dim] = call.output.shape[dim]
            places = places.narrow(dim, 0, 1).expand(sizes)
    tracer.keep(call.output, places)


def join_up(tracer: Tracer, call: Operation) -> None:
    """Lay channels one after the other; along the other dimensions they must stay as many."""
    given = call.given("tensors", "dim")
    filled = []
    for one in given["tensors"]:
        places = tracer.places(one)
        filled.append(torch.full(one.shape, NONE) if places is None else places)
    dim = given.get("dim", 0)
    tracer.keep(call.output, call.func(filled, dim=dim))
    for one, other in pairwise(filled):
        others = [d for d in range(one.dim()) if call.name == "stack" or d != dim % one.dim()]
        if any(tracer.nodes.varies(part, d) for d in others for part in (one, other)):
            if call.name == "stack":
                _meet_two(tracer, one, other, one.shape, "stacked")
                continue
            for part in (one, other):
                tracer.nodes.hold(part, dim, f"joined in {tracer.where}")
            first, second = one.narrow(dim, 0, 1), other.narrow(dim, 0, 1)
            _meet_two(tracer, first, second, first.shape, "joined")


def move(tracer: Tracer, call: Operation) -> None:
    """Do to the nodes what is done to the numbers."""
    places = tracer.places(call.args[0])
    if places is None:
        tracer.fix(call.tensors, f"they choose numbers in {tracer.where}")
        return
    made = flat([call.func(places, *call.args[1:], **call.kwargs)])
    for tensor, own in zip(flat([call.output]), made, strict=True):
        tracer.keep(tensor, own)
    if call.name in ("view", "reshape", "unflatten", "view_as", "reshape_as"):
        _split(tracer, places, made[0])
    if call.name in ("chunk", "split") and len({one.shape for one in made}) == 1:
        for one in made[1:]:
            tracer.nodes.join(made[0], one, f"parts of one size in {tracer.where}")


def _split(tracer: Tracer, before: Tensor, after: Tensor) -> None:
    """Where a dimension is divided in two, let each block go as a whole."""
    for start in _divided(before.shape, after.shape):
        if tracer.nodes.varies(after, start) or tracer.nodes.varies(after, start + 1):
            tracer.nodes.hold(after, start + 1, ONE_HEAD)
            line = after.movedim((start, start + 1), (-2, -1))[..., 0]
            line = line.reshape(-1, after.shape[start])[0]
            tracer.splits.append(Split(tracer.inside[-1], line, after.shape[start + 1]))


def _divided(before: torch.Size, after: torch.Size) -> Iterator[int]:
    """Give the first of each two dimensions into which one was divided."""
    places = {(size, before[dim + 1 :].numel()) for dim, size in enumerate(before)}
    for start, (left, right) in enumerate(pairwise(after)):
        if left > 1 and (left * right, after[start + 2 :].numel()) in places:
            yield start


RULES: dict[str, Callable[[Tracer, Operation], None]] = {
    **dict.fromkeys(EACH, each),
    **dict.fromkeys(MEETINGS, meet),
    **dict.fromkeys(ALONG, reduce),
    **dict.fromkeys(POOLS | {"max_pool1d", "max_pool2d", "max_pool3d", "interpolate"}, pool),
    **dict.fromkeys(MOVES | {"__get__"}, move),
    **dict.fromkeys(("matmul", "__matmul__", "bmm"), multiply),
    **dict.fromkeys(("layer_norm", "rms_norm"), normalise_all),
    **dict.fromkeys(("cat", "concat", "stack"), join_up),
    "group_norm": normalise_groups,
    "batch_norm": normalise_each,
    "scaled_dot_product_attention": attend,
    "pad": pad,
}

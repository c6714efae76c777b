"""How far an input may move before an answer could change: a radius that interval bounds certify.

Source: Gowal et al. 2018, On the effectiveness of interval bound propagation,
https://arxiv.org/abs/1810.12715, section 3, eq. 5 to 8, with the last linear map taken into the
margins. It is the bound that Shi et al. 2021, Fast certified robust training with short warmup,
https://arxiv.org/abs/2103.17268, train with. We differ: the largest radius is looked for by
bisection, in float64 and without outward rounding. A network that was not trained for such bounds
has a small radius: a larger one may be true and not be certified.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, fx, nn

LARGEST, HALVINGS = 1.0, 20
# Modules and functions that never fall where their input rises, so that ends stay ends.
RISING_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU,
    nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d,
    nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d,
)  # fmt: skip
RISING_FUNCTIONS = (
    F.relu, torch.relu, F.relu6, torch.tanh, F.tanh, torch.sigmoid, torch.flatten, F.max_pool2d,
    F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout, F.hardtanh,
)  # fmt: skip
RISING_METHODS = frozenset(
    {"relu", "tanh", "sigmoid", "flatten", "view", "reshape", "mean", "size"}
)
ADDITIONS = (operator.add, operator.iadd, torch.add)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

Ends = tuple[Tensor, Tensor]


def bounded(module: nn.Module) -> fx.GraphModule | None:
    """A copy in float64 that bounds can be followed through; None where they cannot be."""
    try:
        # In a row of one, because a module of torch's own is not looked into.
        traced = fx.symbolic_trace(nn.Sequential(deepcopy(module).double().eval()))
    except Exception:  # whatever code raises that does not say what it does
        return None
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    known = all(_known(traced, node) for node in traced.graph.nodes)
    return traced if known and len(inputs) == 1 else None


def _known(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        own = traced.get_submodule(str(node.target))
        if isinstance(own, WEIGHTED) and getattr(own, "padding_mode", "zeros") != "zeros":
            return False
        return isinstance(own, (*RISING_MODULES, *WEIGHTED, *NORMS))
    if node.op == "call_function":
        return node.target in (*RISING_FUNCTIONS, *ADDITIONS)
    if node.op == "call_method":
        return node.target in RISING_METHODS
    return node.op in ("placeholder", "output")


def margins(
    traced: fx.GraphModule,
    inputs: Float[Tensor, "samples ..."],
    radius: Float[Tensor, "samples ..."],
    answers: Int[Tensor, " samples"],
) -> Float[Tensor, "samples classes"]:
    """Least that an answer's logit can exceed each other's by; infinite for its own.

    Args:
        traced: From `bounded`.
        radius: Of each number of each sample.
    """
    values: dict[fx.Node, Any] = {}
    last = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = (inputs - radius, inputs + radius)
        elif node is last and _is_linear(traced, node):
            return _through_last(
                traced.get_submodule(str(node.target)), values[node.args[0]], answers
            )
        elif node.op != "output":
            values[node] = _step(traced, node, values)
    low, high = values[last]
    apart: Tensor = low.gather(1, answers[:, None]) - high
    return apart.scatter(1, answers[:, None], torch.inf)


def _is_linear(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return type(traced.get_submodule(str(node.target))) is nn.Linear


def _through_last(last: nn.Module, ends: Ends, answers: Tensor) -> Tensor:
    """Margins of differences of logits, whose bounds are closer than differences of bounds."""
    assert isinstance(last, nn.Linear)
    middle, reach = (ends[1] + ends[0]) / 2, (ends[1] - ends[0]) / 2
    apart = last.weight[answers][:, None] - last.weight
    found = torch.einsum("scf,sf->sc", apart, middle) - torch.einsum(
        "scf,sf->sc", apart.abs(), reach
    )
    if last.bias is not None:
        found = found + last.bias[answers][:, None] - last.bias
    return found.scatter(1, answers[:, None], torch.inf)


def _step(traced: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Ends of what a node gives, from those of what it reads."""

    def side(which: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def pick(one: fx.Node) -> Any:
            found = values[one]
            return found[which] if isinstance(found, tuple) else found

        return fx.map_arg(node.args, pick), fx.map_arg(node.kwargs, pick)

    if node.op == "call_module":
        own = traced.get_submodule(str(node.target))
        if isinstance(own, (*WEIGHTED, *NORMS)):
            return _weighted(own, values[node.args[0]])  # type: ignore[index]
        call: Callable[..., Any] = own
    elif node.op == "call_function":
        call = node.target  # type: ignore[assignment]
    else:
        name = str(node.target)

        def call(x: Any, *rest: Any, **named: Any) -> Any:
            return getattr(x, name)(*rest, **named)

    first, second = (call(*given, **named) for given, named in (side(0), side(1)))
    return (first, second) if isinstance(first, Tensor) else first


def _weighted(own: nn.Module, ends: Ends) -> Ends:
    """The middle through the map, and the reach through its absolute values."""
    middle, reach = own((ends[1] + ends[0]) / 2), (ends[1] - ends[0]) / 2
    if isinstance(own, nn.Linear):
        reach = F.linear(reach, own.weight.abs())
    elif isinstance(own, nn.Conv1d | nn.Conv2d):
        convolve = F.conv1d if isinstance(own, nn.Conv1d) else F.conv2d
        reach = convolve(
            reach, own.weight.abs(), None, own.stride, own.padding, own.dilation, own.groups
        )
    else:
        assert isinstance(own, nn.BatchNorm1d | nn.BatchNorm2d) and own.running_var is not None
        factor = (own.running_var + own.eps).rsqrt()
        factor = factor if own.weight is None else factor * own.weight.abs()
        reach = reach * factor.reshape(1, -1, *[1] * (reach.dim() - 2))
    return middle - reach, middle + reach


def certified_radius(
    traced: fx.GraphModule,
    inputs: Float[Tensor, "samples ..."],
    unit: Tensor,
    answers: Int[Tensor, " samples"],
) -> Float[Tensor, " samples"]:
    """Largest radius, in units, within which no input gets another answer; 0 where it has another.

    Args:
        unit: What a radius of 1 moves each number of a sample by; at most LARGEST is looked for.
    """
    x, n = inputs.double(), len(inputs)
    low, high = torch.zeros(n).double(), torch.full((n,), LARGEST).double()
    shape = (n, *[1] * (x.dim() - 1))

    def holds(radius: Tensor) -> Tensor:
        reach = (radius.reshape(shape) * unit.double()).expand_as(x)
        return margins(traced, x, reach, answers).amin(1) > 0

    with torch.no_grad():
        at_all, everywhere = holds(low), holds(high)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            held = holds(middle)
            low, high = torch.where(held, middle, low), torch.where(held, high, middle)
    return torch.where(everywhere, torch.full_like(low, LARGEST), low * at_all)

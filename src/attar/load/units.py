"""Find the weights a plan can decide about, by running the model once and watching.

A unit is a weight that a linear map, a convolution or an embedding reads. Whatever else the model
holds is listed with the reason it is left as it is.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from attar.errors import ModelError
from attar.records import Batch, Leftover, Model, Unit, Units
from attar.sites import Call, bias_name, watched

# Modules that project the joined heads of an attention back to the hidden width, by suffix.
HEAD_PROJECTIONS = ("o_proj", "out_proj", "attention.output.dense")
_HEAD_SIZES = ("head_dim", "attention_head_size")


def list_units(model: Model) -> Units:
    """Trace one forward pass on the model's examples.

    Raises:
        ModelError: The model reads no weight through a linear map, convolution or embedding.
    """
    calls = _watch_calls(model.module, model.examples, model)
    parameters = dict(model.module.named_parameters())
    aliases = _aliases(model.module)
    units, leftovers = [], []
    for name in calls:
        unit = _unit(name, parameters[name], calls[name], aliases, model.module)
        units.append(unit)
    for name, parameter in parameters.items():
        if name not in calls:
            leftovers.append(Leftover(name, tuple(parameter.shape), _reason(parameter)))
    for name, buffer in model.module.named_buffers():
        if name in model.module.state_dict():
            leftovers.append(Leftover(name, tuple(buffer.shape), "is a buffer, not a weight"))
    if not units:
        raise ModelError(
            f"{model.name} has no weight that a linear map, a convolution or an embedding reads.",
            hint="give a module with such layers; wrap a single one in torch.nn.Sequential.",
        )
    return Units(tuple(units), tuple(leftovers))


def _watch_calls(
    module: nn.Module, examples: Batch, model: Model
) -> dict[str, list[tuple[Call, int]]]:
    """Run once; return for each weight, in order of first call, its calls with their MACs."""
    calls: dict[str, list[tuple[Call, int]]] = defaultdict(list)
    samples = len(next(iter(examples.values())))

    def visit(call: Call) -> Tensor:
        output = call.run()
        weight: Tensor = call.arguments["weight"]
        macs = 0
        if call.operation != "embedding":
            rows = weight.shape[0]
            positions = output.numel() // rows
            macs = positions * weight.numel() // samples
        calls[call.name].append((call, macs))
        return output

    with torch.no_grad(), watched(module, visit):
        model.task.forward(module, examples)
    return {name: found for name, found in calls.items() if name.endswith(".weight")}


def _aliases(module: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return names


def _unit(
    name: str,
    weight: nn.Parameter,
    calls: list[tuple[Call, int]],
    aliases: dict[int, list[str]],
    module: nn.Module,
) -> Unit:
    uses = tuple(call.operation for call, _ in calls)
    first = calls[0][0]
    added = first.arguments.get("bias") if len(calls) == 1 else None
    own = bias_name(name) if aliases.get(id(added)) == [bias_name(name)] else ""
    return Unit(
        name=_holder(name),
        kind="embedding" if "embedding" in uses else uses[0],
        shape=tuple(weight.shape),
        uses=uses,
        groups=int(first.arguments.get("groups", 1)) if uses[0] == "convolution" else 1,
        macs=sum(macs for _, macs in calls),
        coupled=tuple(_holder(alias) for alias in aliases[id(weight)] if alias != name),
        heads=_heads(name, weight, module) if uses == ("linear",) else 0,
        bias=own,
    )


def _holder(name: str) -> str:
    return name.removesuffix(".weight")


def _heads(name: str, weight: Tensor, module: nn.Module) -> int:
    """Number of heads whose outputs this weight's columns join, from the module around it."""
    holder = _holder(name)
    if not holder.endswith(HEAD_PROJECTIONS):
        return 0
    path = holder.split(".")
    for depth in range(len(path) - 1, 0, -1):
        around = module.get_submodule(".".join(path[:depth]))
        for attribute in _HEAD_SIZES:
            size = getattr(around, attribute, None)
            if isinstance(size, int) and weight.shape[1] % size == 0:
                return weight.shape[1] // size
        inner = getattr(around, "self", None)
        size = getattr(inner, "attention_head_size", None)
        if isinstance(size, int) and weight.shape[1] % size == 0:
            return weight.shape[1] // size
    return 0


def _reason(parameter: Tensor) -> str:
    if parameter.dim() < 2:
        return "is a vector (bias or norm): few bytes, stored in 16 bits where that is exact enough"
    return (
        "is not the `weight` of a layer that a plain linear, convolution or embedding call reads "
        "(torch's fused attention, for one, reads its weights inside)"
    )

"""A module as an ONNX graph in floats, and where in it each unit's weight is read.

The graph is torch's own (`torch.onnx.export`), which folds padding into convolutions and stores the
weights of linear maps transposed. A unit is found by its name or by its very numbers, and refused
where neither is there.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from attar.errors import ModelError
from attar.records import Batch, Unit, Units

OPSET = 21  # the first with integers of 4 bits in blocks
# Inputs whose length may differ from call to call, beside the number of samples.
LENGTHS = {"embed": 1}
# What a range that ends at 0, or at a bound, does as well.
CLAMPS = ("Clip", "Relu")
# Operation to the place of the weight among its inputs.
WEIGHT_AT = {"Conv": 1, "MatMul": 1, "Gemm": 1, "Gather": 0}


@dataclass(frozen=True)
class Reading:
    """One node that reads a unit's weight.

    Attributes:
        node: Number of the node.
        weight: Name of the tensor that it reads.
        transposed: Whether that is `columns rows`.
    """

    node: int
    weight: str
    transposed: bool


@dataclass(frozen=True)
class FloatGraph:
    """A graph without the weights of its units.

    Attributes:
        model: `onnx.ModelProto`; not to be changed.
        readings: Unit name to the nodes that read it.
    """

    model: Any
    readings: Mapping[str, tuple[Reading, ...]]


_made: WeakKeyDictionary[nn.Module, FloatGraph] = WeakKeyDictionary()


def float_graph(module: nn.Module, examples: Batch, units: Units, task: str) -> FloatGraph:
    """Write a module down as ONNX; the same module is written once only.

    Raises:
        ModelError: It cannot be, or a unit's weight is not found in what came out.
    """
    if module not in _made:
        from onnx import numpy_helper

        with _told_apart(module, [unit.bias for unit in units if unit.bias]) as biases:
            exported = export_floats(module, examples, task)
        for one in exported.graph.initializer:
            if one.name in biases:
                one.CopyFrom(numpy_helper.from_array(biases[one.name].numpy(), one.name))
        readings = {unit.name: _readings(exported.graph, module, unit) for unit in units}
        taken = {one.weight for of in readings.values() for one in of}
        kept = [one for one in exported.graph.initializer if one.name not in taken]
        del exported.graph.initializer[:]
        exported.graph.initializer.extend(kept)
        del exported.graph.value_info[:]
        _made[module] = FloatGraph(exported, readings)
    return _made[module]


def forget(module: nn.Module) -> None:
    """Write a module down afresh next time: its weights are others by now."""
    _made.pop(module, None)


def export_floats(module: nn.Module, examples: Batch, task: str) -> Any:
    """Let torch write the graph; the number of samples is left open."""
    free = torch.export.Dim.DYNAMIC
    shapes = tuple(
        {0: free, LENGTHS[task]: free} if task in LENGTHS else {0: free} for _ in examples
    )
    try:
        with _quiet():
            made = torch.onnx.export(
                module,
                tuple(examples.values()),
                input_names=list(examples),
                output_names=["output"],
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                external_data=False,
            )
    except ModuleNotFoundError as error:
        raise ModelError(
            f"writing ONNX needs the package {error.name}, which is not installed.",
            hint="pip install 'attar[onnx]'",
        ) from error
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"torch cannot write this model as ONNX: {reason}", hint="leave --to out."
        ) from error
    assert made is not None
    return _without_places(made.model_proto, task)


@contextlib.contextmanager
def _told_apart(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Give every bias numbers of its own while torch writes, or it joins those that are alike.

    Yields:
        The true numbers, which the module has again afterwards.
    """
    own = {name: module.get_parameter(name).detach() for name in names}
    true = {name: bias.clone() for name, bias in own.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        for bias in own.values():
            bias.copy_(torch.randn(bias.shape, generator=generator))
        yield true
    finally:
        for name, bias in own.items():
            bias.copy_(true[name])


def _without_places(model: Any, task: str) -> Any:
    """Take out where in the code each node came from: paths of this machine; name open sides."""
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for number, one in enumerate((*model.graph.input, *model.graph.output)):
        del one.metadata_props[:]
        side = one.type.tensor_type.shape.dim
        if number < len(model.graph.input):
            side[0].dim_param = "samples"
            if task in LENGTHS:
                side[LENGTHS[task]].dim_param = "length"
        else:
            side[0].dim_param = "samples"
    for one in model.graph.initializer:
        del one.metadata_props[:]
        one.doc_string = ""
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch's exporter says of its own insides off the screen."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _readings(graph: Any, module: nn.Module, unit: Unit) -> tuple[Reading, ...]:
    from onnx import numpy_helper

    weight = module.get_parameter(f"{unit.name}.weight").detach()
    forms = {False: weight.numpy()}
    if weight.dim() == 2:
        forms[True] = weight.T.contiguous().numpy()
    # The name first: two weights may hold the same numbers.
    named = [one for one in graph.initializer if one.name == f"{unit.name}.weight"]
    for chosen in (named, graph.initializer):
        found = {
            one.name: transposed
            for one in chosen
            for transposed, form in forms.items()
            if tuple(one.dims) == form.shape and np.array_equal(numpy_helper.to_array(one), form)
        }
        readings = tuple(
            Reading(number, name, found[name])
            for number, node in enumerate(graph.node)
            for place, name in enumerate(node.input)
            if name in found and WEIGHT_AT.get(node.op_type) == place
        )
        if readings:
            _check(graph, unit, readings)
            return readings
    raise ModelError(
        f"the weight of {unit.name} is not found in the graph that torch wrote.",
        hint="leave --to out: Attar's own folder holds any model.",
    )


def _check(graph: Any, unit: Unit, readings: Sequence[Reading]) -> None:
    names = {one.weight for one in readings}
    reading = {(one.node, one.weight) for one in readings}
    for number, node in enumerate(graph.node):
        others = names.intersection(node.input)
        if any((number, name) not in reading for name in others):
            raise ModelError(
                f"the weight of {unit.name} is also read by {node.op_type}, which is not known.",
                hint="leave --to out: Attar's own folder holds any model.",
            )


def readers(made: FloatGraph) -> dict[str, frozenset[str] | None]:
    """Units that read what a convolution makes, at most clamped; None where anything else does."""
    graph = made.model.graph
    unit_at = {one.node: name for name, of in made.readings.items() for one in of}
    ends = {one.name for one in graph.output}

    def follow(tensor: str) -> frozenset[str] | None:
        found: frozenset[str] = frozenset()
        if tensor in ends:
            return None
        for number, node in enumerate(graph.node):
            if tensor not in node.input:
                continue
            if node.op_type in CLAMPS:
                more = follow(node.output[0])
            elif number in unit_at and node.input[0] == tensor:
                more = frozenset({unit_at[number]})
            else:
                more = None
            if more is None:
                return None
            found |= more
        return found

    result: dict[str, frozenset[str] | None] = {}
    for name, of in made.readings.items():
        nodes = [graph.node[one.node] for one in of]
        if all(node.op_type == "Conv" for node in nodes):
            each = [follow(node.output[0]) for node in nodes]
            result[name] = None if None in each else frozenset().union(*each)  # type: ignore[arg-type]
    return result

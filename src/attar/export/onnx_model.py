"""One ONNX file that onnxruntime runs, with exactly the numbers that were priced.

    model.onnx   graph, weights, and what Attar says of the model (metadata)

Beside it lie the files that travel with the model (tokenizer, labels), as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from attar.errors import ModelError
from attar.export import onnx_factors
from attar.export.onnx_factors import Factored
from attar.export.onnx_graph import FloatGraph
from attar.export.onnx_nodes import Stored, Writer
from attar.onnx_names import FILE, METADATA, TASKS

NOT_MOVED: Mapping[str, Tensor] = MappingProxyType({})


def check_model(task: str, name: str) -> None:
    """Refuse a model that is not written here.

    Raises:
        ModelError: With the reason.
    """
    if task not in TASKS:
        raise ModelError(
            f"{name} cannot be written as ONNX: its task is {task}.",
            hint=f"leave --to out, or use a model that can {', '.join(TASKS)}.",
        )


def file_contents(
    made: FloatGraph,
    units: Mapping[str, Stored | Factored],
    files: Mapping[str, bytes],
    description: Mapping[str, Any],
    biases: Mapping[str, Tensor] = NOT_MOVED,
) -> dict[str, bytes]:
    """Make the file in memory, so that it can be weighed before it is written.

    Args:
        units: By unit name; weights of units left out are left out of the file (to weigh the rest).
        files: Beside the model: a tokenizer, labels.
        description: JSON-ready; read back by `load/onnx_model.py`.
        biases: Those that are not as the module holds them, by parameter name.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(made.model)
    model.producer_name, model.producer_version = "attar", ""
    reading_at = {
        one.node: (units[name], one)
        for name, of in made.readings.items()
        for one in of
        if name in units
    }
    _move_biases(model.graph, biases)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    writer = Writer(model.graph)
    for number, node in enumerate(nodes):
        stored, reading = reading_at.get(number, (None, None))
        if stored is None or reading is None:
            writer.add(node)
        elif isinstance(stored, Factored):
            onnx_factors.multiply(writer, node, stored, reading)
        else:
            writer.read(node, stored, reading)
    used = {name for node in model.graph.node for name in node.input}
    kept = [one for one in model.graph.initializer if one.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(description, separators=(",", ":"))
    return {FILE: model.SerializeToString(deterministic=True), **files}


def _move_biases(graph: Any, biases: Mapping[str, Tensor]) -> None:
    """Put other numbers into biases; each must be held by itself, and read once.

    Raises:
        ModelError: The graph joined one with another tensor.
    """
    from onnx import numpy_helper

    held = {one.name: one for one in graph.initializer}
    for name, values in biases.items():
        reads = sum(name == given for node in graph.node for given in node.input)
        if name not in held or reads != 1:
            raise ModelError(
                f"the graph that torch wrote has no {name} of its own.",
                hint="leave --to out: Attar's own folder holds any model.",
            )
        held[name].CopyFrom(numpy_helper.from_array(values.detach().float().numpy(), name))

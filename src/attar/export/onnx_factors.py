"""A weight of low rank in an ONNX graph: two products where one was, so that less is computed.

A matrix product becomes one with the right factor, a scale for each component, and one with the
left factor; a convolution becomes one that makes the components, and one of 1 × 1; a look-up
becomes a look-up of components, and a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float16, Float32
from torch import Tensor

from attar.export.onnx_graph import Reading
from attar.export.onnx_nodes import Stored, Writer, as_product
from attar.records import Unit


@dataclass(frozen=True)
class Factored:
    """One unit as two factors: `weight = leftᵀ · diag(middle) · right`.

    Attributes:
        left: `rank rows`.
        middle: `rank`.
        right: `rank columns`.
    """

    unit: Unit
    left: Float16[Tensor, "rank rows"]
    middle: Float32[Tensor, " rank"]
    right: Float16[Tensor, "rank columns"]

    def part(self, name: str, *, turned: bool = False) -> Stored:
        """One factor as the weight of a map: by default from columns to rank, or rank to rows.

        Args:
            turned: The map goes the other way: from rows to rank, or rank to columns.
        """
        spread = (1,) * (len(self.unit.shape) - 2)
        if name == "right":
            weight, inner = (self.right.T, spread) if turned else (self.right, self.unit.shape[2:])
        else:
            weight, inner = (self.left if turned else self.left.T), spread
        of = weight.contiguous()
        rows, columns = of.shape
        # A convolution's columns are its inputs and the places of its kernel.
        per_input = columns // int(np.prod(inner))
        unit = Unit(f"{self.unit.name}/{name}", self.unit.kind, (rows, per_input, *inner), ("",))
        return Stored(unit, of)


def multiply(writer: Writer, node: Any, factored: Factored, reading: Reading) -> None:
    """Add what takes the place of a node that reads this weight.

    Raises:
        ModelError: The node reads the weight in a way that is not known.
    """
    from onnx import helper

    after: list[Any] = []
    if node.op_type == "Gemm":
        node, after = as_product(node, factored.unit, reading)
        reading = Reading(reading.node, reading.weight, transposed=True)
    y, attributes = node.output[0], list(node.attribute)
    made, scaled = f"{y}/components", f"{y}/scaled"
    spread: tuple[int, ...] = ()
    inner, outer = factored.part("right"), factored.part("left")
    if node.op_type == "Conv":
        spread = (1,) * (len(factored.unit.shape) - 2)
        first = helper.make_node("Conv", [node.input[0], ""], [made])
        first.attribute.extend(attributes)
        second = helper.make_node("Conv", [scaled, "", *node.input[2:]], [y])
    elif node.op_type == "Gather":  # rows are looked up, so that the left factor comes first
        inner, outer = factored.part("left"), factored.part("right", turned=True)
        first = helper.make_node("Gather", ["", node.input[1]], [made])
        second = helper.make_node("MatMul", [scaled, ""], [y])
    else:
        if not reading.transposed:  # multiplied from the other side
            inner, outer = factored.part("left", turned=True), factored.part("right", turned=True)
        first = helper.make_node("MatMul", [node.input[0], ""], [made])
        second = helper.make_node("MatMul", [scaled, ""], [y])
    by_columns = Reading(reading.node, "", transposed=node.op_type != "Conv")
    writer.read(first, inner, by_columns)
    scale = factored.middle.reshape(-1, *spread).numpy()
    held = writer.constant(f"{factored.unit.name}/components", scale)
    writer.add(helper.make_node("Mul", [made, held], [scaled]))
    writer.read(second, outer, by_columns)
    for one in after:
        writer.add(one)

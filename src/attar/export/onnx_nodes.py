"""Nodes of an ONNX graph that reads a unit's weight in few bits, and rounds what enters it.

Weights in 8 bits and what they are multiplied with stand behind DequantizeLinear, which an engine
joins with the multiplication to one of integers (the QDQ form). Dynamic ranges are
DynamicQuantizeLinear with MatMulInteger or ConvInteger; where each row has one, plain operations
find it, and MatMulInteger multiplies. Weights in 4 bits are dequantized in blocks, of which
onnxruntime makes MatMulNBits; those in 16 bits are cast. A bias beside 8 bits is int32 in steps of
both scales, as the engine adds it to its sum.

Source: ONNX operators, opset 21, https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from attar.activations import TINY, TOP_CODE
from attar.errors import ModelError
from attar.export.onnx_graph import Reading
from attar.records import Activation, Unit

# ONNX's numbers of types.
FLOAT, UINT8, INT32, UINT4, INT4 = 1, 2, 6, 21, 22
# Weights that meet integers have 8 bits and no sign: with signed ones, onnxruntime adds two
# products in 16 bits on processors without VNNI, and large sums are cut off.
INTEGER_BITS, MIDDLE = 8, 128
LARGEST_BIAS = 2.0**31 - 1
_UNKNOWN = "leave --to out: Attar's own folder holds any model."


@dataclass(frozen=True)
class Codes:
    """A weight as integers: `weight = scale · (code − zero_point)`.

    Attributes:
        codes: `rows columns`, uint8.
        scale: `rows n_groups`, float16.
        zero_point: `rows n_groups`, uint8.
        bits: 4 or 8.
        symmetric: Whether every zero point is the middle code.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    symmetric: bool


@dataclass(frozen=True)
class Stored:
    """One unit as it lies in the file.

    Attributes:
        weight: Integers, or floats `rows columns`.
        input: How what it is multiplied with is rounded.
        output: How the product is rounded.
    """

    unit: Unit
    weight: Codes | Tensor
    input: Activation | None = None
    output: Activation | None = None


class Writer:
    """Lives over one graph: adds nodes in order, and each tensor once."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._made: set[str] = set()
        self._floats = {one.name: one for one in graph.initializer}

    def add(self, node: Any) -> None:
        """Add a node as it is."""
        self._graph.node.append(node)

    def constant(self, name: str, values: np.ndarray) -> str:
        """Hold a tensor under this name, once."""
        return self._tensor(name, values)

    def read(self, node: Any, stored: Stored, reading: Reading) -> None:
        """Add the node that reads a unit's weight, with all that it needs."""
        if node.op_type == "Gather":
            self._look_up(node, stored)
            return
        if stored.input is None or stored.input.scale is not None:
            self._multiply(node, stored, reading.transposed)
        elif node.op_type == "Gemm":
            product, after = as_product(node, stored.unit, reading)
            self._multiply_integers(product, stored, True)
            self._graph.node.extend(after)
        else:
            self._multiply_integers(node, stored, reading.transposed)

    def _multiply(self, node: Any, stored: Stored, is_columns: bool) -> None:
        """The QDQ form, or floats."""
        node.input[1] = self._weight(stored, is_columns)
        if stored.input is not None:
            node.input[0] = self._rounded(node.input[0], stored.input)
            if node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
                node.input[2] = self._bias(node.input[2], stored)
        name = node.output[0]
        if stored.output is not None:
            node.output[0] = f"{name}/exact"
        self.add(node)
        if stored.output is not None:
            self._rounded(node.output[0], stored.output, name)

    def _multiply_integers(self, node: Any, stored: Stored, is_columns: bool) -> None:
        """Ranges of each call: multiply integers, then scale."""
        assert isinstance(stored.weight, Codes)
        assert stored.input is not None
        if stored.input.by_row:
            self._multiply_rows(node, stored, is_columns)
            return
        name, x, y = stored.unit.name, node.input[0], node.output[0]
        codes, scale_of_x, zero = (f"{x}/{part}" for part in ("codes", "scale", "zero"))
        if codes not in self._made:
            self._node("DynamicQuantizeLinear", [x], codes, scale_of_x, zero)
        kind = {"MatMul": "MatMulInteger", "Conv": "ConvInteger"}[node.op_type]
        weight = self._codes(stored, is_columns, signed=False)
        middle = self._tensor(f"{name}/middle", np.array(MIDDLE, np.uint8))
        attributes = {one.name: one for one in node.attribute}
        self._node(kind, [codes, weight, zero, middle], f"{y}/sum")
        self._graph.node[-1].attribute.extend(attributes.values())
        self._node("Cast", [f"{y}/sum"], f"{y}/steps", to=FLOAT)
        shape = (1, -1) + (1,) * (len(stored.unit.shape) - 2) if kind == "ConvInteger" else (-1,)
        scale = stored.weight.scale.reshape(shape)
        step = self._node("Mul", [scale_of_x, self._half(f"{name}/scale", scale)], f"{y}/step")
        has_bias = len(node.input) > 2
        product = f"{y}/product" if has_bias else y
        self._node("Mul", [f"{y}/steps", step], product)
        if has_bias:
            bias = self._values(node.input[2]).reshape(shape)
            self._node("Add", [product, self._tensor(f"{node.input[2]}/spread", bias)], y)

    def _multiply_rows(self, node: Any, stored: Stored, is_columns: bool) -> None:
        """Ranges of each row: Σ (q − z) w = Σ q w − z Σ w, in integers, then scale.

        MatMulInteger takes one zero point for all rows, so theirs are taken off its sum. The sum of
        a weight's codes is a constant of the graph, which an engine works out as it opens the file.
        """
        assert isinstance(stored.weight, Codes)
        name, y = stored.unit.name, node.output[0]
        codes, scale_of_x, zero = self._rounded_rows(node.input[0])
        weight = self._codes(stored, is_columns, signed=False)
        if not is_columns:
            weight = self._node("Transpose", [weight], f"{name}/columns", perm=[1, 0])
        none = self._tensor("rows/none", np.array(0, np.uint8))
        middle = self._tensor(f"{name}/middle", np.array(MIDDLE, np.uint8))
        self._node("MatMulInteger", [codes, weight, none, middle], f"{y}/sum")
        total = self._added(stored, weight)
        off = self._node("Mul", [zero, total], f"{y}/off")
        self._node("Sub", [f"{y}/sum", off], f"{y}/right")
        self._node("Cast", [f"{y}/right"], f"{y}/steps", to=FLOAT)
        self._node("Mul", [f"{y}/steps", scale_of_x], f"{y}/scaled")
        scale = self._half(f"{name}/scale", stored.weight.scale.reshape(-1))
        self._node("Mul", [f"{y}/scaled", scale], y)

    def _added(self, stored: Stored, weight: str) -> str:
        """Sum of all codes that an output channel is made with, counted from the middle one."""
        name = stored.unit.name
        axis = self._tensor("rows/first", np.array([0], np.int64))
        whole = self._node("Cast", [weight], f"{name}/whole", to=INT32)
        added = self._node("ReduceSum", [whole, axis], f"{name}/added", keepdims=1)
        middles = np.array(MIDDLE * stored.unit.columns, np.int32)
        return self._node("Sub", [added, self._tensor(f"{name}/middles", middles)], f"{name}/total")

    def _rounded_rows(self, x: str) -> tuple[str, str, str]:
        """Codes, scale and zero point (int32) of each row; those that read it share the nodes."""
        codes, scale, zero = (f"{x}/rows/{part}" for part in ("codes", "scale", "zero"))
        if codes in self._made:
            return codes, scale, zero
        nothing = self._tensor("rows/nothing", np.array(0, np.float32))
        ends = []
        for reduce, bound in (("ReduceMin", "Min"), ("ReduceMax", "Max")):
            axis = self._tensor("rows/axis", np.array([-1], np.int64))
            end = self._node(reduce, [x, axis], f"{x}/rows/{reduce}", keepdims=1)
            ends.append(self._node(bound, [end, nothing], f"{x}/rows/{bound}"))
        wide = self._node("Sub", [ends[1], ends[0]], f"{x}/rows/wide")
        top = self._tensor("rows/top", np.array(TOP_CODE, np.float32))
        step = self._node("Div", [wide, top], f"{x}/rows/step")
        self._node("Max", [step, self._tensor("rows/tiny", np.array(TINY, np.float32))], scale)
        whole, middle = f"{x}/rows/whole", f"{zero}/float"
        below = self._node("Div", [ends[0], scale], f"{x}/rows/below")
        self._node("Neg", [self._node("Round", [below], whole)], middle)
        steps = self._node("Div", [x, scale], f"{x}/rows/steps")
        rounded = self._node("Round", [steps], f"{x}/rows/rounded")
        moved = self._node("Add", [rounded, middle], f"{x}/rows/moved")
        kept = self._node("Clip", [moved, nothing, top], f"{x}/rows/kept")
        self._node("Cast", [kept], codes, to=UINT8)
        self._node("Cast", [middle], zero, to=INT32)
        return codes, scale, zero

    def _look_up(self, node: Any, stored: Stored) -> None:
        """Rows of an embedding: looked up first, made floats then."""
        name, weight, (_, ids), y = stored.unit.name, stored.weight, node.input, node.output[0]
        if isinstance(weight, Tensor):
            self._node("Gather", [self._tensor(f"{name}/weight", weight.numpy()), ids], f"{y}/half")
            self._node("Cast", [f"{y}/half"], y, to=FLOAT)
        elif weight.bits == 8 and weight.symmetric and self._is_whole(weight):
            self._node("Gather", [self._codes(stored, False, signed=True), ids], f"{y}/codes")
            self._node("Cast", [f"{y}/codes"], f"{y}/steps", to=FLOAT)
            scale = self._tensor(f"{name}/scale", weight.scale.numpy())
            self._node("Gather", [scale, ids], f"{y}/half")
            self._node("Cast", [f"{y}/half"], f"{y}/scale", to=FLOAT)
            self._node("Mul", [f"{y}/steps", f"{y}/scale"], y)
        else:
            self._node("Gather", [self._weight(stored, False), ids], y)

    # ---------------------------------------------------------------------------------------
    # what nodes read

    def _weight(self, stored: Stored, is_columns: bool) -> str:
        """A weight as floats, in the shape that the node reads."""
        name, weight = stored.unit.name, stored.weight
        if isinstance(weight, Tensor):
            rows = weight if is_columns else weight.reshape(stored.unit.shape)
            return self._half(f"{name}/weight", rows.T if is_columns else rows)
        per_row = weight.scale.shape[1] == 1
        axis = int(is_columns) if per_row else int(not is_columns)
        scale = weight.scale.flatten() if per_row else weight.scale
        scale = scale.T if is_columns and not per_row else scale
        signed = weight.symmetric and (stored.input is None or weight.bits < INTEGER_BITS)
        codes = self._codes(stored, is_columns, signed=signed)
        inputs = [codes, self._half(f"{name}/scale", scale)]
        if not signed:
            zeros = weight.zero_point.flatten() if per_row else weight.zero_point
            zeros = zeros.T if is_columns and not per_row else zeros
            inputs.append(self._integers(f"{name}/zero", zeros, weight.bits, signed=False))
        block = {} if per_row else {"block_size": stored.unit.columns // weight.scale.shape[1]}
        made = self._node("DequantizeLinear", inputs, f"{name}/float", axis=axis, **block)
        if len(stored.unit.shape) == 2 or self._is_whole(weight):
            return made
        shape = self._tensor(f"{name}/shape", np.array(stored.unit.shape, np.int64))
        return self._node("Reshape", [made, shape], f"{name}/shaped")

    def _codes(self, stored: Stored, is_columns: bool, *, signed: bool) -> str:
        weight = stored.weight
        assert isinstance(weight, Codes)
        codes = weight.codes.T if is_columns else weight.codes
        if self._is_whole(weight) and not is_columns:
            codes = codes.reshape(stored.unit.shape)
        return self._integers(f"{stored.unit.name}/codes", codes, weight.bits, signed=signed)

    @staticmethod
    def _is_whole(weight: Codes) -> bool:
        """Whether the codes have the shape of the weight: blocks run along rows of a matrix."""
        return weight.scale.shape[1] == 1

    def _rounded(self, x: str, activation: Activation, y: str | None = None) -> str:
        """Round a tensor; those that read it rounded alike share the nodes.

        Args:
            y: Name of the result; None to make one up.
        """
        scale, zero_point = activation.scale, activation.zero_point
        base = f"{x}/{scale!r}/{zero_point}"
        ends = [
            self._tensor(f"{scale!r}/scale", np.array(scale, np.float32)),
            self._tensor(f"{zero_point}/code", np.array(zero_point, np.uint8)),
        ]
        codes = self._node("QuantizeLinear", [x, *ends], f"{base}/codes")
        return self._node("DequantizeLinear", [codes, *ends], y or f"{base}/rounded")

    def _bias(self, name: str, stored: Stored) -> str:
        """A bias in steps of the sum it is added to; as it is where those would be too many."""
        assert isinstance(stored.weight, Codes) and stored.input is not None
        assert stored.input.scale is not None
        if name not in self._floats:
            return name
        steps = np.float32(stored.input.scale) * stored.weight.scale.flatten().float().numpy()
        codes = np.rint(self._values(name).astype(np.float64) / steps)
        if not np.abs(codes).max(initial=0) <= LARGEST_BIAS:
            return name
        unit = stored.unit.name
        scale = self._half(f"{unit}/scale", stored.weight.scale.flatten())
        of_x = self._tensor(
            f"{stored.input.scale!r}/scale", np.array(stored.input.scale, np.float32)
        )
        step = self._node("Mul", [of_x, scale], f"{unit}/step")
        held = self._tensor(f"{unit}/bias", codes.astype(np.int32))
        return self._node("DequantizeLinear", [held, step], f"{unit}/bias/float", axis=0)

    def _values(self, name: str) -> np.ndarray:
        from onnx import numpy_helper

        values: np.ndarray = numpy_helper.to_array(self._floats[name])
        return values

    # ---------------------------------------------------------------------------------------
    # tensors and nodes

    def _half(self, name: str, values: Tensor) -> str:
        """Store numbers in 16 bits and cast them, which an engine does once."""
        stored = self._tensor(name, values.numpy())
        return self._node("Cast", [stored], f"{name}/cast", to=FLOAT)

    def _integers(self, name: str, codes: Tensor, bits: int, *, signed: bool) -> str:
        """Store codes; signed ones count from the middle code."""
        from onnx import TensorProto

        values = codes.numpy().astype(np.int16) - (1 << bits - 1 if signed else 0)
        if bits == 8:
            return self._tensor(name, values.astype(_type(signed)))
        if name in self._made:
            return name
        flat = np.ascontiguousarray(values).reshape(-1) & 15
        flat = np.append(flat, np.zeros(flat.size % 2, flat.dtype)).astype(np.uint8)
        one = TensorProto(name=name, data_type=INT4 if signed else UINT4, dims=values.shape)
        one.raw_data = (flat[::2] | flat[1::2] << 4).tobytes()  # two in a byte, the first one low
        self._made.add(name)
        self._graph.initializer.append(one)
        return name

    def _tensor(self, name: str, values: np.ndarray) -> str:
        from onnx import numpy_helper

        if name not in self._made:
            self._made.add(name)
            self._graph.initializer.append(
                numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name)
            )
        return name

    def _node(self, kind: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> str:
        """Add a node, unless what it makes is there already; give its first output."""
        from onnx import helper

        if outputs[0] not in self._made:
            self._made.update(outputs)
            self.add(helper.make_node(kind, list(inputs), list(outputs), **attributes))
        return outputs[0]


def _type(signed: bool) -> Any:
    return np.int8 if signed else np.uint8


def as_product(node: Any, unit: Unit, reading: Reading) -> tuple[Any, list[Any]]:
    """Write a Gemm as MatMul and, where it has a bias, Add."""
    from onnx import helper

    given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    by_rows = bool(given.get("transB", 0)) != reading.transposed
    plain = given.get("alpha", 1.0) == 1 and given.get("beta", 1.0) == 1 and not given.get("transA")
    if not plain or not by_rows:
        raise ModelError(f"the graph reads {unit.name} in a way that is not known.", hint=_UNKNOWN)
    if len(node.input) < 3:
        return helper.make_node("MatMul", list(node.input), list(node.output)), []
    product = f"{node.output[0]}/product"
    made = helper.make_node("MatMul", list(node.input[:2]), [product])
    return made, [helper.make_node("Add", [product, node.input[2]], list(node.output))]

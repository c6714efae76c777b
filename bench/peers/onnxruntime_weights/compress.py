"""onnxruntime: its `MatMulNBitsQuantizer`, weights only, round to nearest, symmetric; needs no
data. The setting names bits and block size; "embeddings too" has it treat Gather as well."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)
from onnxruntime.transformers.float16 import convert_float_to_float16
from peer import Job, main, matched

PACKED = ("MatMulNBits", "GatherBlockQuantized")


class Named(torch.nn.Module):
    """A model whose inputs come in order: the exporter would give them to the wrong names."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Hidden states."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def compress(job: Job) -> None:
    model = job.model(torch.float32)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    source = job.out / "full.onnx"
    example = (job.tokens[:2], job.calibration["attention"][:2])
    torch.onnx.export(
        Named(model),
        example,
        str(source),
        input_names=["input_ids", "attention_mask"],
        dynamic_axes={n: {0: "samples", 1: "tokens"} for n in ("input_ids", "attention_mask")},
        dynamo=False,
        opset_version=21,
    )
    bits, block_size = (int(n) for n in job.numbers())
    treated = ("MatMul", "Gather") if "embeddings too" in job.setting else ("MatMul",)
    config = DefaultWeightOnlyQuantConfig(
        block_size=block_size, is_symmetric=True, bits=bits, op_types_to_quantize=treated
    )
    quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    quantizer.process()
    source.unlink()
    made = job.artifact / "model.onnx"
    # what it left alone in 16 bits, as of every other tool
    onnx.save(convert_float_to_float16(quantizer.model.model, keep_io_types=True), made)
    job.written()
    job.judge(matched(weights, stored(onnx.load(made))))


def stored(model: onnx.ModelProto) -> list[np.ndarray]:
    held = {i.name: i for i in model.graph.initializer}
    plain = [numpy_helper.to_array(i) for i in held.values()]
    nodes = [node for node in model.graph.node if node.op_type in PACKED]
    return [a for a in plain if a.dtype.kind == "f"] + [decoded(node, held) for node in nodes]


def decoded(node: onnx.NodeProto, held: dict) -> np.ndarray:
    """Let onnxruntime say what numbers a node holds: times the identity, or all rows gathered."""
    own = [held[name] for name in node.input if name in held]
    settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    half = next(i for i in own if i.data_type in (1, 10)).data_type
    if node.op_type == "MatMulNBits":
        fed, kind = np.eye(settings["K"]), half
    else:
        data = next(i for i in own if i.name == node.input[0])
        fed, kind = np.arange(data.dims[0]), onnx.TensorProto.INT64
    free = next(name for name in node.input if name and name not in held)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(free, kind, None)],
        [helper.make_tensor_value_info(node.output[0], half, None)],
        own,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    one = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(one.SerializeToString())
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    return session.run(None, {free: fed.astype(dtype)})[0].astype(np.float32)


main(compress)

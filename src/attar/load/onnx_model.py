"""Run an ONNX file as a module, in onnxruntime. Nothing in it but its graph is run, or believed.

Refused before a session is made: data outside the file, operators that neither ONNX nor onnxruntime
defines, and a file too large for its own format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attar.errors import ModelError
from attar.load.extras import import_extra
from attar.load.tasks import TASKS
from attar.onnx_names import METADATA
from attar.onnx_names import TASKS as ANSWERED
from attar.records import Architecture, Model

LARGEST_BYTES = 1 << 31  # of a protocol buffer
DOMAINS = {"", "ai.onnx", "com.microsoft"}
EXTERNAL = 1  # ONNX's number of "the data lies in another file"
_HINT = "the file is damaged or not from Attar; compress or copy it again."
_TYPES = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64, "tensor(bool)": torch.bool}

Inputs = Mapping[str, tuple[Sequence[Any], str]]
"""Name to shape and type, as ONNX writes types; a side that is no int is left open."""


class OnnxModule(nn.Module):
    """A graph that onnxruntime runs, one thread for each call.

    Args:
        content: Of the file, checked.
        by_sample: Run one sample at a time, as where an engine answers one request: a range that is
            found while it runs would else be that of all samples together.
    """

    def __init__(self, content: bytes, *, by_sample: bool) -> None:
        super().__init__()
        runtime = import_extra("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = runtime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own kinds share no other parent
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"onnxruntime cannot run the file: {reason}", hint=_HINT) from error
        self.inputs = {one.name: (one.shape, one.type) for one in self._session.get_inputs()}
        # A graph for one sample alone is given one at a time.
        self._by_sample = by_sample or any(s[:1] == [1] for s, _ in self.inputs.values())

    def forward(self, *inputs: Tensor) -> Tensor:
        """Answer; inputs in the order of the graph's."""
        if not self._by_sample:
            return self._run(inputs)
        parts = [self._run([x[n : n + 1] for x in inputs]) for n in range(len(inputs[0]))]
        return torch.cat(parts)

    def _run(self, inputs: Any) -> Tensor:
        fed = {}
        for (name, (_, kind)), x in zip(self.inputs.items(), inputs, strict=True):
            fed[name] = np.ascontiguousarray(x.detach().to(_TYPES[kind]).numpy())
        try:
            (output, *_) = self._session.run(None, fed)
        except Exception as error:  # as above
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"onnxruntime could not answer: {reason}", hint=_HINT) from error
        return torch.from_numpy(output)


def read_onnx(path: Path, task: str | None = None) -> Model:
    """Open an ONNX file, with the files that lie beside it.

    Args:
        task: What a file that Attar did not write answers.

    Raises:
        ModelError: It cannot be read, is not safe to run, or does not say what it answers.
    """
    content = _bytes(path)
    proto = _checked(content, path)
    described = _description(proto, path, task)
    kinds = {node.op_type for node in proto.graph.node}
    module = OnnxModule(content, by_sample="DynamicQuantizeLinear" in kinds)
    beside = {f.name: _bytes(f) for f in sorted(path.parent.iterdir()) if f.is_file() and f != path}
    return Model(
        module=module.eval(),
        task=TASKS[described["task"]],
        architecture=Architecture("onnx", described.get("config", {})),
        name=str(path),
        origin=f"{described.get('origin', path.name)}",
        licence=str(described.get("licence", "unknown")),
        files=beside,
        examples=examples_of(module.inputs, described.get("inputs") or ()),
        source_bytes=len(content),
    )


def examples_of(inputs: Inputs, names: Sequence[str] = ()) -> dict[str, Tensor]:
    """Zeros of the shapes a graph names; 2 samples, and 16 where a length is left open.

    Args:
        inputs: Of the graph.
        names: What they are called instead.

    Raises:
        ModelError: An input of another type than Attar gives.
    """
    found = {}
    for name, (shape, kind) in zip(names or list(inputs), inputs.values(), strict=False):
        if kind not in _TYPES:
            raise ModelError(f"the graph's input {name} is a {kind}.", hint=_HINT)
        sides = [side if isinstance(side, int) else 16 for side in shape]
        found[str(name)] = torch.zeros([2, *sides[1:]], dtype=_TYPES[kind])
    return found


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ModelError(f"{path} is larger than an ONNX file can be.", hint=_HINT)
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}.", hint=_HINT) from error


def _checked(content: bytes, path: Path) -> Any:
    onnx = import_extra("onnx", "onnx")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
        onnx.checker.check_model(proto)
    except Exception as error:  # protobuf's and the checker's share no other parent
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no ONNX"
        raise ModelError(f"{path} is not a whole ONNX file: {reason}", hint=_HINT) from error
    for domain in {node.domain for node in proto.graph.node} - DOMAINS:
        raise ModelError(f"{path} asks for operators of {domain!r}.", hint=_HINT)
    if any(one.data_location == EXTERNAL for one in proto.graph.initializer):
        raise ModelError(f"{path} keeps its data in another file.", hint=_HINT)
    return proto


def _description(proto: Any, path: Path, task: str | None) -> dict[str, Any]:
    written = {one.key: one.value for one in proto.metadata_props}.get(METADATA)
    try:
        described = {} if written is None else json.loads(written)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not described readably.", hint=_HINT) from error
    if not isinstance(described, dict) or not isinstance(described.get("config", {}), dict):
        raise ModelError(f"{path} is not described readably.", hint=_HINT)
    found = {**described, "task": described.get("task", task)}
    if found["task"] not in ANSWERED:
        raise ModelError(
            f"{path} does not say what it answers.",
            hint=f"say it with --task, one of {', '.join(ANSWERED)}.",
        )
    return found

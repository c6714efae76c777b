"""Run a model of OpenVINO (`model.xml` with `model.bin`) as a module, in its own engine.

Refused before the engine sees it: a document with declarations of its own, layers that are of none
of OpenVINO's operation sets, and constants that lie outside the file of weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor, nn

from attar.errors import ModelError
from attar.load.extras import import_extra
from attar.load.onnx_model import examples_of
from attar.load.tasks import TASKS
from attar.onnx_names import TASKS as ANSWERED
from attar.records import Architecture, Model

LARGEST_DOCUMENT = 256 << 20  # bytes: that of a model of a thousand layers has two million
OPERATIONS = re.compile(r"opset\d{1,2}")
_HINT = "convert the model again: openvino.save_model writes both files."
# Of inputs, as ONNX names them, which examples are made by.
_TYPES = {"f32": "tensor(float)", "i64": "tensor(int64)", "boolean": "tensor(bool)"}
_NUMBERS = {
    "tensor(float)": torch.float32,
    "tensor(int64)": torch.int64,
    "tensor(bool)": torch.bool,
}


class OpenvinoModule(nn.Module):
    """A graph that OpenVINO runs, one thread for each call.

    In float32 where the file says so: the engine would else take 16 bits on processors that have
    them, and answers would be another machine's.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        core = import_extra("openvino", "openvino").Core()
        settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        try:
            graph = core.read_model(path)
            self._compiled = core.compile_model(graph, "CPU", settings)
        except RuntimeError as error:
            reason = _last_line(error)
            raise ModelError(f"OpenVINO cannot run {path}: {reason}", hint=_HINT) from error
        self.inputs = {one.get_any_name(): (_sides(one), _kind(one)) for one in graph.inputs}
        # A graph for one sample alone is given one at a time.
        self._by_sample = any(shape[:1] == [1] for shape, _ in self.inputs.values())

    def forward(self, *inputs: Tensor) -> Tensor:
        """Answer; inputs in the order of the graph's."""
        if not self._by_sample:
            return self._run(inputs)
        return torch.cat([self._run([x[n : n + 1] for x in inputs]) for n in range(len(inputs[0]))])

    def _run(self, inputs: Any) -> Tensor:
        fed = [
            np.ascontiguousarray(x.detach().to(_NUMBERS[kind]).numpy())
            for (_, kind), x in zip(self.inputs.values(), inputs, strict=True)
        ]
        # A request of its own: several calls may run at once.
        request = self._compiled.create_infer_request()
        try:
            found = request.infer(fed)[self._compiled.output(0)]
        except RuntimeError as error:
            raise ModelError(
                f"OpenVINO could not answer: {_last_line(error)}", hint=_HINT
            ) from error
        return torch.from_numpy(np.array(found, dtype=np.float32))


def read_openvino(path: Path, task: str | None) -> Model:
    """Open a model of OpenVINO.

    Args:
        path: Of the .xml; the .bin of the same name lies beside it.
        task: What it answers, which the file does not say.

    Raises:
        ModelError: It cannot be read, is not safe to run, or no task is given.
    """
    if task not in ANSWERED:
        raise ModelError(
            f"{path} does not say what it answers.",
            hint=f"say it with --task, one of {', '.join(ANSWERED)}.",
        )
    weights = path.with_suffix(".bin")
    try:
        n_bytes = weights.stat().st_size
        if path.stat().st_size > LARGEST_DOCUMENT:
            raise ModelError(f"{path} is larger than a description of layers is.", hint=_HINT)
        document = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {error.filename}: {error.strerror}.", hint=_HINT) from error
    check_document(document, n_bytes, path)
    module = OpenvinoModule(path)
    return Model(
        module=module.eval(),
        task=TASKS[task],
        architecture=Architecture("onnx", {}),
        name=str(path),
        origin=path.name,
        licence="unknown",
        files={path.name: document},
        examples=examples_of(module.inputs),
        source_bytes=len(document) + n_bytes,
    )


def check_document(document: bytes, n_weight_bytes: int, path: Path) -> None:
    """Refuse what a model has no need of.

    Raises:
        ModelError: See the module.
    """
    if b"<!" in document.replace(b"<!--", b""):  # entities, which can grow without bound
        raise ModelError(f"{path} declares entities or types of its own.", hint=_HINT)
    try:
        net = ElementTree.fromstring(document)
    except ElementTree.ParseError as error:
        raise ModelError(f"{path} is not whole XML: {error}.", hint=_HINT) from error
    if net.tag != "net" or net.find("layers") is None:
        raise ModelError(f"{path} describes no network of OpenVINO.", hint=_HINT)
    for layer in net.iter("layer"):
        if not OPERATIONS.fullmatch(layer.get("version", "")):
            kind, of = layer.get("type"), layer.get("version")
            raise ModelError(f"{path} asks for {kind} of {of!r}, not of OpenVINO.", hint=_HINT)
    for offset, size in _constants(net):
        if offset < 0 or size < 0 or offset + size > n_weight_bytes:
            raise ModelError(
                f"{path} has weights at bytes {offset} to {offset + size} of {n_weight_bytes}.",
                hint=_HINT,
            )


def _constants(net: ElementTree.Element) -> Iterator[tuple[int, int]]:
    for layer in net.iter("layer"):
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None:
            numbers = data.get("offset", "x"), data.get("size", "x")
            # As the engine reads them, or not at all.
            yield tuple(int(one) if one.isdecimal() else -1 for one in numbers)  # type: ignore[misc]


def _sides(port: Any) -> list[int | None]:
    return [None if side.is_dynamic else side.get_length() for side in port.get_partial_shape()]


def _kind(port: Any) -> str:
    name: str = port.get_element_type().get_type_name()
    return _TYPES.get(name, name)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

"""The engines that run a model, and how each is opened with a number of threads.

PyTorch is opened where Attar's own models are (`bench_child.py`).
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Once: TypeAlias = Callable[[], dict[str, float]]
"""Answer once; milliseconds by name."""

Inputs: TypeAlias = Sequence[NDArray[Any]]
"""One sample, in the order of the model's inputs; of a language model its tokens, `1 tokens`."""

Opener: TypeAlias = Callable[[Path, Inputs, int, int], Once]
"""A file, inputs, threads, and how many tokens a language model writes."""


@dataclass(frozen=True)
class Engine:
    """A program that runs models.

    Attributes:
        module: That must be importable.
        install: What to type where it is not.
        suffixes: Of files that it runs; "" stands for whatever Attar loads by itself.
    """

    module: str
    install: str
    suffixes: tuple[str, ...]


def milliseconds(start: float) -> float:
    """Since `start` of `time.perf_counter`."""
    return 1000 * (time.perf_counter() - start)


def open_llama_cpp(path: Path, inputs: Inputs, threads: int, new_tokens: int) -> Once:
    """llama.cpp: time to the first token on our clock, of further ones on its own."""
    import xllamacpp

    prompt = inputs[0].reshape(-1).tolist()
    wanted = xllamacpp.CommonParams()
    wanted.model.path = str(path)
    wanted.n_ctx, wanted.n_parallel = len(prompt) + new_tokens + 8, 1
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(wanted)
    asked = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def once() -> dict[str, float]:
        start = time.perf_counter()
        server.handle_completions({**asked, "max_tokens": 1})
        first = milliseconds(start)
        found = server.handle_completions({**asked, "max_tokens": new_tokens})
        return {"first_token_ms": first, "token_ms": found["timings"]["predicted_per_token_ms"]}

    return once


def open_onnxruntime(path: Path, inputs: Inputs, threads: int, _new_tokens: int) -> Once:
    """onnxruntime on the processor, with its own settings but for the threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    fed = dict(zip(names, inputs, strict=True))

    def once() -> dict[str, float]:
        start = time.perf_counter()
        session.run(None, fed)
        return {"sample_ms": milliseconds(start)}

    return once


def open_openvino(path: Path, inputs: Inputs, threads: int, _new_tokens: int) -> Once:
    """OpenVINO on the processor, in its mode for single requests."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    graph = core.read_model(path)
    compiled = core.compile_model(graph, "CPU", settings)
    request = compiled.create_infer_request()
    fed = [np.ascontiguousarray(one) for one in inputs]

    def once() -> dict[str, float]:
        start = time.perf_counter()
        request.infer(fed)
        return {"sample_ms": milliseconds(start)}

    return once


PYTORCH = "pytorch"
ENGINES: Mapping[str, Engine] = {
    PYTORCH: Engine("torch", "pip install torch", ("",)),
    "llama.cpp": Engine("xllamacpp", "pip install xllamacpp", (".gguf",)),
    "onnxruntime": Engine("onnxruntime", "pip install 'attar[onnx]'", (".onnx",)),
    "openvino": Engine("openvino", "pip install 'attar[openvino]'", (".onnx", ".xml")),
}
OPENERS: Mapping[str, Opener] = {
    "llama.cpp": open_llama_cpp,
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
}


def engines_of(suffix: str) -> tuple[list[str], list[str]]:
    """Engines that run files of a suffix: those installed, and a line for each that is not."""
    able = [name for name, engine in ENGINES.items() if suffix in engine.suffixes]
    found = [name for name in able if importlib.util.find_spec(ENGINES[name].module) is not None]
    missing = [
        f"{name} is not installed: {ENGINES[name].install}" for name in able if name not in found
    ]
    return found, missing


def engine_version(name: str) -> str:
    """Of the installed package; "unknown" where it does not say."""
    try:
        return version(ENGINES[name].module)
    except PackageNotFoundError:
        return "unknown"

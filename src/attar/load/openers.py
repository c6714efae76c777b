"""Files of other tools, by what they are called: what opens them, as Attar does not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attar.errors import ModelError

CODE = "load it in a function of your own that returns (module, example_inputs), and name that: "
FACTORY = "package.module:factory"
# Suffix or name to what it is, and what opens it.
OPENERS: Mapping[str, tuple[str, str]] = {
    ".safetensors": (
        "weights without a description of the model",
        "give the folder that holds it with its config.json",
    ),
    ".pt": ("a pickle of PyTorch, which can run code", f"torch.load opens it: {CODE}{FACTORY}"),
    ".pth": ("a pickle of PyTorch, which can run code", f"torch.load opens it: {CODE}{FACTORY}"),
    ".ckpt": ("a pickle of PyTorch, which can run code", f"torch.load opens it: {CODE}{FACTORY}"),
    ".bin": (
        "weights, mostly a pickle of PyTorch, which can run code",
        f"torch.load opens it: {CODE}{FACTORY}",
    ),
    ".pkl": ("a pickle, which can run code", f"its own program opens it: {CODE}{FACTORY}"),
    ".pt2": ("a program that torch.export wrote", f"torch.export.load opens it: {CODE}{FACTORY}"),
    ".pte": ("a program of ExecuTorch", "ExecuTorch runs it; audit the .pt2 it was made from"),
    ".tflite": (
        "a model of LiteRT (TensorFlow Lite)",
        f"ai-edge-litert runs it: {CODE}{FACTORY}; or audit an ONNX file, as tf2onnx writes it",
    ),
    ".h5": ("a model of Keras", "Keras opens it; audit an ONNX file, as tf2onnx writes it"),
    ".keras": ("a model of Keras", "Keras opens it; audit an ONNX file, as tf2onnx writes it"),
    "saved_model.pb": (
        "a model of TensorFlow",
        "TensorFlow opens it; audit an ONNX file, as tf2onnx writes it",
    ),
    ".mlmodel": ("a model of Core ML", f"coremltools runs it, on a Mac: {CODE}{FACTORY}"),
    ".mlpackage": ("a model of Core ML", f"coremltools runs it, on a Mac: {CODE}{FACTORY}"),
    ".engine": (
        "an engine of TensorRT",
        "TensorRT runs it, on the kind of GPU it was made for; audit the ONNX file it came from",
    ),
    ".ggml": ("a file of llama.cpp from before GGUF", "llama.cpp converts it to GGUF"),
}
# How a folder of transformers says that it was quantized, to what opens it.
QUANTIZERS: Mapping[str, str] = {
    "gptq": "gptqmodel",
    "awq": "autoawq or gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
    "aqlm": "aqlm",
    "eetq": "eetq",
    "higgs": "flute-kernel",
    "fbgemm_fp8": "fbgemm-gpu",
    "quark": "amd-quark",
    "auto-round": "auto-round",
}


def not_opened(path: Path) -> ModelError | None:
    """Say what a file of another tool is and what opens it; None where that is unknown."""
    kind = path.suffix.lower()
    if path.is_dir() and (path / "saved_model.pb").is_file():
        kind = "saved_model.pb"
    if kind not in OPENERS:
        return None
    what, opener = OPENERS[kind]
    return ModelError(f"{path.name} is {what}, which Attar does not open.", hint=opener)


def quantized(name: str, settings: object) -> ModelError:
    """Say what opens a folder of transformers that is quantized already."""
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    package = QUANTIZERS.get(str(method))
    how = f" by {method}" if isinstance(method, str) else ""
    tool = f"transformers with {package}" if package else "transformers"
    return ModelError(
        f"{name} holds a model that is quantized already{how}, which Attar does not open.",
        hint=f"{tool} opens it: {CODE}{FACTORY}; to compress, give the folder in 16 or 32 bits",
    )

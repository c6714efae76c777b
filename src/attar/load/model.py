"""Load a model from wherever the user has it."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attar.disk import on_disk
from attar.errors import ModelError
from attar.load.builders import TASKS, build_module, check_finite
from attar.load.built_ins import load_built_in
from attar.load.catalogue import CATALOGUE, built_in
from attar.load.degrid import degrid
from attar.load.gguf_model import read_gguf_model
from attar.load.huggingface import read_huggingface, save_huggingface
from attar.load.openers import not_opened
from attar.load.parts import Parts
from attar.records import Architecture, Batch, Model, Task

__all__ = ["is_factory", "load_model", "model_from_parts", "save_huggingface"]

_EXAMPLE_SAMPLES, _EXAMPLE_TOKENS = 2, 16
_INPUT_NAMES = {
    "language": ("tokens",),
    "classify": ("pixels",),
    "embed": ("tokens", "attention"),
    "transcribe": ("features", "decoder_tokens"),
    "regress": ("inputs",),
}


def load_model(
    source: str | Path | nn.Module,
    *,
    seed_degrid: int | None = None,
    accept_licence: bool = False,
    factory: str | None = None,
    examples: Any = None,
    task: str | None = None,
) -> Model:
    """Load a model.

    Args:
        source: Built-in name, Hugging Face folder, GGUF file, `package.module:factory`, a module.
        seed_degrid: Take a language model off its quantization grid with this seed; see `degrid`.
        accept_licence: The user accepts the terms of a built-in model that has some.
        factory: Of a module: the `package.module:factory` that builds it again, where there is one.
        examples: Of a module or factory: inputs it accepts, as a tensor, a tuple or a named batch.
        task: Of a module or factory: a name in `TASKS`; needed where outputs do not tell.

    Raises:
        ModelError: The model is unknown, unreadable, damaged, or does not say what it is.
    """
    if isinstance(source, nn.Module):
        return _from_module(source, type(source).__name__, factory or "", examples, task)
    name = str(source)
    if is_factory(name):
        module, built_examples = _call_factory(name)
        given = built_examples if examples is None else examples
        return _from_module(module, name, name, given, task)
    parts = _read_parts(name, accept_licence=accept_licence)
    if seed_degrid is not None:
        parts = _degridded(parts, seed_degrid)
    return model_from_parts(parts, name)


def is_factory(name: str) -> bool:
    """Whether a model's name is `package.module:function`: code of the user's own."""
    return ":" in name and not Path(name).exists()


def model_from_parts(parts: Parts, name: str) -> Model:
    """Build the module and put everything about it together."""
    return Model(
        module=build_module(parts.architecture, parts.state),
        task=TASKS[parts.task],
        architecture=parts.architecture,
        name=name,
        origin=parts.origin,
        licence=parts.licence,
        files=parts.files,
        examples=_examples(parts),
        source_bytes=parts.source_bytes,
    )


def _read_parts(name: str, *, accept_licence: bool) -> Parts:
    path = Path(name).expanduser()
    if name in CATALOGUE:
        return load_built_in(name, accept_licence=accept_licence)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if is_gguf or path.suffix.lower() == ".gguf":
            return read_gguf_model(path)
        raise not_opened(path) or ModelError(
            f"{path.name} is no model file known here",
            hint="give a GGUF file, or the folder that holds config.json and model.safetensors",
        )
    if "/" in name or path.suffix in (".gguf", ".safetensors", ".onnx", ".xml"):
        raise ModelError(
            f"there is no file or folder {name}", hint="check the path; `attar models` lists names"
        )
    raise _unknown(name)


def _unknown(name: str) -> ModelError:
    try:
        built_in(name)
    except ModelError as error:
        return error
    raise AssertionError(f"{name} is a built-in")


def _read_folder(folder: Path) -> Parts:
    if (folder / "attar.json").is_file():
        raise ModelError(
            f"{folder} is a model that Attar wrote already",
            hint="`attar run`, `attar audit` and `attar.load` open it; "
            "to compress again, start from the original model",
        )
    if not (folder / "config.json").is_file():
        raise not_opened(folder) or ModelError(
            f"{folder} holds neither config.json nor attar.json",
            hint="give a folder that transformers' save_pretrained or Attar wrote",
        )
    return read_huggingface(folder)


def _degridded(parts: Parts, seed: int) -> Parts:
    state = degrid(parts.state, parts.architecture.config, seed)
    # A single tensor that is left as mapped from the file would keep the whole file in memory.
    state = {
        name: t.clone() if t is parts.state[name] and not on_disk(t) else t
        for name, t in state.items()
    }
    return dataclasses.replace(
        parts,
        state=state,
        origin=f"{parts.origin}, degridded with seed {seed}",
    )


def _examples(parts: Parts) -> Batch:
    """A small batch of random inputs of the right shape; the same one every time."""
    generator = torch.Generator().manual_seed(0)
    config = parts.architecture.config

    def tokens(vocabulary: int, count: int) -> Tensor:
        return torch.randint(vocabulary, (_EXAMPLE_SAMPLES, count), generator=generator)

    if parts.task == "language":
        return {"tokens": tokens(config["vocab_size"], _EXAMPLE_TOKENS)}
    if parts.task == "embed":
        ids = tokens(config["bert"]["vocab_size"], _EXAMPLE_TOKENS)
        return {"tokens": ids, "attention": torch.ones_like(ids)}
    if parts.task == "transcribe":
        frames = 2 * config["max_source_positions"]  # the encoder halves the frame rate
        shape = (_EXAMPLE_SAMPLES, config["num_mel_bins"], frames)
        ids = tokens(config["vocab_size"], 8)
        features = torch.randn(shape, generator=generator)
        return {"features": features, "decoder_tokens": ids, "mask": torch.ones_like(ids).bool()}
    side = config["picture"]["size"]
    return {"pixels": torch.randn((_EXAMPLE_SAMPLES, 3, side, side), generator=generator)}


def _call_factory(name: str) -> tuple[nn.Module, Any]:
    """Import what the user named and call it; a module alone has no examples."""
    package, _, function = name.partition(":")
    here = str(Path.cwd())
    # A command's search path does not hold the folder it is typed in, unlike `python -m`.
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        built = getattr(importlib.import_module(package), function)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ModelError(
            f"{name} cannot be called: {type(error).__name__}: {error}",
            hint="name a function without arguments that returns (module, example_inputs), "
            "as package.module:function",
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    module, examples = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{name} returned a {type(module).__name__}, not a torch.nn.Module",
            hint="return the module, or (module, example_inputs)",
        )
    return module, examples


def _from_module(
    module: nn.Module, name: str, factory: str, examples: Any, task: str | None
) -> Model:
    if task is not None and task not in TASKS:
        raise ModelError(f"there is no task {task!r}", hint=f"choose one of {', '.join(TASKS)}")
    if examples is None:
        raise ModelError(
            f"{name} comes without example inputs, so it cannot be traced",
            hint="return (module, example_inputs) from the factory, or pass examples=...",
        )
    for tensor_name, tensor in module.state_dict().items():
        check_finite(tensor_name, tensor)
    stored = sum(tensor.nbytes for tensor in module.state_dict().values())
    # The user's own module stays as it is.
    ours = copy.deepcopy(module).float().eval().requires_grad_(requires_grad=False)
    chosen = TASKS[task or _guess_task(ours, examples, name)]
    batch = _batch(examples, chosen)
    _check_forward(ours, chosen, batch, name)
    return Model(
        module=ours,
        task=chosen,
        architecture=Architecture("factory", {"factory": factory}),
        name=name,
        origin=f"factory {factory}" if factory else f"module {name}",
        licence="unknown",
        files={},
        examples=batch,
        source_bytes=stored,
    )


def _guess_task(module: nn.Module, examples: Any, name: str) -> str:
    """Tell a language model by what it reads and writes; nothing else can be told."""
    first = _tensors(examples)[0]
    with torch.no_grad():
        try:
            output = TASKS["language"].forward(module, {"tokens": first})
        except Exception:  # a module of another kind fails in its own way
            output = None
    reads_tokens = not first.is_floating_point() and first.dim() == 2
    if reads_tokens and isinstance(output, Tensor) and output.dim() == 3:
        return "language"
    raise ModelError(
        f"it cannot be told what the outputs of {name} mean",
        hint="say it with --task classify (outputs are logits) or --task regress (outputs are "
        "numbers)",
    )


def _tensors(examples: Any) -> list[Tensor]:
    if isinstance(examples, Mapping):
        found = list(examples.values())
    else:
        found = list(examples) if isinstance(examples, tuple | list) else [examples]
    if not found or not all(isinstance(tensor, Tensor) for tensor in found):
        raise ModelError(
            "the example inputs are not tensors",
            hint="give a tensor, a tuple of tensors, or a dict of names and tensors",
        )
    return found


def _batch(examples: Any, task: Task) -> Batch:
    tensors = _tensors(examples)
    if isinstance(examples, Mapping):
        return dict(examples)
    names = _INPUT_NAMES[task.name]
    if len(names) != len(tensors):
        raise ModelError(
            f"a {task.name} model reads {len(names)} tensors ({', '.join(names)}), "
            f"the examples hold {len(tensors)}",
            hint="give the examples as a dict with these names",
        )
    return dict(zip(names, tensors, strict=True))


def _check_forward(module: nn.Module, task: Task, batch: Batch, name: str) -> None:
    try:
        with torch.no_grad():
            output = task.forward(module, batch)
    except Exception as error:  # whatever the user's own module raises
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"{name} does not run on its example inputs: {type(error).__name__}: {reason}",
            hint=f"check the examples; the task {task.name} reads {', '.join(batch)}",
        ) from error
    if not isinstance(output, Tensor) or output.dim() != 3:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(
            f"{name} gives {shape} for the task {task.name}, not samples × predictions × width",
            hint="classify and regress want outputs `samples width`, language `samples tokens "
            "vocabulary`",
        )

"""Read a folder that Attar wrote. Nothing in it is executed, and everything in it is checked."""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attar import disk
from attar.errors import ModelError
from attar.load.builders import TASKS, build_empty, fill
from attar.load.fold import fold_again
from attar.load.narrow import check_runs, narrow
from attar.load.tensor_files import map_safetensors
from attar.memory import release
from attar.parallel import in_order
from attar.records import Architecture, Model, Transform

VERSION = 1
LONGEST_FILE_BYTES = 1 << 28  # of a tokenizer, unpacked: no real one comes near
_HINT = "the folder is damaged or not from Attar; compress or copy it again."


@dataclass(frozen=True)
class AttarFolder:
    """What a folder holds, read and checked, with the weights still packed.

    Attributes:
        tensors: Unit name to its stored tensors.
        leftovers: Name to tensor stored as it is.
        transforms: Unit name to what decodes it.
        shapes: Unit name to the shape the module holds.
    """

    path: Path
    description: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]
    leftovers: Mapping[str, Tensor]
    transforms: Mapping[str, Transform]
    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, bytes]


def is_attar_folder(path: Path) -> bool:
    """Say whether Attar wrote this folder."""
    return (path / "attar.json").is_file()


def read_folder(path: Path, build: Callable[[str, Mapping[str, Any]], Transform]) -> AttarFolder:
    """Read and check a folder; weights stay packed.

    Args:
        build: Treatment and settings to a transform; raises SettingError on bad ones.

    Raises:
        ModelError: A file is missing, damaged, or not what the description says.
    """
    description = read_description(path)
    weights = path / "model.safetensors"
    if _sha256(weights) != description.get("weights_sha256"):
        raise ModelError(f"{weights} is not the file attar.json describes.", hint=_HINT)
    stored = map_safetensors(weights)
    units = description["units"]
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in units}
    leftovers = {}
    for key, tensor in stored.items():
        name, slash, part = key.rpartition("/")
        if slash and name in tensors:
            tensors[name][part] = tensor
        else:
            leftovers[key] = tensor
    transforms, shapes = {}, {}
    for name, line in units.items():
        settings = {k: v for k, v in line.items() if k not in ("treatment", "shape", "nats")}
        transforms[name] = build(line["treatment"], settings)
        shapes[name] = tuple(line["shape"])
    return AttarFolder(path, description, tensors, leftovers, transforms, shapes, _files(path))


def load_folder(folder: AttarFolder, module: nn.Module | None = None) -> Model:
    """Decode every weight and build the model.

    Args:
        module: From the factory the user named, for a model whose code is the user's own.

    Raises:
        ModelError: The model needs a factory and none was given, or tensors do not fit.
    """
    described = folder.description
    architecture = Architecture(described["builder"], described["config"])
    folded = described.get("folded", ())
    # A copy: of a module at hand that stays as it is. One just built may be used up.
    if module is None:
        module = _empty(folder, architecture)
        module = fold_again(module, folded) if folded else module
    else:
        module = fold_again(module, folded)
    # Copies, because the file is not kept: it may be replaced while the model is in use.
    state = {name: tensor.to(torch.float32, copy=True) for name, tensor in folder.leftovers.items()}
    numbers = sum(torch.Size(shape).numel() for shape in folder.shapes.values())
    scratch = disk.Scratch(on_disk=4 * numbers > disk.HELD_AT_MOST_BYTES)
    for name, dense in in_order(lambda name: _decoded(folder, name), folder.tensors):
        state[f"{name}.weight"] = scratch.moved(dense)
        release()
    if "cut" in described:
        narrow(module, {name: tuple(t.shape) for name, t in state.items()}, described["cut"])
    _match_dtypes(module, state)
    model = Model(
        module=fill(module, state),
        task=TASKS[described["task"]],
        architecture=architecture,
        name=str(folder.path),
        origin=f"{described['origin']}, compressed by Attar",
        licence=described["licence"],
        files=folder.files,
        examples=_examples(described["examples"]),
        source_bytes=described["source_bytes"],
    )
    if "cut" in described:
        check_runs(model)
    return model


def _decoded(folder: AttarFolder, name: str) -> tuple[str, Tensor]:
    shape = folder.shapes[name]
    columns = int(torch.Size(shape[1:]).numel())
    dense = folder.transforms[name].decode(folder.tensors[name], shape[0], columns)
    disk.give_back(*folder.tensors[name].values())
    return name, dense.view(shape)


def _examples(described: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make a batch of zeros: enough to trace the module with."""
    kinds = {"int64": torch.int64, "float32": torch.float32, "bool": torch.bool}
    try:
        return {
            name: torch.zeros([int(side) for side in line["shape"]], dtype=kinds[line["dtype"]])
            for name, line in described.items()
            if torch.Size(line["shape"]).numel() <= LONGEST_FILE_BYTES
        }
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError("attar.json describes the example inputs wrongly.", hint=_HINT) from error


def _empty(folder: AttarFolder, architecture: Architecture) -> nn.Module:
    if architecture.builder == "factory":
        raise ModelError(
            f"{folder.path} was made from code of your own, which is not run just because a folder "
            "names it.",
            hint="name the code: --factory "
            + str(architecture.config.get("factory", "package.module:name")),
        )
    return build_empty(architecture)


def _match_dtypes(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Give counters (a batch norm's, say) back the integer type they had."""
    for name, tensor in module.state_dict().items():
        if name in state and not tensor.is_floating_point():
            state[name] = state[name].to(tensor.dtype)


def read_description(path: Path) -> dict[str, Any]:
    """Read attar.json; that it says what it must is checked, weights are not read.

    Raises:
        ModelError: It is missing or damaged.
    """
    try:
        description = json.loads(_bytes(path / "attar.json"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}/attar.json is not readable JSON.", hint=_HINT) from error
    if not isinstance(description, dict) or description.get("attar") != VERSION:
        raise ModelError(
            f"{path}/attar.json is not a description that this Attar reads.",
            hint="it may come from a newer Attar: pip install --upgrade attar",
        )
    kinds = {
        "builder": str,
        "config": dict,
        "task": str,
        "units": dict,
        "examples": dict,
        "origin": str,
        "licence": str,
        "source_bytes": int,
    }
    for key, kind in kinds.items():
        if not isinstance(description.get(key), kind):
            raise ModelError(f"{path}/attar.json has no usable {key!r}.", hint=_HINT)
    if description["task"] not in TASKS:
        raise ModelError(
            f"{path}/attar.json asks for the task {description['task']!r}.", hint=_HINT
        )
    for name, line in description["units"].items():
        shape = line.get("shape") if isinstance(line, dict) else None
        good = (
            isinstance(shape, list) and shape and all(isinstance(s, int) and s > 0 for s in shape)
        )
        if not good or not isinstance(line.get("treatment"), str):
            raise ModelError(f"{path}/attar.json describes the unit {name!r} wrongly.", hint=_HINT)
    return description


def _files(path: Path) -> dict[str, bytes]:
    files = {}
    for file in sorted(path.iterdir()):
        if file.name in ("attar.json", "model.safetensors") or not file.is_file():
            continue
        content = _bytes(file)
        if file.suffix == ".xz":
            try:
                content = lzma.LZMADecompressor().decompress(content, max_length=LONGEST_FILE_BYTES)
            except lzma.LZMAError as error:
                raise ModelError(f"{file} cannot be unpacked.", hint=_HINT) from error
        files[file.name.removesuffix(".xz")] = content
    return files


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}.", hint=_HINT) from error


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}.", hint=_HINT) from error

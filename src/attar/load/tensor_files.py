"""Read and write safetensors files, with Attar's errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from attar.disk import LENGTH_BYTES, SAFETENSORS_TYPES, map_file
from attar.errors import ModelError

METADATA = "__metadata__"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file into memory; changing a tensor does not change the file.

    Raises:
        ModelError: Missing, truncated, or no safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file so that what was read of it can be given back; see `disk`.

    Raises:
        ModelError: Missing, truncated, or no safetensors file.
    """
    header = read_header(path)
    try:
        start = LENGTH_BYTES + int.from_bytes(_front(path), "little")
        whole = map_file(path)
        return {name: _tensor(whole, start, said) for name, said in header.items()}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _unreadable(path, error) from error


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Type, shape and place of every tensor, checked against the file by safetensors itself.

    Raises:
        ModelError: Missing, truncated, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt"):  # no overlap, no gap, nothing beyond the end
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    return {name: said for name, said in header.items() if name != METADATA}


def float32_bytes(header: Mapping[str, Mapping[str, Any]]) -> int:
    """What the tensors of a file take in float32."""
    return sum(4 * torch.Size(said["shape"]).numel() for said in header.values())


def _front(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LENGTH_BYTES)


def _tensor(whole: Tensor, start: int, said: Mapping[str, Any]) -> Tensor:
    first, end = (start + place for place in said["data_offsets"])
    dtype, shape = SAFETENSORS_TYPES[said["dtype"]], said["shape"]
    if not start <= first <= end <= len(whole) or torch.Size(shape).numel() * dtype.itemsize != (
        end - first
    ):
        raise ValueError("a tensor lies outside the file")
    content = whole[first:end]
    if first % dtype.itemsize:  # some writers do not align; a number must be
        content = content.clone()
    return content.view(dtype).view(shape)


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{path.name} is not a readable safetensors file: {error}",
        hint="fetch or write the file again; it may have been cut off",
    )


def write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to one file; each tensor must have memory of its own."""
    save_file({n: t.contiguous() for n, t in state.items()}, path, metadata={"format": "pt"})

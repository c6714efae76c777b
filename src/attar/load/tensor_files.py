"""Read and write safetensors files, with Attar's errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from attar.errors import ModelError


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file into memory; changing a tensor does not change the file.

    Raises:
        ModelError: Missing, truncated, or no safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path.name} is not a readable safetensors file: {error}",
            hint="fetch or write the file again; it may have been cut off",
        ) from error


def write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to one file; each tensor must have memory of its own."""
    save_file({n: t.contiguous() for n, t in state.items()}, path, metadata={"format": "pt"})

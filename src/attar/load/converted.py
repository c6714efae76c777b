"""Models converted once, kept in the cache so that the next load only maps a file.

A converted model is a folder: `model.safetensors`, `parts.json`, and a file for each entry of
`Parts.files`. It appears by one rename, whole or not at all.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from attar.errors import ModelError
from attar.load.parts import Parts
from attar.load.tensor_files import read_safetensors, write_safetensors
from attar.records import Architecture

_WEIGHTS, _PARTS = "model.safetensors", "parts.json"


def write_converted(parts: Parts, folder: Path) -> None:
    """Keep a model at `folder`, replacing nothing that is there already.

    Raises:
        ModelError: The cache cannot be written or is full.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as temporary:
            new = Path(temporary) / "model"
            new.mkdir()
            write_safetensors(parts.state, new / _WEIGHTS)
            for name, content in parts.files.items():
                (new / name).write_bytes(content)
            text = json.dumps(_record(parts), indent=1, sort_keys=True)
            (new / _PARTS).write_text(text, encoding="utf-8")
            if not folder.exists():
                new.rename(folder)
    except OSError as error:
        raise ModelError(
            f"the converted model cannot be kept in {folder.parent}: {error.strerror or error}",
            hint="free some space there, or set ATTAR_CACHE to another folder",
        ) from error


def _record(parts: Parts) -> dict[str, Any]:
    return {
        "builder": parts.architecture.builder,
        "config": dict(parts.architecture.config),
        "task": parts.task,
        "origin": parts.origin,
        "licence": parts.licence,
        "files": sorted(parts.files),
        "source_bytes": parts.source_bytes,
    }


def read_converted(folder: Path) -> Parts:
    """Read a model that `write_converted` kept.

    Raises:
        ModelError: The folder is damaged.
    """
    try:
        record = json.loads((folder / _PARTS).read_text(encoding="utf-8"))
        files = {name: (folder / Path(name).name).read_bytes() for name in record["files"]}
        return Parts(
            architecture=Architecture(record["builder"], record["config"]),
            task=record["task"],
            state=read_safetensors(folder / _WEIGHTS),
            origin=record["origin"],
            licence=record["licence"],
            files=files,
            source_bytes=record["source_bytes"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the converted model in {folder} is damaged: {str(error).splitlines()[0]}",
            hint=f"delete {folder} and try again; it is made afresh",
        ) from error

"""An Attar folder: everything the model needs to run, and nothing else.

    model.safetensors   stored tensors, named UNIT/TENSOR; leftovers under their own names
    attar.json          architecture, plan and receipt, provenance, hash of model.safetensors
    tokenizer.json.xz   and other files that travel with the model, compressed where that helps

The same input gives the same bytes. Files are written to a temporary folder that is then renamed.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from attar.disk import LENGTH_BYTES, SAFETENSORS_TYPES
from attar.errors import OutputError
from attar.export.pieces import Content, Piece, Pieces, pieces_of, tensor_bytes
from attar.gguf_names import FILE as GGUF_FILE
from attar.onnx_names import FILE as ONNX_FILE

WEIGHTS, DESCRIPTION = "model.safetensors", "attar.json"
# Files by one of which a folder is known as Attar's: its own, or one with a file for an engine.
KNOWN_BY = (DESCRIPTION, GGUF_FILE, ONNX_FILE)
# Below this, compressing a file saves less than a disk block.
COMPRESS_FROM_BYTES = 4096


def file_contents(
    tensors: Mapping[str, Tensor], description: Mapping[str, Any], files: Mapping[str, bytes]
) -> dict[str, Content]:
    """Make every file of the folder; what is large can be weighed before it is made."""
    weights = safetensors_file(tensors)

    def described(digest: str) -> bytes:
        return _json({**description, "weights_sha256": digest})

    # The hash is of the bytes written, which takes a pass over them; its length is known before.
    unhashed = len(described(hashlib.sha256().hexdigest()))
    contents: dict[str, Content] = {
        WEIGHTS: weights,
        DESCRIPTION: Pieces(unhashed, lambda: [described(_sha256(weights))]),
    }
    for name, content in files.items():
        if len(content) >= COMPRESS_FROM_BYTES:
            contents[f"{name}.xz"] = _packed(content)
        else:
            contents[name] = content
    return contents


def safetensors_file(tensors: Mapping[str, Tensor]) -> Pieces:
    """Make a safetensors file, byte for byte as safetensors itself does.

    Source: https://github.com/huggingface/safetensors, README, "Format".
    """
    spelled = {dtype: name for name, dtype in SAFETENSORS_TYPES.items()}
    place = {dtype: number for number, dtype in enumerate(spelled)}
    ordered = sorted(tensors.items(), key=lambda item: (place[item[1].dtype], item[0].encode()))
    header: dict[str, Any] = {"__metadata__": {"format": "attar"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        offsets, shape = [start, end], list(tensor.shape)
        header[name] = {"dtype": spelled[tensor.dtype], "shape": shape, "data_offsets": offsets}
    text = _json(header)
    text += b" " * (-len(text) % LENGTH_BYTES)

    def make() -> Iterator[Piece]:
        yield len(text).to_bytes(LENGTH_BYTES, "little") + text
        yield from tensor_bytes(tensor for _, tensor in ordered)

    return Pieces(LENGTH_BYTES + len(text) + end, make)


def _sha256(content: Pieces) -> str:
    digest = hashlib.sha256()
    for piece in content.make():
        digest.update(piece)
    return digest.hexdigest()


@lru_cache(maxsize=8)  # a tokenizer takes seconds, and is weighed at every try
def _packed(content: bytes) -> bytes:
    return lzma.compress(content, preset=9)


def weigh(contents: Mapping[str, Content]) -> int:
    """Bytes of all files together."""
    return sum(len(content) for content in contents.values())


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def check_output(
    folder: Path, *, force: bool, holds: Sequence[str] = KNOWN_BY, option: str = "--out"
) -> None:
    """Refuse an output folder before any work is done for it.

    Args:
        holds: Files by any of which a folder is known as one that may be replaced.
        option: Where the folder was named.

    Raises:
        OutputError: It exists (and not `force`), is not a folder Attar wrote, or its parent cannot
            be written.
    """
    if folder.exists():
        if not force:
            raise OutputError(f"{folder} exists.", hint=f"choose another {option}, or add --force.")
        known = folder.is_dir() and any((folder / name).exists() for name in holds)
        if not known and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputError(
                f"{folder} is not a folder that Attar wrote, so --force does not replace it.",
                hint=f"choose another {option}.",
            )
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        raise OutputError(f"cannot write in {parent}.", hint=f"choose another {option}.")


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder beside `folder`, and put it in its place when all went well.

    Raises:
        OutputError: The disk is full or cannot be written; what was there before is still there.
    """
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"cannot write {folder}: {error.strerror or error}.",
            hint="free some space, or choose another --out.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():  # interrupted between the two renames
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        if not folder.exists():
            for parent in missing:
                with suppress(OSError):  # it was not made, or something else lies in it now
                    parent.rmdir()


def write_files(folder: Path, contents: Mapping[str, Content]) -> int:
    """Write files that are really on disk when this returns; say how many bytes they are."""
    for name, content in contents.items():
        with (folder / name).open("wb") as file:
            for piece in pieces_of(content):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    return weigh(contents)

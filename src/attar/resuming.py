"""What a run has finished, kept beside its output so that a run that was killed can go on.

    OUT.unfinished/run.json            what the run was asked for, and what it computes with
    OUT.unfinished/HASH.safetensors    one finished step: its tensors, and in the header the rest

A step's file is written under another name, and renamed when it is on the disk; so what is there is
whole. Reading makes nothing but numbers, text, tensors and the records in KINDS.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from attar.audit.fidelity import Measured
from attar.environment import environment
from attar.errors import OutputError, Terminated, WorkerError
from attar.explain.dictionary import Dictionary
from attar.explain.statistics import Curvatures
from attar.kernels.symmetric import Packed, Symmetric
from attar.records import Applied, Candidate, Cost, Cut, Recipe, Statistics, Unit
from attar.transform import TRANSFORMS
from attar.transform.apply import Treated
from attar.transform.coded import Codes, Factors
from attar.transform.factorize_low_rank import Product

RUN = "run.json"
# Without a bearing on what is computed.
NOT_IN_KEY = {"threads", "workers", "accept_licence"}
# Records that a step may hold; a file that names another is refused.
KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(Statistics, Curvatures, Symmetric, Packed, Candidate, Cost, Cut),
        *(Applied, Treated, Unit, Codes, Factors, Product, *TRANSFORMS.values()),
        *(Measured, Dictionary),
    )
}
# Names that safetensors has for what tensors hold.
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Result = TypeVar("Result")


@dataclass
class Finished:
    """Steps that are finished, by name.

    Attributes:
        folder: None where nothing is kept.
        tell: Is given a line when keeping is given up, because the disk is full.
        about: Stands before the name of every step.
        whole: What this is a part of, where it is one.
    """

    folder: Path | None = None
    tell: Callable[[str], None] = lambda _line: None
    about: str = ""
    whole: Finished | None = None

    def within(self, about: str) -> Finished:
        """Steps of one part of the run, which may be called as those of another are."""
        return Finished(self.folder, self.tell, f"{self.about}{about}: ", self)

    def once(self, step: str, make: Callable[[], Result]) -> Result:
        """Take what an earlier run made of a step, or make and keep it.

        Args:
            step: Names all that the result depends on beside the run itself.

        Raises:
            OutputError: What is there cannot be read.
        """
        path = self._path(step)
        if path is None:
            return make()
        if path.exists():
            found: Result = _read(path)
            return found
        made = make()
        try:
            _write(path, self.about + step, made)
        except OSError as error:
            self.give_up(error)
        return made

    def has(self, step: str) -> bool:
        """Say whether an earlier run made a step."""
        path = self._path(step)
        return path is not None and path.exists()

    def forget(self, step: str) -> None:
        """Drop a step that nothing will ask for again."""
        path = self._path(step)
        if path is not None:
            path.unlink(missing_ok=True)

    def _path(self, step: str) -> Path | None:
        if self.folder is None:
            return None
        name = hashlib.sha256((self.about + step).encode()).hexdigest()[:32]
        return self.folder / f"{name}.safetensors"

    def give_up(self, error: OSError) -> None:
        """Keep nothing: the result itself needs the room."""
        folder, self.folder = self.folder, None
        if self.whole is not None:
            self.whole.give_up(error)
        elif folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            self.tell(f"what is finished is not kept: {error.strerror or error}")

    @property
    def count(self) -> int:
        """Finished steps that are there."""
        return 0 if self.folder is None else len(list(self.folder.glob("*.safetensors")))


def unfinished_folder(out: Path) -> Path:
    """Where a run that writes `out` keeps what it has finished."""
    return out.with_name(f"{out.name}.unfinished")


def discard(out: Path) -> None:
    """Throw away what an earlier run to `out` has finished.

    Raises:
        OutputError: What is there was not made by a run.
    """
    folder = unfinished_folder(out)
    if folder.exists() and not (folder / RUN).is_file():
        raise OutputError(
            f"{folder} is not what a run leaves, so it is not replaced.",
            hint="choose another --out.",
        )
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def keeping(out: Path, key: Mapping[str, Any], tell: Callable[[str], None]) -> Iterator[Finished]:
    """Go on from what an earlier run with the same key has finished; keep what this one finishes.

    It stays where the run is killed, terminated, or loses its workers; a run that is done,
    interrupted (Ctrl-C) or refused leaves nothing.

    Raises:
        OutputError: A folder of that name is there that no run made.
    """
    folder = unfinished_folder(out)
    missing = [parent for parent in folder.parents if not parent.exists()]
    finished = Finished(folder, tell)
    differs = _differs(folder, key)
    if differs is not None:
        discard(out)
        if differs:
            tell(f"{folder} is of another run ({differs}): all is done again")
    try:
        if differs is not None:
            _begin(finished, key)
        elif finished.count:
            tell(f"going on from {folder}: {finished.count} steps are finished")
        yield finished
    except (WorkerError, MemoryError, Terminated):
        if finished.count:
            tell(f"{folder} keeps what is finished: the same command goes on from there")
            raise
        _remove(folder, missing)
        raise
    except BaseException:
        _remove(folder, missing)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _begin(finished: Finished, key: Mapping[str, Any]) -> None:
    """Make the folder; where that cannot be, the run goes on without."""
    assert finished.folder is not None
    try:
        finished.folder.mkdir(parents=True)
        _put(finished.folder / RUN, json.dumps(key, indent=1).encode())
    except OSError as error:
        finished.give_up(error)


def _remove(folder: Path, missing: Sequence[Path]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for parent in missing:
        with suppress(OSError):  # it was not made, or something else lies in it now
            parent.rmdir()


def key_of(recipe: Recipe, hashes: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a finished step to be of use.

    Args:
        hashes: Of the model, of what it answers, and of the data.
    """
    asked = {name: value for name, value in asdict(recipe).items() if name not in NOT_IN_KEY}
    # As it is read back: JSON knows no tuples.
    return dict(json.loads(json.dumps({**asked, **environment(), **hashes})))


def _differs(folder: Path, key: Mapping[str, Any]) -> str | None:
    """Name what is not as in the run that left a folder: None if nothing, "" if there is none."""
    try:
        before = json.loads((folder / RUN).read_text())
    except (OSError, ValueError):
        return ""
    if not isinstance(before, dict):
        return ""
    other = [name for name in {**before, **key} if before.get(name) != key.get(name)]
    return f"other {', '.join(other)}" if other else None


# ------------------------------------------------------------------------------------------
# one step, one file


@dataclass(frozen=True)
class _Content:
    """What a file holds: what is there twice in memory is written once, and read as one.

    Attributes:
        tensors: By place.
        records: Kind and fields of each, as JSON.
    """

    tensors: list[Tensor]
    records: list[Any]


def _write(path: Path, step: str, value: Any) -> None:
    """Write tensors one after the other: a copy of them all would need as much memory again."""
    content = _Content([], [])
    plain = _to_plain(value, content, {})
    about = {"step": step, "records": json.dumps(content.records), "value": json.dumps(plain)}
    header: dict[str, Any] = {"__metadata__": about}
    start = 0
    for number, tensor in enumerate(content.tensors):
        end = start + tensor.nbytes
        kind, shape = TYPES[tensor.dtype], list(tensor.shape)
        header[str(number)] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    _put(path, len(text).to_bytes(8, "little"), text, *map(_bytes, content.tensors))


def _bytes(tensor: Tensor) -> memoryview:
    if not tensor.numel():  # its stride may be 0, which has no view
        return memoryview(b"")
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _put(path: Path, *parts: bytes | memoryview) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}-{threading.get_ident()}")
    with partial.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read(path: Path) -> Any:
    try:
        with safe_open(path, framework="pt") as file:
            about, count = file.metadata(), len(file.keys())
            # Copies: sums may depend on where in memory numbers begin, and the file will go.
            tensors = [file.get_tensor(str(number)).clone() for number in range(count)]
        content = _Content(tensors, json.loads(about["records"]))
        return _from_plain(json.loads(about["value"]), content, {})
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise OutputError(
            f"{path} cannot be read: {error}.", hint="add --restart to do all of it again."
        ) from error


def _to_plain(value: Any, content: _Content, seen: dict[int, Any]) -> Any:
    """Turn a value into what JSON holds, with the places of its tensors and records."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in seen:
        return seen[id(value)]

    def inner(one: Any) -> Any:
        return _to_plain(one, content, seen)

    if isinstance(value, list | tuple):
        return {type(value).__name__: [inner(one) for one in value]}
    if isinstance(value, Mapping) and not isinstance(value, Curvatures):
        return {"dict": [[key, inner(one)] for key, one in value.items()]}
    if isinstance(value, Tensor):
        content.tensors.append(value)
        plain: dict[str, Any] = {"tensor": len(content.tensors) - 1}
        seen[id(value)] = plain
        if not value.is_contiguous():  # in another order in memory it might give other sums
            plain["stride"] = list(value.stride())
        return plain
    if isinstance(value, np.ndarray):
        # A copy in the same layout: torch warns of arrays that may not be written to.
        seen[id(value)] = {"array": inner(torch.from_numpy(np.array(value, order="K")))}
        return seen[id(value)]
    kind = type(value).__name__
    assert KINDS.get(kind) is type(value), kind
    content.records.append([kind, {key: inner(one) for key, one in vars(value).items()}])
    seen[id(value)] = {"record": len(content.records) - 1}
    return seen[id(value)]


def _from_plain(plain: Any, content: _Content, made: dict[int, Any]) -> Any:
    if not isinstance(plain, dict):
        return plain

    def inner(one: Any) -> Any:
        return _from_plain(one, content, made)

    if "tensor" in plain:
        return _laid_out(content.tensors, plain["tensor"], plain.get("stride"))
    if "array" in plain:
        return inner(plain["array"]).numpy()
    if "dict" in plain:
        return {key: inner(one) for key, one in plain["dict"]}
    if "list" in plain:
        return [inner(one) for one in plain["list"]]
    if "tuple" in plain:
        return tuple(inner(one) for one in plain["tuple"])
    number = plain["record"]
    if number not in made:
        name, fields = content.records[number]
        record: Any = object.__new__(KINDS[name])
        made[number] = record
        vars(record).update({key: inner(one) for key, one in fields.items()})
    return made[number]


def _laid_out(tensors: list[Tensor], number: int, stride: list[int] | None) -> Tensor:
    tensor = tensors[number]
    if stride is not None and list(tensor.stride()) != stride:
        laid = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype)
        tensors[number] = tensor = laid.copy_(tensor)
    return tensor

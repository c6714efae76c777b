"""Tensors that lie in files instead of in memory, so that a model may be larger than memory.

A file is mapped, so reading a tensor is reading memory; what was read stays resident until it is
given back (`give_back`), and can be read again from the file. Scratch files have no name: the
system removes them when the last tensor in them goes, also when the process is killed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from attar.errors import OutputError

# A model whose weights take more than this in float32 stays on disk: weights in memory are faster
# to use, but of a larger model they would be most of what a run needs.
HELD_AT_MOST_BYTES = 1 << 30
# Smaller tensors are not worth a page of their own.
SMALLEST_BYTES = 1 << 16
# Scratch files grow with what is in them, between these.
SMALLEST_FILE_BYTES, LARGEST_FILE_BYTES = 1 << 24, 1 << 28

# How a safetensors file spells number formats, in the order in which it holds tensors of them; and
# the bytes of the length in front of its header.
SAFETENSORS_TYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LENGTH_BYTES = 8

_GIVES_BACK = getattr(mmap, "MADV_DONTNEED", None)


class _Mappings:
    """Where in memory files are mapped; the only places that may be given back."""

    def __init__(self) -> None:
        self._known: list[tuple[int, int, weakref.ref[mmap.mmap]]] = []
        self._lock = Lock()

    def add(self, place: mmap.mmap, whole: Tensor) -> None:
        with self._lock:
            self._known = [one for one in self._known if one[2]() is not None]
            start = whole.data_ptr()
            self._known.append((start, start + whole.nbytes, weakref.ref(place)))

    def find(self, tensor: Tensor) -> tuple[mmap.mmap, int] | None:
        """Where a tensor is mapped, and where in the mapping it starts; None: it is in memory."""
        if not self._known or type(tensor) is DiskWeight or tensor.nbytes == 0:
            return None
        address = tensor.data_ptr()
        for start, end, known in self._known:
            if start <= address < end and (place := known()) is not None:
                return place, address - start
        return None

    def give_back(self, tensor: Tensor) -> None:
        found = self.find(tensor)
        if found is not None and _GIVES_BACK is not None:
            place, start = found
            first = start - start % mmap.PAGESIZE
            place.madvise(_GIVES_BACK, first, min(len(place), start + tensor.nbytes) - first)

    def give_all_back(self) -> None:
        for _, _, known in self._known:
            place = known()
            if place is not None and _GIVES_BACK is not None:
                place.madvise(_GIVES_BACK)


_mappings = _Mappings()


def on_disk(tensor: Tensor) -> bool:
    """Say whether a tensor lies in a file that is mapped here."""
    return type(tensor) is DiskWeight or _mappings.find(tensor) is not None


def give_back(*tensors: Tensor) -> None:
    """Let go of the memory in which mapped tensors were read; nothing happens to others."""
    for tensor in tensors:
        _mappings.give_back(tensor)


def give_all_back() -> None:
    """Let go of the memory of everything that is mapped."""
    _mappings.give_all_back()


def map_file(path: Path) -> Tensor:
    """Map a file as bytes; writing to the tensor does not change the file."""
    with path.open("rb") as file:
        return _mapped(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _mapped(place: mmap.mmap) -> Tensor:
    whole = torch.frombuffer(place, dtype=torch.uint8)
    _mappings.add(place, whole)
    return whole


# What only looks at a weight in another way, and needs no numbers.
_VIEWS = (
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.t.default,
)


class DiskWeight(Tensor):
    """A weight in float32 to whoever uses it, read from disk at each use and kept by none.

    Autograd keeps this tensor and not the numbers, so the way back reads them once more. What is
    computed is the same bit for bit as with the numbers in memory. It cannot be changed in place.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, stored: Tensor, *, transposed: bool = False) -> DiskWeight:
        """Make what looks like a tensor of float32 and has no numbers."""
        seen = stored.t() if transposed else stored
        weight: DiskWeight = Tensor._make_wrapper_subclass(
            cls, seen.shape, strides=seen.stride(), dtype=torch.float32
        )
        return weight

    def __init__(self, stored: Tensor, *, transposed: bool = False) -> None:
        self.stored, self.transposed = stored, transposed

    def __deepcopy__(self, memo: dict[int, Any]) -> DiskWeight:
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DiskWeight({tuple(self.shape)}, stored as {self.stored.dtype})"

    def dense(self) -> Tensor:
        """Read it: float32; only what is float32 on disk stays a mapped tensor."""
        read = self.stored.float()
        if read is not self.stored:
            give_back(self.stored)
        return read.t() if self.transposed else read

    def rows(self, places: Tensor) -> Tensor:
        """Read some rows: float32, `*places columns`."""
        read = torch.embedding(self.stored, places).float()
        give_back(self.stored)
        return read

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, first = kwargs or {}, args[0]
        if func in _VIEWS:
            turned = func is torch.ops.aten.t.default
            with torch.inference_mode(mode=False):  # a view is of the kind of what it looks at
                return DiskWeight(first.stored, transposed=first.transposed != turned)
        if func is torch.ops.aten.embedding.default and not first.transposed:
            return first.rows(args[1])
        if func._schema.is_mutable and isinstance(first, DiskWeight):
            raise RuntimeError("a weight that lies on disk cannot be changed in place")
        read: list[Tensor] = []

        def dense_of(value: Any) -> Any:
            if not isinstance(value, DiskWeight):
                return value
            read.append(value.stored)
            return value.dense()

        found = func(*tree_map(dense_of, args), **tree_map(dense_of, kwargs))
        give_back(*read)
        return found


def lying(tensor: Tensor) -> Tensor:
    """Make a mapped tensor a weight that is read at each use; leave one in memory as it is."""
    return DiskWeight(tensor) if on_disk(tensor) else tensor


def dense(weight: Tensor) -> Tensor:
    """A weight as numbers in memory, without a graph, wherever it lies."""
    if not isinstance(weight, DiskWeight):
        return weight.detach()
    read = weight.dense()
    if on_disk(read):
        read = read.clone()
        give_back(weight.stored)
    return read


def lies_on_disk(module: nn.Module) -> bool:
    """Whether weights of a module lie on disk; then what else is large should go there too."""
    return any(isinstance(weight, DiskWeight) for weight in module.parameters())


class Scratch:
    """Room for what takes much memory and is seldom looked at: in memory, or in nameless files.

    A file goes when all tensors in it are gone, so one of these is for things that go together.
    """

    def __init__(self, *, on_disk: bool) -> None:
        self._on_disk = on_disk
        self._file: Tensor | None = None
        self._used = 0
        self._lock = Lock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Make a tensor of zeros on disk, or one of any content in memory.

        Raises:
            OutputError: The disk is full.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        if not self._on_disk or size < SMALLEST_BYTES:
            return torch.empty(shape, dtype=dtype)
        room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        with self._lock:
            if self._file is None or self._used + room > len(self._file):
                grown = 0 if self._file is None else 2 * len(self._file)
                wanted = min(LARGEST_FILE_BYTES, max(SMALLEST_FILE_BYTES, grown))
                self._file, self._used = _scratch_file(max(room, wanted)), 0
            start, self._used = self._used, self._used + room
            return self._file[start : start + size].view(dtype).view(shape)

    def zeros(self, *shape: int) -> Tensor:
        """Make zeros in float32."""
        return self.empty(shape).zero_() if not self._on_disk else self._zeros_on_disk(shape)

    def _zeros_on_disk(self, shape: tuple[int, ...]) -> Tensor:
        found = self.empty(shape)
        return found if on_disk(found) else found.zero_()

    def moved(self, tensor: Tensor) -> Tensor:
        """Put a tensor here; in memory, the tensor itself."""
        if not self._on_disk or tensor.nbytes < SMALLEST_BYTES or on_disk(tensor):
            return tensor
        place = self.empty(tuple(tensor.shape), tensor.dtype)
        place.copy_(tensor)
        give_back(place)
        return place


def _scratch_file(size: int) -> Tensor:
    try:
        with tempfile.TemporaryFile(prefix="attar-") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # or a full disk would kill the process
            else:
                file.truncate(size)
            return _mapped(mmap.mmap(file.fileno(), size))
    except OSError as error:
        raise _no_room(size, error) from error


def _no_room(size: int, error: OSError) -> OutputError:
    return OutputError(
        f"{size:,} bytes of scratch do not fit in {tempfile.gettempdir()}: "
        f"{error.strerror or error}.",
        hint="free some space there, or name another folder in the environment variable TMPDIR.",
    )


class Stash:
    """Tensors put aside until the way back, in one nameless file that is used again and again."""

    def __init__(self, *, on_disk: bool) -> None:
        self._file = tempfile.TemporaryFile(prefix="attar-") if on_disk else None  # noqa: SIM115
        self._end = 0
        self._closes = None if self._file is None else weakref.finalize(self, self._file.close)

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Put a tensor aside; call what is returned to have it back, with the same strides.

        Raises:
            OutputError: The disk is full.
        """
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        if (
            self._file is None
            or type(tensor) is DiskWeight
            or tensor.nbytes < SMALLEST_BYTES
            or not tensor.permute(order).is_contiguous()
        ):
            return lambda: tensor
        file, start, shape, dtype = self._file, self._end, tensor.shape, tensor.dtype
        strides, size = tensor.stride(), tensor.nbytes
        self._end += size
        content = _bytes_of(tensor.detach().permute(order))
        try:
            _all_bytes(lambda part, at: os.pwrite(file.fileno(), part, start + at), content)
        except OSError as error:
            raise _no_room(size, error) from error

        def get() -> Tensor:
            found = torch.empty_strided(shape, strides, dtype=dtype)
            into = _bytes_of(found.permute(order))
            _all_bytes(lambda part, at: os.preadv(file.fileno(), [part], start + at), into)
            return found

        return get

    @contextmanager
    def of_autograd(self) -> Iterator[None]:
        """Put aside what autograd keeps of the operations in the block."""
        if self._file is None:
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(self.put, lambda get: get()):
            yield

    def clear(self) -> None:
        """Use the room again; what was put aside is lost."""
        self._end = 0

    def close(self) -> None:
        """Give the room back."""
        if self._closes is not None:
            self._closes()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _all_bytes(move: Callable[[memoryview, int], int], content: memoryview) -> None:
    """Repeat until everything is moved; the system may move less than it was asked to."""
    done = 0
    while done < len(content):
        moved = move(content[done:], done)
        if moved <= 0:
            raise OSError("a scratch file ended early")
        done += moved

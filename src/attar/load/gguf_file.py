"""Read a GGUF file: its metadata, and its tensors decoded to float32.

Written here instead of using `gguf.GGUFReader` because that one trusts the counts and offsets in
the file (a bad count makes it loop for years) and makes a numpy array per token of the vocabulary,
which costs seconds. The blocks themselves are decoded by `gguf.quants`.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attar.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# The type codes of the format: numpy's name for each.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in the file. `shape` is in torch's order: slowest dimension first."""

    shape: tuple[int, ...]
    type_code: int
    start: int
    n_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """What the header of a GGUF file says, checked against the size of the file."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.n_bytes for tensor in self.tensors.values())


class _Cursor:
    """A place in a file from which values are read in order, never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = 0

    def take(self, n_bytes: int) -> bytes:
        if n_bytes < 0 or self.offset + n_bytes > len(self.data):
            raise _BrokenError(f"it ends inside its header, at byte {len(self.data)}")
        piece = self.data[self.offset : self.offset + n_bytes]
        self.offset += n_bytes
        return piece

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    def text(self) -> str:
        # Some vocabularies hold tokens that are no whole UTF-8 characters.
        return self.take(self.u64()).decode("utf-8", errors="replace")

    def value(self, type_code: int) -> Any:
        if type_code == _STRING:
            return self.text()
        if type_code == _ARRAY:
            return self._array()
        return self._numbers(type_code, 1)[0]

    def _numbers(self, type_code: int, count: int) -> list[Any]:
        if type_code not in _SCALARS:
            raise _BrokenError(f"it holds a value of the unknown type {type_code}")
        dtype = np.dtype(_SCALARS[type_code])
        numbers: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return numbers

    def _array(self) -> list[Any]:
        type_code, count = self.u32(), self.u64()
        if type_code == _ARRAY:
            raise _BrokenError("it holds an array of arrays, which no model needs")
        if type_code != _STRING:
            return self._numbers(type_code, count)
        if count > len(self.data):  # every string takes 8 bytes or more
            raise _BrokenError(f"it claims an array of {count} strings")
        return [self.text() for _ in range(count)]


class _BrokenError(Exception):
    """What is wrong with the file, as the end of a sentence; never leaves this file."""


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file.

    Raises:
        ModelError: Not a GGUF file, damaged, truncated, or of a version or type not known here.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_header(path, _Cursor(data))
    except (_BrokenError, ValueError) as error:
        raise ModelError(
            f"{path.name} is not a readable GGUF file: {error}",
            hint="fetch or convert the file again; it may have been cut off",
        ) from error
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}", hint="check the path and its permissions"
        ) from error


def _read_header(path: Path, cursor: _Cursor) -> GgufFile:
    if cursor.take(4) != _MAGIC:
        raise _BrokenError("it does not start with 'GGUF'")
    version = cursor.u32()
    if version not in _VERSIONS:
        raise _BrokenError(f"its version is {version}; versions 2 and 3, little-endian, are known")
    n_tensors, n_values = cursor.u64(), cursor.u64()
    if n_tensors + n_values > len(cursor.data):  # each takes more than one byte
        raise _BrokenError(f"it claims {n_tensors} tensors and {n_values} values")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        name = cursor.text()
        if name in metadata:
            raise _BrokenError(f"it states {name} twice")
        metadata[name] = cursor.value(cursor.u32())
    places: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(n_tensors):
        name = cursor.text()
        if name in places:
            raise _BrokenError(f"it holds the tensor {name} twice")
        places[name] = _read_place(cursor, name)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise _BrokenError(f"its alignment is {alignment}")
    start = -(-cursor.offset // alignment) * alignment
    size = len(cursor.data)
    tensors = {name: _locate(name, place, start, size) for name, place in places.items()}
    return GgufFile(path, metadata, tensors)


def _read_place(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], int, int]:
    n_dimensions = cursor.u32()
    if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
        raise _BrokenError(f"the tensor {name} claims {n_dimensions} dimensions")
    shape = tuple(cursor.u64() for _ in range(n_dimensions))[::-1]
    return shape, cursor.u32(), cursor.u64()


def _locate(
    name: str, place: tuple[tuple[int, ...], int, int], data_start: int, file_size: int
) -> GgufTensor:
    import gguf

    shape, type_code, offset = place
    try:
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_code)]
    except (ValueError, KeyError) as error:
        raise _BrokenError(f"the tensor {name} has the unknown type {type_code}") from error
    if shape[-1] % block:
        raise _BrokenError(f"rows of the tensor {name} are not whole blocks of {block}")
    n_bytes = math.prod(shape) // block * block_bytes
    start = data_start + offset
    if n_bytes == 0 or start + n_bytes > file_size:
        raise _BrokenError(
            f"the tensor {name} needs bytes up to {start + n_bytes}, the file has {file_size}"
        )
    return GgufTensor(shape, type_code, start, n_bytes)


def decode_tensor(file: GgufFile, name: str) -> Tensor:
    """Decode one tensor to float32.

    Raises:
        ModelError: `gguf` cannot decode this type.
    """
    import gguf

    place = file.tensors[name]
    quantization = gguf.GGMLQuantizationType(place.type_code)
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    row_bytes = place.shape[-1] // block * block_bytes
    raw = np.fromfile(file.path, np.uint8, count=place.n_bytes, offset=place.start)
    try:
        values = gguf.quants.dequantize(raw.reshape(*place.shape[:-1], row_bytes), quantization)
    except NotImplementedError as error:
        raise ModelError(
            f"the tensor {name} is stored as {quantization.name}, which cannot be decoded here",
            hint="convert the model to Q8_0 or F16 first",
        ) from error
    array = np.ascontiguousarray(values, dtype=np.float32).reshape(place.shape)
    return torch.from_numpy(array)

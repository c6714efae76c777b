"""The block types of llama.cpp: which values a block can hold, and how its bytes are laid out.

A block is a run of columns in one row, cut into equal parts:

    weight = (d · sub_scale[part]) · level(code) − dmin · sub_min[part]

with d and dmin in float16, a sub-scale and a sub-minimum for each part in a few bits (types without
parts have d alone, and the sub-scale 1), and a code for each weight.

Source: ggml-common.h and ggml-quants.c of llama.cpp (https://github.com/ggml-org/llama.cpp, MIT),
as also read by the package `gguf`, whose decoder the tests compare every type with, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

UInt8s = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Blocks:
    """The numbers of n blocks, before they are packed or after.

    Attributes:
        d: `n`, float16.
        dmin: `n`, float16: what a sub-minimum of 1 stands for, or an offset; zeros where unused.
        scales: `n parts`, whole numbers.
        mins: `n parts`, whole numbers, 0 or more.
        codes: `n columns`, from 0.
    """

    d: np.ndarray
    dmin: np.ndarray
    scales: np.ndarray
    mins: np.ndarray
    codes: np.ndarray


@dataclass(frozen=True)
class BlockType:
    """One type.

    Attributes:
        number: llama.cpp's.
        columns: In one block.
        parts: Of equal size.
        block_bytes: Bytes of one block.
        bits: Of a code.
        zero: The code whose level is 0, where levels are whole numbers and there is no minimum.
        scale_limits: Smallest and largest sub-scale; (1, 1) where there are none.
        largest_min: Largest sub-minimum; 0 where there are none.
        pack: To `n block_bytes`.
        unpack: Back.
        levels: Of each code, where they are no whole numbers in a row.
        unit: What a sub-scale of 1 stands for, in d.
        vectors: Where a code is a level with its sign: the sizes that neighbours can have together.
    """

    number: int
    columns: int
    parts: int
    block_bytes: int
    bits: int
    zero: int
    scale_limits: tuple[int, int]
    largest_min: int
    pack: Callable[[Blocks], UInt8s]
    unpack: Callable[[UInt8s], Blocks]
    levels: tuple[int, ...] | None = None
    unit: float = 1.0
    vectors: Callable[[], npt.NDArray[np.float32]] | None = None

    @property
    def has_minimum(self) -> bool:
        """Whether values have an offset of their own."""
        return self.largest_min > 0


# --- pieces of which layouts are made


def _half(x: np.ndarray) -> UInt8s:
    raw: UInt8s = x.astype("<f2").reshape(-1, 1).view(np.uint8)
    return raw


def _to_half(raw: UInt8s) -> np.ndarray:
    return np.ascontiguousarray(raw).view("<f2").reshape(-1)


def _nibbles(codes: np.ndarray, width: int) -> UInt8s:
    """Codes of 4 bits: in each run of 2 · width, the first half low and the second half high."""
    pairs = codes.reshape(len(codes), -1, 2, width)
    both = pairs[:, :, 0] | pairs[:, :, 1] << 4
    packed: UInt8s = both.reshape(len(codes), -1).astype(np.uint8)
    return packed


def _from_nibbles(raw: UInt8s, width: int) -> np.ndarray:
    runs = raw.reshape(len(raw), -1, 1, width)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(raw), -1)


def _quarters(codes: np.ndarray) -> UInt8s:
    """Codes of 2 bits: four runs of 32 in each 128 columns share 32 bytes."""
    runs = codes.reshape(len(codes), -1, 4, 32)
    shifted = runs << np.array([0, 2, 4, 6])[:, None]
    joined = np.bitwise_or.reduce(shifted, axis=2)
    packed: UInt8s = joined.reshape(len(codes), -1).astype(np.uint8)
    return packed


def _from_quarters(raw: UInt8s) -> np.ndarray:
    runs = raw.reshape(len(raw), -1, 1, 32)
    return np.asarray(runs >> np.array([0, 2, 4, 6])[:, None] & 3).reshape(len(raw), -1)


def _bits(flags: np.ndarray) -> UInt8s:
    """One bit each: eight runs of 32 share 32 bytes."""
    runs = flags.reshape(len(flags), 8, 32) << np.arange(8)[:, None]
    packed: UInt8s = np.bitwise_or.reduce(runs, axis=1).astype(np.uint8)
    return packed


def _from_bits(raw: UInt8s) -> np.ndarray:
    return (raw[:, None] >> np.arange(8)[:, None] & 1).reshape(len(raw), -1)


def _six_bit_pairs(scales: np.ndarray, mins: np.ndarray) -> UInt8s:
    """Eight sub-scales and eight sub-minima of 6 bits in 12 bytes."""
    low = scales[:, :4] | scales[:, 4:] >> 4 << 6
    middle = mins[:, :4] | mins[:, 4:] >> 4 << 6
    high = scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4
    return np.concatenate([low, middle, high], axis=1).astype(np.uint8)


def _from_six_bit_pairs(raw: UInt8s) -> tuple[np.ndarray, np.ndarray]:
    low, middle, high = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=1)
    mins = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=1)
    return scales.astype(np.int64), mins.astype(np.int64)


def _six_bits(scales: np.ndarray) -> UInt8s:
    """Sixteen sub-scales from -32 to 31 in 12 bytes: low halves first, then high quarters."""
    shifted = scales + 32
    low = shifted[:, :8] & 15 | (shifted[:, 8:] & 15) << 4
    high = shifted.reshape(-1, 4, 4) >> 4 << np.array([0, 2, 4, 6])[:, None]
    packed = np.concatenate([low, np.bitwise_or.reduce(high, axis=1)], axis=1)
    return np.asarray(packed, np.uint8)


def _from_six_bits(raw: UInt8s) -> np.ndarray:
    low = np.concatenate([raw[:, :8] & 15, raw[:, :8] >> 4], axis=1)
    high = (raw[:, None, 8:] >> np.array([0, 2, 4, 6])[:, None] & 3).reshape(-1, 16)
    return np.asarray(low | high << 4, np.int64) - 32


def _plain(d: np.ndarray, codes: np.ndarray, dmin: np.ndarray | None = None) -> Blocks:
    ones = np.ones((len(d), 1), np.int64)
    used = np.zeros_like(d) if dmin is None else dmin
    return Blocks(d, used, ones, ones * (dmin is not None), codes.astype(np.int64))


# --- the layouts


def _pack_small(b: Blocks, *, with_min: bool, fifth_bit: bool) -> UInt8s:
    parts = [_half(b.d), *([_half(-b.dmin)] if with_min else [])]
    if fifth_bit:
        flags = (b.codes >> 4 & 1).reshape(-1, 4, 8) << np.arange(8)
        parts.append(flags.sum(2).astype(np.uint8))
    return np.concatenate([*parts, _nibbles(b.codes & 15, 16)], axis=1)


def _unpack_small(raw: UInt8s, *, with_min: bool, fifth_bit: bool) -> Blocks:
    at = 4 if with_min else 2
    codes = _from_nibbles(raw[:, -16:], 16)
    if fifth_bit:
        flags = (raw[:, at : at + 4, None] >> np.arange(8) & 1).reshape(len(raw), 32)
        codes = codes | flags << 4
    # The file adds its minimum, and a block here takes one away.
    dmin = -_to_half(raw[:, 2:4]) if with_min else None
    return _plain(_to_half(raw[:, :2]), codes, dmin)


def _small(number: int, bits: int, *, with_min: bool) -> BlockType:
    fifth = bits == 5
    size = 2 + 2 * with_min + 4 * fifth + 16
    return BlockType(
        number, 32, 1, size, bits, 0 if with_min else 1 << bits - 1, (1, 1), int(with_min),
        lambda b: _pack_small(b, with_min=with_min, fifth_bit=fifth),
        lambda raw: _unpack_small(raw, with_min=with_min, fifth_bit=fifth),
    )  # fmt: skip


def _pack_q8(b: Blocks) -> UInt8s:
    return np.concatenate([_half(b.d), (b.codes - 128).astype(np.int8).view(np.uint8)], axis=1)


def _unpack_q8(raw: UInt8s) -> Blocks:
    codes = np.ascontiguousarray(raw[:, 2:]).view(np.int8).astype(np.int64) + 128
    return _plain(_to_half(raw[:, :2]), codes)


def _pack_q2(b: Blocks) -> UInt8s:
    scales = (b.scales | b.mins << 4).astype(np.uint8)
    return np.concatenate([scales, _quarters(b.codes), _half(b.d), _half(b.dmin)], axis=1)


def _unpack_q2(raw: UInt8s) -> Blocks:
    scales = raw[:, :16].astype(np.int64)
    d, dmin = _to_half(raw[:, 80:82]), _to_half(raw[:, 82:])
    return Blocks(d, dmin, scales & 15, scales >> 4, _from_quarters(raw[:, 16:80]))


def _pack_q3(b: Blocks) -> UInt8s:
    parts = [_bits(b.codes >> 2), _quarters(b.codes & 3), _six_bits(b.scales), _half(b.d)]
    return np.concatenate(parts, axis=1)


def _unpack_q3(raw: UInt8s) -> Blocks:
    codes = _from_quarters(raw[:, 32:96]) | _from_bits(raw[:, :32]) << 2
    scales, d = _from_six_bits(raw[:, 96:108]), _to_half(raw[:, 108:])
    return Blocks(d, np.zeros_like(d), scales, np.zeros_like(scales), codes)


def _pack_q4(b: Blocks) -> UInt8s:
    head = [_half(b.d), _half(b.dmin), _six_bit_pairs(b.scales, b.mins)]
    return np.concatenate([*head, _nibbles(b.codes, 32)], axis=1)


def _pack_q5(b: Blocks) -> UInt8s:
    head = [_half(b.d), _half(b.dmin), _six_bit_pairs(b.scales, b.mins)]
    return np.concatenate([*head, _bits(b.codes >> 4), _nibbles(b.codes & 15, 32)], axis=1)


def _unpack_q45(raw: UInt8s) -> Blocks:
    scales, mins = _from_six_bit_pairs(raw[:, 4:16])
    codes = _from_nibbles(raw[:, -128:], 32)
    if raw.shape[1] == 176:
        codes = codes | _from_bits(raw[:, 16:48]) << 4
    return Blocks(_to_half(raw[:, :2]), _to_half(raw[:, 2:4]), scales, mins, codes)


def _pack_q6(b: Blocks) -> UInt8s:
    low = _nibbles(b.codes & 15, 64)
    high = _quarters(b.codes >> 4)
    return np.concatenate([low, high, b.scales.astype(np.int8).view(np.uint8), _half(b.d)], axis=1)


def _unpack_q6(raw: UInt8s) -> Blocks:
    codes = _from_nibbles(raw[:, :128], 64) | _from_quarters(raw[:, 128:192]) << 4
    scales = np.ascontiguousarray(raw[:, 192:208]).view(np.int8).astype(np.int64)
    d = _to_half(raw[:, 208:])
    return Blocks(d, np.zeros_like(d), scales, np.zeros_like(scales), codes)


def _pack_iq4(b: Blocks) -> UInt8s:
    shifted = b.scales + 32
    high = (shifted >> 4 << 2 * np.arange(8)).sum(1).astype("<u2").view(np.uint8).reshape(-1, 2)
    low = (shifted[:, ::2] & 15 | (shifted[:, 1::2] & 15) << 4).astype(np.uint8)
    return np.concatenate([_half(b.d), high, low, _nibbles(b.codes, 16)], axis=1)


def _unpack_iq4(raw: UInt8s) -> Blocks:
    high = np.ascontiguousarray(raw[:, 2:4]).view("<u2").astype(np.int64) >> 2 * np.arange(8) & 3
    low = np.stack([raw[:, 4:8] & 15, raw[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    d, scales = _to_half(raw[:, :2]), (low | high << 4) - 32
    return Blocks(d, np.zeros_like(d), scales, np.zeros_like(scales), _from_nibbles(raw[:, 8:], 16))


# --- vectors of a list, with free signs


@cache
def _sizes(name: str) -> npt.NDArray[np.float32]:
    """Read the list from the package `gguf`, `vectors width`, all above 0."""
    import gguf

    kind: Any = getattr(gguf.quants, name)
    kind.init_grid()
    sizes: npt.NDArray[np.float32] = kind.grid[0, 0].astype(np.float32)
    return sizes


def _places(codes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Find the vector of each few neighbours: `n vectors`."""
    keys = 64 ** np.arange(sizes.shape[1], dtype=np.int64)
    listed = sizes.astype(np.int64) @ keys
    order = np.argsort(listed)
    wanted = np.abs(codes).reshape(len(codes), -1, sizes.shape[1]) @ keys
    return np.asarray(order[np.searchsorted(listed[order], wanted)])


def _signs(codes: np.ndarray) -> UInt8s:
    flags = (codes < 0).reshape(len(codes), -1, 8)
    packed: UInt8s = np.packbits(flags, axis=2, bitorder="little").reshape(len(codes), -1)
    return packed


def _signed(places: np.ndarray, sizes: np.ndarray, signs: UInt8s) -> np.ndarray:
    levels = sizes[places].reshape(len(places), -1).astype(np.int64)
    negative = np.unpackbits(signs, axis=1, bitorder="little")
    return np.asarray(np.where(negative, -levels, levels))


def _high_bits(places: np.ndarray, width: int) -> UInt8s:
    """What does not fit a byte: `width` bits each, 8 / width in a byte."""
    shares = (places >> 8).reshape(len(places), -1, 8 // width) << width * np.arange(8 // width)
    packed: UInt8s = shares.sum(2).astype(np.uint8)
    return packed


def _from_high_bits(raw: UInt8s, width: int) -> np.ndarray:
    shares = raw[:, :, None].astype(np.int64) >> width * np.arange(8 // width) & (1 << width) - 1
    return np.asarray(shares.reshape(len(raw), -1) << 8)


def _odd_scales(scales: np.ndarray) -> UInt8s:
    half = scales >> 1
    packed: UInt8s = (half[:, ::2] | half[:, 1::2] << 4).astype(np.uint8)
    return packed


def _from_odd_scales(raw: UInt8s) -> np.ndarray:
    half = np.stack([raw & 15, raw >> 4], axis=2).reshape(len(raw), -1)
    return np.asarray(2 * half.astype(np.int64) + 1)


def _pack_iq3(b: Blocks) -> UInt8s:
    places = _places(b.codes, _sizes("IQ3_S"))
    parts = [(places & 255).astype(np.uint8), _high_bits(places, 1), _signs(b.codes)]
    return np.concatenate([_half(b.d), *parts, _odd_scales(b.scales)], axis=1)


def _unpack_iq3(raw: UInt8s) -> Blocks:
    places = raw[:, 2:66] | _from_high_bits(raw[:, 66:74], 1)
    codes = _signed(places, _sizes("IQ3_S"), raw[:, 74:106])
    d, scales = _to_half(raw[:, :2]), _from_odd_scales(raw[:, 106:])
    return Blocks(d, np.zeros_like(d), scales, np.zeros_like(scales), codes)


def _pack_iq2(b: Blocks) -> UInt8s:
    places = _places(b.codes, _sizes("IQ2_S"))
    parts = [(places & 255).astype(np.uint8), _signs(b.codes), _high_bits(places, 2)]
    return np.concatenate([_half(b.d), *parts, _odd_scales(b.scales)], axis=1)


def _unpack_iq2(raw: UInt8s) -> Blocks:
    places = raw[:, 2:34] | _from_high_bits(raw[:, 66:74], 2)
    codes = _signed(places, _sizes("IQ2_S"), raw[:, 34:66])
    d, scales = _to_half(raw[:, :2]), _from_odd_scales(raw[:, 74:])
    return Blocks(d, np.zeros_like(d), scales, np.zeros_like(scales), codes)


_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

TYPES: dict[str, BlockType] = {
    "Q2_K": BlockType(10, 256, 16, 84, 2, 0, (0, 15), 15, _pack_q2, _unpack_q2),
    "Q3_K": BlockType(11, 256, 16, 110, 3, 4, (-32, 31), 0, _pack_q3, _unpack_q3),
    "Q4_K": BlockType(12, 256, 8, 144, 4, 0, (0, 63), 63, _pack_q4, _unpack_q45),
    "Q5_K": BlockType(13, 256, 8, 176, 5, 0, (0, 63), 63, _pack_q5, _unpack_q45),
    "Q6_K": BlockType(14, 256, 16, 210, 6, 32, (-128, 127), 0, _pack_q6, _unpack_q6),
    "Q4_0": _small(2, 4, with_min=False),
    "Q4_1": _small(3, 4, with_min=True),
    "Q5_0": _small(6, 5, with_min=False),
    "Q5_1": _small(7, 5, with_min=True),
    "Q8_0": BlockType(8, 32, 1, 34, 8, 128, (1, 1), 0, _pack_q8, _unpack_q8),
    "IQ4_NL": BlockType(
        20, 32, 1, 18, 4, 0, (1, 1), 0,
        lambda b: _pack_small(b, with_min=False, fifth_bit=False),
        lambda raw: _unpack_small(raw, with_min=False, fifth_bit=False),
        _NL_LEVELS,
    ),
    "IQ4_XS": BlockType(
        23, 256, 8, 136, 4, 0, (-32, 31), 0, _pack_iq4, _unpack_iq4, _NL_LEVELS
    ),
    "IQ3_S": BlockType(
        21, 256, 8, 110, 3, 0, (1, 31), 0, _pack_iq3, _unpack_iq3,
        vectors=lambda: _sizes("IQ3_S"),
    ),
    "IQ2_S": BlockType(
        22, 256, 16, 82, 2, 0, (1, 31), 0, _pack_iq2, _unpack_iq2, unit=0.125,
        vectors=lambda: _sizes("IQ2_S"),
    ),
}  # fmt: skip
"""llama.cpp's name of a type to what it is."""

"""Codes of 1 to 8 bits in a dense stream of bytes: exactly ceil(n · bits / 8) of them.

Bit order is little-endian throughout: code i fills bits i·bits … i·bits + bits − 1 of the stream,
lowest first, and bit j of the stream is bit j % 8 of byte j // 8. Unused bits of the last byte
are 0.

`reference_pack` and `reference_unpack` are the definition; `pack` and `unpack` must equal them.
The fast ones use that 8 codes fill exactly `bits` bytes: those bytes are read as one 64-bit word,
and three shift-or-and steps spread its 8 codes over the 8 bytes of the word (or gather them). They
view bytes as words, so they need a little-endian machine, as every machine torch supports is.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor

from attar.errors import ModelError

CODES_PER_WORD = BYTES_PER_WORD = 8
# 256 KiB of 64-bit words: the word buffers of a chunk stay in the second-level cache.
CHUNK_WORDS = 1 << 15


def packed_bytes(n: int, bits: int) -> int:
    """Count the bytes of `n` packed codes."""
    return (n * bits + 7) // 8


def reference_pack(codes: UInt8[Tensor, " n"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Set bit by bit. Slow and obvious."""
    packed = [0] * packed_bytes(codes.numel(), bits)
    for i, code in enumerate(codes.tolist()):
        for k in range(bits):
            position = i * bits + k
            packed[position // 8] |= (code >> k & 1) << position % 8
    return torch.tensor(packed, dtype=torch.uint8)


def reference_unpack(packed: UInt8[Tensor, " bytes"], bits: int, n: int) -> UInt8[Tensor, " n"]:
    """Read bit by bit. Slow and obvious."""
    source, codes = packed.tolist(), [0] * n
    for i in range(n):
        for k in range(bits):
            position = i * bits + k
            codes[i] |= (source[position // 8] >> position % 8 & 1) << k
    return torch.tensor(codes, dtype=torch.uint8)


def pack(codes: UInt8[Tensor, " n"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Pack codes densely.

    Args:
        codes: Each 0 to 2**bits - 1.
        bits: 1 to 8.
    """
    assert 1 <= bits <= 8
    n = codes.numel()
    assert n == 0 or int(codes.max()) < 1 << bits
    if bits == 8:
        return codes.clone()
    n_words = -(-n // CODES_PER_WORD)
    packed = codes.new_empty(n_words, bits)
    words = torch.zeros(min(n_words, CHUNK_WORDS), dtype=torch.int64, device=codes.device)
    shifted = torch.empty_like(words)
    for start in range(0, n_words, CHUNK_WORDS):
        chunk = codes[start * CODES_PER_WORD : (start + CHUNK_WORDS) * CODES_PER_WORD]
        size = -(-chunk.numel() // CODES_PER_WORD)
        word, shift = words[:size], shifted[:size]
        word[-1] = 0  # the codes may end inside the last word
        word.view(torch.uint8)[: chunk.numel()] = chunk
        for distance, lower, upper in reversed(_steps(bits)):
            torch.bitwise_right_shift(word, distance, out=shift)
            word.bitwise_and_(lower).bitwise_or_(shift.bitwise_and_(upper))
        packed[start : start + size] = word.view(torch.uint8).view(size, BYTES_PER_WORD)[:, :bits]
    return packed.view(-1)[: packed_bytes(n, bits)]


def unpack(packed: UInt8[Tensor, " bytes"], bits: int, n: int) -> UInt8[Tensor, " n"]:
    """Undo `pack`.

    Args:
        packed: ceil(n · bits / 8) bytes.
        bits: 1 to 8.
        n: How many codes were packed.

    Raises:
        ModelError: The number of bytes is not what `n` codes fill.
    """
    assert 1 <= bits <= 8
    if packed.numel() != packed_bytes(n, bits):
        raise ModelError(
            f"{packed.numel()} bytes are stored where {n} codes of {bits} bits fill "
            f"{packed_bytes(n, bits)}.",
            hint="the model file is damaged or edited; compress or download it again.",
        )
    if bits == 8:
        return packed.clone()
    n_words = -(-n // CODES_PER_WORD)
    codes = packed.new_empty(n_words * CODES_PER_WORD)
    words = codes.view(torch.int64)
    buffer = packed.new_zeros(min(n_words, CHUNK_WORDS), BYTES_PER_WORD)
    shifted = torch.empty(len(buffer), dtype=torch.int64, device=packed.device)
    for start in range(0, n_words, CHUNK_WORDS):
        word = words[start : start + CHUNK_WORDS]
        shift = shifted[: len(word)]
        chunk = packed[start * bits : (start + len(word)) * bits]
        buffer[: len(word), :bits] = _padded(chunk, bits)
        word.copy_(buffer.view(torch.int64).view(-1)[: len(word)])
        for distance, lower, upper in _steps(bits):
            torch.bitwise_left_shift(word, distance, out=shift)
            word.bitwise_and_(lower).bitwise_or_(shift.bitwise_and_(upper << distance))
    return codes[:n]


def _steps(bits: int) -> tuple[tuple[int, int, int], ...]:
    """List how one lane of 8 codes becomes 2 lanes of 4, then 4 of 2, then 8 of 1.

    Each step splits every lane in two: (how far its upper half moves, mask of the lower halves,
    mask of the upper halves before they move).
    """
    steps = []
    for lanes in (2, 4, 8):
        width, stride = CODES_PER_WORD // lanes * bits, 64 // lanes
        lower = sum(((1 << width) - 1) << lane * stride for lane in range(0, lanes, 2))
        steps.append((stride - width, lower, lower << width))
    return tuple(steps)


def _padded(packed: UInt8[Tensor, " bytes"], bits: int) -> UInt8[Tensor, "words width"]:
    """See bytes as one row for each word; a last row that is cut short is filled with zeros."""
    missing = -packed.numel() % bits
    if missing:
        packed = torch.cat([packed, packed.new_zeros(missing)])
    return packed.view(-1, bits)

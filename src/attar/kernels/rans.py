"""Range coding of small whole numbers: as many bits as they hold information, give or take 0.3%.

`reference_decode` is the definition of the stored form; `encode` and `decode` do the same with many
lanes at once. Symbol i belongs to lane i mod L. Every lane has a state of 32 bits that gives its
symbols one after the other; when a state falls below 2**16, the next 16 stored bits are moved into
it, lanes in turn. The states at the end must be what they were at the start, so that damage shows.

Source: Duda 2013, Asymmetric numeral systems, https://arxiv.org/abs/1311.2540, section 2 (range
variant); lanes that share one stream as in Giesen 2014, Interleaved entropy coders,
https://arxiv.org/abs/1402.3392, section 2.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Real, UInt8, UInt16, UInt32, UInt64

from attar.errors import ModelError

PRECISION = 14  # bits of a probability: every context's frequencies sum to 2**PRECISION
TOTAL = 1 << PRECISION
LOWEST = 1 << 16  # a state is at least this, and below 2**32
STATE_BYTES = 4
# Symbols of one lane: each lane costs about two bytes, and each of its symbols one step of a loop.
SYMBOLS_PER_LANE = 4096
STEPS_AT_ONCE = 64  # for which what depends on no state is looked up together

Frequencies = UInt32[np.ndarray, "contexts symbols"]


def n_lanes(n_symbols: int) -> int:
    """Lanes for so many symbols."""
    return max(1, -(-n_symbols // SYMBOLS_PER_LANE))


def normalised(counts: Real[np.ndarray, "contexts symbols"]) -> Frequencies:
    """Scale counts so that each context's sum to TOTAL and no symbol that occurs gets 0.

    Whole numbers only, so that it comes out the same everywhere. A context without counts is all
    its first symbol.
    """
    wide = counts.astype(np.int64)
    wide[wide.sum(1) == 0, 0] = 1
    occurs = wide > 0
    left = TOTAL - occurs.sum(1, keepdims=True)  # each that occurs has one for sure
    scaled = occurs + wide * left // wide.sum(1, keepdims=True)
    scaled[np.arange(len(wide)), wide.argmax(1)] += TOTAL - scaled.sum(1)
    frequencies: Frequencies = scaled.astype(np.uint32)
    return frequencies


def estimated_bytes(n_symbols: int, bits: float) -> float:
    """Bytes of symbols that take `bits` by their frequencies; never less than what they take."""
    # Every state is stored whole, though it holds 8 to 16 bits of the symbols.
    return STATE_BYTES * n_lanes(n_symbols) + 1.0001 * bits / 8


def encode(
    symbols: UInt16[np.ndarray, " n"], contexts: UInt8[np.ndarray, " n"], frequencies: Frequencies
) -> UInt8[np.ndarray, " bytes"]:
    """Code symbols, each by the frequencies of its context.

    Args:
        frequencies: From `normalised`; every symbol must have one above 0 in its context.
    """
    n, lanes = len(symbols), n_lanes(len(symbols))
    starts = _starts(frequencies)
    state = np.full(lanes, LOWEST, np.uint64)
    words: list[UInt64[np.ndarray, " _"]] = []
    for begin in reversed(range(0, n, lanes * STEPS_AT_ONCE)):
        part = slice(begin, begin + lanes * STEPS_AT_ONCE)
        frequency = frequencies[contexts[part], symbols[part]].astype(np.uint64)
        start = starts[contexts[part], symbols[part]]
        limit = frequency << np.uint64(32 - PRECISION)
        for step in reversed(range(0, len(frequency), lanes)):
            own = slice(step, step + lanes)
            active = state[: len(frequency[own])]  # the last step may not fill all lanes
            full = active >= limit[own]
            words.append(active[full])
            active >>= full * np.uint64(16)
            whole, rest = np.divmod(active, frequency[own])
            whole <<= np.uint64(PRECISION)
            whole += rest
            np.add(whole, start[own], out=active)
    stream = np.concatenate([np.empty(0, np.uint64), *reversed(words)]) & np.uint64(0xFFFF)
    parts = state.astype("<u4").view(np.uint8), stream.astype("<u2").view(np.uint8)
    return np.concatenate(parts)


def decode(
    stored: UInt8[np.ndarray, " bytes"], contexts: UInt8[np.ndarray, " n"], frequencies: Frequencies
) -> UInt16[np.ndarray, " n"]:
    """Undo `encode`; what lies behind the coded bytes is not read.

    Raises:
        ModelError: These bytes are not what `encode` made with these frequencies.
    """
    n, lanes = len(contexts), n_lanes(len(contexts))
    states, words = _parts(stored, lanes)
    table = _table(frequencies)
    symbols = np.empty(n, np.uint16)
    position = 0
    for begin in range(0, n, lanes * STEPS_AT_ONCE):
        part = slice(begin, begin + lanes * STEPS_AT_ONCE)
        entry = contexts[part].astype(np.uint64) << np.uint64(PRECISION)
        for step in range(0, len(entry), lanes):
            own = entry[step : step + lanes]
            state = states[: len(own)]
            own += state & np.uint64(TOTAL - 1)
            own[:] = table[own]
            state >>= np.uint64(PRECISION)
            state *= own & np.uint64(0xFFFF)
            state += own >> np.uint64(16) & np.uint64(0xFFFF)
            low = np.flatnonzero(state < LOWEST)
            end = position + len(low)
            if end > len(words):
                raise _damaged("it ends too early.")
            state[low] = state[low] << np.uint64(16) | words[position:end]
            position = end
        symbols[part] = entry >> np.uint64(32)
    if bool((states != LOWEST).any()):
        raise _damaged("its end does not fit its start.")
    return symbols


def reference_decode(stored: bytes, contexts: list[int], frequencies: list[list[int]]) -> list[int]:
    """Decode one symbol after the other, in plain whole numbers. Slow and obvious."""
    lanes = n_lanes(len(contexts))
    states = [int.from_bytes(stored[4 * i : 4 * i + 4], "little") for i in range(lanes)]
    position, symbols = 4 * lanes, []
    for i, context in enumerate(contexts):
        state, symbol, start = states[i % lanes], 0, 0
        slot = state % TOTAL
        while start + frequencies[context][symbol] <= slot:
            start += frequencies[context][symbol]
            symbol += 1
        state = frequencies[context][symbol] * (state // TOTAL) + slot - start
        if state < LOWEST:
            state = state * 65536 + int.from_bytes(stored[position : position + 2], "little")
            position += 2
        states[i % lanes] = state
        symbols.append(symbol)
    assert states == [LOWEST] * lanes
    return symbols


def _starts(frequencies: Frequencies) -> UInt64[np.ndarray, "contexts symbols"]:
    wide = frequencies.astype(np.uint64)
    starts: UInt64[np.ndarray, "contexts symbols"] = np.cumsum(wide, axis=1) - wide
    return starts


def _table(frequencies: Frequencies) -> UInt64[np.ndarray, " slots"]:
    """For every slot of every context: frequency, slot − start and symbol, from 16 bits to 16."""
    contexts, n = frequencies.shape
    symbol = np.repeat(np.tile(np.arange(n), contexts), frequencies.ravel())
    context = np.repeat(np.arange(contexts), TOTAL)
    past = np.tile(np.arange(TOTAL, dtype=np.uint64), contexts)
    past -= _starts(frequencies)[context, symbol]
    frequency = frequencies[context, symbol].astype(np.uint64)
    table: UInt64[np.ndarray, " slots"] = frequency | past << np.uint64(16)
    table |= symbol.astype(np.uint64) << np.uint64(32)
    return table


def _parts(
    stored: UInt8[np.ndarray, " bytes"], lanes: int
) -> tuple[UInt64[np.ndarray, " lanes"], UInt64[np.ndarray, " words"]]:
    """Split into states and words; an odd last byte is padding."""
    if len(stored) < STATE_BYTES * lanes:
        raise _damaged("it is too short.")
    states = stored[: STATE_BYTES * lanes].copy().view("<u4").astype(np.uint64)
    rest = stored[STATE_BYTES * lanes :]
    return states, rest[: len(rest) // 2 * 2].copy().view("<u2").astype(np.uint64)


def _damaged(problem: str) -> ModelError:
    return ModelError(
        f"coded weights cannot be read: {problem}",
        hint="the model file is damaged or edited; compress or download it again.",
    )

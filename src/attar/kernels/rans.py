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

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Real, UInt8, UInt16, UInt32, UInt64

from attar.errors import ModelError
from attar.kernels.compiled import compiled

PRECISION = 14  # bits of a probability: every context's frequencies sum to 2**PRECISION
TOTAL = 1 << PRECISION
LOWEST = 1 << 16  # a state is at least this, and below 2**32
STATE_BYTES = 4
# Symbols of one lane: each lane costs about two bytes, and each of its symbols one step of a loop.
SYMBOLS_PER_LANE = 4096

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
    state = np.full(n_lanes(len(symbols)), LOWEST, np.uint64)
    words = np.empty(len(symbols), np.uint16)
    n_words = _push_all(symbols, contexts, frequencies, _starts(frequencies), state, words)
    stream = words[:n_words][::-1].astype("<u2")
    return np.concatenate([state.astype("<u4").view(np.uint8), stream.view(np.uint8)])


class Walk(NamedTuple):
    """Where a context depends on the symbols before, every line of them has a state of its own.

    Attributes:
        follows: State and whether the symbol is odd to the next state; lines begin in state 0.
        more: Added to the context in each state.
        lines: Symbol i belongs to line i mod this.
    """

    follows: Int64[np.ndarray, "states two"]
    more: Int64[np.ndarray, " states"]
    lines: int


STILL = Walk(np.zeros((1, 2), np.int64), np.zeros(1, np.int64), 1)


def decode(
    stored: UInt8[np.ndarray, " bytes"],
    contexts: UInt8[np.ndarray, " n"],
    frequencies: Frequencies,
    walk: Walk = STILL,
) -> UInt16[np.ndarray, " n"]:
    """Undo `encode`; what lies behind the coded bytes is not read.

    Args:
        contexts: Without what the state of a line adds.

    Raises:
        ModelError: These bytes are not what `encode` made with these frequencies.
    """
    states, words = _parts(stored, n_lanes(len(contexts)))
    symbols = np.empty(len(contexts), np.uint16)
    lines = np.zeros(walk.lines, np.int64)
    if _pull_all(contexts, _table(frequencies), states, words, symbols, walk, lines) > len(words):
        raise _damaged("it ends too early.")
    if bool((states != LOWEST).any()):
        raise _damaged("its end does not fit its start.")
    return symbols


def reference_decode(
    stored: bytes, contexts: list[int], frequencies: list[list[int]], walk: Walk = STILL
) -> list[int]:
    """Decode one symbol after the other, in plain whole numbers. Slow and obvious."""
    lanes = n_lanes(len(contexts))
    states = [int.from_bytes(stored[4 * i : 4 * i + 4], "little") for i in range(lanes)]
    position, symbols, lines = 4 * lanes, [], [0] * walk.lines
    for i, known in enumerate(contexts):
        context = known + int(walk.more[lines[i % walk.lines]])
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
        lines[i % walk.lines] = int(walk.follows[lines[i % walk.lines], symbol % 2])
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


@compiled
def _push_all(
    symbols: np.ndarray,
    contexts: np.ndarray,
    frequencies: np.ndarray,
    starts: np.ndarray,
    state: np.ndarray,
    words: np.ndarray,
) -> int:
    """Code from the last symbol to the first; words come out in reverse. Gives their number."""
    n_words = 0
    for i in range(len(symbols) - 1, -1, -1):
        lane = i % len(state)
        frequency = np.uint64(frequencies[contexts[i], symbols[i]])
        now = state[lane]
        if now >= frequency << np.uint64(32 - PRECISION):
            words[n_words] = np.uint16(now & np.uint64(0xFFFF))
            n_words += 1
            now >>= np.uint64(16)
        whole = now // frequency
        rest = now - whole * frequency
        state[lane] = (whole << np.uint64(PRECISION)) + rest + starts[contexts[i], symbols[i]]
    return n_words


@compiled
def _pull_all(
    contexts: np.ndarray,
    table: np.ndarray,
    states: np.ndarray,
    words: np.ndarray,
    symbols: np.ndarray,
    walk: Walk,
    lines: np.ndarray,
) -> int:
    """Decode from the first symbol to the last. Gives the words needed: too many where damaged."""
    position = 0
    for i in range(len(contexts)):
        lane, line = i % len(states), i % len(lines)
        now = states[lane]
        context = contexts[i] + walk.more[lines[line]]
        slot = np.uint64(context) << np.uint64(PRECISION) | now & np.uint64(TOTAL - 1)
        entry = table[slot]
        now = (now >> np.uint64(PRECISION)) * (entry & np.uint64(0xFFFF))
        now += entry >> np.uint64(16) & np.uint64(0xFFFF)
        if now < np.uint64(LOWEST):
            if position == len(words):
                return position + 1
            now = now << np.uint64(16) | words[position]
            position += 1
        states[lane] = now
        symbols[i] = np.uint16(entry >> np.uint64(32))
        lines[line] = walk.follows[lines[line], symbols[i] & 1]
    return position

"""Range coding, against decoding symbol after symbol and against the information there is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import ModelError
from attar.kernels import rans


def drawn(n, contexts=3, symbols=9, seed=0):
    """Symbols, their contexts and the frequencies they are coded by."""
    draw = np.random.default_rng(seed)
    context = draw.integers(0, contexts, n).astype(np.uint8)
    spread = 2.0 ** np.arange(contexts) / 4
    symbol = draw.normal(size=n) * spread[context] + symbols // 2
    symbol = symbol.round().clip(0, symbols - 1).astype(np.uint16)
    counts = np.zeros((contexts, symbols), np.int64)
    np.add.at(counts, (context, symbol), 1)
    return symbol, context, rans.normalised(counts)


@given(
    n=st.integers(0, 300),
    contexts=st.integers(1, 6),
    symbols=st.integers(1, 40),
    per_lane=st.sampled_from([1, 7, 64, 4096]),
    seed=st.integers(0, 1000),
)
@settings(derandomize=True, max_examples=80, deadline=None)
def test_decoding_gives_back_what_was_coded(n, contexts, symbols, per_lane, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rans, "SYMBOLS_PER_LANE", per_lane)
        symbol, context, frequencies = drawn(n, contexts, symbols, seed)
        stored = rans.encode(symbol, context, frequencies)
        assert np.array_equal(rans.decode(stored, context, frequencies), symbol)
        plain = rans.reference_decode(stored.tobytes(), context.tolist(), frequencies.tolist())
        assert plain == symbol.tolist()


def test_bytes_behind_the_code_are_not_read():
    symbol, context, frequencies = drawn(5000)
    stored = rans.encode(symbol, context, frequencies)
    for extra in (1, 2, 5):
        padded = np.concatenate([stored, np.full(extra, 77, np.uint8)])
        assert np.array_equal(rans.decode(padded, context, frequencies), symbol)


def test_code_takes_the_bits_of_its_information_and_never_more_than_was_estimated():
    for n in (10, 4096, 4097, 300_000):
        symbol, context, frequencies = drawn(n, 5, 60)
        stored = rans.encode(symbol, context, frequencies)
        information = float(-np.log2(frequencies[context, symbol] / rans.TOTAL).sum())
        lanes = rans.n_lanes(n)
        assert information / 8 <= len(stored) <= rans.estimated_bytes(n, information)
        # A lane's state is 32 bits, of which 8 to 16 hold nothing of the symbols.
        assert len(stored) <= 1.001 * information / 8 + 3.5 * lanes


def test_one_symbol_for_all_takes_no_bits():
    context = np.zeros(9000, np.uint8)
    stored = rans.encode(context.astype(np.uint16), context, rans.normalised(np.array([[9000, 0]])))
    assert len(stored) == rans.STATE_BYTES * 3


@given(counts=st.lists(st.integers(0, 10**12), min_size=1, max_size=2000), times=st.integers(0, 3))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_frequencies_sum_to_the_total_and_none_that_occurs_is_lost(counts, times):
    crowded = np.array([counts + [1, 10**9] * times])
    found = rans.normalised(crowded)
    assert found.sum() == rans.TOTAL
    if crowded.any():
        assert np.array_equal(found > 0, crowded > 0)


def test_frequencies_are_close_to_the_counts():
    counts = np.array([[3, 500, 20_000, 7, 0], [0, 0, 1, 1, 2]])
    share = rans.normalised(counts) / rans.TOTAL
    assert np.abs(share - counts / counts.sum(1, keepdims=True)).max() < 5 / rans.TOTAL


@pytest.mark.parametrize("kept", [0, 3, 4, 50, -2])
def test_a_code_that_was_cut_is_refused(kept):
    symbol, context, frequencies = drawn(2000)
    stored = rans.encode(symbol, context, frequencies)
    with pytest.raises(ModelError, match="cannot be read"):
        rans.decode(stored[:kept], context, frequencies)


def test_a_changed_code_never_gives_what_was_coded_and_never_breaks():
    symbol, context, frequencies = drawn(3000)
    stored = rans.encode(symbol, context, frequencies)
    refused = 0
    for place in range(0, len(stored), 17):
        changed = stored.copy()
        changed[place] ^= 0x5A
        try:
            found = rans.decode(changed, context, frequencies)
        except ModelError:
            refused += 1
        else:
            assert not np.array_equal(found, symbol)
    assert refused > 0.9 * len(range(0, len(stored), 17))

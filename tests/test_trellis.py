"""Rounding along a trellis against its reference, and the reference against every path there is."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.kernels.trellis import (
    COLUMNS,
    NEXT,
    ODD,
    TILE,
    Rates,
    Steps,
    levels,
    quantizers,
    reference_round,
    round_along,
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factor(side, seed):
    x = random(4 * side, side, seed=seed) @ random(side, side, seed=seed + 1)
    moment = (x.T @ x / (4 * side)).double() + torch.eye(side, dtype=torch.float64)
    upper = torch.linalg.cholesky(moment.flip(0, 1)).flip(0, 1)
    inverse = torch.linalg.inv(upper)
    return (inverse / inverse.diagonal()[:, None]).float()


def rates(rows, columns, symbols=16, per_bit=0.3):
    """Codes far from 0 cost more, and every grid and context has prices of its own."""
    size = np.log2(1 + np.abs(np.arange(-symbols // 2, symbols // 2)))
    bits = [[(1 + 0.2 * context) * size + 0.3 * grid for context in range(4)] for grid in range(2)]
    row, column = np.arange(rows) % 3, np.arange(columns) % 4 - 1
    return Rates(np.array(bits, np.float32), row, column, per_bit)


def steps(rows, columns):
    row, column = (0.3 + random(n, seed=n).abs().numpy() for n in (rows, columns))
    return Steps(row, column)


@given(
    rows=st.integers(1, TILE + 5),
    columns=st.integers(1, 4),
    both=st.booleans(),
    per_bit=st.sampled_from([0.0, 0.3, 2.0]),
    seed=st.integers(0, 1000),
)
@settings(derandomize=True, max_examples=6, deadline=None)
def test_tiles_round_as_the_formulas_do(rows, columns, both, per_bit, seed):
    weight, known = random(rows, columns, seed=seed), rates(rows, columns, per_bit=per_bit)
    given = (factor(rows, seed) if both else None, factor(columns, seed + 7), steps(rows, columns))
    expected = reference_round(weight, *given, known)
    found = round_along(weight, *given, known)
    # Sums in float32 may put a weight on the other side of a middle, and what follows with it.
    assert float((found != expected).mean()) < 0.02


def test_more_columns_than_one_tile_round_as_the_formulas_do():
    weight, known = random(3, COLUMNS + 5), rates(3, COLUMNS + 5)
    given = (factor(3, 1), factor(COLUMNS + 5, 2), steps(3, COLUMNS + 5))
    assert np.array_equal(
        round_along(weight, *given, known), reference_round(weight, *given, known)
    )


@pytest.mark.parametrize("per_bit", [0.0, 0.5])
def test_no_path_through_the_states_costs_less(per_bit):
    """One column and rows that do not depend on each other: every path can be tried."""
    weight, known, size = 2 * random(4, 1, seed=3), rates(4, 1, 12, per_bit), steps(4, 1)
    found = round_along(weight, None, torch.ones(1, 1), size, known)

    def cost(codes):
        state, total = 0, 0.0
        for i, k in enumerate(codes):
            odd, context = int(ODD[state]), max(0, int(known.row[i] + known.column[0]))
            level = 2 * k - odd * np.sign(k)
            apart = float(weight[i, 0]) / float(size.row[i] * size.column[0]) - level
            total += apart**2 + per_bit * float(known.bits[odd, context, k + 6])
            state = int(NEXT[state, k & 1])
        return total

    least = min(cost(codes) for codes in product(range(-5, 6), repeat=4))
    assert cost(found[:, 0].tolist()) == pytest.approx(least, rel=1e-5)


def test_a_row_of_step_0_gets_codes_of_0():
    weight, size = random(40, 5), steps(40, 5)
    size.row[::3] = 0
    codes = round_along(weight, factor(40, 1), factor(5, 2), size, rates(40, 5))
    assert not codes[::3].any() and codes[1::3].any()


def test_levels_of_both_grids_are_all_whole_numbers_and_each_once():
    codes = np.arange(-5, 6, dtype=np.int16)[None]
    even, odd = (levels(codes, np.full_like(codes, grid, np.uint8)) for grid in (0, 1))
    assert even[0].tolist() == [2 * k for k in range(-5, 6)]
    assert sorted({*even[0].tolist(), *odd[0].tolist()}) == list(range(-10, 11))


def test_states_follow_the_parity_of_codes_down_each_column():
    codes = np.random.default_rng(0).integers(-9, 9, (50, 3)).astype(np.int16)
    found = quantizers(codes)
    for j in range(3):
        state = 0
        for i in range(50):
            assert found[i, j] == ODD[state]
            state = NEXT[state, codes[i, j] % 2]


def test_every_state_is_reached_in_two_ways_of_which_the_grids_differ_or_the_parities():
    for state in range(len(NEXT)):
        assert sum(int((NEXT[before] == state).sum()) for before in range(len(NEXT))) == 2

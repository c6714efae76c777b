"""Rounding with feedback in tiles against its reference, and what the reference promises."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.kernels.feedback import (
    TILE,
    Grid,
    reference_round,
    reference_vectors,
    round_both,
    vector_error,
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(side, seed):
    x = random(4 * side, side, seed=seed) @ random(side, side, seed=seed + 1)
    return (x.T @ x / (4 * side)).double()


def factors(m):
    """F, and U's diagonal, from `kernels/feedback.py`: m = U Uᵀ."""
    upper = torch.linalg.cholesky(m.flip(0, 1)).flip(0, 1)
    inverse = torch.linalg.inv(upper)
    return (inverse / inverse.diagonal()[:, None]).float(), upper.diagonal()


def grid(rows, columns, groups=1, top=30.0, seed=0):
    def positive(*shape, seed):
        return 0.2 + random(*shape, seed=seed).abs()

    return Grid(
        scale=positive(rows, groups, seed=seed),
        column_scale=positive(columns, seed=seed + 1),
        group_of=torch.arange(columns) * groups // columns,
        lowest=torch.full((rows, groups), -top),
        highest=torch.full((rows, groups), top),
    )


@given(
    rows=st.integers(1, 3 * TILE),
    columns=st.integers(1, 3 * TILE),
    top=st.sampled_from([1.0, 3.0, 30.0]),
    groups=st.integers(1, 3),
    seed=st.integers(0, 1000),
    both=st.booleans(),
)
@settings(derandomize=True, max_examples=25, deadline=None)
def test_tiles_round_as_the_formula_does(rows, columns, top, groups, seed, both):
    weight = random(rows, columns, seed=seed)
    left = factors(moment(columns, seed))[0]
    above = factors(moment(rows, seed + 7))[0]
    steps = grid(rows, columns, groups, top, seed)
    expected = reference_round(weight, above if both else torch.eye(rows), left, steps)
    found = round_both(weight, above if both else None, left, steps)
    # Sums in float32 may put a weight on the other side of a middle, and what follows with it.
    assert float((found != expected).float().mean()) < 0.02


@pytest.mark.parametrize("listed", [True, False])
def test_levels_and_offsets_round_as_the_formula_does(listed):
    weight, steps = random(37, 41, seed=4), grid(37, 41, groups=2, top=5.0)
    levels = torch.tensor([-2.0, -1.1, -0.3, 0.0, 0.2, 1.5]) if listed else None
    low = torch.zeros(37, 2) if listed else steps.lowest
    steps = replace(steps, lowest=low, offset=0.3 * random(37, 2, seed=5), levels=levels)
    steps = replace(steps, scale=steps.scale * torch.tensor([-1.0, 1.0]))
    above, left = factors(moment(37, 1))[0], factors(moment(41, 2))[0]
    expected = reference_round(weight, above, left, steps)
    found = round_both(weight, above, left, steps)
    assert float((found != expected).float().mean()) < 0.02
    assert steps.values(found).isfinite().all() and int(found.max()) == 5


def test_the_error_is_the_sum_of_what_each_weight_loses():
    """The identity that rounding rests on, in float64, for any codes."""
    r, c = moment(6, 1), moment(9, 2)
    (above, of_rows), (left, of_columns) = factors(r), factors(c)
    error = random(6, 9, seed=3).double()
    # E = Fᵣᵀ e F꜀, solved for e.
    alone = torch.linalg.inv(above.T.double()) @ error @ torch.linalg.inv(left.double())
    expected = float((r @ error @ c * error).sum())
    found = of_rows[:, None] ** 2 * alone**2 * of_columns**2
    assert float(found.sum()) == pytest.approx(expected, rel=1e-4)


def test_each_weight_loses_at_most_half_a_step_of_what_is_its_own():
    """Nearest plane: no code of the reference could be one more or less and lose less."""
    weight, steps = random(5, 7), grid(5, 7, top=500.0)
    above, left = factors(moment(5, 1))[0], factors(moment(7, 2))[0]
    codes = reference_round(weight, above, left, steps)
    error = (weight - steps.values(codes)).double()
    alone = torch.linalg.inv(above.T.double()) @ error @ torch.linalg.inv(left.double())
    step = (steps.scale * steps.column_scale).double()
    assert bool((alone.abs() <= 0.5001 * step).all())


def test_codes_stay_within_the_grid():
    weight, steps = 10 * random(40, 40), grid(40, 40, groups=2, top=2.0)
    codes = round_both(weight, factors(moment(40, 1))[0], factors(moment(40, 2))[0], steps)
    assert set(np.unique(codes.numpy())) <= {-2, -1, 0, 1, 2}


@pytest.mark.parametrize("width", [2, 4])
def test_vectors_round_as_the_formula_does(width):
    sizes = torch.tensor([[1.0, 1.0], [1.0, 3.0], [3.0, 1.0], [3.0, 5.0]]).repeat(1, width // 2)
    weight, worth = 2 * random(5, 40, seed=4), 0.2 + random(40, seed=2).abs()
    steps = replace(grid(5, 40, groups=2), vectors=sizes, worth=worth)
    for above in (factors(moment(5, 1))[0], None):
        left = factors(moment(40, 2))[0]
        rows = torch.eye(5) if above is None else above
        expected = reference_vectors(weight, rows, left, steps)
        found = round_both(weight, above, left, steps)
        assert float((found != expected).float().mean()) < 0.02
        assert set(found.abs().unique().tolist()) <= {1, 3, 5}


def test_the_error_of_vectors_is_that_of_the_nearest_of_the_list():
    x, share, scale = (
        random(7, 8).numpy(),
        random(7, 8, seed=1).abs().numpy(),
        np.float32([0.5] * 7),
    )
    sizes = np.float32([[1, 1], [1, 3], [3, 3]])
    found = np.empty(7, np.float32)
    vector_error(x, share, scale, sizes, found)
    for part in range(7):
        total = 0.0
        for j in range(0, 8, 2):
            apart = [np.abs(x[part, j : j + 2]) - 0.5 * size for size in sizes]
            total += min(float((a**2 * share[part, j : j + 2]).sum()) for a in apart)
        assert found[part] == pytest.approx(total, rel=1e-5)


def test_kept_weights_take_up_what_is_fed_to_them_as_the_formula_does():
    weight, above, left = random(9, 40), factors(moment(9, 1))[0], factors(moment(40, 2))[0]
    kept = random(9, 40, seed=8) > 1.0
    results = []
    for round_ in (reference_round, round_both):
        free = torch.zeros(9, 40)
        codes = round_(weight, above, left, replace(grid(9, 40), kept=kept, free=free))
        assert not codes[kept].any() and not free[~kept].any()
        results.append((codes, free))
    (expected, of_reference), (found, free) = results
    assert float((found != expected).float().mean()) < 0.02
    assert torch.allclose(free, of_reference, atol=1e-3) and not torch.equal(
        free[kept], weight[kept]
    )

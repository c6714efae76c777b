import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import ModelError, SettingError
from attar.transform import groups

SHAPES = pytest.mark.parametrize(("rows", "columns", "group_size"), [
    (1, 1, 0), (1, 7, 0), (7, 33, 11), (7, 33, 0), (33, 123, 41), (5, 64, 1),
])  # fmt: skip
SYMMETRIC = pytest.mark.parametrize("symmetric", [False, True])


def random_weight(rows, columns, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(rows, columns, generator=generator)


def quantize(weight, bits, group_size, symmetric, column_weight=None, search=False):
    scale, zero_point = groups.find_scales(
        weight, bits, group_size, symmetric, column_weight, search
    )
    codes = groups.encode(weight, scale, zero_point, bits, group_size)
    return codes, scale, zero_point, groups.decode_codes(codes, scale, zero_point, group_size)


def half_up(value):
    """Smallest float16 that is not below a Python float."""
    half = torch.tensor(value, dtype=torch.float64).half()
    while float(half) < value:
        bits = int(half.view(torch.int16)) + 1
        half = torch.tensor(bits, dtype=torch.int16).view(torch.float16)
    return float(half)


def float32(value):
    return float(torch.tensor(value, dtype=torch.float64).float())


def slow_group(values, bits, symmetric, factor=1.0):
    """Scale and zero point of one group from r = S (q - Z), with scalars."""
    low = float32(min(0.0, *values) * float32(factor))
    high = float32(max(0.0, *values) * float32(factor))
    if symmetric:
        middle = 2 ** (bits - 1)
        exact = max(float32(high / (middle - 1)), float32(-low / middle))
    else:
        exact = float32(float32(high - low) / (2**bits - 1))
    scale = half_up(max(exact, 2.0**-24)) if exact > 0 else 1.0
    if symmetric:
        return scale, 2 ** (bits - 1)
    return scale, min(2**bits - 1, round(float32(-low / scale)))


def slow_codes(values, scale, zero_point, bits):
    return [
        min(2**bits - 1, max(0, round(float32(value / scale)) + zero_point)) for value in values
    ]


def slow_error(values, importance, scale, zero_point, bits):
    codes = slow_codes(values, scale, zero_point, bits)
    return sum(
        weight * (scale * (code - zero_point) - value) ** 2
        for value, weight, code in zip(values, importance, codes, strict=True)
    )


@SHAPES
@SYMMETRIC
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_codes_equal_a_scalar_loop(rows, columns, group_size, symmetric, bits):
    weight = random_weight(rows, columns, seed=bits)
    codes, scale, zero_point, dense = quantize(weight, bits, group_size, symmetric)
    width = group_size or columns
    for row in range(rows):
        for group in range(columns // width):
            values = weight[row, group * width : (group + 1) * width].tolist()
            slow_scale, slow_zero_point = slow_group(values, bits, symmetric)
            assert float(scale[row, group]) == slow_scale
            assert int(zero_point[row, group]) == slow_zero_point
            slow = slow_codes(values, slow_scale, slow_zero_point, bits)
            assert codes[row, group * width : (group + 1) * width].tolist() == slow
            for column, code in enumerate(slow, start=group * width):
                assert float(dense[row, column]) == float32(slow_scale * (code - slow_zero_point))


@SYMMETRIC
@pytest.mark.parametrize("row_groups", [1, 3])
def test_search_finds_the_factor_that_a_scalar_loop_finds(symmetric, row_groups):
    weight = random_weight(6, 20)
    column_weight = random_weight(row_groups, 20, seed=1).square()
    scale, zero_point = groups.find_scales(weight, 3, 10, symmetric, column_weight, search=True)
    for row in range(6):
        for group in range(2):
            part = slice(group * 10, group * 10 + 10)
            values = weight[row, part].tolist()
            importance = column_weight[row * row_groups // 6, part].tolist()
            errors = {}
            for factor in [1 - 0.05 * k for k in range(11)]:
                found = slow_group(values, 3, symmetric, factor)
                errors[found] = slow_error(values, importance, *found, 3)
            chosen = float(scale[row, group]), int(zero_point[row, group])
            # float32 against float64: a tie within rounding may go either way.
            assert errors[chosen] <= min(errors.values()) * (1 + 1e-5)


@SHAPES
@SYMMETRIC
def test_search_never_adds_weighted_error(rows, columns, group_size, symmetric):
    weight = random_weight(rows, columns)
    column_weight = random_weight(1, columns, seed=1).square()
    plain = quantize(weight, 3, group_size, symmetric)[3]
    searched = quantize(weight, 3, group_size, symmetric, column_weight, search=True)[3]
    error = [float((column_weight * (dense - weight) ** 2).sum()) for dense in (searched, plain)]
    assert error[0] <= error[1] * (1 + 1e-6)


def test_search_halves_the_error_of_whole_rows_at_2_bits():
    weight = random_weight(16, 512)
    plain = quantize(weight, 2, 0, False)[3]
    searched = quantize(weight, 2, 0, False, search=True)[3]
    assert (searched - weight).square().sum() < 0.5 * (plain - weight).square().sum()


def test_diagonal_in_one_dimension_counts_for_all_rows():
    weight, diagonal = random_weight(6, 20), random_weight(1, 20, seed=1).square()
    one = groups.find_scales(weight, 2, 10, False, diagonal[0])
    many = groups.find_scales(weight, 2, 10, False, diagonal.expand(6, 20))
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[1], many[1])


floats = st.floats(-1e5, 1e5, width=32, allow_subnormal=False)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(floats, min_size=1, max_size=9), st.integers(3, 8), st.booleans())
def test_no_weight_moves_by_more_than_half_a_step(values, bits, symmetric):
    weight = torch.tensor([values])
    if 0 < float(weight.abs().max()) < 2.0**-24 * 2**bits:
        return  # may be too small for float16
    _, scale, _, dense = quantize(weight, bits, 0, symmetric)
    moved = (dense.double() - weight.double()).abs().max()
    # float32 keeps a quotient of up to 255 steps to within 255 * 2**-24 of a step.
    assert moved <= float(scale) * (0.5 + 255 * 2.0**-23)


@SYMMETRIC
@pytest.mark.parametrize("bits", range(2, 9))
def test_range_always_contains_zero_and_zeros_decode_exactly(symmetric, bits):
    weight = random_weight(4, 12).abs() + 3
    weight[1] *= -1
    weight[:, ::3] = 0
    weight[3] = 0
    _, scale, zero_point, dense = quantize(weight, bits, 4, symmetric, search=True)
    assert (dense[weight == 0] == 0).all()
    assert (scale[3] == 1).all()
    assert (scale > 0).all()
    assert (zero_point <= 2**bits - 1).all()


@SYMMETRIC
def test_scales_stay_positive_and_finite_where_one_group_is_tiny(symmetric):
    weight = random_weight(3, 8)
    weight[1] = 1e-9
    weight[2] = 1e-38
    _, scale, _, dense = quantize(weight, 4, 8, symmetric, search=True)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert (dense[1:].abs() <= 2.0**-24).all()


@SYMMETRIC
@pytest.mark.parametrize("size", [1e5, 1e-3, 3e-6])
def test_large_and_small_weights_keep_their_precision(symmetric, size):
    weight = random_weight(7, 33).clamp(-1, 1) * size
    dense = quantize(weight, 4, 11, symmetric)[3]
    # A step is at most 2/14 of the size; a scale below 2**-14 is rounded up by up to 2**-24.
    assert ((dense - weight).abs() <= size / 14 + 2.0**-24 * 8).all()


@SYMMETRIC
@pytest.mark.parametrize(("size", "named"), [(1e9, "ends at 65504"), (1e-9, "begins at 5.96e-08")])
def test_weights_outside_float16_scales_are_refused_by_name(symmetric, size, named):
    with pytest.raises(SettingError, match=named) as caught:
        groups.find_scales(random_weight(2, 8, size=size), 4, 4, symmetric)
    assert "32 bits" in caught.value.hint


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 3.4e38])
def test_weights_that_are_not_finite_never_become_codes(bad):
    weight = random_weight(2, 8)
    weight[1, 3] = bad
    with pytest.raises(SettingError):
        groups.find_scales(weight, 4, 4, False)


def test_refusal_names_columns_and_group_size():
    assert "27 columns" in groups.refuse_groups(27, 64)
    assert "group_size 64" in groups.refuse_groups(27, 64)
    assert groups.refuse_groups(27, 9) is None
    assert groups.refuse_groups(27, 0) is None


@SHAPES
@SYMMETRIC
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_stored_tensors_come_back_and_weigh_what_was_said(
    rows, columns, group_size, symmetric, bits
):
    codes, scale, zero_point, _ = quantize(
        random_weight(rows, columns), bits, group_size, symmetric
    )
    tensors = groups.store(codes, scale, zero_point, bits, symmetric)
    assert ("zero_point" in tensors) is not symmetric
    stored = groups.stored_bytes(rows, columns, bits, group_size, symmetric)
    assert sum(tensor.nbytes for tensor in tensors.values()) == stored
    loaded = groups.load_stored(tensors, bits, rows, columns, group_size, symmetric)
    for before, after in zip((codes, scale, zero_point), loaded, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_stored_scale_must_be_a_number_above_zero(bad):
    tensors = groups.store(*quantize(random_weight(2, 8), 4, 4, True)[:3], 4, True)
    tensors["scale"][1, 1] = bad
    with pytest.raises(ModelError, match="scale"):
        groups.load_stored(tensors, 4, 2, 8, 4, True)


def test_column_weights_are_the_diagonal_scaled_to_one():
    factor = random_weight(3 * 5, 5).view(3, 5, 5).double()
    moment = factor @ factor.mT
    found = groups.column_weights(moment)
    expected = torch.stack([matrix.diagonal() for matrix in moment])
    assert torch.allclose(found.double(), expected / expected.max())
    assert torch.equal(groups.column_weights(moment[0].diagonal().clone())[0].max(), torch.ones(()))


def test_moment_of_zeros_or_none_says_nothing():
    assert groups.column_weights(None) is None
    assert groups.column_weights(torch.zeros(1, 3, 3)) is None


def test_tiny_moments_do_not_vanish():
    weight, diagonal = random_weight(4, 16), random_weight(1, 16, seed=1)[0].square()
    found = [
        groups.find_scales(weight, 2, 8, False, groups.column_weights(diagonal * factor))
        for factor in (1.0, 2.0**-90)
    ]
    assert torch.equal(found[0][0], found[1][0])


def test_result_does_not_depend_on_chunks_or_threads(monkeypatch):
    weight = random_weight(700, 150)
    column_weight = random_weight(7, 150, seed=1).square()
    before = quantize(weight, 3, 50, False, column_weight, search=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(2, threads))
    try:
        again = quantize(weight, 3, 50, False, column_weight, search=True)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(groups, "CHUNK_WEIGHTS", 1000)
    chunked = quantize(weight, 3, 50, False, column_weight, search=True)
    for one, two, three in zip(before, again, chunked, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 33])
def test_sum_in_order_is_the_sum(width):
    terms = random_weight(width, 5)
    # float64 truth; float32 errs by at most one rounding for each halving.
    expected = terms.double().sum(0)
    assert torch.allclose(groups._sum_in_order(terms.clone()).double(), expected, atol=1e-5)

from itertools import combinations
from math import ceil, comb, log2

import pytest
import torch

from attar.errors import ModelError, SettingError
from attar.kernels import bitpack
from attar.records import Unit
from attar.transform.zero_n_m import ZeroNM, choose, list_patterns, number_patterns

PATTERNS = pytest.mark.parametrize(
    ("n_kept", "m"), [(2, 4), (1, 4), (4, 8), (3, 5), (1, 2), (7, 8)]
)


def random_weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def slow_choice(weight, power, n_kept, m):
    """Try every pattern of every m columns; keep the one whose zeros lose least."""
    rows, columns = weight.shape
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for row in range(rows):
        for start in range(0, columns, m):
            part = range(start, start + m)

            def lost(kept, row=row, part=part):
                return sum(
                    float(weight[row, c]) ** 2 * float(power[row * len(power) // rows, c])
                    for c in part
                    if c not in kept
                )

            for column in min(combinations(part, n_kept), key=lost):
                mask[row, column] = True
    return mask


@PATTERNS
@pytest.mark.parametrize("row_groups", [1, 3])
def test_choice_loses_least_among_all_patterns(n_kept, m, row_groups):
    weight = random_weight(3, 3 * m)
    power = random_weight(row_groups, 3 * m, seed=1).square()
    assert torch.equal(choose(weight, power, n_kept, m), slow_choice(weight, power, n_kept, m))


@PATTERNS
@pytest.mark.parametrize("rows", [1, 7])
def test_every_m_columns_keep_n(n_kept, m, rows):
    dense = ZeroNM(n_kept, m, 16).apply(random_weight(rows, 9 * m), None).dense
    assert ((dense.view(-1, m) != 0).sum(1) == n_kept).all()


def test_of_equal_weights_the_first_are_kept():
    assert choose(torch.ones(1, 8), None, 2, 4).tolist() == [[True, True, False, False] * 2]


@PATTERNS
def test_pattern_numbers_are_dense_and_come_back(n_kept, m):
    patterns = list_patterns(n_kept, m)
    assert len(patterns) == comb(m, n_kept)
    assert number_patterns(patterns, n_kept).tolist() == list(range(comb(m, n_kept)))


@PATTERNS
@pytest.mark.parametrize("bits", [4, 16])
def test_cost_is_the_sum_of_its_parts(n_kept, m, bits):
    unit = Unit("fc", "linear", (7, 3 * m), ("linear",), macs=70 * m)
    cost = ZeroNM(n_kept, m, bits, group_size=0).cost(unit)
    patterns = ceil(7 * 3 * ceil(log2(comb(m, n_kept))) / 8)
    kept = 7 * 3 * n_kept
    values = kept * 2 if bits == 16 else ceil(kept * bits / 8) + 7 * 2
    assert cost.weight_bytes == patterns + values
    assert cost.macs == 70 * n_kept


def test_stored_patterns_say_where_the_codes_go():
    weight = random_weight(5, 12)
    transform = ZeroNM(2, 4, 5, group_size=0)
    tensors = transform.apply(weight, None).tensors
    dense = transform.decode(tensors, 5, 12)
    numbers = bitpack.reference_unpack(tensors["patterns"], 3, 15).tolist()
    codes = iter(bitpack.reference_unpack(tensors["codes"], 5, 30).tolist())
    positions = list(combinations(range(4), 2))
    expected = [[0.0] * 12 for _ in range(5)]
    for group, number in enumerate(numbers):
        row, start = group // 3, group % 3 * 4
        for position in positions[number]:
            expected[row][start + position] = float(tensors["scale"][row, 0]) * (next(codes) - 16)
    assert dense.tolist() == expected


def test_columns_that_do_not_divide_are_refused():
    unit = Unit("conv", "convolution", (8, 3, 3, 3), ("convolution",))
    assert "27 columns" in ZeroNM(2, 4).rejects(unit)
    assert ZeroNM(1, 3).rejects(unit) is None


def test_pattern_number_that_does_not_exist_is_damaged():
    transform = ZeroNM(2, 4, 4)
    tensors = transform.apply(random_weight(2, 8), None).tensors
    tensors["patterns"][0] |= 7  # 2:4 has patterns 0 to 5
    with pytest.raises(ModelError, match="pattern number"):
        transform.decode(tensors, 2, 8)


@pytest.mark.parametrize(
    "settings",
    [{"m": 1}, {"m": 9}, {"n_kept": 0}, {"n_kept": 4}, {"bits": 32}, {"group_size": -1}],
)
def test_bad_setting_is_refused(settings):
    with pytest.raises(SettingError) as caught:
        ZeroNM(**settings)
    assert next(iter(settings)) in caught.value.hint


def test_label_says_how_many_are_kept():
    assert ZeroNM(2, 4, 4).label() == "2:4 kept at 4 bit"
    assert ZeroNM(1, 4, 16).label() == "1:4 kept in float16"


def test_zeros_stay_zeros():
    weight = random_weight(3, 8)
    weight[1] = 0
    weight[2, ::2] = 0
    dense = ZeroNM(3, 4, 4).apply(weight, None).dense
    assert (dense[weight == 0] == 0).all()

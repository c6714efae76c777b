import math

import pytest
import torch

from attar.errors import ModelError, SettingError
from attar.kernels import bitpack
from attar.records import Unit
from attar.transform import groups
from attar.transform.zero_unstructured import ZeroUnstructured, choose

SHAPES = pytest.mark.parametrize(("rows", "columns"), [(1, 2), (7, 33), (33, 123), (5, 64)])


def random_weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def slow_choice(weight, moment, n_kept):
    """Keep the n_kept columns of each row with the largest |w| * sqrt(E[x^2])."""
    rows, columns = weight.shape
    mask = [[False] * columns for _ in range(rows)]
    for row in range(rows):
        power = [1.0] * columns if moment is None else moment[row * len(moment) // rows].tolist()
        scores = [
            abs(float(weight[row, column])) * math.sqrt(power[column]) for column in range(columns)
        ]
        for column in sorted(range(columns), key=lambda column: -scores[column])[:n_kept]:
            mask[row][column] = True
    return torch.tensor(mask)


@SHAPES
@pytest.mark.parametrize("row_groups", [None, 1, "rows"])
def test_choice_equals_a_scalar_loop(rows, columns, row_groups):
    weight = random_weight(rows, columns)
    count = rows if row_groups == "rows" else row_groups
    moment = None if count is None else random_weight(count, columns, seed=1).square()
    n_kept = max(1, columns // 3)
    assert torch.equal(choose(weight, moment, n_kept), slow_choice(weight, moment, n_kept))


@SHAPES
@pytest.mark.parametrize("kept_fraction", [0.1, 0.5, 0.6])
@pytest.mark.parametrize("bits", [3, 8, 16])
def test_every_row_keeps_the_same_number_and_the_rest_is_exactly_zero(
    rows, columns, kept_fraction, bits
):
    weight = random_weight(rows, columns)
    dense = ZeroUnstructured(kept_fraction, 16).apply(weight, None).dense
    n_kept = max(1, round(kept_fraction * columns))
    assert ((dense != 0).sum(1) == n_kept).all()
    coarse = ZeroUnstructured(kept_fraction, bits).apply(weight, None).dense
    assert (coarse[dense == 0] == 0).all()


def test_float16_values_are_the_weights_themselves():
    weight = random_weight(7, 33)
    dense = ZeroUnstructured(0.5, 16).apply(weight, None).dense
    assert torch.equal(dense[dense != 0], weight[dense != 0].half().float())


@pytest.mark.parametrize("group_size", [0, 5, 16, 64])
def test_kept_values_are_rounded_in_groups_of_kept_values(group_size):
    weight = random_weight(7, 33)
    tensors = ZeroUnstructured(0.5, 4, group_size).apply(weight, None).tensors
    dense = ZeroUnstructured(0.5, 4, group_size).decode(tensors, 7, 33)
    mask = bitpack.reference_unpack(tensors["mask"], 1, 7 * 33).view(7, 33)
    codes = bitpack.reference_unpack(tensors["codes"], 4, 7 * 16).view(7, 16)
    for row in range(7):
        places = [column for column in range(33) if mask[row, column]]
        assert len(places) == 16
        for number, column in enumerate(places):
            scale = float(tensors["scale"][row, number // (group_size or 16)])
            assert float(dense[row, column]) == scale * (int(codes[row, number]) - 8)


def test_the_moment_decides_what_stays():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert choose(weight, None, 2).tolist() == [[False, False, True, True]]
    diagonal = torch.tensor([100.0, 100.0, 1.0, 1.0])
    assert choose(weight, diagonal, 2).tolist() == [[True, True, False, False]]


def test_kept_values_are_fitted_to_inputs_that_are_strong():
    weight = random_weight(8, 64)
    diagonal = random_weight(1, 64, seed=1)[0].square()
    transform = ZeroUnstructured(0.5, 3)
    mask = choose(weight, diagonal, 32)
    plain = transform.apply(weight * mask, None).dense
    informed = transform.apply(weight, diagonal).dense

    def damage(dense):
        return float((diagonal * (dense - weight * mask) ** 2).sum())

    assert damage(informed) < damage(plain)


def test_too_few_columns_are_refused_with_the_number():
    unit = Unit("conv", "convolution", (8, 1, 1, 1), ("convolution",), groups=8)
    assert "1 columns" in ZeroUnstructured().rejects(unit)


def test_cost_counts_weights_that_are_not_zero():
    unit = Unit("fc", "linear", (10, 33), ("linear",), macs=3300)
    assert ZeroUnstructured(0.5).cost(unit).macs == 1600


def test_mask_that_keeps_another_number_is_damaged():
    transform = ZeroUnstructured(0.5, 4)
    tensors = transform.apply(random_weight(7, 33), None).tensors
    tensors["mask"][0] ^= 1
    with pytest.raises(ModelError, match="does not keep 16 weights"):
        transform.decode(tensors, 7, 33)


@pytest.mark.parametrize(
    "settings",
    [
        {"kept_fraction": 0.0},
        {"kept_fraction": 1.0},
        {"kept_fraction": math.nan},
        {"bits": 1},
        {"bits": 12},
        {"group_size": -64},
    ],
)
def test_bad_setting_is_refused(settings):
    with pytest.raises(SettingError):
        ZeroUnstructured(**settings)


def test_label_says_what_is_kept():
    assert ZeroUnstructured(0.5, 4).label() == "50% kept at 4 bit"
    assert ZeroUnstructured(0.625, 16).label() == "62.5% kept in float16"


def test_rows_of_zeros_keep_zeros():
    weight = random_weight(3, 8)
    weight[1] = 0
    weight[2, ::2] = 0
    dense = ZeroUnstructured(0.75, 4).apply(weight, None).dense
    assert (dense[weight == 0] == 0).all()


def test_short_last_group_costs_a_scale():
    unit = Unit("fc", "linear", (2, 20), ("linear",))
    stored = ZeroUnstructured(0.5, 8, group_size=4).cost(unit).weight_bytes
    assert stored == 2 * 20 // 8 + 2 * 10 + 2 * 3 * groups.SCALE_BYTES

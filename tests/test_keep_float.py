import pytest
import torch

from attar.errors import SettingError
from attar.records import Unit
from attar.transform.keep_float import KeepFloat

FORMATS = pytest.mark.parametrize(
    ("transform", "dtype"),
    [
        (KeepFloat(), torch.float16),
        (KeepFloat(bfloat16=True), torch.bfloat16),
        (KeepFloat(32), torch.float32),
    ],
)


def random_weight(rows, columns, size=1.0):
    return size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@FORMATS
def test_dense_is_the_weight_in_that_format(transform, dtype):
    weight = random_weight(7, 33)
    replacement = transform.apply(weight, None)
    assert replacement.tensors["weight"].dtype == dtype
    assert torch.equal(replacement.dense, weight.to(dtype).float())
    assert transform.label() == str(dtype)[6:]


@FORMATS
def test_result_shares_no_memory_with_the_weight(transform, dtype):
    weight = random_weight(3, 5)
    replacement = transform.apply(weight, None)
    before = replacement.dense.clone()
    weight.zero_()
    replacement.tensors["weight"].zero_()
    assert torch.equal(replacement.dense, before)


def test_32_bits_change_nothing():
    weight = random_weight(3, 5, 1e-38)
    assert torch.equal(KeepFloat(32).apply(weight, None).dense, weight)


@pytest.mark.parametrize("size", [1e5, 1e-9])
def test_weights_outside_float16_are_refused_and_fit_bfloat16(size):
    weight = random_weight(3, 5, size)
    with pytest.raises(SettingError, match="outside the range of float16") as caught:
        KeepFloat().apply(weight, None)
    assert "bfloat16" in caught.value.hint
    dense = KeepFloat(bfloat16=True).apply(weight, None).dense
    # bfloat16 has 8 significant bits.
    assert ((dense - weight).abs() <= 2.0**-8 * weight.abs()).all()


def test_one_weight_too_large_among_many_is_refused():
    weight = random_weight(30, 50)
    weight[29, 49] = 70000
    with pytest.raises(SettingError, match="7e\\+04"):
        KeepFloat().apply(weight, None)


def test_a_few_tiny_weights_among_others_are_kept():
    weight = random_weight(3, 5)
    weight[1] = 1e-12
    assert KeepFloat().apply(weight, None).dense[1].abs().max() <= 2.0**-24


def test_zeros_are_kept():
    assert not KeepFloat().apply(torch.zeros(2, 3), None).dense.any()


def test_cost_is_two_or_four_bytes_a_weight():
    unit = Unit("conv", "convolution", (7, 3, 3, 3), ("convolution",), macs=5)
    assert KeepFloat().cost(unit).weight_bytes == 7 * 27 * 2
    assert KeepFloat(32).cost(unit).weight_bytes == 7 * 27 * 4
    assert KeepFloat().cost(unit).macs == 5


@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 32, "bfloat16": True}])
def test_bad_setting_is_refused(settings):
    with pytest.raises(SettingError):
        KeepFloat(**settings)

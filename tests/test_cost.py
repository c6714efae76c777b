import math

import pytest
import torch

from attar.cost import fp16_bytes, leftover_dtype, total_macs, unit_cost
from attar.errors import PlanError
from attar.records import Cost, Leftover, Unit

LINEAR = Unit("fc", "linear", (10, 33), ("linear",), macs=330)
CONVOLUTION = Unit("conv", "convolution", (8, 3, 3, 3), ("convolution",), macs=216 * 49)


class Halves:
    """A transform for even columns only."""

    def rejects(self, unit):
        return None if unit.columns % 2 == 0 else f"has {unit.columns} columns, an odd number"

    def cost(self, unit):
        return Cost(weight_bytes=unit.n_weights // 2, macs=unit.macs)

    def apply(self, weight, moment):
        raise NotImplementedError

    def decode(self, tensors, rows, columns):
        raise NotImplementedError


def test_unit_cost_is_the_cost_of_the_transform():
    even = Unit("fc", "linear", (10, 4), ("linear",), macs=40)
    assert unit_cost(even, Halves()) == Cost(weight_bytes=20, macs=40)


def test_a_rejected_unit_has_no_cost_but_a_reason():
    with pytest.raises(PlanError, match=r"unit fc cannot .* 33 columns, an odd number") as caught:
        unit_cost(LINEAR, Halves())
    assert "fc" in caught.value.hint


def test_macs_are_added_up():
    assert total_macs([LINEAR, CONVOLUTION]) == 330 + 216 * 49
    assert total_macs([]) == 0


def test_everything_counts_two_bytes():
    leftovers = [Leftover("bias", (10,), "a bias"), Leftover("step", (), "a number")]
    assert fp16_bytes([LINEAR, CONVOLUTION], leftovers) == 2 * (330 + 216 + 10 + 1)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, -0.3, 0.0, 65504.0], torch.float16),
        ([1.0, 1e5], torch.float32),  # overflows
        ([1.0, 1e-9], torch.float32),  # vanishes
        ([1.0, 1.03e-7], torch.float32),  # a float16 subnormal: comes back 16% off
        ([1.0, math.inf], torch.float32),
        ([1.0, math.nan], torch.float32),
        ([], torch.float16),
    ],
)
def test_float16_only_where_every_value_comes_back(values, dtype):
    assert leftover_dtype("norm.weight", torch.tensor(values)) == dtype


def test_integers_stay_what_they_are():
    assert leftover_dtype("norm.weight", torch.tensor([1, 2])) == torch.int64
    assert leftover_dtype("norm.weight", torch.tensor([True])) == torch.bool


def test_every_float16_number_of_normal_size_is_kept_within_tolerance():
    generator = torch.Generator().manual_seed(0)
    tensor = torch.exp(torch.empty(10_000).uniform_(-9, 11, generator=generator))
    assert leftover_dtype("norm.weight", tensor) == torch.float16
    error = (tensor.half().double() - tensor.double()).abs() / tensor.double()
    assert error.max() <= 2.0**-10


def test_a_tiny_value_of_a_bias_may_vanish_beside_large_ones():
    values = torch.tensor([1.0, -2.0, 1e-9, 1.03e-7])
    assert leftover_dtype("head.bias", values) == torch.float16
    assert leftover_dtype("head.weight", values) == torch.float32
    assert leftover_dtype("head.bias", values[2:]) == torch.float32  # no large ones there
    assert leftover_dtype("head.bias", torch.tensor([1.0, 1e5])) == torch.float32
    assert leftover_dtype("head.bias", torch.tensor([math.nan])) == torch.float32
    assert leftover_dtype("head.bias", torch.zeros(0)) == torch.float16

"""Sums of outer products kept by half, against the whole matrix in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.kernels.symmetric import Symmetric, reference_sum, stored_numbers


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(side=st.integers(1, 70), n=st.integers(1, 9), seed=st.integers(0, 100))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_the_sum_is_that_of_the_definition_and_symmetric(side, n, seed):
    x = random(n, side, seed=seed)
    total = Symmetric(side)
    total.add_outer(x)
    found = total.dense()
    # Sums of nine float32 products of numbers around one.
    assert torch.allclose(found.double(), reference_sum(x.double()), rtol=1e-5, atol=1e-5)
    # A block on the diagonal is a product of its own, whose halves may differ in the last bit.
    assert torch.allclose(found, found.T, rtol=1e-6, atol=1e-6)


def test_sums_add_up_with_their_factors():
    one, two = random(5, 33), random(8, 33, seed=1)
    total = Symmetric(33)
    total.add_outer(one)
    total.add_outer(two, times=3.0)
    expected = reference_sum(one.double()) + 3 * reference_sum(two.double())
    found = total.div_(2).dense().double()
    assert torch.allclose(found, expected / 2, rtol=1e-5, atol=1e-5)


def test_two_sums_add_up():
    one, two = random(5, 33), random(8, 33, seed=1)
    first, second, both = Symmetric(33), Symmetric(33), Symmetric(33)
    for total, x in ((first, one), (second, two), (both, one), (both, two)):
        total.add_outer(x)
    assert torch.allclose(first.add_(second).dense(), both.dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 3, 7, 123, 576])
def test_it_keeps_the_numbers_it_says_and_less_than_all(side):
    total = Symmetric(side)
    kept = sum(block.numel() for block in total._blocks)
    assert kept == stored_numbers(side)
    assert side * (side + 1) // 2 <= kept <= side * side
    if side == 576:
        assert kept == side * side * 5 // 8


@given(side=st.integers(1, 70), n=st.integers(1, 90), power=st.integers(-40, 30))
@settings(derandomize=True, max_examples=40, deadline=None)
def test_what_is_kept_in_16_bits_is_near_by_the_size_of_the_diagonal(side, n, power):
    x = random(n, side) * random(side, seed=1).exp() * 2.0 ** (power / 2)
    x[:, :1] = 0  # an input that never came
    total = Symmetric(side)
    total.add_outer(x)
    exact, found = total.dense().double(), total.packed().dense().double()
    root = exact.diagonal().sqrt()
    assert bool(((found - exact).abs() <= 6e-4 * root * root[:, None]).all())
    assert torch.allclose(found.diagonal(), exact.diagonal(), rtol=1e-6)

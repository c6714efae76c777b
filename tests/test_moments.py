"""Sums over positions, each against a plain loop in float64."""

import numpy as np
import pytest
import torch

from attar.explain import moments
from attar.records import Unit
from attar.sites import Call

# Sums of at most a few hundred float32 products of numbers around one.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_call(x):
    arguments = {"input": x, "weight": random(3, x.shape[-1])}
    return Call("w", "linear", arguments, torch.nn.functional.linear)


@pytest.mark.parametrize(
    "shape, samples, layout",
    [
        ((5, 7), 5, (5, 1, 1, 7)),
        ((2, 3, 7), 2, (2, 1, 3, 7)),
        ((2, 3, 4, 7), 2, (2, 1, 12, 7)),
        ((6, 7), 2, (2, 1, 3, 7)),  # flattened over samples and positions, as experts are
        ((1, 7), 4, (1, 1, 1, 7)),  # a query shared by all samples
        ((3, 7), 2, (3, 1, 1, 7)),  # does not divide: each row counts as a sample
    ],
)
def test_linear_inputs_come_in_one_layout(shape, samples, layout):
    x = random(*shape)
    found = moments.inputs_of(linear_call(x), samples)
    assert found.shape == layout
    assert torch.equal(found.flatten(), x.flatten())


def test_convolution_outputs_are_laid_out_by_group():
    unit = Unit("c", "convolution", (6, 2, 3, 3), ("convolution",), groups=3)
    out = random(2, 6, 4, 5)
    found = moments.outputs_of(unit, out, 2)
    assert found.shape == (2, 3, 20, 2)
    for sample, group, row, i, j in np.ndindex(2, 3, 2, 4, 5):
        assert found[sample, group, 5 * i + j, row] == out[sample, 2 * group + row, i, j]


@pytest.mark.parametrize("positions, at_most, step", [(7, 7, 1), (7, 6, 2), (33, 10, 4), (1, 5, 1)])
def test_thinning_takes_every_nth_position(positions, at_most, step):
    values = random(2, 1, positions, 3)
    found = moments.thinned(values, at_most)
    assert found.shape[2] <= at_most
    assert torch.equal(found, values[:, :, ::step])


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("times", [1.0, 2.5])
def test_second_moment_is_a_sum_of_outer_products(groups, times):
    values, start = random(2, groups, 7, 5), random(groups, 5, 5, seed=1)
    total = start.clone()
    moments.add_second_moment(total, values, times)
    expected = start.double().numpy()
    for sample, group, position in np.ndindex(2, groups, 7):
        x = values[sample, group, position].double().numpy()
        expected[group] += times * np.outer(x, x)
    assert np.allclose(total.numpy(), expected, **CLOSE)


@pytest.mark.parametrize("groups", [1, 3])
def test_the_diagonal_alone_is_the_diagonal_of_the_full_moment(groups):
    values = random(2, groups, 7, 5)
    full, diagonal = torch.zeros(groups, 5, 5), torch.zeros(groups * 5)
    moments.add_second_moment(full, values, 1.5)
    moments.add_second_moment(diagonal, values, 1.5)
    assert torch.allclose(full.diagonal(dim1=1, dim2=2).flatten(), diagonal, **CLOSE)


def test_values_added_do_not_change():
    values = random(2, 1, 7, 5)
    before = values.clone()
    moments.add_second_moment(torch.zeros(1, 5, 5), values)
    moments.add_second_moment(torch.zeros(5), values)
    assert torch.equal(values, before)


@pytest.mark.parametrize("at_once", [1, 5, 2**21])
def test_what_a_linear_map_answers_is_summed_over_positions_in_parts(monkeypatch, at_once):
    monkeypatch.setattr(moments, "NUMBERS_AT_ONCE", at_once)
    unit = Unit("l", "linear", (4, 6), ("linear",))
    y, g = random(3, 7, 4), random(3, 7, 4, seed=1)
    products, sizes = moments.channel_products(unit, y, g, 3), moments.channel_sizes(unit, y, 3)
    assert products.shape == (3, 4) and sizes.shape == (4,)
    for sample, row in np.ndindex(3, 4):
        expected = sum(float(y[sample, p, row] * g[sample, p, row]) for p in range(7))
        assert float(products[sample, row]) == pytest.approx(expected, abs=1e-4)
    for row in range(4):
        expected = sum(abs(float(y[sample, p, row])) for sample, p in np.ndindex(3, 7))
        assert float(sizes[row]) == pytest.approx(expected, abs=1e-4)


def test_what_a_convolution_answers_is_summed_over_positions():
    unit = Unit("c", "convolution", (6, 2, 3, 3), ("convolution",), groups=3)
    y, g = random(2, 6, 4, 5), random(2, 6, 4, 5, seed=1)
    products, sizes = moments.channel_products(unit, y, g, 2), moments.channel_sizes(unit, y, 2)
    assert products.shape == (2, 6) and sizes.shape == (6,)
    for sample, row in np.ndindex(2, 6):
        at = [float(y[sample, row, i, j] * g[sample, row, i, j]) for i, j in np.ndindex(4, 5)]
        assert float(products[sample, row]) == pytest.approx(sum(at), abs=1e-4)
    for row in range(6):
        at = [abs(float(y[sample, row, i, j])) for sample, i, j in np.ndindex(2, 4, 5)]
        assert float(sizes[row]) == pytest.approx(sum(at), abs=1e-4)


def test_a_token_counts_once_per_sample_with_the_sum_of_its_positions():
    tokens = torch.tensor([[4, 1, 4, 4], [1, 1, 0, 6]])
    products = random(2, 4)
    expected = np.zeros(9)
    for sample in range(2):
        for token in range(9):
            at = [
                float(p)
                for t, p in zip(tokens[sample], products[sample], strict=True)
                if t == token
            ]
            expected[token] += sum(at) ** 2
    assert np.allclose(moments.token_products(tokens, products, 9).numpy(), expected, **CLOSE)


def test_head_products_are_the_slope_of_scaling_each_head():
    heads, columns, rows = 3, 12, 5
    x, g, weight = random(2, 1, 4, columns), random(2, 1, 4, rows, seed=1), random(rows, columns)
    found = moments.head_products(x, g, weight, heads)
    size = columns // heads
    for sample, head in np.ndindex(2, heads):
        expected = 0.0
        for position, row, column in np.ndindex(4, rows, size):
            c = head * size + column
            expected += float(
                g[sample, 0, position, row] * weight[row, c] * x[sample, 0, position, c]
            )
        assert float(found[sample, head]) == pytest.approx(expected, abs=1e-3)


def hedged(values):
    """Three quarters as found, a quarter by their roots."""
    roots = [value**0.5 for value in values]
    return [
        0.75 * value + 0.25 * sum(values) * root / sum(roots)
        for value, root in zip(values, roots, strict=True)
    ]


def test_token_frequency_is_half_what_was_seen_and_half_what_is_expected():
    counts, answers = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 2.0])
    found = moments.token_frequency(counts, answers)
    assert found.tolist() == pytest.approx(hedged([0.5, 0.25, 0.25]))


def test_without_answers_what_was_seen_once_stands_for_the_unseen():
    counts = torch.tensor([6.0, 1.0, 1.0, 0.0, 0.0])
    found = moments.token_frequency(counts, None)
    expected = [0.75 * 0.75, 0.125 * 0.75, 0.125 * 0.75, 0.125, 0.125]
    assert found.tolist() == pytest.approx(hedged(expected))


def test_a_hedge_keeps_the_order_and_the_sum_and_cuts_differences():
    rare, frequent = 1e-6, 0.3
    found = moments.hedged(torch.tensor([rare, 0.0, frequent]))
    assert float(found.sum()) == pytest.approx(rare + frequent)
    assert found[1] == 0 and found[0] > 100 * rare and found[2] < frequent
    assert not moments.hedged(torch.zeros(3)).any()


@pytest.mark.parametrize(
    "counts", [[1.0, 1.0, 0.0], [5.0, 5.0, 0.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]
)
def test_frequencies_are_shares(counts):
    counts = torch.tensor(counts)
    for answers in (None, torch.tensor([0.1, 0.2, 7.0])):
        found = moments.token_frequency(counts, answers)
        assert float(found.sum()) == pytest.approx(1.0) and (found >= 0).all()


def test_answers_of_another_vocabulary_are_not_used():
    counts = torch.tensor([3.0, 1.0])
    assert torch.equal(
        moments.token_frequency(counts, torch.ones(5)), moments.token_frequency(counts, None)
    )

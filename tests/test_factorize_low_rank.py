"""Thin factors: the least damage of any product of their rank, and rounded as they are stored."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attar.errors import ModelError, SettingError
from attar.explain import price
from attar.records import Curvature, RowWeights, Unit
from attar.transform.factorize_low_rank import (
    COLUMN_DAMPING,
    ROW_DAMPING,
    FactorizeLowRank,
    decompose,
    factorize_all,
)
from attar.transform.quantize_entropy import QuantizeEntropy


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(side, seed=0):
    """Of inputs that hang together and differ in size."""
    x = random(4 * side, side, seed=seed) @ random(side, side, seed=seed + 1)
    x = x * torch.linspace(0.1, 3, side)
    return x.T @ x / (4 * side)


def told(side, seed=5):
    r = moment(side, seed)
    return RowWeights(r.diagonal().clone(), torch.ones(side), r)


def damage(change, r, c):
    change = change.double()
    return float((r.double() @ change @ c.double() * change).sum())


def ridged(matrix, share):
    return matrix + share * matrix.diagonal().mean() * torch.eye(len(matrix))


def slow_product(weight, r, c, rank):
    """R^-1/2 · svd(R^1/2 W C^1/2) cut off · C^-1/2, with symmetric roots, by numpy."""

    def roots(matrix):
        values, vectors = np.linalg.eigh(matrix.double().numpy())
        return (vectors * values**0.5) @ vectors.T, (vectors * values**-0.5) @ vectors.T

    (row, row_back), (column, column_back) = roots(r), roots(c)
    u, s, v = np.linalg.svd(row @ weight.double().numpy() @ column)
    cut = (u[:, :rank] * s[:rank]) @ v[:rank]
    return torch.from_numpy(row_back @ cut @ column_back)


@pytest.mark.parametrize("shape", [(7, 33), (33, 7), (21, 21)])
@pytest.mark.parametrize("rank", [1, 3])
def test_floats_are_the_truncated_decomposition_in_the_norm_of_the_price(shape, rank):
    weight, c, rows = random(*shape), moment(shape[1]), told(shape[0])
    found = FactorizeLowRank(rank, 16).apply(weight, c[None], rows).dense
    r, c = ridged(rows.moment, ROW_DAMPING), ridged(c, COLUMN_DAMPING)
    expected = slow_product(weight, r, c, rank)
    # Two float16 factors: each number errs by 2**-11.
    assert float((found - expected).norm() / expected.norm()) < 2**-9


def test_no_other_product_of_this_rank_costs_less():
    weight, c, rows = random(20, 31), moment(31), told(20)
    r, c_ridged = ridged(rows.moment, ROW_DAMPING), ridged(c, COLUMN_DAMPING)
    costs = {
        name: damage(
            FactorizeLowRank(4, 16, name).apply(weight, c[None], rows).dense - weight, r, c_ridged
        )
        for name in ("price", "outputs", "weights")
    }
    assert costs["price"] < 0.95 * costs["outputs"] < costs["weights"]
    for seed in range(20):
        near = decompose(weight, c[None], rows, "price").of_rank(4)
        right = near.right / near.values[:, None]
        left = near.fitted(right)
        left = left + 0.02 * left.std() * random(4, 20, seed=seed).double()
        right = right + 0.02 * right.std() * random(4, 31, seed=seed + 1).double()
        assert damage(left.T @ right - weight, r, c_ridged) >= costs["price"] * (1 - 1e-4)


def test_atomic_feature_mimicking_keeps_outputs_better_than_weights_do():
    """Its claim: factors by the covariance of outputs err less on outputs, at equal rank."""
    weight, c = random(24, 40), moment(40)
    lost = {
        name: damage(
            FactorizeLowRank(6, 16, name).apply(weight, c[None]).dense - weight, torch.eye(24), c
        )
        for name in ("outputs", "weights")
    }
    assert lost["outputs"] < 0.8 * lost["weights"]
    # Its own formula: the leading eigenvectors of the outputs' covariance, as a projection.
    covariance = weight.double() @ ridged(c, COLUMN_DAMPING).double() @ weight.double().T
    basis = torch.linalg.eigh(covariance).eigenvectors[:, -6:]
    expected = basis @ basis.T @ weight.double()
    found = FactorizeLowRank(6, 16, "outputs").apply(weight, c[None]).dense
    assert float((found - expected).norm() / expected.norm()) < 2**-9


def test_the_plain_decomposition_knows_nothing_of_the_data():
    weight = random(9, 14)
    found = FactorizeLowRank(3, 16, "weights").apply(weight, moment(14)[None], told(9)).dense
    u, s, v = np.linalg.svd(weight.double().numpy())
    expected = torch.from_numpy((u[:, :3] * s[:3]) @ v[:3])
    # The left factor is fitted once more, in the norm of the inputs.
    assert float((found - expected).norm() / expected.norm()) < 0.5
    row_space = torch.linalg.svd(found.double()).Vh[:3]
    assert torch.allclose(row_space.T @ row_space, torch.from_numpy(v[:3].T @ v[:3]), atol=2e-3)


def test_the_second_factor_makes_good_what_rounding_the_first_lost():
    weight, c, rows = random(96, 128), moment(128), told(96)
    how = FactorizeLowRank(12, 3)
    made = how.apply(weight, c[None], rows)
    product = made.unpacked
    best = decompose(weight, c[None], rows, "price").of_rank(12)
    rounded = product.middle[:, None].double() * product.right.double()
    exact = damage(best.fitted(rounded).T @ rounded - weight, rows.moment, c)
    ideal = best.right / best.values[:, None]
    blind = damage(best.fitted(ideal).T @ rounded - weight, rows.moment, c)
    assert exact < blind
    assert damage(made.dense - weight, rows.moment, c) < 1.5 * exact


def test_at_one_bit_factors_lose_less_than_coded_integers_where_few_components_are_strong():
    """As in queries and keys."""
    weight = random(192, 24, seed=1) @ random(24, 192, seed=2) + random(192, 192)
    c, rows = moment(192), told(192)
    unit = Unit("q", "linear", (192, 192), ("linear",))
    thin, plain = FactorizeLowRank(32, 3), QuantizeEntropy(1.1)
    assert thin.cost(unit).weight_bytes <= plain.cost(unit).weight_bytes
    lost = [
        damage(how.apply(weight, c[None], rows).dense - weight, rows.moment, c)
        for how in (thin, plain)
    ]
    assert lost[0] < 0.5 * lost[1]


def test_rank_and_bits_buy_less_damage():
    weight, c, rows = random(130, 150), moment(150), told(130)
    made = factorize_all(
        weight,
        c[None],
        [FactorizeLowRank(r, b) for r, b in ((4, 2), (16, 2), (16, 4), (16, 16))],
        rows,
    )
    lost = [damage(one.dense - weight, rows.moment, c) for one in made]
    assert lost == sorted(lost, reverse=True)


def test_frequent_tokens_of_an_embedding_lose_less():
    """R of an embedding is how often each token occurs."""
    table, frequency = random(300, 24), torch.logspace(0, -4, 300)
    made = FactorizeLowRank(6, 8).apply(table, None, RowWeights(frequency, torch.ones(300)))
    lost = (made.dense - table).square().sum(1)
    assert float(lost[:30].mean()) < 0.7 * float(lost[-100:].mean())
    curvature = (Curvature(frequency, torch.ones(24), torch.ones(24)),)
    plain = FactorizeLowRank(6, 8).apply(table, None).dense
    assert price.damage(made.dense - table, curvature) < price.damage(plain - table, curvature)


@pytest.mark.parametrize("bits", [3, 5, 16])
def test_a_row_of_zeros_stays_zeros_and_a_weight_of_zeros_too(bits):
    weight = random(40, 50)
    weight[7] = 0
    dense = FactorizeLowRank(5, bits).apply(weight, moment(50)[None]).dense
    assert not dense[7].any() and dense[8].any()
    assert not FactorizeLowRank(5, bits).apply(torch.zeros(40, 50), None).dense.any()


def test_cost_counts_both_products():
    unit = Unit("fc", "linear", (10, 33), ("linear",), macs=3300)
    assert FactorizeLowRank(2).cost(unit).macs == 3300 * 2 * 43 // 330


def test_refusals_say_what_is_wrong():
    grouped = Unit("conv", "convolution", (8, 9, 3, 3), ("convolution",), groups=2)
    assert "in groups" in FactorizeLowRank(2).rejects(grouped)
    small = Unit("fc", "linear", (10, 33), ("linear",))
    assert "as small as" in FactorizeLowRank(8).rejects(small)
    assert "too small to be coded in 2.5 bits" in FactorizeLowRank(3, 2.5).rejects(small)
    assert FactorizeLowRank(3, 2).rejects(small) is None
    for settings in ({"rank": 0}, {"bits": 9}, {"minimise": "loss"}):
        with pytest.raises(SettingError, match=next(iter(settings))):
            FactorizeLowRank(**settings)


def test_a_factor_that_is_no_number_is_damage():
    how = FactorizeLowRank(2, 4)
    tensors = dict(how.apply(random(9, 12), None).tensors)
    tensors["middle"] = torch.full_like(tensors["middle"], torch.nan)
    with pytest.raises(ModelError, match="not a number"):
        how.decode(tensors, 9, 12)


def test_a_diagonal_moment_serves_too():
    weight, diagonal = random(12, 20), moment(20).diagonal().clone()
    rows = replace(told(12), moment=None)
    found = FactorizeLowRank(3, 16).apply(weight, diagonal, rows).dense
    full = FactorizeLowRank(3, 16).apply(
        weight, torch.diag(diagonal)[None], replace(rows, moment=None)
    )
    assert torch.allclose(found, full.dense, atol=1e-2)

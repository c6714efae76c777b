"""Learned values, against the best table that plain loops find and against what others lose."""

import numpy as np
import pytest
import torch

from attar.errors import ModelError
from attar.records import RowWeights, Unit
from attar.transform.quantize_codebook import QuantizeCodebook, learn_table
from attar.transform.quantize_feedback import QuantizeFeedback
from attar.transform.quantize_levels import QuantizeLevels


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(columns, seed=1):
    x = random(4 * columns, columns, seed=seed) @ random(columns, columns, seed=seed + 1)
    return (x.T @ x / len(x))[None]


def test_a_table_for_gaussian_weights_is_nearly_that_of_lloyd_and_max():
    table = learn_table(random(64, 8, 64), torch.ones(64, 8, 64), 2).float()
    # Max 1960, table I, 4 values.
    assert np.allclose(table, [-1.510, -0.4528, 0.4528, 1.510], atol=0.04)


def test_no_value_of_the_table_could_move_and_lose_less():
    x, worth = random(9, 1, 33), random(9, 1, 33, seed=1).abs()
    table = learn_table(x, worth, 3).double()
    flat, share = x.flatten().double(), worth.flatten().double()
    nearest = (flat[:, None] - table).abs().argmin(1)
    for place, value in enumerate(table.tolist()):
        own = nearest == place
        if bool(own.any()):
            mean = float((flat[own] * share[own]).sum() / share[own].sum())
            assert value == pytest.approx(mean, abs=0.02)  # cells are 0.003 wide, and float16


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learned_values_lose_less_than_even_steps_and_than_normal_quantiles(bits):
    """As SqueezeLLM: values where weights are many and dear beat even steps at equal bytes."""
    weight = torch.distributions.Laplace(0.0, 1.0).icdf(
        torch.rand(128, 192, generator=torch.Generator().manual_seed(0)).clamp(0.001, 0.999)
    )
    c = moment(192)
    rows = RowWeights(torch.exp(random(128, seed=3)), torch.ones(128))

    def lost(transform):
        change = transform.apply(weight, c, rows).dense - weight
        return float((((change @ c[0]) * change).sum(1) * rows.importance).sum())

    unit = Unit("w", "linear", (128, 192), ("linear",))
    own, even = QuantizeCodebook(bits, 64), QuantizeFeedback(bits, 64)
    assert own.cost(unit).weight_bytes <= even.cost(unit).weight_bytes
    # At 2 bits each of the few values is far from most weights, wherever it lies.
    assert lost(own) < (1.0 if bits == 2 else 0.95) * lost(even)
    if bits == 4:
        assert lost(own) < lost(QuantizeLevels("nf4", 64))


def test_a_value_that_is_no_number_is_damage():
    transform = QuantizeCodebook(2, 0)
    tensors = transform.apply(random(9, 31), None).tensors
    tensors["table"][1] = float("nan")
    with pytest.raises(ModelError, match="not a number"):
        transform.decode(tensors, 9, 31)

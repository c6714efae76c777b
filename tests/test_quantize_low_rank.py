"""A correction of low rank against the whole decomposition, and what it promises."""

import pytest
import torch

from attar.errors import ModelError, SettingError
from attar.records import RowWeights, Unit
from attar.transform.quantize_feedback import QuantizeFeedback
from attar.transform.quantize_low_rank import QuantizeLowRank, _low_rank


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(side, seed=0):
    x = random(4 * side, side, seed=seed) @ random(side, side, seed=seed + 1)
    return (x.T @ x / (4 * side))[None]


def weighted(error, c, r):
    """trace(diag(r) E C Eᵀ)."""
    e = error.double()
    return float((r.double()[:, None] * (e @ c[0].double()) * e).sum())


@pytest.mark.parametrize("rows, columns", [(24, 40), (40, 24), (30, 30)])
def test_no_product_of_the_rank_leaves_less(rows, columns):
    """Eckart and Young: what is left is the sum of the smaller squared singular values."""
    error, c = random(rows, columns), moment(columns)
    r = random(rows, seed=3).exp()
    left, right = _low_rank(error, c, RowWeights(r, torch.ones(rows)), 5)
    damped = c[0].double() + 0.01 * c[0].diagonal().double().mean() * torch.eye(columns)
    root = torch.linalg.cholesky(damped)
    values = torch.linalg.svdvals(r.double().sqrt()[:, None] * error.double() @ root)
    left_over = weighted(error - left @ right, damped[None], r)
    assert left_over == pytest.approx(float(values[5:].square().sum()), rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_rank_more_loses_less(bits):
    weight, c, r = random(48, 64), moment(64), random(48, seed=3).exp()
    told = RowWeights(r, torch.ones(48))
    losses = [weighted(QuantizeFeedback(bits, 32).apply(weight, c, told).dense - weight, c, r)]
    for rank in (2, 8, 20):
        made = QuantizeLowRank(bits, 32, rank).apply(weight, c, told)
        losses.append(weighted(made.dense - weight, c, r))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.6 * losses[0]


def test_bytes_are_those_that_are_stored_and_decode_to_what_was_said():
    weight, transform = random(48, 64), QuantizeLowRank(3, 32, 4)
    made = transform.apply(weight, moment(64))
    unit = Unit("x", "linear", (48, 64), ("linear",), macs=48 * 64)
    cost = transform.cost(unit)
    assert sum(t.nbytes for t in made.tensors.values()) == cost.weight_bytes
    assert cost.macs == 48 * 64
    assert torch.equal(transform.decode(made.tensors, 48, 64), made.dense)


def test_refusals_say_what_is_wrong():
    small = Unit("x", "linear", (8, 32), ("linear",))
    assert "rank 8" in QuantizeLowRank(4, 32).rejects(small)
    for bad in ({"bits": 1}, {"rank": 0}, {"rank": True}, {"group_size": -1}):
        with pytest.raises(SettingError, match="quantize_low_rank"):
            QuantizeLowRank(**bad)
    made = QuantizeLowRank(3, 32, 4).apply(random(48, 64), None)
    broken = {**made.tensors, "left": made.tensors["left"] * float("nan")}
    with pytest.raises(ModelError, match="not a number"):
        QuantizeLowRank(3, 32, 4).decode(broken, 48, 64)

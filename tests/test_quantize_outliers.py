"""A few weights in 16 bits: what is kept, what it is worth, and how it is found again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import ModelError
from attar.records import RowWeights, Unit
from attar.transform.quantize_feedback import QuantizeFeedback
from attar.transform.quantize_outliers import QuantizeOutliers, _gaps, _places
from attar.transform.quantize_rtn import QuantizeRtn


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(columns, seed=1):
    x = random(4 * columns, columns, seed=seed) @ random(columns, columns, seed=seed + 1)
    return (x.T @ x / len(x))[None]


def heavy(rows, columns, seed=0):
    """Weights of which one in a hundred is large, as in language models."""
    large = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.01
    return random(rows, columns, seed=seed + 1) * (1 + 7 * large)


def damage(change, c, importance):
    return float((((change @ c[0]) * change).sum(1) * importance).sum())


def test_the_dearest_weights_are_kept_nearly_exactly_where_nothing_is_fed_back():
    weight = random(20, 64)
    weight[3, 5], weight[17, 60] = 40.0, -30.0
    dense = QuantizeOutliers(3, 64, 0.01).apply(weight, None).dense
    error = (dense - weight).abs()
    assert float(error[3, 5]) < 0.02 and float(error[17, 60]) < 0.02
    # Without them the range is that of the others.
    assert (
        float(error.max())
        < 1.1
        < float((QuantizeRtn(3, 64).apply(weight, None).dense - weight).abs().max())
    )


def test_one_percent_in_16_bits_loses_less_than_rounding_to_nearest_and_than_a_larger_width_would():
    """GWQ's `works_when`: the top 1% in float16 and the rest in few bits beats plain rounding."""
    weight, c = heavy(128, 192), moment(192)
    rows = RowWeights(torch.exp(random(128, seed=3)), torch.ones(128))
    unit = Unit("w", "linear", (128, 192), ("linear",))
    kept, plain = QuantizeOutliers(3, 64, 0.01), QuantizeRtn(3, 32)
    assert kept.cost(unit).weight_bytes <= 1.02 * plain.cost(unit).weight_bytes
    lost, of_plain, of_feedback = (
        damage(t.apply(weight, c, rows).dense - weight, c, rows.importance)
        if t is not plain
        else damage(t.apply(weight, c).dense - weight, c, rows.importance)
        for t in (kept, plain, QuantizeFeedback(3, 32))
    )
    assert lost < 0.6 * of_plain and lost < 0.9 * of_feedback


def test_a_kept_weight_makes_good_what_was_lost_before_it():
    weight, c = heavy(40, 64), moment(64)
    made = QuantizeOutliers(2, 0, 0.05).apply(weight, c)
    places = made.tensors["gaps"].long().add(1).cumsum(0) - 1
    moved = (made.dense - weight).flatten()[places].abs()
    assert float((moved > 0.01).float().mean()) > 0.3
    frozen = made.dense.clone()
    frozen.view(-1)[places] = weight.view(-1)[places]
    ones = torch.ones(40)
    assert damage(made.dense - weight, c, ones) < damage(frozen - weight, c, ones)


@given(
    n=st.integers(1, 3000),
    share=st.floats(0.001, 0.9),
    loud=st.integers(0, 2999),
    seed=st.integers(0, 99),
)
@settings(derandomize=True, max_examples=40, deadline=None)
def test_places_are_found_again_and_hold_the_dearest(n, share, loud, seed):
    worth = random(1, n, seed=seed).abs()
    worth[0, : loud % n] *= 1e-3  # so that the dearest lie together at the end
    n_kept = QuantizeOutliers(4, 0, share)._kept(n)
    places = _places(worth, n_kept)
    assert len(places) == n_kept and bool((places.diff() > 0).all())
    assert torch.equal(_gaps(places).long().add(1).cumsum(0) - 1, places)
    sure = n_kept - min(n_kept - 1, n >> 8)
    dearest = torch.argsort(worth[0], descending=True, stable=True)[:sure]
    assert set(dearest.tolist()) <= set(places.tolist())


def test_a_place_outside_is_damage():
    transform = QuantizeOutliers(4, 0)
    tensors = transform.apply(random(9, 31), None).tensors
    tensors["gaps"][:] = 255
    with pytest.raises(ModelError, match="outside"):
        transform.decode(tensors, 9, 31)

"""Error feedback against a scalar loop from the paper, and what it promises beside."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import ModelError, SettingError
from attar.kernels.feedback import TILE
from attar.records import RowWeights, Unit
from attar.transform import quantize_feedback as method
from attar.transform.groups import column_weights, find_scales
from attar.transform.quantize_feedback import (
    DAMPING_FRACTION,
    QuantizeFeedback,
    feedback_factor,
    quantize_all,
)
from attar.transform.quantize_rtn import QuantizeRtn


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(groups, side, seed=0):
    """Correlated inputs: without correlation there is nothing to feed back along."""
    mix = random(groups, side, side, seed=seed + 50)
    x = random(groups, 4 * side, side, seed=seed) @ mix
    return x.transpose(1, 2) @ x / (4 * side)


def rounded(w, scale, zero_point, top):
    """Code of one weight."""
    return min(max(np.round(np.float32(w / scale)) + zero_point, 0.0), top)


def gptq_by_equations(weight, h, scale, zero_point, top):
    """Equations 2 and 3 of GPTQ: the inverse of what is left is worked out anew at each column.

    Args:
        scale, zero_point: Of each weight, fixed beforehand.
    """
    rows, columns = weight.shape
    order = sorted(range(columns), key=lambda c: -h[c, c])
    damped = h + DAMPING_FRACTION * np.mean(np.diag(h)) * np.eye(columns)
    codes = np.zeros((rows, columns))
    for row in range(rows):
        w, left = weight[row].astype(np.float64).copy(), list(order)
        while left:
            inverse = np.linalg.inv(damped[np.ix_(left, left)])
            q = left[0]
            codes[row, q] = rounded(w[q], scale[row, q], zero_point[row, q], top)
            error = w[q] - scale[row, q] * (codes[row, q] - zero_point[row, q])
            for place, column in enumerate(left):
                w[column] -= error / inverse[0, 0] * inverse[0, place]
            left.pop(0)
    return codes


def codes_of(weight, c, transform):
    """Codes found, and those of the second implementation with the same scales."""
    rows, columns = weight.shape
    scales = find_scales(
        weight, transform.bits, transform.group_size, transform.symmetric, column_weights(c)
    )
    found = method.feed_back(weight, method.turns(c, None, rows, columns), transform, scales)
    width = transform.group_size or columns
    scale, zero_point = (s.double().repeat_interleave(width, dim=1).numpy() for s in scales)
    each = rows // len(c)
    expected = [
        gptq_by_equations(
            weight[g * each : (g + 1) * each].double().numpy(),
            c[g].double().numpy(),
            scale[g * each : (g + 1) * each],
            zero_point[g * each : (g + 1) * each],
            2**transform.bits - 1,
        )
        for g in range(len(c))
    ]
    return found.numpy(), np.concatenate(expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "rows, columns, group_size, symmetric",
    [(3, 7, 0, False), (2, 12, 4, False), (2, 12, 3, True), (1, 1, 0, False)],
)
def test_codes_are_those_of_the_papers_equations(bits, rows, columns, group_size, symmetric):
    transform = QuantizeFeedback(bits, group_size, symmetric)
    found, expected = codes_of(random(rows, columns), moment(1, columns), transform)
    assert np.array_equal(found, expected)


def test_codes_are_those_of_the_equations_beyond_one_block():
    columns = TILE * 2 + 5
    c = moment(1, columns, seed=2)
    found, expected = codes_of(random(2, columns, seed=3), c, QuantizeFeedback(3, 0))
    # An error moved along 69 columns in float32 may put a weight on the other side of a middle.
    assert np.mean(found != expected) < 0.03
    assert abs(found - expected).max() <= 1


def test_each_group_of_rows_has_a_moment_of_its_own():
    """The order of columns is that of all groups together, so groups share one diagonal here."""
    c = moment(3, 6)
    root = c.diagonal(dim1=1, dim2=2).rsqrt()
    diagonal = torch.linspace(2, 1, 6).sqrt()
    c = c * root[:, :, None] * root[:, None] * diagonal[:, None] * diagonal
    found, expected = codes_of(random(6, 6), c, QuantizeFeedback(2, 3))
    assert np.array_equal(found, expected)


def error(dense, weight, c):
    """trace(dW C dWᵀ), rows split over groups."""
    change = (dense - weight).double().reshape(len(c), -1, weight.shape[1])
    return float(((change @ c.double()) * change).sum())


def error_of_both(dense, weight, r, c):
    """trace(R dW C dWᵀ)."""
    change = (dense - weight).double()
    return float((r[0].double() @ change @ c[0].double() * change).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_between_rows_loses_less_where_rows_hang_together(bits):
    both, alone, apart = [], [], []
    for seed in range(20):
        weight, c, r = random(24, 16, seed=seed), moment(1, 16, seed), moment(1, 24, seed + 100)
        diagonal = r[0].diagonal().clone()
        transform = QuantizeFeedback(bits, 8)
        told = RowWeights(diagonal, torch.ones(24), r[0])
        both.append(error_of_both(transform.apply(weight, c, told).dense, weight, r, c))
        alone.append(error_of_both(transform.apply(weight, c).dense, weight, r, c))
        unrelated = RowWeights(diagonal, torch.ones(24), torch.diag(diagonal))
        same = transform.apply(weight, c, unrelated).dense
        apart.append(torch.equal(same, transform.apply(weight, c).dense))
    assert np.mean(both) < 0.75 * np.mean(alone)
    assert all(apart)  # rows that do not hang together are rounded as if nothing were known


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_loses_less_than_rounding_to_nearest_with_the_same_scales(bits):
    with_feedback, nearest = [], []
    for seed in range(20):
        weight, c = random(9, 24, seed=seed), moment(1, 24, seed)
        diagonal = c.diagonal(dim1=1, dim2=2)[0].clone()
        transform = QuantizeFeedback(bits, 8)
        with_feedback.append(error(transform.apply(weight, c).dense, weight, c))
        nearest.append(error(transform.apply(weight, diagonal).dense, weight, c))
    assert np.mean(with_feedback) < 0.7 * np.mean(nearest)


def test_several_settings_at_once_are_the_same_as_one_at_a_time():
    weight, c = random(6, 24), moment(2, 24)
    transforms = [
        QuantizeFeedback(bits, size, symmetric)
        for bits in (2, 5)
        for size in (0, 8)
        for symmetric in (False, True)
    ]
    for transform, made in zip(transforms, quantize_all(weight, c, transforms), strict=True):
        alone = transform.apply(weight, c)
        assert torch.equal(made.dense, alone.dense)
        assert made.tensors.keys() == alone.tensors.keys()
        assert all(torch.equal(made.tensors[k], alone.tensors[k]) for k in made.tensors)


def test_few_rows_at_a_time_give_the_same_codes(monkeypatch):
    weight, c = random(14, 24), moment(2, 24)
    whole = QuantizeFeedback(3, 8).apply(weight, c)
    monkeypatch.setattr(method, "CHUNK_WEIGHTS", 24 * 2 * 3)
    assert torch.equal(QuantizeFeedback(3, 8).apply(weight, c).dense, whole.dense)


@pytest.mark.parametrize("given", ["diagonal", "nothing"])
def test_without_a_full_moment_every_weight_goes_to_the_nearest_code(given):
    weight = random(5, 12)
    importance = random(12).square() if given == "diagonal" else None
    found = QuantizeFeedback(3, 4).apply(weight, importance)
    nearest = QuantizeRtn(3, 4).apply(weight, importance)
    assert torch.equal(found.dense, nearest.dense)


def test_a_moment_without_correlations_feeds_nothing_back():
    weight, diagonal = random(5, 12), random(12).square() + 0.1
    full = QuantizeFeedback(3, 4).apply(weight, torch.diag(diagonal)[None])
    assert torch.equal(full.dense, QuantizeFeedback(3, 4).apply(weight, diagonal).dense)


def test_the_size_of_the_moment_does_not_matter():
    weight, c = random(5, 12), moment(1, 12)
    one = QuantizeFeedback(3, 4).apply(weight, c).dense
    # By powers of two nothing is rounded differently.
    assert all(
        torch.equal(one, QuantizeFeedback(3, 4).apply(weight, c * 2.0**power).dense)
        for power in (-30, 20)
    )


def test_the_feedback_factor_is_the_share_of_an_error_that_each_later_column_takes():
    c = moment(1, 7)
    found = feedback_factor(c)[0][0].double().numpy()
    damped = c[0].double().numpy()
    damped += DAMPING_FRACTION * np.trace(damped) / 7 * np.eye(7)
    for i in range(7):
        inverse = np.linalg.inv(damped[i:, i:])
        assert np.allclose(found[i, i:], inverse[0] / inverse[0, 0], rtol=1e-3, atol=1e-4)
        assert not found[i, :i].any()


def test_inputs_that_were_never_seen_get_a_finite_factor():
    c = torch.cat([moment(1, 5), torch.zeros(1, 5, 5)])
    c[0, 2] = c[0, :, 2] = 0.0
    found, lasting = feedback_factor(c)
    assert torch.isfinite(found).all() and bool((lasting > 0).all())
    assert torch.equal(found[1], torch.eye(5))
    assert torch.isfinite(QuantizeFeedback(2, 0).apply(random(4, 5), c).dense).all()


def test_a_moment_that_rounding_left_without_a_root_gets_more_of_a_ridge():
    """Only in the group that needs it: that of the other is as it would be alone."""
    sound = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    broken = torch.tensor([[1.0, 1.2], [1.2, 1.0]])  # eigenvalues 2.2 and -0.2
    factor, lasting = feedback_factor(torch.stack([sound, broken]))
    assert factor.isfinite().all() and (lasting > 0).all()
    assert torch.equal(factor[0], feedback_factor(sound[None])[0][0])
    # 0.03 is too little for -0.2; with 0.3 the second column takes 1.2 / 1.3 of an error.
    found = feedback_factor(broken[None], 0.03)[0]
    assert float(found[0, 0, 1]) == pytest.approx(-1.2 / 1.3)
    with pytest.raises(ValueError, match="not finite"):
        feedback_factor(torch.full((1, 2, 2), torch.nan))


def test_a_moment_of_fewer_samples_than_columns_is_no_hindrance():
    x = random(3, 40)
    found = QuantizeFeedback(2, 8).apply(random(4, 40), (x.T @ x / 3)[None])
    assert torch.isfinite(found.dense).all()


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 5),
    columns=st.sampled_from([1, 7, 12, 33]),
    bits=st.integers(2, 8),
    size=st.floats(1e-3, 1e3),
)
@settings(derandomize=True, max_examples=40, deadline=None)
def test_what_is_stored_decodes_to_what_was_said_within_the_range(seed, rows, columns, bits, size):
    weight = size * random(rows, columns, seed=seed)
    transform = QuantizeFeedback(bits, 0)
    made = transform.apply(weight, moment(1, columns, seed))
    assert torch.equal(transform.decode(made.tensors, rows, columns), made.dense)
    assert made.dense.abs().max() <= 2.01 * weight.abs().max()


def test_the_weight_and_the_moment_are_left_alone():
    weight, c = random(5, 12), moment(1, 12)
    before = weight.clone(), c.clone()
    QuantizeFeedback(3, 4).apply(weight, c)
    assert torch.equal(weight, before[0]) and torch.equal(c, before[1])


def test_refusals_say_what_is_wrong():
    unit = Unit("x", "linear", (5, 12), ("linear",))
    assert "12 columns" in QuantizeFeedback(4, 5).rejects(unit)
    assert QuantizeFeedback(4, 4).rejects(unit) is None
    for bad in ({"bits": 1}, {"bits": 9}, {"group_size": -1}):
        with pytest.raises(SettingError, match="quantize_feedback"):
            QuantizeFeedback(**bad)
    with pytest.raises(ModelError, match="missing"):
        QuantizeFeedback(4, 4).decode({}, 5, 12)

"""Nats between two outputs, against plain formulas in float64, and curvature by sampling."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import rel_entr, softmax

from attar.divergence import Divergence, fit_gaussian

CATEGORICAL = Divergence("categorical")


def logits(n, width, seed=0, spread=2.0):
    return spread * torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n, width", [(1, 2), (7, 33), (3, 123)])
def test_categorical_divergence_is_scipys_relative_entropy(n, width):
    p, q = logits(n, width).double(), logits(n, width, seed=1).double()
    expected = rel_entr(softmax(p.numpy(), axis=1), softmax(q.numpy(), axis=1)).sum(1)
    assert np.allclose(CATEGORICAL.between(p, q).numpy(), expected, rtol=1e-12)


def test_float32_divergence_is_that_of_float64_to_rounding():
    p, q = logits(9, 123), logits(9, 123, seed=1)
    exact = CATEGORICAL.between(p.double(), q.double())
    # A sum of 123 terms, each good to a few times 6e-8 of numbers up to ten.
    assert torch.allclose(CATEGORICAL.between(p, q).double(), exact, atol=1e-5)


@given(
    seed=st.integers(0, 10_000),
    width=st.integers(2, 17),
    spread=st.floats(0.01, 30.0),
    shift=st.floats(-50.0, 50.0),
)
@settings(derandomize=True, max_examples=60, deadline=None)
def test_divergence_is_never_negative_and_does_not_see_a_shift_of_all_logits(
    seed, width, spread, shift
):
    p, q = logits(5, width, seed, spread).double(), logits(5, width, seed + 1, spread).double()
    found = CATEGORICAL.between(p, q)
    assert (found >= -1e-12).all()
    assert torch.allclose(found, CATEGORICAL.between(p + shift, q - shift), atol=1e-9)
    assert CATEGORICAL.between(p, p).abs().max() < 1e-12


def test_gaussian_divergence_is_half_the_squared_whitened_difference():
    whitening = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)).double()
    p, q = logits(6, 4).double(), logits(6, 4, seed=1).double()
    found = Divergence("gaussian", whitening).between(p, q)
    precision = (whitening.T @ whitening).numpy()
    for i in range(6):
        d = (q[i] - p[i]).numpy()
        assert float(found[i]) == pytest.approx(0.5 * d @ precision @ d, rel=1e-12)


def draws(divergence, outputs, times, seed=0):
    """Sampled gradients at one output, `times width`."""
    generator = torch.Generator().manual_seed(seed)
    return divergence.sampled_gradient(outputs.expand(times, -1).clone(), generator)


def test_second_moment_of_sampled_gradients_is_the_fisher_information():
    n, output = 40_000, logits(1, 5)
    p = output.softmax(-1)[0]
    g = draws(CATEGORICAL, output, n)
    found = g.T @ g / n
    # An entry is a mean of n numbers within [-1, 1]: standard error at most 0.005; 4 of them.
    assert (found - (torch.diag(p) - torch.outer(p, p))).abs().max() < 0.02
    assert g.mean(0).abs().max() < 0.02


def test_fisher_information_is_the_hessian_of_the_divergence():
    output = logits(1, 4).double()
    hessian = torch.autograd.functional.hessian(
        lambda z: CATEGORICAL.between(output, z[None])[0], output[0]
    )
    p = output.softmax(-1)[0]
    assert torch.allclose(hessian, torch.diag(p) - torch.outer(p, p), atol=1e-12)


def test_answers_are_sampled_as_often_as_their_probability_says():
    n, output = 20_000, logits(1, 7, seed=5)
    # One-hot minus p: the answer is where the gradient is above zero.
    answers = draws(CATEGORICAL, output, n).argmax(-1).bincount(minlength=7).numpy()
    expected = n * softmax(output[0].double().numpy())
    # A right sampler falls below one in a thousand with seed 0 only by a very unlucky seed.
    assert stats.chisquare(answers, expected * answers.sum() / expected.sum()).pvalue > 1e-3


def test_an_answer_that_is_sure_has_no_gradient_and_one_that_is_impossible_is_never_sampled():
    g = draws(CATEGORICAL, torch.tensor([[0.0, 200.0, -200.0]]), 500)
    assert g.abs().max() == 0.0
    g = draws(CATEGORICAL, torch.tensor([[1.0, -200.0, 1.0]]), 500)
    assert (g[:, 1] == 0).all() and torch.isfinite(g).all()


def test_outputs_are_left_as_they_are():
    output = logits(5, 6)
    before = output.clone()
    CATEGORICAL.sampled_gradient(output, torch.Generator().manual_seed(0))
    CATEGORICAL.between(output, output + 1)
    assert torch.equal(output, before)


def test_the_same_seed_samples_the_same_answers():
    output = logits(50, 6)
    one, two, other = (
        CATEGORICAL.sampled_gradient(output, torch.Generator().manual_seed(s)) for s in (3, 3, 4)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_second_moment_of_gaussian_gradients_is_the_precision():
    whitening = torch.tensor([[2.0, 0.5], [0.0, 1.0]])
    g = draws(Divergence("gaussian", whitening), torch.zeros(1, 2), 40_000)
    # Entries up to 4.25: standard error up to 4.25 * sqrt(2 / n) = 0.03; 4 of them.
    assert (g.T @ g / 40_000 - whitening.T @ whitening).abs().max() < 0.12


def shrunk_covariance(x):
    """Oracle approximating shrinkage, by its equation 23, in plain loops."""
    n, width = x.shape
    mean = x.mean(0)
    s = np.zeros((width, width))
    for row in x:
        s += np.outer(row - mean, row - mean) / n
    trace, square = np.trace(s), np.trace(s @ s)
    numerator = (1 - 2 / width) * square + trace**2
    denominator = (n + 1 - 2 / width) * (square - trace**2 / width)
    rho = min(1.0, numerator / denominator)
    return (1 - rho) * s + rho * trace / width * np.eye(width)


@pytest.mark.parametrize("n, width", [(50, 3), (7, 12), (200, 5)])
def test_whitening_is_the_root_of_the_inverse_of_the_shrunk_covariance(n, width):
    mixed = torch.randn(n, width, generator=torch.Generator().manual_seed(0))
    outputs = mixed @ torch.randn(width, width, generator=torch.Generator().manual_seed(1)) + 5
    whitening = fit_gaussian(outputs).whitening.double().numpy()
    expected = np.linalg.inv(shrunk_covariance(outputs.double().numpy()))
    assert np.allclose(whitening.T @ whitening, expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_many_samples_are_whitened_to_unit_covariance():
    outputs = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    outputs = outputs @ torch.tensor([[5.0, 0, 0], [1, 1, 0], [0, 0, 0.1]])
    white = outputs @ fit_gaussian(outputs).whitening.T
    # Shrinkage by about one in n changes the smallest variance, 2,500 times below the largest.
    assert torch.cov(white.T).diagonal().tolist() == pytest.approx([1, 1, 1], rel=0.5)
    assert torch.cov(white.T)[:2, :2].flatten().tolist() == pytest.approx([1, 0, 0, 1], abs=0.05)


def test_an_output_that_never_changes_is_counted_in_plain_units():
    fitted = fit_gaussian(torch.full((6, 3), 2.0))
    assert torch.isfinite(fitted.whitening).all()
    p, q = torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]])
    assert float(fitted.between(p, q)) == pytest.approx(0.5)


def test_one_sample_or_one_output_gives_a_finite_whitening():
    assert torch.isfinite(fit_gaussian(torch.randn(1, 4)).whitening).all()
    found = fit_gaussian(torch.tensor([[1.0], [3.0], [5.0]])).whitening
    assert float(found) == pytest.approx((8 / 3) ** -0.5, rel=1e-5)

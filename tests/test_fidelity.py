"""What differs between two models, against plain loops."""

import numpy as np
import pytest
import torch
import toys
from scipy.special import rel_entr, softmax
from torch import nn

from attar.audit import fidelity
from attar.audit.fidelity import bootstrap, measure
from attar.divergence import Divergence
from attar.records import Silent

CATEGORICAL = Divergence("categorical")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7)).requires_grad_(False)


def compared(task, one, other, batches, divergence=CATEGORICAL, **more):
    model = toys.toy(task, one, examples=batches[0])
    return measure(
        model,
        lambda batch: model.task.forward(other, batch),
        batches,
        divergence,
        progress=Silent(),
        **more,
    )


class Follows(nn.Module):
    """A language model that looks at one token only."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.requires_grad_(False)

    def forward(self, tokens):
        return self.head(self.table(tokens))


TOKENS = torch.tensor([[1, 2, 1, 8, 0], [2, 2, 2, 3, 8], [5, 1, 0, 0, 1]])


def test_every_prediction_is_compared_in_order():
    x = random(11, 5)
    one, two = classifier(), classifier(1)
    found = compared("classify", one, two, [{"inputs": x[:8]}, {"inputs": x[8:]}])
    p, q = (softmax(m(x).double().numpy(), axis=1) for m in (one, two))
    assert found.sample.tolist() == list(range(11)) and not found.position.any()
    assert np.allclose(found.divergence, rel_entr(p, q).sum(1), atol=1e-6)
    assert found.answer_before.tolist() == p.argmax(1).tolist()
    assert found.answer_after.tolist() == q.argmax(1).tolist()
    assert np.allclose(found.probability_before, p.max(1), atol=1e-6)
    assert np.allclose(found.probability_after, q.max(1), atol=1e-6)
    assert found.entropy == pytest.approx(-(p * np.log(p)).sum(1).mean(), rel=1e-5)
    assert found.mean_divergence == pytest.approx(rel_entr(p, q).sum(1).mean(), rel=1e-5)
    assert len(found.surprise_before) == 0


def test_blind_divergence_is_what_one_answer_for_all_would_lose():
    x = random(11, 5)
    found = compared("classify", classifier(), classifier(), [{"inputs": x}])
    p = softmax(classifier()(x).double().numpy(), axis=1)
    mean = p.mean(0)
    expected = np.mean([(row * np.log(row / mean)).sum() for row in p])
    assert found.blind_divergence == pytest.approx(expected, rel=1e-4)
    information = -(mean * np.log(mean)).sum() + (p * np.log(p)).sum(1).mean()
    assert found.blind_divergence == pytest.approx(information, rel=1e-4)


def test_blind_divergence_of_means_is_half_their_whitened_spread():
    x, whitening = random(20, 5) + 1, torch.diag(torch.linspace(0.5, 2, 7))
    divergence = Divergence("gaussian", whitening)
    found = compared("regress", classifier(), classifier(1), [{"inputs": x}], divergence)
    white = (classifier()(x) @ whitening).double().numpy()
    expected = 0.5 * ((white - white.mean(0)) ** 2).sum(1).mean()
    assert found.blind_divergence == pytest.approx(expected, rel=1e-4)
    assert (found.answer_before == -1).all() and found.entropy == 0.0
    one, two = (m(x).double().numpy() for m in (classifier(), classifier(1)))
    cosine = (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
    assert np.allclose(found.cosine, cosine, atol=1e-6)


def test_surprise_is_that_of_the_token_that_follows_and_of_no_padding():
    mask = torch.tensor(
        [[True] * 5, [True, True, True, False, False], [True, False, False, False, False]]
    )
    one, two = Follows(), Follows(1)
    batches = [{"tokens": TOKENS[:2], "mask": mask[:2]}, {"tokens": TOKENS[2:], "mask": mask[2:]}]
    found = compared("language", one, two, batches)
    expected, samples = [], []
    for sample, length in enumerate((5, 3, 1)):
        for position in range(length - 1):
            logits = [m(TOKENS[sample, position])[None].log_softmax(-1)[0] for m in (one, two)]
            following = TOKENS[sample, position + 1]
            expected.append([-float(logit[following]) for logit in logits])
            samples.append(sample)
    assert found.surprise_sample.tolist() == samples
    assert np.allclose(found.surprise_before, [e[0] for e in expected], atol=1e-5)
    assert np.allclose(found.surprise_after, [e[1] for e in expected], atol=1e-5)
    assert found.sample.tolist() == [0] * 5 + [1] * 3 + [2]
    assert found.position.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0]


def test_a_model_compared_with_itself_loses_nothing():
    found = compared("language", Follows(), Follows(), [{"tokens": TOKENS}])
    assert np.abs(found.divergence).max() < 1e-6
    assert np.array_equal(found.answer_before, found.answer_after)
    assert np.array_equal(found.surprise_before, found.surprise_after)


def test_comparing_few_rows_at_a_time_changes_nothing(monkeypatch):
    batches = [{"tokens": TOKENS}]
    whole = compared("language", Follows(), Follows(1), batches)
    monkeypatch.setattr(fidelity, "ROWS_AT_ONCE", 4)
    parts = compared("language", Follows(), Follows(1), batches)
    for name in ("sample", "position", "answer_after", "surprise_sample"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))
    assert np.allclose(whole.divergence, parts.divergence, atol=1e-6)
    assert np.allclose(whole.surprise_after, parts.surprise_after, atol=1e-6)
    assert whole.blind_divergence == pytest.approx(parts.blind_divergence, rel=1e-6)


# --- the bootstrap


def test_an_interval_holds_the_mean_of_the_distribution_about_as_often_as_it_says():
    draws = np.random.default_rng(0)
    held = 0
    for seed in range(60):
        values = draws.exponential(1.0, 80)
        found = bootstrap(values, np.arange(80), seed=seed)
        held += found.low <= 1.0 <= found.high
        assert found.low <= found.value <= found.high
    # 95% of 60 is 57; a percentile interval of 80 skewed values falls a few percent short.
    assert held >= 51


def test_the_width_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(0, 1, 400)
    found = bootstrap(values, np.arange(400), seed=0)
    assert found.value == pytest.approx(values.mean())
    # 2 * 1.96 / sqrt(400), to the error of 1,000 resamples.
    assert found.high - found.low == pytest.approx(0.196, rel=0.15)


def test_predictions_of_one_sample_are_drawn_together():
    of_samples = np.random.default_rng(2).normal(0, 1, 20)
    values, sample = np.repeat(of_samples, 50), np.repeat(np.arange(20), 50)
    together = bootstrap(values, sample, seed=0)
    apart = bootstrap(values, np.arange(1000), seed=0)
    # Twenty samples, not a thousand: wider by the root of fifty.
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(7.1, rel=0.2)
    alone = bootstrap(of_samples, np.arange(20), seed=0)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))


def test_long_samples_count_by_their_predictions():
    values = np.array([0.0] * 9 + [1.0])
    found = bootstrap(values, np.array([0] * 9 + [1]), seed=0)
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.high) == (0.0, 1.0)


def test_the_interval_is_seeded():
    values = np.random.default_rng(3).normal(0, 1, 30)
    one, two, other = (bootstrap(values, np.arange(30), seed=s) for s in (1, 1, 2))
    assert one == two and one != other


def test_one_sample_has_an_interval_of_no_width_and_functions_are_of_the_mean():
    found = bootstrap(np.array([1.0, 3.0]), np.array([4, 4]), seed=0, of=np.exp)
    assert found.value == found.low == found.high == pytest.approx(np.exp(2.0))


@pytest.mark.parametrize("n", [1, 7, 33, 123])
def test_samples_are_drawn_alike_however_many_at_once(monkeypatch, n):
    whole = np.random.default_rng(3).integers(0, n, (fidelity.N_RESAMPLES, n))
    for at_once in (1, 5 * n, 999 * n, 10**9):
        monkeypatch.setattr(fidelity, "DRAWN_AT_ONCE", at_once)
        assert np.array_equal(np.concatenate(list(fidelity.resamples(n, 3))), whole)

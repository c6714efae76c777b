"""Whether what changed is for the worse, and for whom, on models made to differ."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from test_fidelity import compared
from torch import nn

from attar.audit.behaviour import RARER, against_truth, by_class, by_slice, with_calibration
from attar.audit.fidelity import TEMPERATURES
from attar.audit.verdict import judge
from attar.errors import DataError


class Given(nn.Module):
    """Answers what it is given, times a number, and something else for some inputs."""

    def __init__(self, times=1.0, spoilt=()):
        super().__init__()
        self.times = nn.Parameter(torch.tensor(float(times)), requires_grad=False)
        self.spoilt = set(spoilt)

    def forward(self, inputs):
        logits = self.times * inputs[:, 1:]
        rows = torch.tensor([int(row) in self.spoilt for row in inputs[:, 0].tolist()])
        return torch.where(rows[:, None], logits.roll(1, 1), logits)


def inputs(n, seed=0, classes=4):
    logits = 3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.arange(n)[:, None].float(), logits], 1)


def found(one, other, x, answers=(), per_batch=7):
    batches = [{"inputs": x[at : at + per_batch]} for at in range(0, len(x), per_batch)]
    return compared("classify", one, other, batches, answers=answers, closely=True)


def test_flips_are_split_by_the_true_answer():
    x = inputs(23)
    original = x[:, 1:].argmax(1)
    answers = original.tolist()
    answers[5] = int(x[5, 1:].roll(1).argmax())  # the original is wrong, the spoilt one right
    answers[6], answers[7] = (int(original[7]) + 1) % 4, -1
    measured = found(Given(), Given(spoilt=(2, 5, 7, 20)), x, answers)
    truth = against_truth(measured, 0)
    assert truth.n_predictions == 22
    assert measured.surprise_at.tolist() == [i for i in range(23) if i != 7]
    after = torch.where(torch.isin(torch.arange(23), torch.tensor([2, 5, 7, 20]))[:, None],
                        x[:, 1:].roll(1, 1), x[:, 1:]).argmax(1)  # fmt: skip
    known = [i for i in range(23) if answers[i] >= 0]
    before_right = [bool(original[i] == answers[i]) for i in known]
    after_right = [bool(after[i] == answers[i]) for i in known]
    worse = sum(b and not a for b, a in zip(before_right, after_right, strict=True))
    better = sum(a and not b for b, a in zip(before_right, after_right, strict=True))
    assert (worse, better) == (2, 1)
    assert truth.accuracy_before.value == pytest.approx(sum(before_right) / 22)
    assert truth.accuracy_after.value == pytest.approx(sum(after_right) / 22)
    assert truth.negative_flips.value == pytest.approx(worse / 22)
    assert truth.positive_flips.value == pytest.approx(better / 22)
    assert truth.p_value == 1.0


def test_without_answers_there_is_no_truth():
    x = inputs(9)
    assert against_truth(found(Given(), Given(), x), 0) is None
    assert against_truth(found(Given(), Given(), x, [-1] * 9), 0) is None


def test_js_brier_and_the_probability_of_the_truth_are_those_of_their_definitions():
    x = inputs(11)
    answers = [(3 * i) % 4 for i in range(11)]
    measured = found(Given(), Given(0.6), x, answers)
    p, q = (softmax(t * x[:, 1:].double().numpy(), axis=1) for t in (1.0, 0.6))
    expected = [jensenshannon(a, b) ** 2 for a, b in zip(p, q, strict=True)]
    assert np.allclose(measured.jensen_shannon, expected, atol=1e-6)
    for name, chances in (("before", p), ("after", q)):
        own = [sum((chances[i][c] - (c == answers[i])) ** 2 for c in range(4)) for i in range(11)]
        assert np.allclose(getattr(measured, f"brier_{name}"), own, atol=1e-5)
    ratios = [q[i][answers[i]] / p[i][answers[i]] for i in range(11)]
    truth = against_truth(measured, 0)
    assert truth.probability_ratio.value == pytest.approx(np.exp(np.mean(np.log(ratios))), rel=1e-4)


def test_the_best_temperature_undoes_a_model_that_is_too_sure():
    x = inputs(600, seed=4)
    draws = np.random.default_rng(1)
    answers = [int(draws.choice(4, p=row / row.sum()))
               for row in softmax(x[:, 1:].double().numpy(), axis=1)]  # fmt: skip
    measured = found(Given(), Given(2.0), x, answers, per_batch=100)
    truth = with_calibration(against_truth(measured, 0), measured)
    before, after = truth.calibration_before, truth.calibration_after
    assert before.temperature == pytest.approx(1.0, rel=0.15)
    assert after.temperature == pytest.approx(2.0, rel=0.15)
    assert after.ece > 2 * after.ece_refitted and after.brier > before.brier
    losses = []
    for temperature in TEMPERATURES:
        p = softmax(2 * x[:, 1:].double().numpy() / temperature, axis=1)
        losses.append(-np.mean(np.log(p[np.arange(600), answers])))
    assert after.temperature == TEMPERATURES[int(np.argmin(losses))]


def test_the_slice_that_is_spoilt_comes_first_and_no_other_is_worse():
    x = inputs(120, seed=2)
    labels = [("cats", "dogs", "birds")[i % 3] for i in range(120)]
    spoilt = [i for i in range(120) if labels[i] == "dogs"][:20]
    answers = x[:, 1:].argmax(1).tolist()
    measured = found(Given(), Given(0.97, spoilt), x, answers)
    slices = by_slice(measured, labels, family="categorical", seed=0)
    worst, *others = slices
    assert worst.label == "dogs"
    assert worst.n_samples == 40 and worst.p_worse < 0.01 and worst.p_accuracy < 0.01
    assert all(one.p_worse > 0.2 and one.p_accuracy == 1.0 for one in others)
    inside = [measured.divergence[i] for i in range(120) if labels[i] == "dogs"]
    assert worst.divergence.value == pytest.approx(np.mean(inside))
    assert worst.flips.value == worst.truth.negative_flips.value == 0.5
    assert worst.smallest_shown > 0


def test_what_is_not_looked_at_closely_costs_no_temperatures_and_says_so():
    x = inputs(9)
    measured = compared("classify", Given(), Given(0.5), [{"inputs": x}], answers=[0] * 9)
    truth = with_calibration(against_truth(measured, 0), measured)
    assert truth.calibration_before is None and len(measured.jensen_shannon) == 0
    right = (x[:, 1:].argmax(1) == 0).double().mean()
    assert truth.accuracy_before.value == pytest.approx(float(right))


def test_one_label_for_all_is_no_slice():
    x = inputs(9)
    measured = found(Given(), Given(0.5), x)
    assert by_slice(measured, [], family="categorical", seed=0) == ()
    assert by_slice(measured, ["a"] * 9, family="categorical", seed=0) == ()


def test_a_damaged_class_is_found_by_the_answer_though_its_label_hides_it():
    """Samples that the original takes for the class are spoilt, whatever their label is."""
    x = inputs(160, seed=3)
    answers = x[:, 1:].argmax(1).tolist()
    spoilt = [i for i, answer in enumerate(answers) if answer == 2][:30]
    measured = found(Given(), Given(0.97, spoilt), x)
    names = ["zero", "one", "two", "three"]
    worst, *others = by_class(measured, names, seed=0)
    assert worst.label == "two" and worst.n_samples == answers.count(2) and worst.p_worse < 0.01
    assert {one.label for one in others} == {"zero", "one", "three"}
    assert all(one.p_worse > 0.2 for one in others)
    labels = [names[i % 4] for i in range(160)]
    assert all(
        one.p_worse > 0.05 for one in by_slice(measured, labels, family="categorical", seed=0)
    )


def test_rare_answers_are_one_row_and_of_one_row_there_is_no_table():
    x = inputs(40, seed=8)
    x[:, 1] += 4.0
    answers = x[:, 1:].argmax(1)
    often = [c for c in range(4) if int((answers == c).sum()) >= 5]
    assert 0 < len(often) < 4
    measured = found(Given(), Given(0.9), x)
    classes = by_class(measured, list("abcd"), seed=0)
    assert {one.label for one in classes} == {"abcd"[c] for c in often} | {RARER}
    assert sum(one.n_samples for one in classes) == 40
    assert by_class(measured, [], seed=0) == ()
    x[:, 1] += 100.0
    assert by_class(found(Given(), Given(0.9), x), list("abcd"), seed=0) == ()


def test_what_float32_rounds_is_no_slice_that_lost_more():
    """One class is less sure, so its rounding is larger, and still no loss."""
    x = inputs(90, seed=6)
    labels = ["sure" if i % 2 else "unsure" for i in range(90)]
    x[1::2, 1:] *= 4
    measured = found(Given(), Given(1 + 1e-6), x)
    assert abs(measured.divergence).max() < 1e-6
    slices = by_slice(measured, labels, family="categorical", seed=0)
    assert [one.p_worse for one in slices] == [1.0, 1.0]


def test_a_verdict_holds_truth_and_slices_and_no_perplexity_of_labels():
    x = inputs(30)
    measured = found(Given(), Given(0.5), x, x[:, 1:].argmax(1).tolist())
    verdict = judge(measured, family="categorical", predicted_damage=0.0, seed=0,
                    slices=["a", "b"] * 15, classes=list("wxyz"), labelled=True)  # fmt: skip
    assert verdict.perplexity_ratio is None
    assert verdict.truth.accuracy_before.value == 1.0
    assert verdict.truth.calibration_after is not None
    assert {one.label for one in verdict.slices} == {"a", "b"}
    assert {one.label for one in verdict.classes} <= {*"wxyz", RARER} and verdict.classes
    assert verdict.divergence_median <= verdict.divergence_p95 <= verdict.divergence_p99
    assert 0 < verdict.jensen_shannon.value < np.log(2)


def test_an_answer_that_is_no_class_is_refused():
    with pytest.raises(DataError, match="class 4"):
        found(Given(), Given(), inputs(5), [0, 1, 2, 3, 4])


def test_tokens_of_a_text_count_as_one_sample_in_the_test():
    """One text that went all wrong is no evidence, however long it is."""

    class Follows(nn.Module):
        def __init__(self, spoilt):
            super().__init__()
            self.table = nn.Embedding(9, 9)
            self.table.weight = nn.Parameter(
                8 * torch.eye(9).roll(1 + spoilt, 1), requires_grad=False
            )

        def forward(self, tokens):
            logits = self.table(tokens)
            rows = tokens[:, :1, None] == 0
            return torch.where(rows, logits, 8 * torch.eye(9).roll(1, 1)[tokens])

    tokens = torch.stack([(torch.arange(30) + start) % 9 for start in range(4)])
    measured = compared("language", Follows(0), Follows(3), [{"tokens": tokens}])
    truth = against_truth(measured, 0)
    assert truth.accuracy_before.value == 1.0
    assert truth.negative_flips.value == pytest.approx(0.25)
    assert truth.p_value > 0.5

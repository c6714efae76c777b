"""Explanations of an answer by its input, against their equations and against one another."""

from itertools import combinations, permutations
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attar.attribute import METHODS, faithfulness
from attar.attribute.features import gathered, number_places, spread
from attar.attribute.kernel_shap import KernelShap, drawn_sets, solved
from attar.attribute.question import Asked, Explained, Question, Way
from attar.attribute.shapley_sampling import ShapleySampling
from attar.errors import DataError
from attar.load.tasks import TASKS

COLUMNS = 5


class Crossed(nn.Module):
    """Columns that count only together, and one that counts for nothing."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 3).double()

    def forward(self, inputs):
        a, b, c, d, _ = inputs.T
        return self.out(torch.stack([a * b, c.tanh(), d * d * a, b], 1))


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def crossed(seed=1):
    torch.manual_seed(3)
    model = Explained("crossed", TASKS["classify"], Crossed().eval())
    return Question(model, {"inputs": draws(1, COLUMNS, seed=seed)}, Asked(0, 1), Way(steps=64))


def straight():
    """A straight line: here every complete method must say the same."""
    torch.manual_seed(4)
    model = Explained("straight", TASKS["regress"], nn.Linear(COLUMNS, 1).double())
    asked = Asked(0, -1, torch.ones(1, dtype=torch.float64))
    return Question(model, {"inputs": draws(1, COLUMNS, seed=2)}, asked, Way(steps=1))


def pictures():
    torch.manual_seed(5)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).double()  # fmt: skip
    model = Explained("pictures", TASKS["classify"], module.eval())
    return Question(model, {"pixels": draws(1, 3, 15, 22)}, Asked(0, 2), Way(steps=32))


def exact_shapley(question):
    """From the definition: the mean over all orders."""
    n = question.n_features
    sets = {
        chosen: float(
            question.answers(question.present(torch.tensor([[i in chosen for i in range(n)]])))
        )
        for size in range(n + 1)
        for chosen in map(frozenset, combinations(range(n), size))
    }
    values, orders = np.zeros(n), list(permutations(range(n)))
    for order in orders:
        for place, one in enumerate(order):
            before = frozenset(order[:place])
            values[one] += (sets[before | {one}] - sets[before]) / len(orders)
    return values


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_number_for_each_place_the_same_again(name):
    question = pictures()
    found = METHODS[name]()(question)
    assert found.shape == (15, 22) and bool(found.isfinite().all()) and bool(found.any())
    assert torch.equal(METHODS[name]()(pictures()), found)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("saliency", "grad_cam")])
def test_on_a_straight_line_a_part_is_its_slope_times_its_way(name):
    question = straight()
    (weight,) = question.model.module.weight.detach()
    expected = weight * question.point[0]
    found = METHODS[name]()(question)
    near = 2e-3 if name == "lime" else 1e-6  # which is held back by its ridge
    torch.testing.assert_close(found.double(), expected, rtol=near, atol=near)


def test_complete_methods_sum_to_what_the_whole_input_changed():
    question = crossed()
    whole = question.whole_change()
    for name, method in METHODS.items():
        if method.complete:
            assert float(method()(question).sum()) == pytest.approx(whole, rel=1e-3), name


def test_saliency_is_the_absolute_gradient():
    question = pictures()
    x = question.point.clone().requires_grad_()
    question.model.module(x).log_softmax(-1)[0, 2].backward()
    found = METHODS["saliency"]()(question)
    torch.testing.assert_close(found, x.grad[0].abs().sum(0))


def test_grad_cam_weighs_the_last_maps_by_their_mean_gradients():
    question = pictures()
    module = question.model.module
    maps = module[:3](question.point).detach().requires_grad_()
    module[3:](maps).log_softmax(-1)[0, 2].backward()
    weights = maps.grad.mean((2, 3))[0]
    expected = torch.einsum("k,khw->hw", weights, maps.detach()[0]).relu()
    torch.testing.assert_close(METHODS["grad_cam"]()(question), expected)
    with pytest.raises(DataError, match="explains pictures"):
        METHODS["grad_cam"]()(crossed())


def test_all_orders_give_the_shapley_values():
    question = crossed()
    exact = exact_shapley(question)
    sampled = ShapleySampling(orders=600)(question)
    assert np.abs(sampled.numpy() - exact).max() < 0.1 * np.abs(exact).max()
    assert exact[4] == pytest.approx(0, abs=1e-12) and float(sampled[4]) == pytest.approx(0)


def test_kernel_shap_with_all_sets_gives_the_shapley_values():
    """Each set as often as its weight says: the regression of theorem 2, exactly."""
    question = crossed()
    n, rows, weights = question.n_features, [], []
    for size in range(1, n):
        for chosen in combinations(range(n), size):
            rows.append([i in chosen for i in range(n)])
            weights.append((n - 1) / (comb(n, size) * size * (n - size)))
    repeats = torch.tensor(weights).mul(60).round().long()
    there = torch.tensor(rows).repeat_interleave(repeats, 0)
    empty = question.answers(question.baseline)
    gains = question.answers(question.present(there)) - empty
    found = solved(there.double(), gains, torch.tensor(question.whole_change()))
    np.testing.assert_allclose(found.numpy(), exact_shapley(question), atol=1e-5)
    sampled = KernelShap(sets=4000)(question)
    assert np.abs(sampled.numpy() - found.numpy()).max() < 0.1 * float(found.abs().max())


def test_sets_are_drawn_by_size_as_often_as_their_kernel_weighs():
    there = drawn_sets(6, 60_000, torch.Generator().manual_seed(0))
    sizes = torch.bincount(there.sum(1), minlength=7)[1:6].double()
    expected = torch.tensor([1 / (s * (6 - s)) for s in range(1, 6)]).double()
    torch.testing.assert_close(sizes / sizes.sum(), expected / expected.sum(), atol=0.01, rtol=0)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(0, 99))
def test_what_is_spread_over_places_is_gathered_again(sides, seed):
    features = number_places(torch.Size(sides), 0)
    assert sorted(set(features.flatten().tolist())) == list(range(int(features.max()) + 1))
    values = draws(int(features.max()) + 1, seed=seed)
    torch.testing.assert_close(gathered(spread(values, features), features), values)


def test_places_that_stay_are_no_feature():
    features = number_places(torch.Size([6]), 2)
    assert features.tolist() == [-1, -1, 0, 1, 2, 3]
    assert spread(torch.ones(4), features).tolist() == [0, 0, 1, 1, 1, 1]


# --- checks


def test_curves_are_the_answers_of_a_plain_loop():
    question = straight()
    parts = METHODS["occlusion"]()(question)
    found = faithfulness.curves_of(question, parts, (0.0,))
    order = sorted(range(COLUMNS), key=lambda n: -float(parts[n]))
    for most, sign in ((found.most_first, 1), (found.least_first, -1)):
        x, answers = question.point.clone(), []
        for place in [None, *order[::sign]]:
            if place is not None:
                x[0, place] = 0
            answers.append(float(question.answers(x)))
        assert most == pytest.approx(answers)
    area = np.trapezoid(np.subtract(found.least_first, found.most_first), found.shares)
    assert found.area == pytest.approx(area) and found.area > 0


def test_what_is_right_beats_chance_and_its_reverse_does_not():
    torch.manual_seed(0)
    model = Explained("wide", TASKS["classify"], nn.Linear(40, 5).double())
    question = Question(model, {"inputs": 3 * draws(1, 40)}, Asked(0, 1), Way(steps=32))
    chance = faithfulness.chance_areas(question)
    assert len(chance) == 2 * faithfulness.ORDERS and chance[0] == -chance[-1]
    parts = METHODS["integrated_gradients"]()(question)
    assert faithfulness.curves_of(question, parts, chance).p < 0.05
    assert faithfulness.curves_of(question, -parts, chance).p > 0.9


def test_sparsity_is_gini_and_agreement_spearman():
    assert faithfulness.sparsity(torch.ones(7)) == pytest.approx(0)
    assert faithfulness.sparsity(torch.eye(1, 10)[0]) == pytest.approx(0.9)
    parts = draws(30)
    assert faithfulness.agreement(parts, -parts) == pytest.approx(1)  # of sizes
    assert faithfulness.agreement(parts, torch.ones(30)) == 0

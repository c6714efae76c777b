"""Interval bounds hold for every input within the radius, and no larger one is certified."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys
from report_cases import efficientnet
from test_corruptions import opened, rounded, seen
from torch import nn

from attar.audit.intervals import bounded, certified_radius, margins
from attar.corrupting import with_corruptions
from attar.judging import judge_models
from attar.report.html import report_to_html
from attar.report.terminal import audit_to_text


class Shortcut(nn.Module):
    """Convolution, norm, an addition, pooling, and a last map."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, 1, 2, 2, 3)
        self.norm, self.last = nn.BatchNorm2d(3), nn.Linear(3, 4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.norm.weight.data.normal_()

    def forward(self, pixels):
        x = F.relu(self.norm(self.first(pixels)))
        x = x + torch.tanh(self.second(x))
        return self.last(F.adaptive_avg_pool2d(x, 1).flatten(1))


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))


def by_loops(module, x, reach, answer):
    """Margins of one sample through `small`, one number at a time, in Python's float64."""
    low, high = [v - reach for v in x], [v + reach for v in x]
    *layers, last = module
    for layer in layers:
        if not isinstance(layer, nn.Linear):
            low, high = (
                layer(torch.tensor(end, dtype=torch.float64)).tolist() for end in (low, high)
            )
            continue
        weight, bias = layer.weight.tolist(), layer.bias.tolist()
        ends = []
        for row, b in zip(weight, bias, strict=True):
            lowest = b + sum(
                w * (a if w > 0 else z) for w, a, z in zip(row, low, high, strict=True)
            )
            highest = b + sum(
                w * (z if w > 0 else a) for w, a, z in zip(row, low, high, strict=True)
            )
            ends.append((lowest, highest))
        low, high = ([end[side] for end in ends] for side in (0, 1))
    found = []
    for other in range(last.out_features):
        apart = (last.weight[answer] - last.weight[other]).tolist()
        b = float(last.bias[answer] - last.bias[other])
        found.append(
            b + sum(w * (a if w > 0 else z) for w, a, z in zip(apart, low, high, strict=True))
        )
    return found


def test_margins_are_those_of_the_definition():
    module = small().double().requires_grad_(False)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double()
    answers = module(x).argmax(1)
    found = margins(bounded(module), x, torch.full_like(x, 0.03), answers)
    for i in range(6):
        expected = by_loops(module, x[i].tolist(), 0.03, int(answers[i]))
        for other in range(3):
            if other == int(answers[i]):
                assert found[i, other] == torch.inf
            else:
                assert float(found[i, other]) == pytest.approx(expected[other], abs=1e-9)


@pytest.mark.parametrize("make", [small, Shortcut])
def test_no_input_within_the_radius_gets_another_answer(make):
    torch.manual_seed(2)
    module = make().double().eval().requires_grad_(False)
    shape = (5,) if make is small else (2, 6, 5)
    x = torch.randn(8, *shape).double()
    answers = module(x).argmax(1)
    radius = certified_radius(bounded(module), x, torch.ones(()), answers)
    assert (radius > 0).all()
    reach = radius.reshape(-1, *[1] * len(shape))
    for _ in range(300):
        moved = x + reach * (2 * torch.rand_like(x) - 1).sign()
        assert torch.equal(module(moved).argmax(1), answers)
    # a little beyond, the bounds no longer hold
    least = margins(bounded(module), x, (reach + 1e-5).expand_as(x), answers).amin(1)
    assert (least[radius < 1] <= 0).all()


def test_a_linear_map_is_certified_to_the_very_boundary():
    module = nn.Linear(2, 2, bias=False)
    module.weight.data = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    x = torch.tensor([[0.6, 0.3], [5.0, 5.0], [-0.3, -0.3]])
    unit = torch.tensor([1.0, 0.5])
    answers = torch.tensor([0, 0, 1])
    radius = certified_radius(bounded(module), x, unit, answers)
    # x + 2 y = 0 is reached where the radius times (1 + 2 * 0.5) makes up for it
    assert radius.tolist() == pytest.approx([0.6, 1.0, 0.45], abs=2e-6)
    assert certified_radius(bounded(module), x, unit, 1 - answers).tolist() == [0, 0, 0]


class Odd(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.last = how, nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.how(x))


def test_what_cannot_be_followed_is_left_out():
    assert bounded(Odd(torch.sin)) is None
    assert bounded(Odd(lambda x: x * x)) is None
    assert bounded(Odd(lambda x: x if x.sum() > 0 else -x)) is None  # depends on the data
    assert bounded(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"))) is None
    assert bounded(Odd(torch.relu)) is not None


def test_an_audit_says_both_radii_where_it_can():
    from attar.load.model import load_model

    x = torch.randn(80, 5, generator=torch.Generator().manual_seed(5))
    model = load_model(small().eval(), examples={"inputs": x[:2]}, task="classify")
    session = opened(model, {"inputs": x.numpy()})
    other = rounded(model, 4)
    judged = with_corruptions(session, other, judge_models(session, other))
    found = judged.certified
    assert found.n_samples == 40 and found.unit == "each number's spread"
    assert found.before.value > 0 and found.before.value != found.after.value
    assert found.change.value == pytest.approx(found.after.value - found.before.value)
    assert found.change.low <= found.change.value <= found.change.high
    told = " ".join(audit_to_text(judged).split())
    assert "corruption added nats" in told and "certified radius (interval bounds; 1 is" in told
    page = report_to_html(replace(efficientnet(), verdict=judged))
    assert "The true radius may be larger" in page
    same = with_corruptions(session, model, judge_models(session, model)).certified
    assert same.change == replace(same.change, value=0.0, low=0.0, high=0.0)
    inputs = torch.cat([batch["inputs"] for batch in session.data.audit])
    unit = torch.from_numpy(np.std(inputs.numpy(), axis=0))
    radius = certified_radius(bounded(model.module), inputs, unit, model.module(inputs).argmax(1))
    assert found.before.value == pytest.approx(float(radius.mean()), abs=1e-6)


def test_pictures_are_certified_in_units_of_white():
    model = toys.picture_model()
    session = opened(model, seen())
    other = rounded(model)
    found = with_corruptions(session, other, judge_models(session, other)).certified
    if bounded(model.module) is None:
        assert found is None
    else:
        assert found.unit == "black to white" and 0 < found.before.value < 1

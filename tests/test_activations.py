"""Rounding to 8 bits while a model runs: by the equation, its price, and what stays in floats."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import toy

from attar.activations import TOP_CODE, activation_of, rounded, roundings
from attar.divergence import Divergence
from attar.errors import PlanError
from attar.explain.activation_price import (
    INPUT,
    OUTPUT,
    Place,
    find_places,
    price_activations,
    slopes,
    trials_of,
)
from attar.int8 import Around, activation_damage, scaled, with_rounded
from attar.plan.activation_fields import activations_from_dict, activations_to_dict
from attar.plan.int8_share import choose_rounded, in_integers
from attar.records import Activation, Candidate, Cost, PricedActivation, Silent
from attar.sites import substituted

NUMBERS = st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=9)


def by_loops(values, scale, zero_point):
    """Equation 1 of Jacob et al., one number at a time."""
    found = []
    for value in values:
        code = min(TOP_CODE, max(0, round(value / scale) + zero_point))
        found.append((code - zero_point) * scale)
    return torch.tensor(found, dtype=torch.float64)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(NUMBERS, st.floats(-40, 10), st.floats(-10, 40))
def test_rounding_is_the_equation(values, low, high):
    activation = activation_of(low, high)
    x = torch.tensor(values)
    expected = by_loops((x / activation.scale).double().tolist(), 1.0, activation.zero_point)
    found = rounded(x, activation).double()
    assert torch.allclose(found, expected * activation.scale, rtol=1e-6, atol=1e-6)
    assert rounded(torch.zeros(3), activation).tolist() == [0, 0, 0]
    inside = (x >= min(low, 0)) & (x <= max(high, 0))
    assert bool(((found - x).abs()[inside] <= 1.01 * activation.scale).all())


def test_a_dynamic_range_is_that_of_each_sample():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 7, generator=generator) * torch.tensor([1, 10, 0.1, 0, 3]).view(5, 1, 1)
    found = rounded(x, Activation())
    for sample, made in zip(x, found, strict=True):
        low, high = min(0.0, float(sample.min())), max(0.0, float(sample.max()))
        scale = (high - low) / TOP_CODE or 1.0
        zero_point = min(TOP_CODE, max(0, round(-low / scale)))
        expected = by_loops(sample.flatten().tolist(), scale, zero_point)
        assert torch.allclose(made.flatten().double(), expected, atol=1.01 * scale)
        assert float((made - sample).abs().max()) <= 0.51 * scale + 1e-6


def test_each_row_of_a_linear_map_has_a_range_of_its_own():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 5, 7, generator=generator)
    # A token a hundred times as large as the others, one without negatives, one of zeros.
    x[0, 1] *= 100
    x[1, 2].abs_()
    x[2, 4] = 0
    found = rounded(x, Activation(by_row=True))
    for row, made in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        low, high = min(0.0, float(row.min())), max(0.0, float(row.max()))
        scale = (high - low) / TOP_CODE or 1.0
        expected = by_loops(row.tolist(), scale, round(-low / scale))
        assert torch.allclose(made.double(), expected, atol=1.01 * scale)
        assert float((made - row).abs().max()) <= 0.51 * scale + 1e-6
    assert not found[2, 4].any()
    others = torch.ones(3, 5, dtype=torch.bool)
    others[0, 1] = False
    lost = {by_row: (rounded(x, Activation(by_row=by_row)) - x)[others].norm()
            for by_row in (False, True)}  # fmt: skip
    assert lost[True] < 0.1 * lost[False]


def test_rows_are_for_linear_maps_alone():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.map = nn.Conv1d(3, 4, 1), nn.Linear(5, 2)

        def forward(self, inputs):
            return self.map(self.convolution(inputs))

    model = toy("regress", Both(), examples={"inputs": torch.ones(2, 3, 5)})
    batches = [{"inputs": torch.randn(2, 3, 5)} for _ in range(2)]
    places = find_places(model, ["convolution", "map"], batches, Silent())
    assert not places[INPUT, "convolution"].by_row
    assert places[INPUT, "map"].by_row


def test_sums_over_bins_are_sums_over_numbers():
    generator = torch.Generator().manual_seed(1)
    x, g = torch.randn(2, 3, 700, generator=generator)
    x[:, ::5] = 0
    trials = trials_of(Place(["a"], float(x.min()), float(x.max())))
    found = slopes(x, g, trials)
    for number in (0, 7, 33, len(trials.activations) - 1):
        error = rounded(x, trials.activations[number]) - x
        exact = (error * g).sum(1)
        # A bin's middle stands for what lies in it. In the few bins where codes change, that is off
        # by a step; nothing is off on average.
        step = trials.activations[number].scale
        allowed = 4 * (trials.width * step) ** 0.5 * float(g.square().sum(1).max()) ** 0.5
        assert torch.allclose(found[number], exact, atol=allowed)


class Sites(nn.Module):
    """Two maps that read one tensor, and one that reads their sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.one, self.two, self.last = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, inputs):
        return self.last((self.one(inputs) + self.two(inputs)).relu_())


MODEL = toy("regress", Sites(), examples={"inputs": torch.ones(2, 5)})
NAMES = ("one", "two", "last")


def data(samples=40):
    drawn = torch.randn(samples, 5, generator=torch.Generator().manual_seed(2))
    return [{"inputs": part} for part in drawn.split(8)]


def test_units_that_read_one_tensor_share_its_rounding():
    places = find_places(MODEL, NAMES, data(), Silent())
    inputs = {key: at.units for key, at in places.items() if key[0] == INPUT}
    assert inputs == {(INPUT, "one"): ["one", "two"], (INPUT, "last"): ["last"]}
    everything = torch.cat([batch["inputs"] for batch in data()])
    assert places[INPUT, "one"].high == float(everything.max())
    assert places[OUTPUT, "last"].low < 0 < places[OUTPUT, "last"].high
    assert places[INPUT, "last"].low == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_price_is_what_rounding_really_costs(dynamic):
    """Of means under a unit Gaussian, half the squared change is exact, not only to 2nd order."""
    batches, plain = data(400), Divergence("gaussian", torch.eye(3))
    places = {k: at for k, at in find_places(MODEL, NAMES, batches, Silent()).items()
              if k != (OUTPUT, "one")}  # fmt: skip
    found = price_activations(
        MODEL, places, batches, plain, dynamic=dynamic, seed=0, draws=8, progress=Silent()
    )
    assert found.keys() == places.keys()
    for (side, name), priced in found.items():
        around = {side: priced.activation}
        choices = {
            unit: Candidate(unit, "keep_float", {}, Cost(0, 0), 0.0, **around)
            for unit in priced.units
        }
        total = 0.0
        for batch in batches:
            with torch.no_grad(), substituted(MODEL.module, {}, roundings(choices)):
                after = MODEL.module(batch["inputs"])
            total += float((after - MODEL.module(batch["inputs"])).square().sum()) / 2
        measured = total / 400
        # 400 samples, 8 answers each: a chi-square of 3200 draws, and kinks of the ReLU.
        assert priced.damage == pytest.approx(measured, rel=0.25), (side, name)


def test_a_range_that_cuts_off_what_does_not_matter_is_chosen():
    """Outlier Suppression+: few large numbers that nothing depends on should not set the step."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(5)
            self.map = nn.Linear(8, 3, bias=False)
            self.map.weight.data[:, 0] = 0

        def forward(self, inputs):
            return self.map(inputs)

    model = toy("regress", Masked(), examples={"inputs": torch.ones(2, 8)})
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(6))
    x[:, 0] *= 40
    batches = [{"inputs": part} for part in x.split(16)]
    places = find_places(model, ["map"], batches, Silent())
    priced = price_activations(
        model, {(INPUT, "map"): places[INPUT, "map"]}, batches,
        Divergence("gaussian", torch.eye(3)), dynamic=False, seed=0, draws=4, progress=Silent(),
    )[INPUT, "map"]  # fmt: skip
    widest = activation_of(float(x.min()), float(x.max()))
    assert priced.activation.scale < 0.5 * widest.scale


def test_what_is_too_dear_stays_a_float_while_enough_is_in_integers():
    def priced(damage, *units):
        return PricedActivation(units, Activation(1.0, 0), damage)

    macs = {"a": 5, "b": 5, "c": 90}
    few = {
        (INPUT, "a"): priced(10.0, "a"), (INPUT, "b"): priced(1e-9, "b"),
        (INPUT, "c"): priced(50.0, "c"), (OUTPUT, "c"): priced(1.0, "c"),
    }  # fmt: skip
    # b is cheap, so it is kept; c is dear, and too much work.
    kept = choose_rounded(few, macs, {})
    assert kept == set(few) - {(INPUT, "a")}
    # a's product must be rounded by b, or a makes floats: both stay, or both go.
    both = choose_rounded({**few, (INPUT, "b"): priced(9.0, "b")}, macs, {"a": frozenset({"b"})})
    assert both == {(INPUT, "c"), (OUTPUT, "c")}
    assert in_integers(set(few) - {(OUTPUT, "c")}, few, {}) == {"a", "b"}


def test_a_plans_line_is_read_back_and_bad_ones_are_refused():
    both = Candidate(
        "u", "t", {}, Cost(0, 0), 0.0, input=Activation(0.1, 3, 1e-5), output=Activation()
    )
    written = activations_to_dict(both)
    assert activations_from_dict(written, "u") == {"input": both.input, "output": both.output}
    assert activations_from_dict({"treatment": "t"}, "u") == {}
    rows = replace(both, input=Activation(damage=0.25, by_row=True), output=None)
    assert activations_to_dict(rows) == {"input": {"dynamic": "rows", "nats": 0.25}}
    assert activations_from_dict(activations_to_dict(rows), "u") == {"input": rows.input}
    for bad in (
        "dynamic", {}, {"scale": 0.1}, {"scale": 0.0, "zero_point": 0}, {"dynamic": False},
        {"dynamic": 1}, {"dynamic": "row"}, {"dynamic": []},
        {"scale": 0.1, "zero_point": 256}, {"scale": 0.1, "zero_point": True}, [1],
        {"scale": float("nan"), "zero_point": 0}, {"scale": 0.1, "zero_point": 1, "more": 1},
        {"dynamic": True, "nats": "x"}, {1: 2}, None,
    ):  # fmt: skip
        with pytest.raises(PlanError, match="no rounding to 8 bits"):
            activations_from_dict({"input": bad}, "u")


def test_fewer_bits_are_no_way_around_what_was_asked_for():
    few = Candidate("u", "quantize_feedback", {"bits": 4, "group_size": 32}, Cost(4, 0), 2.0)
    int8 = Candidate(
        "u", "quantize_feedback", {"bits": 8, "group_size": 0, "symmetric": True}, Cost(8, 0), 1.0
    )
    around = Around(Activation(0.1, 0, 5.0), Activation(0.2, 1, 1.0))
    four, eight = with_rounded({"u": [few, int8], "v": [few]}, {"u": around})["u"]
    assert (four.input, four.output, four.predicted_damage) == (None, None, 8.0)
    assert (eight.input, eight.output) == (around.input, around.output)
    assert eight.predicted_damage == 7.0 and activation_damage(eight) == 6.0
    assert scaled(eight, 3.0).predicted_damage == 9.0

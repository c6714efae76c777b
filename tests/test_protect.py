"""A slice that is protected loses no more than it may, as far as the bytes go."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attar import pipeline, protecting
from attar.cli import main
from attar.errors import AttarError, BudgetError
from attar.plan.fuse import fuse_protected
from attar.plan.planfile import plan_to_dict, recipe_from_dict
from attar.plan.solve import slice_damage, solve, weight_bytes
from attar.records import Candidate, Cost, Protected, Recipe, Round

HALF = 8
COUNT = 120


class Towers(nn.Module):
    """Each half of the input has layers of its own, and all classes hear of both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = (
            nn.Sequential(nn.Linear(HALF, 96, bias=False), nn.ReLU(), nn.Linear(96, 5, bias=False))
            for _ in range(2)
        )

    def forward(self, inputs):
        return 4 * (self.left(inputs[:, :HALF]) + self.right(inputs[:, HALF:]))


def towers():
    return Towers().eval(), {"inputs": torch.randn(2, 2 * HALF)}


def save_samples(path):
    """Samples of slice "a" speak to the left tower alone, and those of "b" to the right."""
    draws = np.random.default_rng(0)
    inputs = draws.standard_normal((2 * COUNT, 2 * HALF)).astype(np.float32)
    labels = np.array(["a", "b"])[np.arange(len(inputs)) % 2]
    inputs[labels == "a", HALF:] = 0
    inputs[labels == "b", :HALF] = 0
    np.savez(path, inputs=inputs, where=labels)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_samples("d.npz")
    return tmp_path


def wanted(size="3.4kB", *protect, slices="where", **more):
    return Recipe(
        "test_protect:towers", size, "d.npz", slices, task="classify", protect=protect,
        calibration=COUNT, recovery=COUNT // 2, audit=COUNT // 2, **more,
    )  # fmt: skip


def lost(report):
    kept = min(report.plan.rounds, key=lambda r: abs(r.weight_bytes - report.plan.weight_bytes))
    return kept.slices


# --- the program


def candidate(unit, size, nats):
    return Candidate(unit, "quantize_rtn", {"bits": size}, Cost(size, 0), nats)


PRICES = st.lists(
    st.lists(st.floats(1e-4, 1.0), min_size=3, max_size=3), min_size=2, max_size=4
)  # of each unit at 1, 2 and 3 bytes


@settings(derandomize=True, max_examples=60, deadline=None)
@given(PRICES, st.lists(st.floats(0.0, 4.0), min_size=4, max_size=4), st.floats(0.05, 1.0))
def test_the_plan_is_the_best_of_all_that_spare_the_slice(prices, worth, share):
    names = [f"u{n}" for n in range(len(prices))]
    options = {
        name: [candidate(name, 1 + n, nats) for n, nats in enumerate(sorted(own, reverse=True))]
        for name, own in zip(names, prices, strict=True)
    }
    there = dict(zip(names, worth, strict=False))
    limit = 2 * len(names)
    every = [
        dict(zip(names, chosen, strict=True))
        for chosen in product(*options.values())
        if sum(one.cost.weight_bytes for one in chosen) <= limit
    ]

    def on_slice(plan):
        return sum(c.predicted_damage * there[name] for name, c in plan.items())

    least, most = min(map(on_slice, every)), max(map(on_slice, every))
    nats = least + share * (most - least) + 1e-6
    own = Protected("s", nats, there, dict.fromkeys(names, 1.0))
    found = solve(options, limit, [own])
    assert slice_damage(own, found) == pytest.approx(on_slice(found))
    assert weight_bytes(found) <= limit and on_slice(found) <= nats * (1 + 1e-5)
    spare = [plan for plan in every if on_slice(plan) <= nats]
    best = min(sum(c.predicted_damage for c in plan.values()) for plan in spare)
    assert sum(c.predicted_damage for c in found.values()) <= best * 1.002
    if least > 2e-6:
        with pytest.raises(BudgetError, match=r"the least that each could lose .* s ") as error:
            solve(options, limit, [replace(own, nats=0.5 * least)])
        assert "--protect SLICE:NATS lose more" in error.value.hint


def test_a_slice_that_measured_more_than_predicted_is_held_tighter():
    own = Protected("s", 0.5, {"u": 2.0}, {"u": 1.0})
    plan = {"u": candidate("u", 1, 0.1)}
    (tighter,) = protecting.corrected([own], plan, Round(0.1, 0.1, 0.2, 1, {"s": 0.3}))
    assert tighter.correction == pytest.approx(0.3 / 0.2)
    options = {"u": [candidate("u", 1, 0.2), candidate("u", 2, 0.1)]}
    assert solve(options, 2, [own])["u"].predicted_damage == 0.1
    assert protecting.excess([own], Round(0.1, 0.1, 0.2, 1, {"s": 0.75})) == pytest.approx(0.5)
    assert protecting.excess([own], Round(0.1, 0.1, 0.2, 1, {"s": 0.4})) == 0.0


def test_a_group_is_worth_what_its_members_are_together():
    own = Protected("s", 0.5, {"q": 2.0, "k": 1.0, "o": 5.0}, {"q": 1.0, "k": 3.0, "o": 4.0})
    (fused,) = fuse_protected([own], [["q", "k"]])
    assert fused.there == {"q": 3.0, "k": 1.0, "o": 5.0} and fused.everywhere["q"] == 4.0


# --- a run


def test_a_protected_slice_pays_less_and_the_rest_more(here):
    free = pipeline.compress(wanted(), here / "free")
    assert "protected" not in " ".join((*free.plan.notes, *free.verdict.reasons))
    before = {one.label: one.divergence.value for one in free.verdict.slices}
    limit = before["a"] / 2
    spared = pipeline.compress(wanted("3.4kB", f"a:{limit:.3g}"), here / "spared")
    after = {one.label: one.divergence.value for one in spared.verdict.slices}
    assert after["a"] < 0.65 * before["a"] and after["b"] > before["b"]
    assert lost(spared)["a"] < 1.2 * limit
    (note,) = [line for line in spared.plan.notes if line.startswith("protected a")]
    assert f"it may lose {limit:.3g} nats" in note and "measured on recovery data" in note
    (check,) = [one for one in spared.verdict.checks if one.name == "protected a: divergence"]
    assert check.limit == pytest.approx(limit, rel=0.01) and check.found.value == after["a"]
    again = recipe_from_dict(plan_to_dict(spared.plan))
    assert again.protect == (f"a:{limit:.3g}",)
    sizes = [point.weight_bytes for point in spared.frontier.points]
    assert sizes and sizes == sorted(sizes)


def test_classes_are_those_that_the_original_answers(here):
    session = pipeline.open_recipe(wanted("3.4kB", "class=2:0.5", slices=None))
    session = protecting.labelled(session)
    for batches, labels in (
        (session.data.calibration, [one for own in session.data.slices for one in own]),
        (session.data.recovery, session.data.recovery_slices),
    ):
        inputs = torch.cat([batch["inputs"] for batch in batches])
        answers = session.model.module(inputs).argmax(1).tolist()
        assert labels == [f"class {number}" for number in answers]
    asked = wanted("3.4kB", "class=2:0.5", slices=None, rounds=1)
    report = pipeline.compress(asked, here / "out")
    assert any(one.name == "protected class 2: divergence" for one in report.verdict.checks)


@pytest.mark.parametrize(
    ("typed", "more", "says"),
    [
        (["--protect", "a"], (), "is not a slice and the nats"),
        (["--protect", "a:-1"], (), "is not a slice and the nats"),
        (["--protect", "a:nan"], (), "is not a slice and the nats"),
        (["--protect", ":0.1"], (), "is not a slice and the nats"),
        (["--protect", "c:0.1"], (), "hint: there are a, b"),
        (["--protect", "class=9:0.1"], (), "hint: there are class 0, class 1"),
        (["--protect", "a:0.1", "--protect", "class=1:0.1"], (), "protected together"),
        (["--protect", "a:0.1"], ("--decide", "qbert"), "knows no slices"),
        (["--protect", "a:0.1"], ("--cut", "auto"), "leave --cut out"),
        (["--protect", "a:1e-9"], (), "no plan of this size spares"),
    ],
)
def test_what_cannot_be_protected_is_two_lines_and_exit_code_two(here, capsys, typed, more, says):
    command = ["compress", "test_protect:towers", "--task", "classify", "--data", "d.npz"]
    sizes = [
        "--calibration",
        f"{COUNT}",
        "--recovery",
        f"{COUNT // 2}",
        "--audit",
        f"{COUNT // 2}",
        "--size",
        "3.4kB",
    ]
    code = main([*command, "--slices", "where", *sizes, *typed, *more, "--out", "out"])
    assert code == 2 and says in " ".join(capsys.readouterr().err.split())
    assert not (here / "out").exists()


def test_data_without_labels_has_no_slices_to_protect(here):
    session = pipeline.open_recipe(wanted("3.4kB", "a:0.5", slices=None))
    with pytest.raises(AttarError, match="the data has no labels") as error:
        protecting.labelled(session)
    assert "class=NUMBER" in error.value.hint


def test_a_column_may_stand_before_its_label(here):
    session = protecting.labelled(pipeline.open_recipe(wanted("3.4kB", "where=a:0.5")))
    assert protecting._resolved(session, "where=a") == "a"


def test_a_frontier_protects_nothing(here, capsys):
    command = ["plan", "test_protect:towers", "--frontier", "sizes", "--protect", "a:0.1"]
    assert main(command) == 2
    assert "--protect goes with --size" in capsys.readouterr().err

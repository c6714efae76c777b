"""What is worth less than its bytes is cut, the rest is rounded, and a plan does it again."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
import toy_code
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cut import MODELS, TOLERANCE
from test_resuming import KILLED

import attar
from attar import cut_turns, pipeline, writing
from attar.cli import main
from attar.cut import cut_out, find_coupled, narrower
from attar.cut.choose import Offer, choose
from attar.cut.refit import Reader, cheapest_first, refitted, weighted
from attar.errors import BudgetError, ModelError, PlanError, SettingError
from attar.load.folder import load_folder, read_folder
from attar.load.narrow import changed_sizes, narrow
from attar.records import Recipe
from attar.report.terminal import report_to_text
from attar.transform.apply import build_transform

# ---------------------------------------------------------------------------------------------
# which units go

NATS = st.lists(st.floats(0.01, 4.0), min_size=1, max_size=4)


@given(st.lists(st.tuples(NATS, st.floats(0.1, 3.0)), min_size=1, max_size=4))
@settings(derandomize=True, deadline=None)
def test_what_goes_is_the_best_of_all_counts(drawn):
    offers = [
        Offer(str(number), tuple(range(len(nats))), tuple(sorted(nats)), worth)
        for number, (nats, worth) in enumerate(drawn)
    ]
    gains = {
        counts: sum(
            count * offer.worth - sum(offer.added[:count])
            for count, offer in zip(counts, offers, strict=True)
        )
        for counts in product(*(range(len(offer.units) + 1) for offer in offers))
    }
    chosen = choose(offers, at_most=1.0)
    counts = tuple(len(chosen.get(offer.group, ())) for offer in offers)
    assert gains[counts] == pytest.approx(max(gains.values()))


def test_the_cheapest_for_its_worth_goes_first_from_whatever_group():
    one = Offer("one", (5, 2, 9), (0.1, 0.4, 0.5), 1.0)
    other = Offer("other", (1, 0), (0.3, 2.0), 2.0)
    assert choose([one, other], at_most=1.0, enough=0.5) == {"one": (5,)}
    assert choose([one, other], at_most=1.0, enough=1.5) == {"one": (5,), "other": (1,)}
    assert choose([one, other], at_most=0.12) == {"one": (5,)}
    assert choose([one, other], at_most=0.05) == {}
    everything = {"one": (2, 5, 9), "other": (0, 1)}
    assert choose([one, other], at_most=float("inf")) == everything


def test_one_that_waits_for_a_dearer_one_is_as_dear():
    assert Offer("one", (0, 1), (0.9, 0.1), 1.0).ratios() == [0.9, 0.9]


def test_units_taken_at_a_worth_are_the_best_of_all_sets():
    """On a tiny map, against every set of columns that could go, each with its own best fit."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(300, 7, generator=generator, dtype=torch.float64)
    inputs = inputs * torch.tensor([3.0, 0.1, 1.0, 0.2, 2.0, 0.15, 1.5])
    weight = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    moment, rows = inputs.T @ inputs / 300, torch.ones(4, dtype=torch.float64)
    worth = 0.08

    def gain(gone):
        change = refitted(weight, moment, torch.tensor(gone, dtype=torch.long)) - weight
        return worth * len(gone) - 0.5 * float((change @ moment * change).sum())

    reader = Reader(weighted(weight, rows), moment, torch.arange(7)[:, None])
    units, added = cheapest_first([reader], 6, stop=worth)
    taken = choose([Offer("only", tuple(units), tuple(added), worth)], at_most=1.0)["only"]
    every = [gone for size in range(7) for gone in combinations(range(7), size)]
    assert taken == max(every, key=gain)
    assert 0 < len(taken) < 6


# ---------------------------------------------------------------------------------------------
# turn by turn


@pytest.mark.parametrize("name", MODELS)
def test_two_turns_cut_what_one_cut_of_both_does(name):
    module, run = MODELS[name]()
    groups = find_coupled(module, run).groups
    first = {one.name: [0] for one in groups if one.units > 2}
    small = cut_out(module, groups, first)
    second = {one.name: [one.units - 1] for one in narrower(small, groups, first) if one.units > 1}
    smaller = cut_out(small, narrower(small, groups, first), second)
    both = {
        one.name: [*first.get(one.name, ()), *([one.units - 1] if one.name in second else ())]
        for one in groups
    }
    once = cut_out(module, groups, both)
    assert changed_sizes(module, smaller) == changed_sizes(module, once)
    shapes = [{key: one.shape for key, one in m.state_dict().items()} for m in (smaller, once)]
    assert shapes[0] == shapes[1]
    torch.testing.assert_close(run(smaller), run(once), rtol=0, atol=TOLERANCE.get(name, 1e-9))
    left = narrower(smaller, narrower(small, groups, first), second)
    assert [one.units for one in left] == [one.units - len(both[one.name]) for one in groups]
    for one in left:  # the numbers that go with a unit are those that a cut of it takes
        if one.units > 1:
            less = cut_out(smaller, left, {one.name: [0]})
            gone = [sum(t.numel() for t in m.state_dict().values()) for m in (smaller, less)]
            tied = len(dict(smaller.named_parameters(remove_duplicate=False))) - len(
                dict(smaller.named_parameters())
            )
            assert tied or gone[0] - gone[1] == one.weights


@pytest.mark.parametrize("name", MODELS)
def test_a_module_just_built_is_made_as_narrow(name):
    module, run = MODELS[name]()
    groups = find_coupled(module, run).groups
    small = cut_out(module, groups, {one.name: [0] for one in groups if one.units > 1})
    built, _ = MODELS[name]()
    state = small.state_dict()
    shapes = {key: tuple(one.shape) for key, one in state.items()}
    narrow(built, shapes, {"sizes": changed_sizes(module, small)})
    built.load_state_dict(state)
    assert torch.equal(run(built), run(small))


@pytest.mark.parametrize(
    ("shapes", "described"),
    [
        ({}, None),
        ({}, {"sizes": [1]}),
        ({}, {"sizes": {"nowhere": {"in_features": 1}}}),
        ({}, {"sizes": {"0": {"in_features": 17}}}),
        ({}, {"sizes": {"0": {"in_features": 0}}}),
        ({}, {"sizes": {"0": {"in_features": True}}}),
        ({}, {"sizes": {"0": {"forward": 1}}}),
        ({"0.weight": (64, 17)}, {"sizes": {}}),
        ({"0.weight": (64,)}, {"sizes": {}}),
        ({"0.weight": (0, 16)}, {"sizes": {}}),
    ],
)
def test_a_description_makes_a_module_narrower_or_is_refused(shapes, described):
    module, _ = toy_code.classifier()
    with pytest.raises(ModelError) as caught:
        narrow(module, shapes, described)
    assert caught.value.hint


# ---------------------------------------------------------------------------------------------
# the whole of it


COUNT = 120


def recipe(folder, code="redundant", **more):
    data = folder / "data.npz"
    if not data.exists():
        toy_code.save_data(data, count=COUNT)
    return Recipe(f"toy_code:{code}", "3700", str(data), task="classify", rounds=1, **more)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrowed")
    asked = recipe(folder, cut="auto")
    return folder, asked, pipeline.compress(asked, folder / "small")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


AGAIN = Recipe("", factory="toy_code:redundant", threads=1)


def test_where_channels_say_the_same_a_cut_wins_and_less_is_lost(made):
    folder, asked, report = made
    plan = report.plan
    assert plan.cuts and plan.contenders[0].turns == 0
    best = min(plan.contenders, key=lambda one: one.measured_damage)
    assert best.is_chosen and best.turns == max(cut.turn for cut in plan.cuts)
    assert sum(one.is_chosen for one in plan.contenders) == 1
    alone = pipeline.compress(replace(asked, cut="off"), folder / "rounded")
    assert report.verdict.divergence.value < 0.9 * alone.verdict.divergence.value
    assert report.bytes_after <= 3700


def test_what_was_cut_is_gone_from_the_file_and_the_module(made):
    folder, _, report = made
    lost = {"0": 0, "3": 0}
    for cut in report.plan.cuts:
        lost[cut.group] += len(cut.units)
    small = attar.load(folder / "small", factory=toy_code.redundant()[0]).module
    assert (small[0].out_features, len(small[0].weight)) == (64 - lost["0"], 64 - lost["0"])
    assert (small[3].in_features, small[3].out_features) == (64 - lost["0"], 48 - lost["3"])
    assert small[5].in_features == small[5].weight.shape[1] == 48 - lost["3"]
    numbers = sum(cut.weights for cut in report.plan.cuts)
    whole, _ = toy_code.redundant()
    layers = ("0.weight", "3.weight", "5.weight", "3.bias")  # the first has none of its own before
    held = [sum(m.get_parameter(name).numel() for name in layers) for m in (whole, small)]
    assert held[0] - held[1] + lost["0"] == numbers


def test_a_plan_cuts_the_same_again_byte_for_byte(made):
    folder, _, _ = made
    pipeline.apply_plan_file(folder / "small/report/plan.yaml", folder / "again", recipe=AGAIN)
    assert files(folder / "small") == files(folder / "again")


def test_another_size_is_had_from_the_prices_of_what_was_cut(made):
    folder, _, report = made
    asked = replace(AGAIN, size="4400")
    other = pipeline.apply_frontier_file(folder / "small", folder / "other", recipe=asked)
    assert [cut.units for cut in other.plan.cuts] == [cut.units for cut in report.plan.cuts]
    assert report.bytes_after < other.bytes_after <= 4400


def test_what_is_read_back_answers_as_what_was_decided(made):
    folder, _, _ = made
    model = attar.load("toy_code:redundant", task="classify")
    asked = {"size": "3700", "rounds": 1, "cut": "auto", "data": folder / "data.npz"}
    plan = attar.plan(model, **asked)
    small = attar.apply(model, plan)
    read = load_folder(read_folder(folder / "small", build_transform), toy_code.redundant()[0])
    inputs = {"inputs": toy_code.samples(50, seed=4)}
    one, other = (m.task.forward(m.module, inputs) for m in (small, read))
    assert torch.equal(one, other)
    found = attar.audit(model, small)
    assert found.outcome == "passed" and found.divergence.value > 0
    edited = replace(plan, cuts=plan.cuts)  # is carried out afresh
    again = attar.apply(model, edited, data=folder / "data.npz")
    assert torch.equal(again.task.forward(again.module, inputs), one)


def test_the_report_says_what_was_cut_group_by_group(made):
    folder, _, report = made
    facts = json.loads((folder / "small/report/report.json").read_text())
    cuts, shapes = facts["cuts"], [one.get("left", {}).get("shape") for one in facts["units"]]
    for group in cuts["groups"]:
        own = [cut for cut in report.plan.cuts if cut.group == group["group"]]
        assert group["units"] == sum(len(cut.units) for cut in own)
        assert group["weights"] == sum(cut.weights for cut in own)
        assert group["predicted_damage"] >= 0 and group["measured_damage"] >= 0
    gone = sum(group["weights"] for group in cuts["groups"])
    assert cuts["numbers"]["before"] - cuts["numbers"]["after"] == gone
    assert cuts["macs"]["after"] < cuts["macs"]["before"]
    text = report_to_text(report)
    assert f"{sum(len(cut.units) for cut in report.plan.cuts)} units of 2 groups" in text
    page = (folder / "small/report/report.html").read_text()
    assert "What was cut" in page and "then rounding" in page
    assert shapes[1] == list(report.left["3"].shape) != [48, 64]


def test_the_audit_says_what_the_cut_alone_cost(made):
    _, _, report = made
    (claim,) = [one for one in report.verdict.groups if one.group == "cut"]
    assert claim.predicted_damage == pytest.approx(report.plan.cut_damage)
    assert 0 < claim.measured_damage < report.verdict.divergence.value
    assert claim.bytes_before == 2 * sum(cut.weights for cut in report.plan.cuts)


def test_where_rounding_alone_is_better_nothing_is_cut_and_the_bytes_are_the_same(tmp_path):
    asked = replace(recipe(tmp_path, "classifier"), size="5kB")
    plain = pipeline.compress(asked, tmp_path / "plain")
    tried = pipeline.compress(replace(asked, cut="auto"), tmp_path / "tried")
    assert files(tmp_path / "plain") == files(tmp_path / "tried")
    assert not plain.plan.contenders and tried.plan.contenders
    assert any("nothing was cut" in note for note in tried.plan.notes)
    assert tried.plan.contenders[0].is_chosen and not tried.plan.cuts
    text = (tmp_path / "plain/report/plan.yaml").read_text()
    assert "cut" not in text and "contenders" not in text


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("only")
    asked = replace(recipe(folder, "classifier", cut="only"), size="6.5kB")
    return folder, asked, pipeline.compress(asked, folder / "only")


ALONE_AGAIN = replace(AGAIN, factory="toy_code:classifier")


def test_cutting_alone_meets_a_size_in_16_bits(alone):
    folder, _, report = alone
    assert report.bytes_after <= 6500
    assert {choice.treatment for choice in report.plan.choices.values()} == {"keep_float"}
    assert report.plan.cuts and not report.plan.contenders
    plan = folder / "only/report/plan.yaml"
    pipeline.apply_plan_file(plan, folder / "again", recipe=ALONE_AGAIN)
    assert files(folder / "only") == files(folder / "again")


def test_a_size_below_the_fewest_bits_is_met_by_cutting_first(tmp_path):
    asked = replace(recipe(tmp_path, "classifier"), size="3300")
    with pytest.raises(BudgetError):
        pipeline.compress(asked, tmp_path / "rounded")
    report = pipeline.compress(replace(asked, cut="auto"), tmp_path / "small")
    assert report.bytes_after <= 3300 and report.plan.cuts
    assert any("rounding alone does not fit" in note for note in report.plan.notes)


def test_an_onnx_file_holds_the_narrower_network(alone):
    onnx = pytest.importorskip("onnx")
    folder, _, made_here = alone
    text = (folder / "only/report/plan.yaml").read_text()
    (folder / "onnx.yaml").write_text(text.replace("  size: 6.5kB", "  size: 10kB\n  to: onnx"))
    report = pipeline.apply_plan_file(folder / "onnx.yaml", folder / "small", recipe=ALONE_AGAIN)
    graph = onnx.load(folder / "small/model.onnx").graph
    shapes = {tuple(one.dims) for one in graph.initializer}
    assert {unit.shape for unit in report.left.values()} <= shapes
    units = [[(cut.group, cut.units) for cut in one.plan.cuts] for one in (report, made_here)]
    assert units[0] == units[1] != []
    assert report.verdict.outcome == made_here.verdict.outcome != "failed"


def test_nothing_that_is_kept_is_cut(tmp_path):
    asked = recipe(tmp_path, "classifier", cut="only", keep=("5",))
    report = pipeline.compress(replace(asked, size="8kB"), tmp_path / "kept")
    assert {cut.group for cut in report.plan.cuts} == {"0"}  # what 5 reads stays, and so does 5
    assert any("it is kept" in note for note in report.plan.notes)
    with pytest.raises(BudgetError, match="cutting alone leaves at least"):
        pipeline.compress(replace(asked, size="8kB", keep=("3",)), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_run_that_was_killed_goes_on_and_writes_the_same_bytes(made, monkeypatch, capsys):
    folder, asked, _ = made
    monkeypatch.chdir(folder)
    words = ["compress", asked.model, "--task", "classify", "--data", asked.data]
    words += ["--size", "3700", "--rounds", "1", "--cut", "auto", "--out", "broken"]
    script = KILLED.format(tests=str(Path(__file__).parent), after=30)
    run = [sys.executable, "-c", script, *words]
    killed = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert main(words) == 0
    assert "29 steps are finished" in capsys.readouterr().err
    assert files(folder / "broken") == files(folder / "small")


# ---------------------------------------------------------------------------------------------
# what cannot be


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("group: '0'", "group: '5'", "cannot be"),
        ("group: '0'", "group: nothing", "no units of that name"),
        ("turn: 1, units: [", "turn: 1, units: [64, ", "64"),
        ("turn: 1, units: [", "turn: 1, units: [-1, ", "names no group, turn and units"),
        ("turn: 1, units: [", "turn: one, units: [", "names no group, turn and units"),
    ],
)
def test_a_plan_that_cuts_what_cannot_be_is_refused(made, tmp_path, old, new, said):
    folder, _, _ = made
    text = (folder / "small/report/plan.yaml").read_text()
    assert old in text
    (tmp_path / "plan.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(PlanError, match=said):
        pipeline.apply_plan_file(tmp_path / "plan.yaml", tmp_path / "out", recipe=AGAIN)
    assert not (tmp_path / "out").exists()


def test_a_plan_that_would_empty_a_layer_is_refused(made, tmp_path):
    folder, _, _ = made
    text = (folder / "small/report/plan.yaml").read_text()
    line = "- {group: '3', turn: 9, units: " + str(list(range(48))) + "}\n"
    lines = [one for one in text.splitlines(keepends=True) if "group: '3'" not in one]
    text = "".join(lines).replace("cuts:\n", "cuts:\n" + line)
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(PlanError, match="all 48 units of '3'"):
        pipeline.apply_plan_file(tmp_path / "plan.yaml", tmp_path / "out", recipe=AGAIN)


def test_layers_that_do_not_fit_together_are_refused_when_read(made, tmp_path):
    folder, _, _ = made
    broken = tmp_path / "broken"
    broken.mkdir()
    for name, content in files(folder / "small").items():
        (broken / name).write_bytes(content)
    about = json.loads((broken / "attar.json").read_text())
    del about["cut"]
    (broken / "attar.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match="has shape"):
        attar.load(broken, factory=toy_code.redundant()[0])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"to": "gguf"}, "llama.cpp"),
        ({"decide": "qbert"}, "compares prices"),
        ({"cut": "some"}, "cannot be 'some'"),
    ],
)
def test_a_cut_that_goes_with_nothing_else_is_refused(other, said):
    with pytest.raises(SettingError, match=said):
        writing.check_form(Recipe("", **{"cut": "auto", **other}))


def test_all_sizes_have_no_one_cut(tmp_path):
    with pytest.raises(SettingError, match="depends on the size"):
        pipeline.frontier(recipe(tmp_path, cut="auto"), tmp_path / "f", force=False, progress=None)


def test_what_is_left_whole_is_said():
    lines = list(cut_turns._notes([("a", "it is kept"), ("b", "it is kept")]))
    assert lines == ["not cut: 2 group(s) such as a: it is kept."]

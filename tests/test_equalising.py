"""Changes chosen by price: the statistics after them, plans that hold them, the same bytes."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import toy_code
from linked_models import PreNorm, randomised

import attar
from attar import equalising, pipeline
from attar.cli import main
from attar.equalise.facts import facts_of
from attar.equalise.fold_hadamard import FoldHadamard
from attar.equalise.fold_scale import FoldScale
from attar.equalise.fold_shift import FoldShift
from attar.errors import PlanError, SettingError
from attar.links import Change
from attar.load.model import load_model
from attar.plan.planfile import plan_to_yaml
from attar.records import Equalised, Recipe, Silent
from attar.session import open_session

# Float32 sums of hundreds of products in another order.
CLOSE = {"rtol": 2e-3, "atol": 1e-6}


def session_of(module, inputs, **more):
    model = load_model(module, examples={"inputs": inputs[:2]}, task="classify")
    # With means too, which shifts need, and which changes of channels must carry along.
    asked = {"calibration": 40, "recovery": 20, "audit": 20, "biases": "moved", **more}
    recipe = Recipe(model.name, task="classify", **asked)
    return open_session(recipe, model, Silent(), {"inputs": inputs})


class Attending(torch.nn.Module):
    """Values with a bias, through attention, to a head: scale, shift and rotation are all free."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(8, 8) for _ in range(3))
        self.out, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 5)

    def forward(self, x):
        q, k, v = (
            one(x).view(*x.shape[:2], 2, 4).transpose(1, 2)
            for one in (self.query, self.key, self.value)
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.out(mixed.transpose(1, 2).reshape(x.shape)).mean(1))


@pytest.mark.parametrize(
    "fold",
    [FoldScale(1.0, 0.5), FoldShift("mean", 1.5), FoldHadamard()],
    ids=["scale", "shift", "rotation"],
)
def test_statistics_after_a_change_are_those_gathered_after_it(fold):
    inputs = torch.randn(90, 3, 8, generator=torch.Generator().manual_seed(1))
    module = randomised(Attending()).float()
    session = session_of(module, inputs)
    statistics = session.gather()
    work = equalising.open_work(session, statistics)
    link = next(one for one in work.found.links if one.name == "value")
    assert fold.refuses(link) is None
    work.fold(link, fold.change(link, work.facts(link)))
    gathered = session.gather()
    for unit, sides in (("out", ("first", "second", "means")), ("value", ("rows", "rows_first"))):
        (said,), (seen,) = work.statistics.curvatures[unit], gathered.curvatures[unit]
        for side in sides:
            want = getattr(seen, side)
            assert float(want.abs().max()) > 0
            torch.testing.assert_close(
                getattr(said, side) / want.abs().max(), want / want.abs().max(), **CLOSE
            )


def test_facts_sum_over_readers_and_shared_heads():
    inputs = torch.randn(90, 3, 8, generator=torch.Generator().manual_seed(1))
    session = session_of(randomised(Attending()).float(), inputs)
    work = equalising.open_work(session, session.gather())
    link = next(one for one in work.found.links if one.name == "value")
    facts = facts_of(link, work.state(), work.units, work.statistics, work.ranges)
    columns = work.statistics.curvatures["out"][0]
    moment = columns.columns[0] * columns.rows_mean
    for channel in range(8):
        assert float(facts.power[channel]) == pytest.approx(float(moment[channel, channel]))
        size = float(work.state()["out.weight"][:, channel].norm())
        assert float(facts.sizes[channel]) == pytest.approx(size)
    torch.testing.assert_close(facts.moment[1], moment[4:, 4:].double())
    assert bool((facts.low <= facts.mean).all()) and bool((facts.mean <= facts.high).all())


# --- what is chosen


def recipe(tmp_path, **more):
    data = tmp_path / "data.npz"
    if not data.exists():
        toy_code.save_data(data)
    few = {"calibration": 20, "recovery": 20, "audit": 20, "rounds": 1, **more}
    return Recipe("toy_code:uneven", "4.5kB", str(data), task="classify", equalise="auto", **few)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equalised")
    asked = recipe(folder)
    return folder, asked, pipeline.compress(asked, folder / "small")


def files(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name != "attar.json"
    } | {"units": json.loads((folder / "attar.json").read_text())["units"]}


def test_uneven_channels_are_evened_out_and_less_is_lost(made):
    folder, asked, report = made
    assert report.plan.equalised
    assert all(one.damage_after < one.damage_before for one in report.plan.equalised)
    assert any("equalised: fold_scale" in note for note in report.plan.notes)
    without = pipeline.compress(replace(asked, equalise="none"), folder / "plain")
    assert not without.plan.equalised
    assert report.verdict.divergence.value < 0.8 * without.verdict.divergence.value


def test_the_report_lists_what_was_folded(made):
    folder, _, report = made
    facts = json.loads((folder / "small" / "report" / "report.json").read_text())
    assert [one["link"] for one in facts["plan"]["equalised"]] == [
        one.link for one in report.plan.equalised
    ]


def test_a_plan_makes_the_same_bytes(made):
    folder, _, _ = made
    again = Recipe("", factory="toy_code:uneven", threads=1)
    pipeline.apply_plan_file(folder / "small/report/plan.yaml", folder / "again", recipe=again)
    assert files(folder / "small") == files(folder / "again")


def test_one_thread_makes_the_same_bytes(made):
    folder, asked, _ = made
    pipeline.compress(replace(asked, threads=1), folder / "alone")
    assert files(folder / "small") == files(folder / "alone")


def test_any_size_of_a_frontier_has_the_changes_it_was_priced_with(made):
    folder, asked, _ = made
    found = pipeline.frontier(replace(asked, size=""), folder / "sizes", force=False, progress=None)
    assert found.equalised
    again = Recipe("", "4.5kB", factory="toy_code:uneven")
    report = pipeline.apply_frontier_file(folder / "sizes", folder / "sized", recipe=again)
    assert [one.link for one in report.plan.equalised] == [one.link for one in found.equalised]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{link: '9', method: fold_scale, alpha: 0.5}", "nothing of that name"),
        ("{link: '3', method: fold_hadamard, seed: 0}", "one by one"),
        ("{link: '3', method: fold_magic}", "no method"),
        ("{link: '3', method: fold_scale, gamma: 1}", "no such setting"),
        ("{link: '3', method: fold_scale, alpha: 9.0}", "alpha is 9.0"),
        ("{link: 3}", "names no link"),
        ("fold_scale", "names no link"),
    ],
)
def test_an_edited_plan_is_refused_by_what_is_wrong(made, tmp_path, line, said):
    _, _, report = made
    text = plan_to_yaml(replace(report.plan, equalised=()))
    path = tmp_path / "plan.yaml"
    path.write_text(text.replace("equalised: []", f"equalised:\n- {line}"))
    again = Recipe("", factory="toy_code:uneven")
    with pytest.raises((PlanError, SettingError), match=said):
        pipeline.apply_plan_file(path, tmp_path / "out", recipe=again)
    assert not (tmp_path / "out").exists()


def test_a_word_that_is_no_way_is_refused(tmp_path, capsys):
    typed = [
        "compress",
        "minilm",
        "--size",
        "9MB",
        "--equalise",
        "best",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(typed) == 2
    assert "--equalise cannot be" in capsys.readouterr().err


def test_from_python_the_model_at_hand_stays(made):
    module, examples = toy_code.uneven()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = attar.load(module, examples=examples, task="classify")
    data = {"inputs": toy_code.samples(120)}
    known = attar.explain(model, data)
    plan = attar.plan(model, known, size="4.5kB", equalise="auto")
    again = attar.plan(model, known, size="4.5kB", equalise="auto")
    assert plan.equalised and plan.equalised == again.equalised
    for name, tensor in model.module.state_dict().items():
        if name in before:
            assert (
                tensor.shape != before[name].shape
                or name.startswith(("0", "1"))
                or torch.equal(tensor, before[name])
            )
    small, same = attar.apply(model, plan), attar.apply(model, deepcopy(plan), data=data)
    for name, tensor in small.module.state_dict().items():
        assert torch.equal(tensor, same.module.state_dict()[name])
    assert attar.audit(model, small).divergence.value < 0.1


# --- a price of one's own


def test_a_price_of_activations_chooses_a_shift():
    """What int8 activations need: told what rounding them costs, the cheapest change is found."""
    inputs = torch.randn(90, 9, generator=torch.Generator().manual_seed(2))
    module = randomised(PreNorm()).float()
    module.norm.bias.data[3] += 30.0  # one channel far from zero: a step of all spans it
    session = session_of(module, inputs)
    work = equalising.open_work(session, session.gather())
    link = next(one for one in work.found.links if one.name == "norm")
    facts = work.facts(link)

    def step_of_all(change: Change) -> float:
        """Error of one step for all channels, through the weights that it meets."""
        taken = torch.zeros(9) if change.shift is None else change.shift
        ends = torch.stack([facts.low - taken, facts.high - taken]) * change.write.by
        met = (facts.sizes * change.read.by).square().sum()
        return float((ends.max() - ends.min()).square() * met)

    option, change, _ = equalising.best_change(link, facts, equalising.OPTIONS, step_of_all)
    assert option[0] == "fold_shift"
    assert float(change.shift[3]) == pytest.approx(30, abs=3)
    same = equalising.best_change(link, facts, [("fold_scale", {"alpha": 0.0})], step_of_all)
    assert step_of_all(change) < 0.5 * same[2]
    assert equalising.best_change(link, facts, [("fold_hadamard", {})], step_of_all) is None


def test_an_equalised_record_reads_as_it_was_written():
    from attar.plan.planfile import equalised_from_dict, equalised_to_list

    one = Equalised("a.b", "fold_scale", {"alpha": 0.5, "beta": 0.25}, 0.5, 0.25)
    assert equalised_from_dict({"equalised": equalised_to_list((one,))}) == (one,)
    assert equalised_from_dict({}) == ()

"""Whether two models give the same reasons: measures, explanations, and the table between ends."""

import base64
import io
import json
import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy_code
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from report_cases import efficientnet
from scipy.spatial import distance
from scipy.stats import spearmanr
from test_attribution import Text, random, spoilt
from test_decide import classifier_session, llama_session
from torch import nn

import attar
from attar import asking, drifting
from attar.asking import choose, name_of, way_of
from attar.attribute.integrated_gradients import integrated_gradients
from attar.attribute.question import Asked, Explained, Question, Way
from attar.attribute.units import unit_relevance
from attar.audit import drift
from attar.audit.fidelity import bootstrap
from attar.audit.policy import with_policy
from attar.cli import main
from attar.errors import DataError, SettingError
from attar.judging import judge_models, open_policy
from attar.load.tasks import TASKS
from attar.records import Architecture, Recipe, Silent
from attar.report.drift_text import caution_text, drift_page, drift_parts
from attar.report.html import report_to_html
from attar.report.layout import render
from attar.report.record import jsonable, verdict_to_json
from attar.serving import audit_report
from attar.session import open_session

numbers = st.floats(-100, 100, width=32)
vectors = arrays(np.float64, st.integers(1, 33), elements=numbers)
maps = arrays(np.float64, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=numbers)
FIXED = settings(derandomize=True, deadline=None, max_examples=60)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Fewer predictions than a user gets are explained."""
    monkeypatch.setitem(asking.MOST, "language", 6)
    monkeypatch.setattr(asking, "MOST_OTHERWISE", 24)
    monkeypatch.setattr(asking, "TEXT_STEPS", 16)


def pairs(n=9, size=33, seed=0):
    draws = np.random.default_rng(seed)
    return [(draws.normal(size=size), draws.normal(size=size)) for _ in range(n)]


# --- measures


def test_rank_correlation_is_scipys_also_with_ties():
    draws = np.random.default_rng(3)
    tied = [(draws.integers(-2, 3, 33) * 1.0, draws.integers(-2, 3, 33) * 1.0) for _ in range(9)]
    for one, other in [*pairs(), *tied]:
        expected = spearmanr(one, other).statistic
        assert drift.rank_correlation(one, other) == pytest.approx(expected, abs=1e-12)


def test_top_signs_cosine_and_mass_are_those_of_plain_loops():
    for one, other in pairs(size=41):
        k = 4  # a tenth of 41
        first, second = (
            set(sorted(range(41), key=lambda i: (-abs(e[i]), i))[:k]) for e in (one, other)
        )
        assert drift.top_agreement(one, other) == len(first & second) / k
        same = [(one[i] > 0) == (other[i] > 0) for i in first | second]
        assert drift.sign_agreement(one, other) == pytest.approx(sum(same) / len(same))
        assert drift.cosine(one, other) == pytest.approx(1 - distance.cosine(one, other))
        shares = [[abs(v) / sum(map(abs, e)) for v in e] for e in (one, other)]
        moved = sum(abs(a - b) for a, b in zip(*shares, strict=True)) / 2
        assert drift.mass_moved(one, other) == pytest.approx(moved)


def test_of_equal_sizes_the_earlier_feature_is_at_the_top():
    assert drift.top(np.array([1.0, -2.0, 2.0])).tolist() == [False, True, False]
    assert drift.top(np.ones(30)).nonzero()[0].tolist() == [0, 1, 2]


def ssim_by_loops(one, other, side):
    """Equation 13 of Wang et al. 2004, place by place."""
    far = side // 2
    window = [[math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-far, far + 1)]
              for i in range(-far, far + 1)]  # fmt: skip
    whole = sum(map(sum, window))
    span = one.max() - one.min()
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    found = []
    for row in range(far, one.shape[0] - far):
        for column in range(far, one.shape[1] - far):
            cells = [
                (window[i][j] / whole, one[row + i - far, column + j - far],
                 other[row + i - far, column + j - far])
                for i in range(side) for j in range(side)
            ]  # fmt: skip
            mx, my = sum(w * x for w, x, _ in cells), sum(w * y for w, _, y in cells)
            vx = sum(w * (x - mx) ** 2 for w, x, _ in cells)
            vy = sum(w * (y - my) ** 2 for w, _, y in cells)
            both = sum(w * (x - mx) * (y - my) for w, x, y in cells)
            found.append((2 * mx * my + c1) * (2 * both + c2)
                         / ((mx * mx + my * my + c1) * (vx + vy + c2)))  # fmt: skip
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("shape", "side"), [((15, 13), 11), ((7, 12), 7), ((6, 9), 5), ((1, 8), 1)]
)
def test_structural_similarity_is_that_of_plain_loops(shape, side):
    draws = np.random.default_rng(1)
    one = draws.normal(size=shape)
    other = one + 0.3 * draws.normal(size=shape)
    found = drift.structural_similarity(one, other)
    assert found == pytest.approx(ssim_by_loops(one, other, side), abs=1e-9)
    assert found < 1


def test_structural_similarity_is_that_of_skimage():
    metrics = pytest.importorskip("skimage.metrics")
    draws = np.random.default_rng(2)
    one = draws.normal(size=(33, 21))
    other = one + draws.normal(size=(33, 21))
    expected = metrics.structural_similarity(
        one, other, data_range=one.max() - one.min(), gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    assert drift.structural_similarity(one, other) == pytest.approx(expected, abs=1e-9)


SAME = {
    "rank_correlation": 1.0, "top_agreement": 1.0, "sign_agreement": 1.0, "cosine": 1.0,
    "structural_similarity": 1.0, "mass_moved": 0.0,
}  # fmt: skip


@FIXED
@given(maps)
def test_the_same_map_agrees_in_everything(explanation):
    assert drift.compare(explanation, explanation.copy()) == SAME


@FIXED
@given(vectors, st.floats(1e-3, 1e3))
def test_a_larger_copy_has_the_same_order_signs_and_shares(explanation, by):
    found = drift.compare(explanation, by * explanation)
    assert found.keys() == SAME.keys() - {"structural_similarity"}
    if np.ptp(explanation) > 0:  # an order of equal numbers is none
        assert found["rank_correlation"] == pytest.approx(1.0)
    assert found["top_agreement"] == found["sign_agreement"] == 1.0
    if explanation.any():
        assert found["cosine"] == pytest.approx(1.0)
        assert found["mass_moved"] == pytest.approx(0.0, abs=1e-9)


@FIXED
@given(
    st.integers(1, 33).flatmap(lambda n: st.tuples(*[arrays(np.float64, n, elements=numbers)] * 2))
)
def test_measures_stay_in_their_range_and_all_but_two_have_no_side(both):
    one, other = both
    there, back = drift.compare(one, other), drift.compare(other, one)
    for name, value in there.items():
        low = -1.0 if name in ("rank_correlation", "cosine") else 0.0
        assert low - 1e-12 <= value <= 1.0 + 1e-12
        assert back[name] == pytest.approx(value, abs=1e-9)


def test_an_explanation_that_is_flat_agrees_with_none_but_itself():
    flat, other = np.zeros((12, 12)), np.random.default_rng(0).normal(size=(12, 12))
    found = drift.compare(flat, other)
    assert found["rank_correlation"] == found["cosine"] == found["structural_similarity"] == 0.0
    assert found["mass_moved"] == 1.0


def test_the_mean_over_all_counts_each_group_by_its_true_share():
    found = [{"x": v} for v in (0.9, 0.8, 0.1, 0.3)]
    changed = np.array([False, False, True, True])
    every = drift.stratified(found, changed, 0.1, seed=0)["x"]
    assert every.value == pytest.approx(0.9 * 0.85 + 0.1 * 0.2)
    assert every.low < every.value < every.high
    assert every.low >= 0.9 * 0.8 + 0.1 * 0.1 - 1e-12
    alone = drift.stratified(found[:2], changed[:2], 0.0, seed=0)["x"]
    assert alone.value == pytest.approx(0.85)
    own = drift.means(found, 5)["x"]
    assert own == bootstrap(np.array([0.9, 0.8, 0.1, 0.3]), np.arange(4), seed=5)
    assert drift.means([], 0) is None


# --- explanations


def smooth_picture():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 5)
    )


class Gaussian(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.inner = nn.Linear(7, 3)

    def forward(self, x):
        return self.inner(x).tanh()


EXPLAINED = {
    "classify": (smooth_picture, {"inputs": random(1, 2, 5, 5)}, Asked(0, 3)),
    "regress": (Gaussian, {"inputs": random(1, 7)}, Asked(0, -1, torch.tensor([0.6, 0.0, -0.8]))),
    "language": (Text, {"tokens": torch.tensor([[3, 1, 4, 1, 5, 9, 2]])}, Asked(6, 8)),
}


def in_double(task):
    make, sample, asked = EXPLAINED[task]
    sample = {n: t.double() if t.is_floating_point() else t for n, t in sample.items()}
    if asked.direction is not None:
        asked = replace(asked, direction=asked.direction.double())
    module = make().double().eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter *= 1.5  # so that answers are sure of something
    return Explained("toy", TASKS[task], module), sample, asked


@pytest.mark.parametrize("task", EXPLAINED)
def test_the_parts_sum_to_what_the_answer_gains_over_the_baseline(task):
    model, sample, asked = in_double(task)
    gain = Question(model, sample, asked, Way()).whole_change()
    assert abs(gain) > 0.02
    gaps = [
        abs(float(integrated_gradients(model, sample, asked, Way(steps=steps)).sum()) - gain)
        for steps in (16, 64, 256)
    ]
    # The midpoint rule errs by the square of its step.
    assert gaps[0] < 0.01 * abs(gain) and gaps[1] < gaps[0] / 8 and gaps[2] < gaps[1] / 8


def test_of_a_linear_answer_each_part_is_weight_times_input():
    layer = nn.Linear(4, 1).double().requires_grad_(False)
    x, mean = random(1, 4).double(), random(4, seed=1).double()
    asked = Asked(0, -1, torch.ones(1).double())
    model = Explained("toy", TASKS["regress"], layer)
    found = integrated_gradients(model, {"inputs": x}, asked, Way(mean))
    assert torch.allclose(found, layer.weight[0] * (x[0] - mean), atol=1e-12)


def test_tokens_are_explained_by_their_vectors_and_a_kept_token_by_nothing():
    model, sample, asked = in_double("language")
    way = Way(kept=1, steps=512)
    found = integrated_gradients(model, sample, asked, way)
    table = model.module.table.weight

    def answer(t):
        """The same network by hand, on vectors."""
        x = table[sample["tokens"]].clone()
        x[:, 1:] *= t
        q, k, v = model.module.mix(x).chunk(3, -1)
        seen = torch.ones(7, 7).tril() > 0
        weight = (q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1)
        return float((2 * model.module.out(x + weight @ v))[0, -1].log_softmax(-1)[8])

    assert Question(model, sample, asked, way).whole_change() == pytest.approx(
        answer(1.0) - answer(0.0)
    )
    assert found.shape == (7,) and found[0] == 0
    assert float(found.sum()) == pytest.approx(answer(1.0) - answer(0.0), rel=1e-3)


def test_other_weights_explain_as_a_model_that_holds_them():
    model, sample, asked = in_double("language")
    other = deepcopy(model.module)
    other.mix.weight *= 1.5
    other.table.weight += 0.1
    weights = {f"{n}.weight": getattr(other, n).weight for n in ("mix", "table")}
    stood_in = replace(model, weights={n: (lambda w=w: w) for n, w in weights.items()})
    held = integrated_gradients(replace(model, module=other), sample, asked, Way())
    assert torch.allclose(integrated_gradients(stood_in, sample, asked, Way()), held)
    assert not torch.allclose(integrated_gradients(model, sample, asked, Way()), held)
    names = {"mix", "table", "out"}
    one, two = (
        unit_relevance(m, sample, asked, names) for m in (stood_in, replace(model, module=other))
    )
    assert one == pytest.approx(two)


def test_relevance_of_a_unit_is_output_times_gradient():
    model, sample, asked = in_double("classify")
    found = unit_relevance(model, sample, asked, {"0", "5"})
    module, x = model.module, sample["inputs"]
    for unit, place in (("0", 1), ("5", 6)):
        output = module[:place](x).requires_grad_()
        module[place:](output).log_softmax(-1)[0, 3].backward()
        assert found[unit] == pytest.approx(float((output.detach() * output.grad).abs().sum()))
    assert found.keys() == {"0", "5"}


def test_a_model_that_cuts_the_gradient_is_refused():
    class Cut(nn.Linear):
        def forward(self, x):
            return super().forward(x.detach())

    model = Explained("cut", TASKS["regress"], Cut(3, 1).requires_grad_(False))
    asked = Asked(0, -1, torch.ones(1))
    with pytest.raises(DataError, match="no gradient of an answer of cut reaches"):
        integrated_gradients(model, {"inputs": random(1, 3)}, asked, Way())


# --- which predictions


def test_at_most_one_prediction_of_a_sample_and_half_of_them_changed():
    session = llama_session()
    other = spoilt(session, {u.name: 0.15 for u in session.units})
    chosen, share = choose(session, other.module)
    assert 0.05 < share < 0.95
    assert len({one.sample for one in chosen}) == len(chosen) == 6
    assert sum(one.changed for one in chosen) == 3
    for one in chosen:
        tokens = torch.cat([b["tokens"] for b in session.data.audit])[one.sample]
        assert torch.equal(one.inputs["tokens"][0], tokens[: one.asked.position + 1])
        assert one.asked.position >= 7
        forward = session.model.task.forward
        modules = (session.model.module, other.module)
        outputs = [forward(m, {"tokens": tokens[None]})[0, one.asked.position] for m in modules]
        answers = [int(output.argmax()) for output in outputs]
        assert answers[0] == one.asked.answer and (answers[0] != answers[1]) == one.changed
    again, _ = choose(session, other.module)
    assert [o.asked for o in again] == [o.asked for o in chosen]
    assert (
        name_of(session, chosen[0])
        == f"sample {chosen[0].sample}, token {chosen[0].asked.position}"
    )


def test_of_more_samples_than_are_explained_changed_ones_are_half(monkeypatch):
    session = classifier_session()
    other = spoilt(session, {u.name: 0.2 for u in session.units})
    monkeypatch.setattr("attar.asking.MOST_OTHERWISE", 12)
    chosen, share = choose(session, other.module)
    assert len(chosen) == 12 and sum(one.changed for one in chosen) == 6
    assert 0.1 < share < 0.4


def test_tables_start_at_the_means_of_their_calibration_data():
    session = classifier_session()
    rows = torch.cat([batch["inputs"] for batch in session.data.calibration])
    assert torch.equal(way_of(session).baseline, rows.mean(0))
    assert way_of(llama_session()) == Way(kept=1, steps=asking.TEXT_STEPS)


def test_what_fills_a_sentence_up_is_not_explained():
    model = toys.sentence_model()
    tokens = torch.arange(90).reshape(15, 6)
    attention = torch.ones(15, 6, dtype=torch.int64)
    attention[::2, 4:] = 0
    data = {"tokens": tokens, "attention": attention}
    session = open_session(Recipe("toy", task="embed"), model, Silent(), data)
    chosen, share = choose(session, model.module)
    kept = torch.cat([b["attention"] for b in session.data.audit]).sum(1)
    assert share == 0.0
    assert [one.inputs["tokens"].shape[1] for one in chosen] == [
        int(kept[o.sample]) for o in chosen
    ]
    assert {one.inputs["tokens"].shape[1] for one in chosen} == {4, 6}
    assert all(torch.linalg.norm(one.asked.direction) == pytest.approx(1) for one in chosen)


# --- from floor to ceiling


def drifted(session, size, reference=None):
    other = spoilt(session, {unit.name: size for unit in session.units})
    return drifting.with_drift(session, other, judge_models(session, other), reference)


def every(found, role, name="rank_correlation"):
    return found.row(role).every[name].value


@pytest.mark.parametrize("make", [classifier_session, llama_session])
def test_damage_lies_between_the_floor_and_the_ceiling_and_in_order(make):
    session = make()
    found = [drifted(session, size).drift for size in (0.05, 0.2)]
    for one in found:
        assert one.n_changed > 0 and one.n_stayed > 0
        assert every(one, "floor") > 0.98 and abs(every(one, "ceiling")) < 0.5
    order = [every(found[0], "floor"), *(every(one, "compressed") for one in found)]
    assert order[0] > order[1] + 0.02 > order[2] + 0.1 > every(found[0], "ceiling") + 0.2
    moved = [every(found[0], "floor", "mass_moved")]
    moved += [every(one, "compressed", "mass_moved") for one in found]
    assert moved == sorted(moved) and moved[2] < every(found[0], "ceiling", "mass_moved")


def test_the_same_model_gives_the_same_reasons():
    session = classifier_session()
    verdict = judge_models(session, session.model)
    found = drifting.with_drift(session, session.model, verdict, session.model).drift
    for role in ("compressed", "reference"):
        values = {name: one.value for name, one in found.row(role).every.items()}
        assert values == {n: v for n, v in SAME.items() if n != "structural_similarity"}
    assert found.n_changed == 0 and found.row("compressed").changed is None
    assert all(one.before == one.after for one in found.units)
    assert sum(one.before for one in found.units) == pytest.approx(1)
    assert found.completeness_gap < 0.05


def test_the_same_seed_gives_the_same_numbers_on_any_number_of_threads(monkeypatch):
    monkeypatch.setitem(asking.MOST, "language", 3)
    session = llama_session()
    found = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(drifted(session, 0.2).drift)
    torch.set_num_threads(before)
    assert found[0] == found[1]
    other = replace(session, recipe=replace(session.recipe, seed=1))
    assert drifted(other, 0.2).drift.row("ceiling") != found[0].row("ceiling")


def test_the_ceiling_holds_the_numbers_of_each_weight_in_another_order():
    session = classifier_session()
    compressed = Explained("same", session.model.task, session.model.module)
    models = dict(drifting._models(session, compressed, None))
    assert list(models) == ["floor", "compressed", "ceiling"]
    for unit in session.units:
        own = session.weight(unit)
        shuffled, rounded = (
            models[role].weights[f"{unit.name}.weight"]().reshape(own.shape)
            for role in ("ceiling", "floor")
        )
        assert torch.equal(shuffled.flatten().sort().values, own.flatten().sort().values)
        assert not torch.equal(shuffled, own)
        assert (rounded - own).abs().max() <= (own.max() - own.min()) / 255
        assert not torch.equal(rounded, own)


def embed_session():
    tokens = torch.randint(0, 250, (40, 6), generator=torch.Generator().manual_seed(1))
    data = {"tokens": tokens, "attention": torch.ones_like(tokens)}
    return open_session(Recipe("toy", task="embed"), toys.sentence_model(), Silent(), data)


def regress_session():
    module, examples = toy_code.regressor()
    model = attar.load(module, examples=examples, task="regress")
    data = {"inputs": toy_code.samples(90)}
    return open_session(Recipe("toy", task="regress"), model, Silent(), data)


@pytest.mark.parametrize("make", [embed_session, regress_session])
def test_outputs_that_are_no_answers_are_explained_along_their_own_direction(make):
    session = make()
    verdict = drifted(session, 0.2)
    found = verdict.drift
    assert "of the output, along the original's own" in found.method
    assert found.n_changed is None and found.n_stayed > 9 and found.completeness_gap < 0.05
    order = [every(found, role) for role in ("floor", "compressed", "ceiling")]
    assert order[0] > 0.98 and order[0] > order[1] > 0.6 > order[2] + 0.1
    text = render(drift_parts(verdict_to_json(verdict)["drift"]), 100, False)
    assert f"all predictions, {found.n_stayed}" in text and "answer," not in text


def test_a_unit_that_was_cut_loses_its_share():
    session = classifier_session()
    other = spoilt(session, {})
    other.module.get_parameter("0.weight").data[8:] = 0  # of 64 channels
    found = drifting.with_drift(session, other, judge_models(session, other)).drift
    assert found.units[0].unit == "0" and found.units[0].after < found.units[0].before - 0.05
    for side in ("before", "after"):
        assert sum(getattr(one, side) for one in found.units) == pytest.approx(1)


def test_concepts_are_kept_by_the_floor_and_lost_by_the_ceiling():
    session = classifier_session()
    verdict = judge_models(session, session.model)
    same = drifting.with_drift(session, session.model, verdict, session.model).drift
    for place in same.concepts:
        floor, own, ceiling = place.rows
        assert [row.role for row in place.rows] == ["floor", "compressed", "ceiling"]
        assert (own.kept, own.n_lost, own.n_merged) == (1.0, 0, 0)
        assert floor.n_lost == 0 and floor.kept > 0.98
        assert ceiling.n_lost > place.n_concepts / 2 and ceiling.kept < 0.5
        assert all(one.shown and one.strength_ratio == 1.0 for one in place.moved)
    assert [place.unit for place in same.concepts] == ["3", "5"]


def test_concepts_that_lay_in_what_was_cut_are_named_and_told():
    session = classifier_session()
    other = spoilt(session, {})
    other.module.get_parameter("0.weight").data[8:] = 0  # of 64 channels
    verdict = drifting.with_drift(session, other, judge_models(session, other))
    place = verdict.drift.concepts[0]
    gone = [one for one in place.moved if one.lost]
    assert gone and place.rows[1].n_lost >= len(gone)
    assert place.moved[0].kept == min(one.kept for one in place.moved)
    text = render(drift_parts(verdict_to_json(verdict)["drift"]), 300, False)
    assert f"{place.n_concepts} concepts of what enters 3: floor 0 lost" in text
    assert text.count("  lost: ") >= len(gone) and "sample" in text


def test_concepts_of_a_text_are_told_by_its_tokens():
    session = llama_session()
    found = drifted(session, 0.05).drift.concepts
    assert len(found) == 2 and found[0].n_concepts >= 2
    shown = {word for place in found for one in place.moved for word in one.shown}
    assert shown and all(word.startswith("token ") for word in shown)


def test_an_explanation_that_is_no_number_is_named():
    class Sharp(nn.Module):
        """Finite answers, and a gradient that is infinite at 0.5 of the way."""

        def __init__(self, power):
            super().__init__()
            self.power, self.out = power, nn.Linear(3, 2)

        def forward(self, x):
            return self.out(x) + 0 * (x.sum(1, keepdim=True) * 0).abs().pow(self.power)

    make = {
        power: toys.toy("classify", Sharp(power), examples={"inputs": torch.zeros(2, 3)})
        for power in (2.0, 0.5)
    }
    make[0.5].module.load_state_dict(make[2.0].module.state_dict())
    session = open_session(Recipe("toy"), make[2.0], Silent(), {"inputs": random(40, 3)})
    verdict = judge_models(session, make[0.5])
    with pytest.raises(
        DataError, match=r"the explanation of sample \d+ by toy classify is not finite"
    ):
        drifting.with_drift(session, make[0.5], verdict)


def test_answers_that_are_no_numbers_leave_drift_out_and_say_so():
    session = classifier_session()
    told = []
    progress = Silent()
    progress.note = told.append
    session = replace(session, progress=progress)
    other = spoilt(session, {})
    other.module.get_parameter("0.weight").data[0, 0] = float("nan")
    verdict = drifting.with_drift(session, other, judge_models(session, other))
    assert verdict.drift is None and verdict.outcome == "failed"
    assert any("drift is left out" in line for line in told)


# --- what is refused


def test_a_graph_of_onnx_is_refused_with_what_to_audit_instead():
    session = classifier_session()
    graph = replace(session.model, architecture=Architecture("onnx", {}), name="small.onnx")
    for other, reference in ((graph, None), (session.model, graph)):
        with pytest.raises(DataError, match=r"small.onnx is a graph of ONNX.*\n.*--to attar"):
            drifting.check_models(session, other, reference)


def test_a_reference_with_other_inputs_or_answers_is_refused():
    session = classifier_session()
    own = {"inputs": torch.zeros(2, 5)}
    narrow = replace(session.model, module=nn.Linear(5, 10), name="narrow", examples=own)
    with pytest.raises(DataError, match=r"and narrow inputs of 5, which cannot read the same data"):
        drifting.check_models(session, session.model, narrow)
    few = replace(session.model, module=nn.Linear(16, 3), name="few")
    with pytest.raises(DataError, match="10 numbers and few 3"):
        drifting.check_models(session, session.model, few)


def test_what_needs_drift_is_refused_without_it(tmp_path):
    with pytest.raises(SettingError, match=r"reference.*\n.*add --drift"):
        drifting.check_asked(None, drift=False, reference=True)
    file = tmp_path / "limits.yaml"
    file.write_text("drift: 0.1\n")
    with pytest.raises(SettingError, match=r"limits.yaml limits drift"):
        drifting.check_asked(open_policy(file), drift=False, reference=False)
    assert drifting.check_asked(open_policy(file), drift=True, reference=True) is None


@pytest.mark.parametrize(
    ("size", "limit", "outcome"), [(0.02, 0.1, "passed"), (0.02, 0.001, "failed")]
)
def test_a_policy_limits_the_lost_rank_correlation(tmp_path, size, limit, outcome):
    verdict = drifted(classifier_session(), size)
    file = tmp_path / "limits.yaml"
    file.write_text(f"drift: {limit}\n")
    one = with_policy(verdict, open_policy(file), 1).checks[-1]
    mean = verdict.drift.row("compressed").every["rank_correlation"]
    assert one.name == "drift" and one.outcome == outcome
    assert (one.found.value, one.found.low, one.found.high) == (
        1 - mean.value,
        1 - mean.high,
        1 - mean.low,
    )


# --- what is shown


def picture_session():
    labels = "\n".join(f"<b>thing</b> {n}" for n in range(7)).encode()
    model = toys.picture_model(labels)
    pixels = random(40, 3, 33, 33)
    model.module[4].weight.mul_(20)
    model.module[4].bias.sub_(model.module(pixels).mean(0))  # else all have one answer
    return open_session(Recipe("toy"), model, Silent(), {"pixels": pixels})


def test_pictures_are_put_side_by_side_changed_ones_first():
    session = picture_session()
    verdict = drifted(session, 0.5)
    found = verdict.drift
    assert "structural_similarity" in found.row("compressed").every
    assert len(found.shown) == 4 and found.shown[0].changed
    flags = [one.changed for one in found.shown]
    assert flags == sorted(flags, reverse=True)
    for one in found.shown:
        assert (len(one.before), len(one.before[0])) == (17, 17)  # 33 pixels, two to a cell
        assert one.answer.startswith("<b>thing</b> ")
    page = drift_page(verdict_to_json(verdict)["drift"])
    for pair, one in zip(page["maps"], found.shown, strict=True):
        for side, values in zip(pair["sides"], (one.before, one.after), strict=True):
            drawn = Image.open(io.BytesIO(base64.b64decode(side["data"].partition(",")[2])))
            grey, values = np.asarray(drawn).astype(int), np.array(values)
            assert grey.shape == values.shape
            assert ((grey > 128) <= (values > 0)).all() and ((grey < 127) <= (values < 0)).all()
            row, column = np.unravel_index(np.abs(values).argmax(), values.shape)
            assert f"row {row + 1} of 17, column {column + 1} of 17" in side["says"]
    html = report_to_html(audit_report(session, session.model, verdict, None))
    assert html.count("data:image/png;base64,") == 8
    assert "&lt;b&gt;thing&lt;/b&gt;" in html and "<b>thing" not in html


def test_a_coarse_map_sums_cells_and_its_sizes_sum_to_one():
    parts = np.arange(1.0, 1 + 40 * 33).reshape(40, 33)
    coarse = np.array(drifting._coarse(parts))
    assert coarse.shape == (20, 17)
    assert coarse.sum() == pytest.approx(1, abs=1e-3)
    assert coarse[0, 0] == pytest.approx(parts[:2, :2].sum() / parts.sum(), rel=1e-4)


def test_texts_are_put_side_by_side_and_told_without_colour():
    session = llama_session()
    verdict = drifted(session, 0.2)
    facts = verdict_to_json(verdict)["drift"]
    first = verdict.drift.shown[0]
    assert len(first.tokens) == len(first.before[0]) == len(first.after[0])
    assert sum(map(abs, first.before[0])) == pytest.approx(1, abs=1e-3)
    html = report_to_html(audit_report(session, session.model, verdict, None))
    assert html.count('class="shares"') == 8 and "strongest: <bdi>" in html
    text = render(drift_parts(jsonable(facts, "", [])), 100, False)
    assert "floor" in text and "ceiling" in text and "this model" in text
    assert f"same answer, {verdict.drift.n_stayed}" in text
    assert f"another answer, {verdict.drift.n_changed}" in text
    mean = verdict.drift.row("compressed").stayed["rank_correlation"].value
    assert f"{mean:.3f}" in text


def test_a_floor_that_moved_itself_is_said_to_say_little():
    facts = verdict_to_json(efficientnet().verdict)["drift"]
    assert caution_text(facts) == ""
    facts["rows"][0]["every"]["rank_correlation"]["value"] = 0.7
    assert "rank correlation of 0.70: explanations of this model are brittle" in caution_text(facts)
    assert "brittle" in render(drift_parts(facts), 1000, False)


def test_where_drift_was_not_asked_for_nothing_is_said_of_it():
    session = classifier_session()
    verdict = judge_models(session, session.model)
    assert verdict_to_json(verdict)["drift"] is None and drift_parts(None) == []
    assert "reasons" not in report_to_html(audit_report(session, session.model, verdict, None))


# --- end to end


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A classifier of the command line, compressed, with its data."""
    folder = tmp_path_factory.mktemp("drift")
    data = toy_code.save_data(folder / "data.npz", count=200)
    typed = ["toy_code:classifier", "--task", "classify", "--data", str(data)]
    out = folder / "small"
    assert main(["compress", *typed, "--size", "3.7kB", "--out", str(out)]) in (0, 1, 3)
    audit = ["audit", typed[0], str(out), *typed[1:], "--factory", typed[0], "--drift"]
    return folder, audit


def test_the_command_line_writes_what_it_says(small, capsys):
    folder, audit = small
    facts, report = folder / "facts.json", folder / "report"
    limits, cases = folder / "limits.yaml", folder / "cases.xml"
    limits.write_text("drift: 0.9\n")
    more = ["--reference", "toy_code:other", "--json", str(facts), "--report", str(report)]
    more += ["--policy", str(limits), "--junit", str(cases)]
    assert main([*audit, *more]) in (0, 1, 3)
    said = " ".join(capsys.readouterr().out.split())
    found = json.loads(facts.read_text())["drift"]
    assert found == json.loads((report / "report.json").read_text())["verdict"]["drift"]
    assert [row["role"] for row in found["rows"]] == ["floor", "compressed", "reference", "ceiling"]
    assert found["rows"][2]["model"] == "toy_code:other"
    means = [row["every"]["rank_correlation"]["value"] for row in found["rows"]]
    assert means[0] > means[1] > means[2] and means[1] > means[3]
    assert f"{found['rows'][1]['stayed']['rank_correlation']['value']:.3f}" in said
    assert "the limit is 0.9: passed" in said and "drift" in cases.read_text()
    page = (report / "report.html").read_text()
    assert "Whether the reasons are still the same" in page and "toy_code:other" in page


@pytest.mark.parametrize(
    ("reference", "said"),
    [("toy_code:regressor", "3"), ("nowhere", "nowhere")],
)
def test_a_bad_reference_is_two_lines_and_exit_code_two(small, capsys, reference, said):
    _, audit = small
    assert main([*audit, "--reference", reference]) == 2
    error, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert error.startswith("error: ") and said in error and hint.startswith("hint: ")


def test_an_onnx_file_is_refused_on_the_command_line(small, capsys):
    pytest.importorskip("onnxruntime")
    folder, audit = small
    out = folder / "graph"
    data = audit[audit.index("--data") + 1]
    typed = [audit[1], "--task", "classify", "--data", data]
    assert main(["compress", *typed, "--size", "9kB", "--to", "onnx", "--out", str(out)]) in (
        0,
        1,
        3,
    )
    assert main(["audit", audit[1], str(out), *typed[1:], "--drift"]) == 2
    error, hint = capsys.readouterr().err.strip().splitlines()[-2:]
    assert error.startswith("error: ") and "is a graph of ONNX or OpenVINO: no gradients" in error
    assert hint.startswith("hint: audit the folder that Attar writes with --to attar")


def test_python_gives_the_same_as_the_command_line(small):
    _, audit = small
    module, examples = toy_code.classifier()
    model = attar.load(module, examples=examples, task="classify")
    other = attar.load(toy_code.other()[0], examples=examples, task="classify")
    back = attar.load(audit[2], factory=toy_code.classifier()[0])
    data = {"inputs": np.load(audit[audit.index("--data") + 1])["inputs"]}
    found = attar.audit(model, back, data, drift=True, reference=other)
    assert [row.role for row in found.drift.rows] == ["floor", "compressed", "reference", "ceiling"]
    assert attar.audit(model, back, data).drift is None
    with pytest.raises(SettingError, match="add --drift"):
        attar.audit(model, back, data, reference=other)
    made = attar.apply(model, attar.plan(model, data=data, size="7kB"))
    known = attar.audit(model, made, drift=True)
    assert known.groups and known.drift.row("compressed").every["rank_correlation"].value > 0.9

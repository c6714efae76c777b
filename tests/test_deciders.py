"""Every decider of the table, and each against what its paper does, on small problems."""

import random
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import pstdev

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decide import classifier_session, divergence_by_hand, uniform
from torch import nn

import attar
from attar import decide, plan, trials
from attar.activations import roundings
from attar.divergence import Divergence
from attar.errors import SettingError
from attar.load.model import load_model
from attar.plan import (
    DECIDERS,
    boosting,
    decide_granularity,
    decide_lrp,
    decide_mixdq,
    decide_ohq,
    decide_qbert,
    decide_quantune,
)
from attar.plan.solve import weight_bytes
from attar.records import (
    Activation,
    Candidate,
    Cost,
    Curvature,
    Question,
    Recipe,
    Silent,
    Statistics,
    Trial,
    Unit,
    Units,
)
from attar.session import open_session
from attar.sites import substituted
from attar.transform.apply import build_transform, materialise

WIDTHS = (2, 3, 4, 5, 6, 8)
ALL = pytest.mark.parametrize("name", DECIDERS)


def toy_question(content, quality, limit=None, seconds=None, widths=WIDTHS, seed=0):
    """Units whose trials lose `content + quality`, each times 4^-bits; prices know nothing."""
    units = [Unit(f"u{i}", "linear", (8 + i, 100), ("linear",)) for i in range(len(content))]
    candidates = {
        u.name: [
            Candidate(u.name, "quantize_rtn", {"bits": b}, Cost(b * u.n_weights // 8, 0), 4.0**-b)
            for b in widths
        ]
        for u in units
    }
    rates = {u.name: (c, q) for u, c, q in zip(units, content, quality, strict=True)}

    def trial(choices):
        lost = [
            (rates[n][0] * 4.0 ** -c.settings["bits"], rates[n][1] * 4.0 ** -c.settings["bits"])
            for n, c in choices.items()
        ]
        return Trial(sum(c for c, _ in lost), sum(q for _, q in lost))

    even = sum(4 * u.n_weights // 8 for u in units)
    return Question(
        candidates, limit or even, Units(tuple(units), ()), statistics_of({}), seed, trial,
        seconds or (lambda c: 1.0), lambda name: torch.ones(1, 100),
    )  # fmt: skip


def statistics_of(curvatures):
    return Statistics(curvatures, {}, {}, {}, {}, {}, {}, 0, {})


def every_plan(candidates, limit):
    plans = (dict(zip(candidates, p, strict=True)) for p in product(*candidates.values()))
    return [p for p in plans if weight_bytes(p) <= limit]


# --- the table


def test_every_file_of_a_decider_is_in_the_table():
    files = {path.stem for path in Path(plan.__file__).parent.glob("decide_*.py")}
    assert files == {f"decide_{name}" for name in DECIDERS}
    assert next(iter(DECIDERS)) == "price"  # the default comes first


@pytest.fixture(scope="module")
def priced():
    session = classifier_session()
    statistics = decide.explain(session)
    return session, statistics, decide.price(session, statistics)


def planned(priced, name, **more):
    session, statistics, candidates = priced
    own = replace(session, recipe=replace(session.recipe, decide=name, **more))
    return decide.plan(own, candidates, statistics)


@ALL
def test_a_decider_fits_the_budget_and_says_what_it_measured(priced, name):
    found = planned(priced, name)
    session, _, candidates = priced
    assert found.plan.weight_bytes <= session.budget_bytes()
    assert list(found.plan.choices) == list(candidates)
    assert all(c.refused is None for c in found.plan.choices.values())
    small = materialise(session.model.module, found.treated)
    measured = divergence_by_hand(session, small, session.data.recovery)
    assert found.plan.predicted_damage == pytest.approx(measured, rel=1e-3)
    assert found.plan.recipe.decide == name


def test_trials_and_what_is_decided_by_them_are_the_same_on_any_number_of_threads(priced):
    name = "quantune"
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(planned(priced, name).plan.choices)
    finally:
        torch.set_num_threads(2)
    assert found[0] == found[1]


def test_an_unknown_decider_is_refused_with_those_that_are():
    with pytest.raises(SettingError, match="no decider 'dice'") as error:
        trials.check_decider(classifier_session(decide="dice").recipe)
    assert "qbert" in error.value.hint
    with pytest.raises(SettingError, match="dice"):
        attar.compress("nothing", size="1kB", out="nowhere", decide_by="dice")


# --- trials


def test_a_trial_measures_what_is_lost_with_these_units_alone(priced):
    session, statistics, candidates = priced
    asked = trials.Trials(session, statistics)
    name = next(iter(candidates))
    choice = next(c for c in candidates[name] if c.settings.get("bits") == 2)
    found = asked.trial({name: choice})
    change = materialise(session.model.module, {name: asked._treat(choice)})
    batch = {k: t[: trials.SAMPLES] for k, t in session.data.recovery[0].items()}
    assert found.nats == pytest.approx(divergence_by_hand(session, change, [batch]), rel=1e-3)
    assert found.content > 0 and found.quality > 0
    assert asked.seconds(choice) > 0


@pytest.mark.parametrize("width", [2, 7])
def test_the_parts_of_a_divergence_sum_to_it_and_mean_what_they_say(width):
    draws = torch.Generator().manual_seed(width)
    p, q = (3 * torch.randn(5, width, generator=draws, dtype=torch.float64) for _ in range(2))
    categorical = Divergence("categorical")
    content, quality = categorical.parts(p, q)
    torch.testing.assert_close(content + quality, categorical.between(p, q))
    for row in range(5):
        one, two = p[row].softmax(-1), q[row].softmax(-1)
        best = int(one.argmax())
        a, b = float(one[best]), float(two[best])
        by_hand = a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))
        assert float(content[row]) == pytest.approx(by_hand, rel=1e-6)
        assert float(quality[row]) >= -1e-12
    gaussian = Divergence("gaussian", torch.eye(width, dtype=torch.float64) * 2)
    content, quality = gaussian.parts(p, 1.5 * p)
    assert float(content.abs().max()) < 1e-12  # longer, not turned
    torch.testing.assert_close(quality, gaussian.between(p, 1.5 * p))
    content, quality = gaussian.parts(p, q)
    torch.testing.assert_close(content + quality, gaussian.between(p, q))


# --- OHQ


@given(
    rates=st.lists(st.floats(1e-3, 10.0), min_size=1, max_size=4),
    slow=st.lists(st.floats(0.1, 50.0), min_size=6, max_size=6),
    bits=st.floats(2.0, 8.5),
)
@settings(derandomize=True, max_examples=10, deadline=None)
def test_ohq_finds_the_least_of_sensitivity_and_time_within_the_bytes(rates, slow, bits):
    asked = toy_question(rates, [0.0] * len(rates), widths=WIDTHS,
                         seconds=lambda c: slow[WIDTHS.index(c.settings["bits"])])  # fmt: skip
    limit = int(bits / 4 * asked.limit)
    asked = replace(asked, limit=limit)
    flat = [c for of in asked.candidates.values() for c in of]
    most = max(asked.trial({c.unit: c}).nats for c in flat)

    def loss(choices):
        lost = sum(asked.trial({n: c}).nats / most for n, c in choices.items())
        return lost + sum(
            decide_ohq.TIME_WEIGHT * asked.seconds(c) / max(map(asked.seconds, flat))
            for c in choices.values()
        )

    least = min(map(loss, every_plan(asked.candidates, limit)))
    assert loss(decide_ohq.decide(asked)) <= least * 1.001 + 1e-6


def test_ohq_leaves_a_treatment_that_takes_long_for_one_that_is_read_faster():
    """Its works_when: sensitivities and times of this machine decide the widths together."""
    wide = 2 * toy_question([1.0, 1.0], [0.0, 0.0]).limit
    slow = toy_question([1.0, 1.0], [0.0, 0.0], wide, lambda c: 1 + 99 * (c.settings["bits"] == 8))
    plain = decide_ohq.decide(toy_question([1.0, 1.0], [0.0, 0.0], wide))
    assert [c.settings["bits"] for c in plain.values()] == [8, 8]
    assert [c.settings["bits"] for c in decide_ohq.decide(slow).values()] == [6, 6]


# --- MixDQ


def test_mixdq_solves_each_half_by_its_own_metric_and_keeps_the_best_share():
    content, quality = [5.0, 3.0, 0.01, 0.02], [0.5, 0.1, 900.0, 700.0]
    asked = toy_question(content, quality)
    tried = {id(c): asked.trial({c.unit: c}) for of in asked.candidates.values() for c in of}
    assert decide_mixdq.content_units(asked.candidates, tried) == {"u0", "u1"}
    found = decide_mixdq.decide(asked)
    halves = [("u0", "u1"), ("u2", "u3")]
    for half, metric in zip(halves, ("content", "quality"), strict=True):
        own = {n: asked.candidates[n] for n in half}
        chosen = {n: found[n] for n in half}
        best = min(getattr(asked.trial(p), metric) for p in every_plan(own, weight_bytes(chosen)))
        assert getattr(asked.trial(chosen), metric) == pytest.approx(best, rel=2e-3)
    best = min(asked.trial(p).nats for p in every_plan(asked.candidates, asked.limit))
    assert asked.trial(found).nats < 1.5 * best  # nine shares lie near the best one


# --- Q-BERT


def test_the_largest_eigenvalue_is_that_of_any_group():
    draws = torch.Generator().manual_seed(3)
    roots = torch.randn(2, 7, 7, generator=draws)
    moments = roots @ roots.mT
    exact = max(float(np.linalg.eigvalsh(m.double().numpy())[-1]) for m in moments)
    assert decide_qbert.largest_eigenvalue(moments) == pytest.approx(exact, rel=1e-3)
    assert decide_qbert.largest_eigenvalue(torch.tensor([1.0, 5.0, 2.0])) == 5.0


def test_the_worth_of_a_unit_is_mean_and_spread_of_its_eigenvalue_over_the_halves():
    rows = torch.diag(torch.tensor([1.0, 3.0]))[None]
    first, second = (torch.diag(torch.tensor(v))[None] for v in ([2.0, 1.0], [4.0, 0.5]))
    found = decide_qbert.worth_of([Curvature(rows, first, second)])
    assert found == pytest.approx(9.0 + pstdev([6.0, 12.0]))


def test_qbert_gives_the_wide_width_to_the_largest_eigenvalues():
    asked = toy_question([1.0] * 4, [0.0] * 4)
    one = torch.ones(1, 1, 1)
    curvatures = {f"u{i}": (Curvature(one * s, one, one),) for i, s in enumerate((1, 9, 3, 2))}
    asked = replace(asked, statistics=statistics_of(curvatures))
    found = decide_qbert.decide(asked)
    assert weight_bytes(found) <= asked.limit
    bits = [found[f"u{i}"].settings["bits"] for i in (1, 2, 3, 0)]
    assert bits == sorted(bits, reverse=True) and bits[0] > bits[-1]
    assert len(set(bits)) == 2


class Steps(nn.Module):
    """Equal layers, each of which moves the answer less than the one before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.steps = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))
        self.answer = nn.Linear(32, 10)

    def forward(self, inputs):
        for number, step in enumerate(self.steps):
            inputs = inputs + 4.0**-number * torch.tanh(step(inputs))
        return 8 * self.answer(inputs)


def lost_by(name, module, inputs, size, spare):
    """Nats that a decider loses, and that one width of 3 bits for all loses in the same bytes."""
    model = load_model(module.eval(), examples={"inputs": inputs[:2]}, task="classify")
    recipe = Recipe(model.name, task="classify", size=size, decide=name)
    session = open_session(recipe, model, Silent(), {"inputs": inputs})
    statistics = decide.explain(session)
    n_bytes, even = uniform(session, statistics, 3)
    own = replace(session, recipe=replace(recipe, size=str(n_bytes + spare)))
    found = decide.plan(own, decide.price(session, statistics), statistics)
    small = materialise(session.model.module, found.treated)
    assert found.plan.weight_bytes <= n_bytes + spare
    return divergence_by_hand(session, small, session.data.recovery), even


def test_qbert_loses_less_than_one_width_for_all_in_the_same_bytes():
    """Its works_when, where layers differ in curvature."""
    inputs = torch.randn(120, 32, generator=torch.Generator().manual_seed(0))
    lost, even = lost_by("qbert", Steps(), inputs, "4kB", 50)
    assert lost < 0.8 * even


# --- LRP-QViT


class Ranked(nn.Module):
    """Attention, as in a vision transformer of patches, whose later blocks add ever less."""

    def __init__(self, width=24, blocks=4):
        super().__init__()
        torch.manual_seed(11)
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.place = nn.Parameter(0.5 * torch.randn(1, 4, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * blocks))
        self.mixes = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(blocks))
        self.outs = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.wide = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.back = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(blocks))
        self.answer = nn.Linear(width, 10)

    def forward(self, inputs):
        x = self.patches(inputs).flatten(2).transpose(1, 2) + self.place
        for n, (mix, out) in enumerate(zip(self.mixes, self.outs, strict=True)):
            q, k, v = mix(self.norms[2 * n](x)).chunk(3, -1)
            x = x + 3.0**-n * out((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
            hidden = nn.functional.gelu(self.wide[n](self.norms[2 * n + 1](x)))
            x = x + 3.0**-n * self.back[n](hidden)
        return 6 * self.answer(x.mean(1))


def test_contributions_are_shares_of_output_times_gradient():
    taylor = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([5.0])}
    found = decide_lrp.contributions(replace(statistics_of({}), channel_taylor=taylor), ["a", "b"])
    assert found == pytest.approx({"a": 3 / 8, "b": 5 / 8})


def test_a_table_that_is_only_looked_up_has_the_mean_contribution():
    taylor = {"a": torch.tensor([1.0]), "b": torch.tensor([3.0])}
    names = ["a", "table", "b"]
    found = decide_lrp.contributions(replace(statistics_of({}), channel_taylor=taylor), names)
    assert found == pytest.approx({"a": 1 / 6, "table": 2 / 6, "b": 3 / 6})


def test_lrp_gives_more_bits_to_what_contributes_more():
    asked = toy_question([1.0] * 4, [0.0] * 4)
    taylor = {f"u{i}": torch.tensor([float(4**i)]) for i in range(4)}
    asked = replace(asked, statistics=replace(statistics_of({}), channel_taylor=taylor))
    found = decide_lrp.decide(asked)
    bits = [found[f"u{i}"].settings["bits"] for i in range(4)]
    assert weight_bytes(found) <= asked.limit
    assert bits == sorted(bits) and bits[-1] > bits[0]


def test_lrp_loses_less_than_one_width_for_all_on_a_vision_transformer():
    """Its works_when."""
    inputs = torch.randn(120, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    lost, even = lost_by("lrp", Ranked(), inputs, "9kB", 100)
    assert lost < 0.2 * even


# --- granularity: LLaMA3-70B's mixed W8A8


def test_outliers_of_a_weight_are_those_of_its_rows():
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 4.0], [0.0] * 4])
    assert decide_granularity.outliers(weight) == pytest.approx((1.0 + 4.0) / 2)
    assert decide_granularity.outliers(torch.zeros(2, 3)) == 0.0


def test_few_weights_are_vulnerable_and_only_where_they_stand_out():
    draws = torch.Generator().manual_seed(0)
    weights = {f"u{i}": torch.randn(16, 64, generator=draws) for i in range(40)}
    assert decide_granularity.vulnerable(weights) == []
    weights["u3"][:, 5] *= 60
    weights["u9"][:, 7] *= 90
    weights["u11"][:, 7] *= 20
    assert decide_granularity.vulnerable(weights) == ["u9", "u3"]  # 3% of 40, rounded up


def test_granularity_takes_the_widest_width_that_fits_and_finer_groups_while_they_do():
    units = [Unit(f"u{i}", "linear", (8, 128), ("linear",)) for i in range(3)]
    candidates = {
        u.name: [
            Candidate(u.name, *t, build_transform(*t).cost(u), 0.0)
            for t in decide_granularity.menu(u, build_transform)
        ]
        for u in units
    }
    weights = {
        u.name: torch.randn(8, 128, generator=torch.Generator().manual_seed(0)) for u in units
    }
    weights["u1"][:, 0] = 70.0
    asked = replace(toy_question([], []), candidates=candidates, weight=weights.__getitem__)

    def settings_within(limit):
        found = decide_granularity.decide(replace(asked, limit=limit))
        assert weight_bytes(found) <= limit
        return [(c.settings["bits"], c.settings["group_size"]) for c in found.values()]

    coarse = 3 * (8 * 128 + 2 * 8)
    assert settings_within(10**6) == [(8, 0), (8, 32), (8, 0)]
    assert settings_within(coarse) == [(8, 0)] * 3
    assert settings_within(coarse - 1) == [(6, 0), (6, 32), (6, 0)]


class Outlying(nn.Module):
    """Nine maps, one of which reads small channels through large columns, as LLaMA3-70B does."""

    def __init__(self, width=256):
        super().__init__()
        torch.manual_seed(0)
        self.gain = nn.Parameter(torch.ones(width))
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(8))
        self.head = nn.Linear(width, 5)
        with torch.no_grad():
            self.gain[:2] /= 300
            self.maps[0].weight[:, :2] *= 300
            self.head.weight *= 8

    def forward(self, x):
        x = x * self.gain
        for one in self.maps:
            x = torch.relu(one(x)) * 2
        return self.head(x)


def test_finer_groups_for_one_weight_recover_eight_bits_without_calibration():
    """Its works_when."""
    inputs = torch.randn(120, 256, generator=torch.Generator().manual_seed(1))
    model = load_model(Outlying(), examples={"inputs": inputs[:2]}, task="classify")
    session = open_session(
        Recipe("toy", task="classify", size="90%", decide="granularity"),
        model,
        Silent(),
        {"inputs": inputs},
    )
    found = decide.plan(
        session, decide.price(session, s := decide.explain(session)), s
    ).plan.choices
    fine = [name for name, c in found.items() if c.settings["group_size"] != 0]
    assert fine == ["maps.0"] and {c.settings["bits"] for c in found.values()} == {8}

    around = roundings({n: replace(c, input=Activation()) for n, c in found.items()})

    def lost(choices):
        made = {
            f"{n}.weight": build_transform(c.treatment, c.settings)
            .apply(session.weight(session.units.named(n)), None)
            .dense
            for n, c in choices.items()
        }
        with substituted(
            model.module, {n: partial(lambda w: w, w) for n, w in made.items()}, around
        ):
            after = model.module(inputs)
        return float(session.divergence.between(model.module(inputs), after).mean())

    with torch.no_grad():
        by_activations, mixed = lost({}), lost(found)
        per_row = lost(
            {n: replace(c, settings={**c.settings, "group_size": 0}) for n, c in found.items()}
        )
    assert mixed - by_activations < 0.25 * (per_row - by_activations)


# --- Quantune


def split_by_loops(features, left):
    """Best split by trying every one, XGBoost eq. 7 with squared loss."""

    def worth(part):
        return sum(part) ** 2 / (len(part) + boosting.SHRINKAGE)

    best = None
    for feature in range(features.shape[1]):
        values = sorted(set(features[:, feature]))
        for low, high in pairwise(values):
            middle = (low + high) / 2
            parts = [left[features[:, feature] <= middle], left[features[:, feature] > middle]]
            gain = sum(map(worth, parts)) - worth(left)
            if gain > 0 and (best is None or gain > best[0] + 1e-12):
                best = (gain, feature, middle)
    return best


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_splits_where_trying_every_split_says(seed):
    draws = np.random.default_rng(seed)
    features = draws.integers(0, 4, (13, 3)).astype(float)
    left = draws.standard_normal(13)
    tree = boosting.grow(features, left, 1)
    _, feature, threshold = split_by_loops(features, left)
    assert (tree.feature, tree.threshold) == (feature, threshold)
    low = left[features[:, feature] <= threshold]
    assert tree.low.value == pytest.approx(low.sum() / (len(low) + boosting.SHRINKAGE))


def test_trees_learn_what_they_are_shown_and_a_constant_stays_one():
    draws = np.random.default_rng(0)
    features = draws.standard_normal((40, 4))
    targets = np.where(features[:, 1] > 0, 2.0, -1.0) + 0.5 * features[:, 3]
    errors = boosting.boost(features, targets).predict(features) - targets
    assert np.abs(errors).mean() < 0.1 * np.abs(targets).mean()
    assert boosting.boost(features, np.full(40, 3.0)).predict(features) == pytest.approx(3.0)


@pytest.mark.parametrize("seed", [0, 3])
def test_quantune_reaches_a_loss_in_fewer_trials_than_drawing_at_random(seed):
    """Its works_when."""
    draws = random.Random(seed)
    rates = [10 ** draws.uniform(-2, 2) for _ in range(12)]
    asked = toy_question(rates, [0.0] * 12, seed=seed)
    options = list(asked.candidates.values())
    at_random = decide_quantune.search(asked, options, 64, learns=False)
    found = list(decide_quantune.search(asked, options, 40).values())
    assert len(at_random) == 64 and len(found) == 40
    assert min(found) < 0.9 * min(at_random.values())


def test_quantune_tries_no_plan_twice_and_ends_on_a_small_problem():
    asked = toy_question([1.0], [0.0])
    options = list(asked.candidates.values())
    found = decide_quantune.search(asked, options, 64)
    assert 1 <= len(found) <= 3  # 2, 3 and 4 bits fit; only the largest that fits is tried
    best = decide_quantune.decide(asked)
    assert best["u0"].settings["bits"] == 4

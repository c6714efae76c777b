"""Who is responsible for a divergence: shares that sum to it; and what is returned."""

import json
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import toy_code
import toys
from scipy.stats import spearmanr
from test_decide import classifier_session
from torch import nn

from attar.attributing import with_attribution
from attar.audit.fidelity import measure
from attar.cli import main
from attar.divergence import Divergence, fit_gaussian
from attar.errors import DataError
from attar.explain.attribution import shares_of, slopes_at
from attar.judging import judge_models
from attar.load.model import load_model
from attar.records import Recipe, Silent
from attar.session import open_session


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Text(nn.Module):
    """A small language model: a table, attention over what came before, a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.table, self.mix, self.out = nn.Embedding(11, 8), nn.Linear(8, 24), nn.Linear(8, 11)
        self.requires_grad_(False)

    def forward(self, tokens):
        x = self.table(tokens)
        q, k, v = self.mix(x).chunk(3, -1)
        seen = torch.ones(len(tokens[0]), len(tokens[0])).tril() > 0
        weight = (q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1)
        return 2 * self.out(x + weight @ v)


def network(bend=nn.GELU):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), bend(), nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 5)
    ).requires_grad_(False)


CASES = {
    "classify": (network, {"inputs": random(9, 2, 5, 5)}, "categorical"),
    "regress": (network, {"inputs": random(9, 2, 5, 5)}, "gaussian"),
    "language": (Text, {"tokens": torch.arange(28).reshape(4, 7) % 11}, "categorical"),
}


def case(task, size):
    make, batch, family = CASES[task]
    model = toys.toy(task, make(), examples={n: t[:2] for n, t in batch.items()})
    batches = [{n: t[:3] for n, t in batch.items()}, {n: t[3:] for n, t in batch.items()}]
    divergence = Divergence("categorical")
    if family == "gaussian":
        divergence = fit_gaussian(model.task.forward(model.module, batch).flatten(0, 1))
    changes = {
        name: size * p.std() * random(*p.shape, seed=n)
        for n, (name, p) in enumerate(model.module.named_parameters())
    }
    return model, batches, divergence, changes


def measured(model, batches, divergence, changes):
    other = deepcopy(model.module)
    for name, change in changes.items():
        other.get_parameter(name).data += change
    task = model.task
    found = measure(
        model, lambda batch: task.forward(other, batch), batches, divergence, progress=Silent()
    )
    return found.divergence


def called(changes):
    return {name: (lambda change=change: change) for name, change in changes.items()}


@pytest.mark.parametrize("task", CASES)
def test_shares_sum_to_the_divergence_of_each_sample(task):
    model, batches, divergence, changes = case(task, 0.15)
    found = shares_of(model, called(changes), batches, divergence, progress=Silent())
    each = measured(model, batches, divergence, changes)
    n = sum(len(next(iter(batch.values()))) for batch in batches)
    by_sample = each.reshape(n, -1).sum(1)
    assert by_sample.mean() > 1e-4
    total = sum(found.values()).numpy()
    # Three points of a smooth curve; what is left is of the seventh order in the change.
    assert np.allclose(total, by_sample, rtol=5e-3, atol=5e-3 * by_sample.mean())


def test_kinks_leave_a_small_error_of_the_sum():
    _, batches, divergence, _ = case("classify", 0.15)
    model = toys.toy("classify", network(nn.ReLU), examples=batches[0])
    changes = {n: 0.15 * p.std() * random(*p.shape) for n, p in model.module.named_parameters()}
    found = shares_of(model, called(changes), batches, divergence, progress=Silent())
    whole = measured(model, batches, divergence, changes).sum()
    assert float(sum(found.values()).sum()) == pytest.approx(whole, rel=0.03)


@pytest.mark.parametrize("task", CASES)
def test_a_slope_is_what_a_small_step_along_one_change_does(task):
    model, batches, divergence, changes = case(task, 0.3)
    at, step = 0.6, 1e-2
    found = slopes_at(model, called(changes), at, batches, divergence, progress=Silent())
    for unit in found:
        ends = []
        for sign in (-1, 1):
            moved = {
                name: (at + sign * step * (name.rpartition(".")[0] == unit)) * change
                for name, change in changes.items()
            }
            ends.append(measured(model, batches, divergence, moved).sum())
        expected = (ends[1] - ends[0]) / (2 * step)
        assert float(found[unit].sum()) == pytest.approx(expected, rel=0.02, abs=2e-3)


def spoilt(session, sizes, seed=5):
    """The session's model with noise of these sizes, by unit."""
    module = deepcopy(session.model.module)
    for n, unit in enumerate(session.units):
        weight = module.get_parameter(f"{unit.name}.weight")
        noise = random(*weight.shape, seed=seed + n)
        weight.data += sizes.get(unit.name, 0.0) * weight.std() * noise
    return replace(session.model, module=module)


def test_the_spoilt_layer_is_named_first_and_what_it_returns_is_what_it_does():
    session = classifier_session()
    names = [unit.name for unit in session.units]
    for culprit in names:
        sizes = dict.fromkeys(names, 0.02) | {culprit: 0.5}
        other = spoilt(session, sizes)
        verdict = with_attribution(session, other, judge_models(session, other), {})
        first = verdict.responsible[0]
        assert first.unit == culprit and first.share > 0.8
        assert sum(one.damage.value for one in verdict.responsible) == pytest.approx(
            sum(one.share for one in verdict.responsible) * first.damage.value / first.share
        )
        assert abs(verdict.unattributed) < 0.05
        assert first.measured == pytest.approx(first.returned, rel=0.35)


def test_what_is_predicted_to_be_returned_ranks_as_what_is_measured(monkeypatch):
    monkeypatch.setattr("attar.attributing.TRIED", 100)
    session = classifier_session()
    names = [unit.name for unit in session.units]
    draws = np.random.default_rng(0)
    predicted, returned = [], []
    for trial in range(4):
        sizes = {name: float(10 ** draws.uniform(-2, -0.7)) for name in names}
        other = spoilt(session, sizes, seed=trial)
        verdict = with_attribution(session, other, judge_models(session, other), {})
        predicted += [one.returned for one in verdict.responsible]
        returned += [one.measured for one in verdict.responsible]
    assert spearmanr(predicted, returned).statistic > 0.9


def test_models_that_do_not_differ_or_do_not_match_are_refused():
    session = classifier_session()
    other = replace(session.model, module=nn.Module())
    with pytest.raises(DataError, match="no layer of the compressed model has the name"):
        with_attribution(session, other, judge_models(session, session.model), {})
    with pytest.raises(DataError, match="no layer"):
        with_attribution(session, spoilt(session, {}), judge_models(session, session.model), {})


def test_weights_without_a_counterpart_are_named():
    session = classifier_session()
    other = spoilt(session, {unit.name: 0.1 for unit in session.units})
    first, *_ = session.units
    parent = other.module.get_submodule(first.name.rpartition(".")[0])
    linear = parent.get_submodule(first.name.rpartition(".")[2])
    linear.weight = nn.Parameter(torch.zeros(first.rows + 1, first.columns))
    told = []
    progress = Silent()
    progress.note = told.append
    session = replace(session, progress=progress)
    verdict = with_attribution(session, other, judge_models(session, session.model), {})
    assert first.name not in {one.unit for one in verdict.responsible}
    assert any(f"{first.name}.weight" in line for line in told)


# --- where, by what, and the way back


def test_rows_that_were_spoilt_are_named():
    session = classifier_session()
    unit = list(session.units)[-1]
    other = spoilt(session, {})
    other.module.get_parameter(f"{unit.name}.weight").data[1] *= 0.5
    verdict = with_attribution(session, other, judge_models(session, other), {})
    assert (verdict.responsible[0].unit, verdict.responsible[0].where) == (unit.name, "row 1")
    other = spoilt(session, {unit.name: 0.3})
    verdict = with_attribution(session, other, judge_models(session, other), {})
    assert verdict.responsible[0].where == ""


def test_ways_back_cost_and_return_more_with_every_layer():
    session = classifier_session()
    names = [unit.name for unit in session.units]
    other = spoilt(session, dict.fromkeys(names, 0.15))
    verdict = with_attribution(session, other, judge_models(session, other), {})
    ways = verdict.rollbacks
    assert [len(one.units) for one in ways] == list(range(1, len(ways) + 1)) and len(ways) > 1
    alone = {one.unit: one for one in verdict.responsible}
    per_byte = [alone[one.units[-1]].returned / alone[one.units[-1]].cost_bytes for one in ways]
    assert per_byte == sorted(per_byte, reverse=True)
    for less, more in pairwise(ways):
        assert more.units[:-1] == less.units
        assert more.cost_bytes == less.cost_bytes + alone[more.units[-1]].cost_bytes
        assert more.measured > less.measured
    # By hand: all of them halved, and the divergence on the same samples again.
    last = ways[-1]
    half = deepcopy(other.module)
    for name in last.units:
        weight = half.get_parameter(f"{name}.weight")
        weight.data = 0.5 * (weight.data + session.model.module.get_parameter(f"{name}.weight"))
    inputs = torch.cat([one["inputs"] for one in session.data.audit])
    order = np.argsort(verdict.sample_divergence, kind="stable")
    taken = [int((n + 0.5) * len(inputs) / 64) for n in range(64)]
    batch = {"inputs": inputs[order[taken].copy()]}
    forward, divergence = session.model.task.forward, session.divergence
    with torch.no_grad():
        before = forward(session.model.module, batch)[:, 0]
        lost = [
            float(divergence.between(before, forward(module, batch)[:, 0]).mean())
            for module in (other.module, half)
        ]
    assert last.measured == pytest.approx(lost[0] - lost[1], rel=1e-3)


def test_the_damage_of_each_treatment_is_that_of_its_layers(tmp_path, capsys):
    data = toy_code.save_data(tmp_path / "data.npz")
    typed = ["toy_code:classifier", "--task", "classify", "--data", str(data)]
    out = str(tmp_path / "small")
    assert main(["compress", *typed, "--size", "4kB", "--out", out]) in (0, 1, 3)
    facts = tmp_path / "facts.json"
    more = ["--factory", typed[0], "--attribute", "--json", str(facts)]
    asked = ["audit", typed[0], out, *typed[1:], *more]
    assert main(asked) in (0, 1, 3)
    verdict = json.loads(facts.read_text())
    described = json.loads((tmp_path / "small" / "attar.json").read_text())["units"]
    for line in verdict["treatments_responsible"]:
        own = [one for one in verdict["responsible"] if one["treatment"] == line["treatment"]]
        assert line["n_units"] == len(own)
        assert line["nats"] == pytest.approx(sum(one["damage"]["value"] for one in own), rel=1e-4)
        assert all(described[one["unit"]]["treatment"] in line["treatment"] for one in own)
    assert sum(line["n_units"] for line in verdict["treatments_responsible"]) == len(described)
    assert "one bit more costs" in " ".join(capsys.readouterr().out.split())


class Scaled(nn.Module):
    """A table whose rows are normed: which way a row points hangs on the very end of its path."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.table, self.out = nn.Embedding(40, 12), nn.Linear(12, 6)
        self.place = nn.Parameter(0.05 * torch.randn(12))

    def forward(self, tokens):
        x = self.table(tokens) + self.place
        return self.out(4 * torch.nn.functional.layer_norm(x, (12,))).mean(1)


def rare_session():
    """Two samples in a hundred have one of the last ten tokens."""
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 30, (400, 3), generator=draws)
    tokens[::50, 1] = 35
    model = load_model(Scaled(), examples={"inputs": tokens[:2]}, task="classify")
    sizes = {"calibration": 40, "recovery": 20, "audit": 340}
    recipe = Recipe("rare", task="classify", **sizes)
    return open_session(recipe, model, Silent(), {"inputs": tokens})


def test_damage_that_few_samples_have_is_attributed_and_its_rows_are_named():
    session = rare_session()
    other = spoilt(session, {"out": 0.001})
    other.module.table.weight.data[30:] = 0
    verdict = with_attribution(session, other, judge_models(session, other), {})
    first = verdict.responsible[0]
    assert (first.unit, first.where) == ("table", "rows 30 to 39")
    assert first.share > 0.9
    # A path of three points would leave a part of it unexplained.
    assert abs(verdict.unattributed) < 0.1

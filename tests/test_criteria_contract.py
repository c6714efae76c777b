"""What every criterion of the table promises, on toy models through the real statistics."""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import toy_code
import toys

import attar.explain as folder
from attar.explain import CRITERIA
from attar.load.model import load_model
from attar.records import Recipe, Silent
from attar.session import open_session

ALL = pytest.mark.parametrize("name", CRITERIA)
MODELS = pytest.mark.parametrize("kind", ["classify", "language", "convolution"])
# In the folder, but no criterion: they gather what criteria read.
HELPERS = {
    "activation_price",
    "concentration",
    "dictionary",
    "gatherer",
    "moments",
    "probe",
    "sampling",
    "statistics",
}
HELPERS |= {"attribution"}


def _session(model, inputs, *, task=None):
    recipe = Recipe(model=model.name, task=task)
    return open_session(recipe, model, Silent(), inputs)


@cache
def opened(kind):
    """A session with its statistics; gathered once."""
    draws = torch.Generator().manual_seed(0)
    if kind == "language":
        tokens = torch.randint(0, 260, (20, 6), generator=draws)
        session = _session(toys.language_model(), {"tokens": tokens})
    elif kind == "convolution":
        pixels = torch.randn(20, 3, 33, 33, generator=draws)
        session = _session(toys.picture_model(), {"pixels": pixels})
    else:
        module, examples = toy_code.classifier()
        model = load_model(module, examples=examples, task="classify")
        session = _session(model, {"inputs": toy_code.samples(60)})
    return session, session.gather()


def score(name, kind):
    session, statistics = opened(kind)
    return session, CRITERIA[name](session.model, session.units, statistics)


@ALL
@MODELS
def test_every_unit_gets_one_finite_number_per_row_and_none_is_negative(name, kind):
    session, scores = score(name, kind)
    assert set(scores.channels) == {unit.name for unit in session.units}
    for unit in session.units:
        values = scores.channels[unit.name]
        assert values.shape == (unit.rows,)
        assert torch.isfinite(values).all() and (values >= 0).all()


@ALL
@MODELS
def test_every_unit_gets_a_total_and_every_map_one_above_zero(name, kind):
    session, scores = score(name, kind)
    assert set(scores.totals) == {unit.name for unit in session.units}
    for unit in session.units:
        # A table that is only looked up in has no output channels that could be active.
        least = 0 if set(unit.uses) == {"embedding"} else 1e-12
        assert least <= scores.totals[unit.name] < float("inf")


@ALL
def test_a_criterion_gives_the_same_twice_and_changes_nothing(name):
    session, one = score(name, "classify")
    before = {n: t.clone() for n, t in session.model.module.state_dict().items()}
    _, two = score(name, "classify")
    assert all(torch.equal(one.channels[unit], two.channels[unit]) for unit in one.channels)
    assert one.totals == two.totals
    assert all(torch.equal(before[n], t) for n, t in session.model.module.state_dict().items())


@ALL
def test_a_criterion_goes_by_the_name_of_its_file(name):
    _, scores = score(name, "classify")
    assert scores.criterion == name == CRITERIA[name].__module__.rpartition(".")[2]


@ALL
def test_a_criterion_says_where_it_comes_from(name):
    text = sys.modules[CRITERIA[name].__module__].__doc__
    assert "Source:" in text


@ALL
def test_a_dead_channel_is_worth_nothing_or_the_least(name):
    module, examples = toy_code.classifier()
    with torch.no_grad():
        module[3].weight[5] = 0.0
        module[3].bias[5] = 0.0
        module[5].weight[:, 5] = 0.0
    model = load_model(module, examples=examples, task="classify")
    session = _session(model, {"inputs": toy_code.samples(60)})
    scores = CRITERIA[name](session.model, session.units, session.gather())
    assert scores.channels["3"][5] == scores.channels["3"].min() == 0.0


def test_every_file_of_the_folder_is_in_the_table():
    files = {path.stem for path in Path(folder.__file__).parent.glob("[!_]*.py")}
    assert files - HELPERS == set(CRITERIA)


def test_only_what_is_a_price_is_in_nats():
    _, scores = score("price", "classify")
    assert scores.nats
    assert not score("magnitude", "classify")[1].nats

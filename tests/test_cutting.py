"""A cut is priced at all that reads it, with the fit that follows, and measured when made."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from toys import toy

from attar import cutting
from attar.cut import cut_out
from attar.errors import SettingError
from attar.load.units import list_units
from attar.plan.size import parse_share
from attar.records import Recipe, Silent
from attar.session import open_session

SIDE = 6


class Small(nn.Module):
    """Channels read by a convolution and by a map, of which some say the same."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(2, 9, 3), nn.Conv2d(9, 7, 2)
        self.head = nn.Linear(7 * 9, 4)
        with torch.no_grad():
            self.first.weight[3:6] = self.first.weight[:3] + 0.02 * torch.randn(3, 2, 3, 3)
            self.first.bias[3:6] = self.first.bias[:3]

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).flatten(1))


@pytest.fixture(scope="module")
def tried():
    """A session, what goes together in it, and a third of it tried."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(420, 2, SIDE, SIDE, generator=generator)
    model = toy("classify", Small().eval(), examples={"inputs": inputs[:2]})
    recipe = Recipe(model="small", calibration=256, recovery=64, audit=64)
    session = open_session(recipe, model, Silent(), {"inputs": inputs.numpy()})
    coupled = cutting.find(session)
    return session, coupled, cutting.try_cut(session, coupled, 1 / 3)


def test_a_share_of_each_group_is_priced_and_cut(tried):
    session, coupled, trial = tried
    assert {group.name: group.units for group in coupled.groups} == {"first": 9, "second": 7}
    assert {name: len(price.units) for name, price in trial.prices.items()} == {
        "first": 3,
        "second": 2,
    }
    small = cut_out(
        session.model.module, coupled.groups, {k: v.units for k, v in trial.prices.items()}
    )
    sizes = [sum(p.numel() for p in one.parameters()) for one in (session.model.module, small)]
    assert (trial.weights, trial.of_weights) == (sizes[0] - sizes[1], sizes[0])
    assert [p.weights for p in trial.prices.values()] == [3 * (19 + 28), 2 * (37 + 36)]


def test_of_channels_that_say_the_same_one_goes(tried):
    _, _, trial = tried
    chosen = set(trial.prices["first"].units)
    for pair in ({0, 3}, {1, 4}, {2, 5}):
        assert len(pair & chosen) == 1
    assert trial.prices["first"].refitted < 0.05 * trial.prices["first"].plain


def test_what_was_predicted_is_what_is_measured_when_little_is_lost(tried):
    session, coupled, trial = tried
    assert trial.measured < 0.5 * trial.measured_plain
    one = cutting.try_cut(session, coupled, 1 / 9)
    assert [len(price.units) for price in one.prices.values()] == [1, 1]
    assert one.predicted == pytest.approx(one.measured, rel=0.6)
    assert one.predicted < trial.predicted


def test_biases_take_the_mean_up(tried):
    session, coupled, trial = tried
    moved = replace(session, units=list_units(session.model))
    removed = {name: price.units for name, price in trial.prices.items()}
    new = cutting.fit(moved, moved.gather(), coupled.groups, removed)
    assert set(new) == {"second.weight", "second.bias", "head.weight", "head.bias"}
    gone = coupled.groups[0].members[2].indices[list(trial.prices["first"].units)].flatten()
    assert not new["second.weight"][:, gone].any()
    inputs = torch.cat([batch["inputs"] for batch in session.data.calibration])
    with torch.no_grad():
        x = torch.relu(session.model.module.first(inputs))
        before = nn.functional.conv2d(x, session.model.module.second.weight).mean((0, 2, 3))
        after = nn.functional.conv2d(x, new["second.weight"]).mean((0, 2, 3))
    shift = new["second.bias"] - session.model.module.second.bias
    # Inputs of a convolution count alike, so the mean output is what it was.
    torch.testing.assert_close(shift, before - after, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("text", ["10", "0%", "100%", "ten", "5bits", "-3%"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(SettingError, match="no share") as caught:
        parse_share(text)
    assert "10%" in caught.value.hint
    assert parse_share("12.5%") == 0.125

"""The folding itself, against loops written from x' = G (x - z), W' = W H, b' = b + W z."""

import pytest
import torch

from attar.links import (
    Change,
    Link,
    Mix,
    Reader,
    Writer,
    comes_whole,
    folded,
    on_features,
    rotation,
    scaling,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Three channels in two blocks of one, read twice and in another order, with one feature of none.
REACHED = torch.tensor([2, 0, 1, -1, 2, 1, 0])


def link(blocks=None, bias="b.bias", channels=3, reached=REACHED):
    return Link(
        "a",
        "linear",
        (Writer("a.weight", bias="a.bias"),),
        (Reader("b.weight", reached, bias),),
        channels,
        torch.ones(channels, dtype=torch.bool),
        blocks,
        can_shift=bias is not None,
    )


@pytest.fixture
def state():
    return {
        "a.weight": drawn(3, 5),
        "a.bias": drawn(3, seed=1),
        "b.weight": drawn(4, 7, seed=2),
        "b.bias": drawn(4, seed=3),
    }


def test_scale_and_shift_are_those_of_the_equations(state):
    s, z = torch.tensor([2.0, 0.5, 3.0]).double(), torch.tensor([0.3, -1.0, 2.0]).double()
    new = folded(link(), scaling(s, z), state)
    for channel in range(3):
        torch.testing.assert_close(
            new["a.weight"][channel], state["a.weight"][channel] / s[channel]
        )
        want = (state["a.bias"][channel] - z[channel]) / s[channel]
        torch.testing.assert_close(new["a.bias"][channel], want)
    for feature, channel in enumerate(REACHED.tolist()):
        by = s[channel] if channel >= 0 else 1.0
        torch.testing.assert_close(new["b.weight"][:, feature], state["b.weight"][:, feature] * by)
    for row in range(4):
        added = sum(
            float(state["b.weight"][row, feature] * z[channel])
            for feature, channel in enumerate(REACHED.tolist())
            if channel >= 0
        )
        assert float(new["b.bias"][row]) == pytest.approx(float(state["b.bias"][row]) + added)


def test_a_rotation_turns_every_place_where_a_block_comes(state):
    blocks = torch.tensor([[0, 2, 1]])
    q = torch.linalg.qr(drawn(3, 3, seed=4))[0]
    new = folded(link(blocks), rotation(link(blocks), q[None]), state)
    torch.testing.assert_close(new["a.weight"][[0, 2, 1]], q.T @ state["a.weight"][[0, 2, 1]])
    x = drawn(5, seed=5)
    before = state["a.weight"] @ x + state["a.bias"]
    after = new["a.weight"] @ x + new["a.bias"]
    known = REACHED >= 0
    torch.testing.assert_close(
        state["b.weight"][:, known] @ before[REACHED[known]],
        new["b.weight"][:, known] @ after[REACHED[known]],
    )
    torch.testing.assert_close(new["b.weight"][:, ~known], state["b.weight"][:, ~known])


def test_a_block_must_come_whole():
    blocks = torch.tensor([[0, 1, 2]])
    assert comes_whole(Reader("b", REACHED), blocks)
    assert not comes_whole(Reader("b", torch.tensor([0, 1, 2, 0])), blocks)


def test_a_moment_becomes_that_of_the_changed_channels():
    x = drawn(3, 200)
    matrix = drawn(1, 2, 2, seed=6)
    mix = Mix(matrix, torch.tensor([[2, 0]]))
    torch.testing.assert_close(mix.both(x @ x.T), mix.rows(x) @ mix.rows(x).T)
    scale = Mix(torch.tensor([2.0, 3.0, 0.5]).double())
    torch.testing.assert_close(scale.both((x * x).sum(1)), (scale.rows(x) * scale.rows(x)).sum(1))


def test_what_is_not_changed_is_not_given_and_the_state_stays(state):
    before = {name: tensor.clone() for name, tensor in state.items()}
    new = folded(link(bias=None), scaling(torch.ones(3) * 2), state)
    assert set(new) == {"a.weight", "a.bias", "b.weight"}
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_a_change_by_ones_changes_no_bit(state):
    single = {name: tensor.float() for name, tensor in state.items()}
    new = folded(link(), scaling(torch.ones(3)), single)
    assert all(torch.equal(new[name], single[name]) for name in new)
    ones = Change(Mix(torch.ones(3).double()), Mix(torch.ones(3).double()))
    assert ones.shift is None
    torch.testing.assert_close(on_features(link().readers[0], ones.read).by, torch.ones(7).double())

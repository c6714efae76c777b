"""Watching and standing in for the operations that read a weight."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attar.sites import patches, substituted, watched

# Both sides are sums of at most a few hundred float32 products of numbers around one.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def seen(module, *inputs):
    """Calls that read a weight of the module, in order."""
    calls = []

    def visit(call):
        calls.append(call)
        return call.run()

    with torch.no_grad(), watched(module, visit):
        module(*inputs)
    return calls


def multiplied(call, weight, groups):
    """A convolution's output from its patches: `samples rows positions`."""
    by_group = weight.reshape(groups, weight.shape[0] // groups, -1)
    return torch.einsum("sgpc,grc->sgrp", patches(call), by_group).flatten(1, 2)


def check_convolution(module, x):
    (call,) = seen(module, x)
    with torch.no_grad():
        out = module(x)
        bias = 0 if module.bias is None else module.bias[:, None]
        assert torch.allclose(
            multiplied(call, module.weight, module.groups) + bias, out.flatten(2), **CLOSE
        )


CONVOLUTIONS = {
    "plain 2-D": (nn.Conv2d(3, 5, 3), (2, 3, 7, 9)),
    "asymmetric kernel": (nn.Conv2d(3, 4, (1, 4)), (2, 3, 5, 7)),
    "stride": (nn.Conv2d(2, 3, (3, 2), stride=(2, 3)), (1, 2, 9, 8)),
    "padding": (nn.Conv2d(2, 3, (3, 2), padding=(2, 1), stride=2), (2, 2, 5, 7)),
    "dilation": (nn.Conv2d(2, 3, (3, 2), dilation=(2, 3), padding=(0, 2)), (2, 2, 9, 7)),
    "groups": (nn.Conv2d(6, 9, 3, groups=3, padding=1), (2, 6, 5, 4)),
    "depthwise": (nn.Conv2d(5, 5, (3, 1), groups=5, stride=2), (3, 5, 7, 3)),
    "depthwise, two rows each": (nn.Conv2d(3, 6, 2, groups=3), (1, 3, 4, 5)),
    "same": (nn.Conv2d(2, 3, (3, 5), padding="same", dilation=(2, 1)), (2, 2, 6, 7)),
    "valid": (nn.Conv2d(2, 3, 2, padding="valid"), (2, 2, 4, 5)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 4, 5)),
    "1-D": (nn.Conv1d(3, 5, 4, stride=3, padding=2), (2, 3, 17)),
    "1-D, groups and dilation": (nn.Conv1d(4, 6, 3, dilation=2, groups=2, bias=False), (2, 4, 11)),
    "3-D": (nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1)), (1, 2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_times_weight_is_the_convolution(name):
    module, shape = CONVOLUTIONS[name]
    check_convolution(module, torch.randn(shape, generator=torch.Generator().manual_seed(0)))


# Torch warns that an even kernel needs a copy that is padded on one side only.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kernel", [2, 4])
def test_same_padding_of_an_even_kernel_adds_more_on_the_right(kernel):
    check_convolution(nn.Conv1d(2, 3, kernel, padding="same"), torch.randn(2, 2, 7))


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2]),
    size=st.tuples(st.integers(7, 10), st.integers(7, 9)),
)
@settings(derandomize=True, max_examples=40, deadline=None)
def test_patches_times_weight_is_the_convolution_for_any_settings(
    kernel, stride, padding, dilation, groups, size
):
    module = nn.Conv2d(
        4, 6, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    check_convolution(module, torch.randn(2, 4, *size))


@pytest.mark.parametrize("at_most", [1, 6, 20, 34])
def test_fewer_patches_are_some_of_all_spread_evenly(at_most):
    module = nn.Conv2d(2, 3, 2)
    (call,) = seen(module, torch.randn(2, 2, 8, 6))
    every = patches(call).reshape(2, 1, 7, 5, 8)
    fewer = patches(call, at_most)
    step = next(n for n in range(1, 9) if -(-7 // n) * -(-5 // n) <= at_most)
    expected = every[:, :, ::step, ::step].reshape(2, 1, -1, 8)
    assert fewer.shape[2] <= at_most
    assert torch.equal(fewer, expected)


def test_enough_positions_are_all_taken():
    (call,) = seen(nn.Conv1d(2, 3, 2), torch.randn(2, 2, 8))
    assert torch.equal(patches(call, 7), patches(call))


class OwnPadding(nn.Conv2d):
    """What EfficientNet does: pads in forward and calls the function itself."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 2, 0)), self.weight, stride=self.stride, groups=self.groups)


def test_a_convolution_that_pads_in_its_own_forward_is_seen_with_what_it_really_reads():
    module = OwnPadding(2, 3, 3, stride=2, bias=False)
    x = torch.randn(2, 2, 6, 7)
    (call,) = seen(nn.Sequential(module), x)
    assert call.name == "0.weight" and call.operation == "convolution"
    assert call.input.shape == (2, 2, 8, 8)
    assert torch.allclose(multiplied(call, module.weight, 1), module(x).flatten(2), **CLOSE)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        return self.head(self.table(tokens))


def test_a_tied_weight_goes_by_one_name_in_both_uses():
    calls = seen(Tied(), torch.tensor([[1, 2, 6]]))
    assert [(c.name, c.operation) for c in calls] == [
        ("table.weight", "embedding"),
        ("table.weight", "linear"),
    ]


class ByName(nn.Module):
    """Calls with every argument named."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 2))

    def forward(self, x):
        return F.conv1d(weight=self.weight, input=x, stride=2)


def test_arguments_may_be_named():
    module, x = ByName(), torch.randn(1, 2, 5)
    (call,) = seen(module, x)
    assert torch.allclose(multiplied(call, module.weight, 1), module(x), **CLOSE)


def test_weights_that_are_not_the_modules_are_let_through():
    foreign = torch.randn(3, 4)

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(self.own(x), foreign)

    assert [call.name for call in seen(Foreign(), torch.randn(2, 4))] == ["own.weight"]


def test_a_visit_decides_what_the_model_goes_on_with():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with torch.no_grad(), watched(module, lambda call: torch.full((2, 4), 5.0)):
        assert torch.equal(module(torch.randn(2, 3)), torch.full((2, 4), 5.0))


def test_other_weights_give_the_answers_of_a_module_that_holds_them():
    module, other = (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(2))
    with torch.no_grad():
        other[0].bias.copy_(module[0].bias)
        other[2].load_state_dict(module[2].state_dict())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = torch.randn(5, 3)
    with torch.no_grad(), substituted(module, {"0.weight": lambda: other[0].weight}):
        inside = module(x)
    assert torch.equal(inside, other(x))
    assert not torch.equal(inside, module(x))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_way_back_through_made_weights_needs_none_of_them_kept(kind):
    module = nn.Linear(3, 4) if kind == "linear" else nn.Conv2d(3, 4, 2)
    module.requires_grad_(False)
    other = 2 * module.weight
    x = torch.randn(5, 3) if kind == "linear" else torch.randn(2, 3, 4, 4)
    made = []

    def make():
        weight = other.clone()
        made.append(weakref.ref(weight))
        return weight

    one, two = (x.clone().requires_grad_() for _ in range(2))
    with substituted(module, {"weight": make}):
        output = module(one)
    assert [ref() for ref in made] == [None]
    output.square().sum().backward()
    module.weight.copy_(other)
    module(two).square().sum().backward()
    assert torch.allclose(one.grad, two.grad, **CLOSE)
    assert all(ref() is None for ref in made) and len(made) == 2


def test_a_substitute_of_a_tied_weight_is_used_at_every_use_and_made_anew_each_time():
    module, made = Tied(), []

    def make():
        made.append(1)
        return torch.zeros(7, 4)

    with torch.no_grad(), substituted(module, {"table.weight": make}):
        assert not module(torch.tensor([[1, 2]])).any()
    assert len(made) == 2


def test_watching_inside_a_substitution_sees_the_own_name_and_the_other_answer():
    module, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(5, 3)
    weight = torch.randn(4, 3)
    outputs = []

    def visit(call):
        outputs.append((call.name, call.run()))
        return outputs[-1][1]

    with torch.no_grad(), substituted(module, {"0.weight": lambda: weight}), watched(module, visit):
        module(x)
    ((name, output),) = outputs
    assert name == "0.weight"
    assert torch.equal(output, F.linear(x, weight, module[0].bias))


def test_substitutions_of_different_weights_nest():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))
    one, two, x = torch.randn(3, 3), torch.randn(2, 3), torch.randn(5, 3)
    with (
        torch.no_grad(),
        substituted(module, {"0.weight": lambda: one}),
        substituted(module, {"1.weight": lambda: two}),
    ):
        assert torch.allclose(module(x), x @ one.T @ two.T, **CLOSE)


@pytest.mark.parametrize("enter", [watched, substituted])
def test_nothing_is_watched_any_more_after_an_exception(enter):
    module, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3)
    calls = []

    def broken(*_):
        calls.append(1)
        raise RuntimeError("in the middle of a forward")

    what = broken if enter is watched else {"0.weight": broken}
    expected = module(x)
    with pytest.raises(RuntimeError, match="middle"), enter(module, what):
        module(x)
    assert torch.equal(module(x), expected)
    assert len(calls) == 1


def test_a_function_in_place_of_nothing_changes_nothing():
    module, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3)
    with substituted(module, {}):
        assert torch.equal(module(x), F.linear(x, module[0].weight, module[0].bias))

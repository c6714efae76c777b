"""What goes together is found, and a cut leaves what the same network answers with zeros there."""

import copy

import pytest
import torch
import torch.nn.functional as F
from linked_models import Convolutions, Fused, Grouped, PostNorm, PreNorm, randomised
from tiny_models import GEMMA, LLAMA, random_model
from torch import nn

from attar.coupling import CoupledGroup, Member
from attar.cut import cut_out, find_coupled
from attar.cut.find import check_same
from attar.errors import CutError

TOKENS = torch.arange(14).reshape(2, 7)


class Picture(nn.Module):
    """A residual sum, a concatenation, depthwise and grouped convolutions, three kinds of norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(6)
        self.wide = nn.Conv2d(6, 10, 1)
        self.own = nn.Conv2d(10, 20, 3, padding=1, groups=10)
        self.back = nn.Conv2d(20, 6, 1)
        self.beside = nn.Conv2d(6, 5, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(11, 3, 1), nn.Conv2d(3, 11, 1)
        self.into = nn.Conv2d(11, 12, 1)
        self.grouped = nn.Conv2d(12, 9, 3, groups=3)
        self.norm = nn.GroupNorm(3, 9)
        self.last = nn.Conv2d(9, 7, 1)
        self.head = nn.Linear(7 * 4, 4)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        x = x + self.back(F.silu(self.own(F.relu6(self.wide(x)))))
        x = torch.cat([x, F.hardswish(self.beside(F.pad(x, (1, 0, 0, 1))))[..., :-1, 1:]], 1)
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.gelu(self.norm(self.grouped(F.max_pool2d(self.into(x), 2))))
        return self.head(F.adaptive_avg_pool2d(F.relu(self.last(x)), 2).flatten(1))


class Rotary(nn.Module):
    """Heads that share keys and values, turned by position, counted in attributes, and a gate."""

    def __init__(self, width=15, heads=6, shared=3, size=4, inner=7):
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, shared, size
        self.num_key_value_groups = heads // shared
        self.table = nn.Embedding(11, width)
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, heads * size)
        self.k_proj, self.v_proj = (nn.Linear(width, shared * size) for _ in range(2))
        self.o_proj = nn.Linear(heads * size, width)
        self.gate_up, self.down = nn.Linear(width, 2 * inner), nn.Linear(inner, width)
        self.register_buffer("frequencies", 10.0 ** -torch.arange(size // 2))
        self.head = nn.Linear(width, 5)

    def turned(self, x):
        angles = torch.arange(x.shape[-2])[:, None] * self.frequencies.double()
        cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))
        one, other = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-other, one], -1) * sin

    def forward(self, tokens):
        x = self.table(tokens % 11)
        b, t, _ = x.shape
        normed = self.norm(x)
        q = self.q_proj(normed).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = (
            one(normed).view(b, t, self.num_key_value_heads, self.head_dim).transpose(1, 2)
            for one in (self.k_proj, self.v_proj)
        )
        k, v = (one.repeat_interleave(self.num_key_value_groups, 1) for one in (k, v))
        scores = self.turned(q) @ self.turned(k).transpose(-1, -2) / self.head_dim**0.5
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1)
        x = x + self.o_proj(mixed)
        gate, up = self.gate_up(self.norm(x)).chunk(2, -1)
        return self.head(x + self.down(F.silu(gate) * up))


class Twice(nn.Module):
    """One map used twice, and channels that an operation meets which nobody listed."""

    def __init__(self):
        super().__init__()
        self.into, self.again, self.out = nn.Linear(4, 9), nn.Linear(9, 9), nn.Linear(9, 8)
        self.odd, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.again(torch.relu(self.again(torch.relu(self.into(x)))))
        return self.head(torch.flip(self.odd(self.out(x)), (-1,)))


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def plain(kind, example):
    return randomised(kind()), lambda module: module(example)


def language(config):
    return random_model(config).double(), lambda module: module(TOKENS, use_cache=False).logits


MODELS = {
    "picture": lambda: plain(Picture, drawn(2, 3, 13, 11)),
    "rotary": lambda: plain(Rotary, TOKENS),
    "grouped": lambda: plain(Grouped, TOKENS),
    "post-norm": lambda: plain(PostNorm, TOKENS),
    "pre-norm": lambda: plain(PreNorm, drawn(5, 9)),
    "convolutions": lambda: plain(Convolutions, drawn(2, 3, 13, 13)),
    "fused": lambda: plain(Fused, drawn(2, 5, 8)),
    "twice": lambda: plain(Twice, drawn(5, 4)),
    "llama": lambda: language(LLAMA),
    "gemma3": lambda: language(GEMMA),
}
LAYER = "model.layers.0"
# Group to its kind, how many units, and how many places of each (parameter, dimension) go with one.
EXPECTED = {
    "picture": {
        "stem": ("channel", 6, {"stem_norm.running_var": 1, "back.weight": 1, "wide.weight": 1}),
        "wide": ("channel", 10, {"wide.bias": 1, "own.weight": 2, "own.bias": 2, "back.weight": 2}),
        "beside": ("channel", 5, {"squeeze.weight": 1, "excite.weight": 1, "into.weight": 1}),
        "squeeze": ("channel", 3, {"squeeze.bias": 1, "excite.weight": 1}),
        "into": ("channel group", 3, {"into.weight": 4, "grouped.weight": 3, "norm.bias": 3}),
        "last": ("channel", 7, {"last.weight": 1, "head.weight": 4}),
    },
    "rotary": {
        "q_proj": ("head", 3, {"q_proj.bias": 8, "k_proj.weight": 4, "o_proj.weight": 8}),
        "gate_up": ("neuron", 7, {"gate_up.weight": 2, "down.weight": 1}),
    },
    "grouped": {"gate": ("neuron", 18, {"up.weight": 1, "down.weight": 1})},
    "post-norm": {"fc1": ("neuron", 17, {"fc1.bias": 1, "fc2.weight": 1})},
    "pre-norm": {"fc1": ("neuron", 14, {"fc2.weight": 1})},
    "convolutions": {
        "first": ("channel", 6, {"own.weight": 1, "point.weight": 1}),
        "point": ("channel", 8, {"clipped.weight": 1}),
        "clipped": ("channel", 7, {"last.weight": 1}),
        "last": ("channel", 5, {"head.weight": 4}),
    },
    "fused": {},
    "twice": {
        "into": ("neuron", 9, {"into.bias": 1, "again.bias": 1, "out.weight": 1}),
        "out": ("neuron", 8, {"odd.weight": 1}),
    },
    "llama": {f"{LAYER}.mlp.gate_proj": ("neuron", 64, {f"{LAYER}.mlp.down_proj.weight": 1})},
    "gemma3": {f"{LAYER}.self_attn.q_proj": ("head", 2, {f"{LAYER}.self_attn.o_proj.weight": 16})},
}


@pytest.fixture(scope="module")
def found():
    """Each model with what was found in it; worked out once."""
    made = {}

    def get(name):
        if name not in made:
            module, run = MODELS[name]()
            made[name] = module, run, find_coupled(module, run)
        return made[name]

    return get


@pytest.mark.parametrize("name", MODELS)
def test_what_goes_together_is_found(found, name):
    groups = {group.name: group for group in found(name)[2].groups}
    if name not in ("llama", "gemma3"):  # those have more layers than are written out here
        assert set(groups) == set(EXPECTED[name])
    for group, (kind, units, widths) in EXPECTED[name].items():
        assert (groups[group].kind, groups[group].units) == (kind, units)
        seen = {one.parameter: one.indices.shape[1] for one in groups[group].members}
        assert {key: seen.get(key) for key in widths} == widths
        assert any(one.reads for one in groups[group].members)


def answer_with_zeros(module, run, group, unit):
    """The second implementation: zeros in a copy, one number after the other."""
    other = copy.deepcopy(module)
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        for member in group.members:
            for index in member.indices[unit].tolist() if member.reads else ():
                parameters[member.parameter][:, index] = 0.0
        return run(other)


# The norms of transformers compute in float32.
TOLERANCE = {"llama": 1e-5, "gemma3": 1e-5}


@pytest.mark.parametrize("name", MODELS)
def test_every_single_unit_is_cut_as_if_nothing_read_it(found, name):
    module, run, coupled = found(name)
    whole = sum(one.numel() for one in module.parameters())
    before = {key: one.clone() for key, one in module.state_dict().items()}
    for group in coupled.groups:
        for unit in range(group.units):
            small = cut_out(module, coupled.groups, {group.name: [unit]})
            wanted = answer_with_zeros(module, run, group, unit)
            torch.testing.assert_close(run(small), wanted, rtol=0, atol=TOLERANCE.get(name, 1e-9))
            left = sum(one.numel() for one in small.parameters())
            buffers = sum("running" in one.parameter for one in group.members)
            assert whole - left == group.weights - buffers
    assert all(torch.equal(before[key], one) for key, one in module.state_dict().items())


@pytest.mark.parametrize("name", ["picture", "rotary", "llama", "gemma3"])
def test_all_but_one_unit_of_all_groups_go_at_once(found, name):
    module, run, coupled = found(name)
    removed = {group.name: list(range(group.units - 1)) for group in coupled.groups}
    check_same(module, run, coupled.groups, removed)
    once = cut_out(module, coupled.groups, removed)
    # What is left is traced again, and nothing of it can go but what is no group any more.
    assert {group.name for group in find_coupled(once, run).groups} <= {"own", "into"}
    assert type(once) is type(module)


def test_layers_say_what_they_are_after_a_cut(found):
    module, _, coupled = found("picture")
    small = cut_out(module, coupled.groups, {"into": [1], "wide": [0, 9], "stem": [2]})
    assert (small.grouped.groups, small.grouped.in_channels, small.grouped.out_channels) == (
        2,
        8,
        6,
    )
    assert (small.norm.num_groups, small.norm.num_channels) == (2, 6)
    assert (small.own.groups, small.own.in_channels, small.own.out_channels) == (8, 8, 16)
    assert small.stem_norm.num_features == 5
    assert (small.squeeze.in_channels, small.into.in_channels) == (10, 10)
    module, _, coupled = found("rotary")
    small = cut_out(module, coupled.groups, {"q_proj": [1]})
    assert (small.num_heads, small.num_key_value_heads, small.num_key_value_groups) == (4, 2, 2)
    assert (small.o_proj.in_features, small.k_proj.out_features, small.head_dim) == (16, 8, 4)
    assert (module.num_heads, module.o_proj.in_features) == (6, 24)


@pytest.mark.parametrize(
    ("name", "holder", "said"),
    [
        ("picture", "head", "the answer"),
        ("rotary", "table", "norm normalises over them"),
        ("grouped", "table", "mean along them in norm1"),
        ("grouped", "q_proj", "the model does not run"),
        ("fused", "qkv", "the model does not run"),
        ("twice", "odd", "they enter flip in the model itself, which is not understood"),
        ("llama", "model.embed_tokens", "input_layernorm"),
    ],
)
def test_what_must_stay_says_why(found, name, holder, said):
    assert said in found(name)[2].pinned[holder]


def test_a_tied_weight_stays_one():
    module = random_model({**LLAMA, "tie_word_embeddings": True})
    group = CoupledGroup(
        "vocabulary",
        "row",
        2,
        (Member("model.embed_tokens.weight", 0, torch.tensor([[3], [5]])),),
        1,
    )
    small = cut_out(module, [group], {"vocabulary": [1]})
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert small.lm_head.out_features == small.model.embed_tokens.num_embeddings
    assert small.lm_head.out_features == module.lm_head.out_features - 1


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ({"head": [0]}, "head has no coupled units"),
        ({"last": [7]}, "0 to 6"),
        ({"last": [2, 2]}, "one twice"),
        ({"last": list(range(7))}, "nothing of last.weight"),
    ],
)
def test_a_cut_that_cannot_be_is_refused_by_name(found, removed, said):
    module, _, coupled = found("picture")
    with pytest.raises(CutError, match=said) as caught:
        cut_out(module, coupled.groups, removed)
    assert caught.value.hint


def test_a_cut_that_answers_otherwise_is_found_out(found):
    module, run, coupled = found("picture")
    last = next(group for group in coupled.groups if group.name == "last")
    other = [
        Member(one.parameter, one.dim, one.indices.roll(1, 0), one.reads) if one.reads else one
        for one in last.members
    ]
    with pytest.raises(CutError, match="does not answer as with zeros"):
        check_same(
            module, run, [CoupledGroup("last", "channel", 7, tuple(other), 1)], {"last": [3]}
        )

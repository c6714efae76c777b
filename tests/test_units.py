"""The weights a plan can decide about, and the reason for whatever is none."""

import pytest
import torch
import toys
from test_statistics import AroundAttention, Picture, Tied
from tiny_models import LLAMA, random_model
from torch import nn

from attar.errors import ModelError
from attar.load.units import list_units


def units_of(module, examples, task="classify"):
    return list_units(toys.toy(task, module, examples=examples))


def test_units_come_in_order_of_first_use_with_shape_and_kind():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(5, 4), nn.Linear(3, 5)

        def forward(self, x):
            return self.last(self.first(x))

    units = units_of(Backwards(), {"inputs": torch.zeros(2, 3)})
    assert [(u.name, u.kind, u.shape, u.uses) for u in units] == [
        ("first", "linear", (5, 3), ("linear",)),
        ("last", "linear", (4, 5), ("linear",)),
    ]
    assert [left.name for left in units.leftovers] == ["last.bias", "first.bias"]


def test_convolutions_have_groups_and_columns_of_one_group():
    units = units_of(Picture(), {"pixels": torch.zeros(2, 4, 7, 6)})
    assert [(u.name, u.groups, u.rows, u.columns) for u in units] == [
        ("grouped", 2, 6, 12),
        ("depthwise", 6, 6, 4),
        ("plain", 1, 3, 6),
        ("head", 1, 5, 3),
    ]


def test_multiply_accumulates_are_those_of_one_sample():
    units = units_of(Picture(), {"pixels": torch.zeros(2, 4, 7, 6)})
    # Positions: 4 x 4 of the strided one, 3 x 3 after a kernel of 2; weights each.
    assert [u.macs for u in units] == [16 * 72, 9 * 24, 9 * 18, 15]
    tied = units_of(Tied(), {"tokens": torch.zeros(3, 5, dtype=torch.long)}, "language")
    assert tied.named("table").macs == 5 * 36  # looking up multiplies nothing


def test_a_tied_weight_is_one_unit_with_two_uses():
    units = units_of(Tied(), {"tokens": torch.zeros(1, 5, dtype=torch.long)}, "language")
    table = units.named("table")
    assert table.uses == ("embedding", "linear") and table.kind == "embedding"
    assert table.coupled == ("head",) and table.shape == (9, 4)
    assert [u.name for u in units] == ["table", "mix"]


def test_a_layer_called_twice_is_one_unit_with_two_uses():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x):
            return self.mix(torch.tanh(self.mix(x)))

    (unit,) = units_of(Twice(), {"inputs": torch.zeros(2, 4)})
    assert unit.uses == ("linear", "linear") and unit.macs == 32 and unit.coupled == ()


def test_an_output_projection_knows_its_heads_and_others_have_none():
    units = units_of(AroundAttention(), {"inputs": torch.zeros(2, 3, 6)})
    assert {u.name.rpartition(".")[2]: u.heads for u in units} == {
        "q": 0,
        "k": 0,
        "v": 0,
        "o_proj": 3,
    }


def test_a_llama_has_its_maps_one_table_and_heads():
    units = units_of(
        random_model(LLAMA), {"tokens": torch.zeros(1, 5, dtype=torch.long)}, "language"
    )
    names = [u.name for u in units]
    assert names[0] == "model.embed_tokens" and len(names) == 1 + 2 * 7
    assert units.named("model.embed_tokens").coupled == ("lm_head",)
    assert units.named("model.layers.1.self_attn.o_proj").heads == 4
    assert {left.shape for left in units.leftovers} == {(32,)}


def test_every_number_of_the_model_is_in_a_unit_or_left_with_a_reason():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mix = nn.BatchNorm1d(4), nn.Linear(4, 3)
            self.unread = nn.Linear(4, 9)
            self.scale = nn.Parameter(torch.ones(2, 4))
            self.register_buffer("shift", torch.zeros(4))
            self.register_buffer("computed", torch.zeros(4), persistent=False)

        def forward(self, x):
            return self.mix(self.norm(x) * self.scale.mean(0) + self.shift)

    module = Mixed()
    units = units_of(module, {"inputs": torch.zeros(2, 4)})
    covered = {f"{u.name}.weight" for u in units} | {left.name for left in units.leftovers}
    assert covered == set(module.state_dict())
    reasons = {left.name: left.reason for left in units.leftovers}
    assert "vector" in reasons["norm.weight"] and "buffer" in reasons["norm.running_mean"]
    assert "buffer" in reasons["shift"] and "is not the `weight`" in reasons["scale"]
    assert "is not the `weight`" in reasons["unread.weight"]


def test_a_model_without_weights_to_decide_about_is_refused():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.scale

    with pytest.raises(ModelError, match="no weight"):
        units_of(Scales(), {"inputs": torch.zeros(2, 4)})


def test_finding_units_changes_nothing():
    module = Picture().eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    units_of(module, {"pixels": torch.ones(2, 4, 7, 6)})
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())

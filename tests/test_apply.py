"""Carrying a plan out: what is stored, what the receipt says, what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_statistics import Tied
from torch import nn

from attar.errors import ModelError, SettingError
from attar.records import Candidate, Cost, Replacement, Silent, Unit, Units
from attar.sites import substituted
from attar.transform import TRANSFORMS
from attar.transform.apply import (
    apply_choices,
    build_transform,
    materialise,
    substitutions,
    treat,
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 3))


UNITS = Units(
    (
        Unit("0", "convolution", (4, 1, 2, 2), ("convolution",), groups=2),
        Unit("2", "linear", (3, 16), ("linear",)),
    ),
    (),
)
CHOICES = {
    "0": Candidate("0", "quantize_rtn", {"bits": 4, "group_size": 0}, Cost(0, 0), 0.0),
    "2": Candidate("2", "quantize_feedback", {"bits": 3, "group_size": 8}, Cost(0, 0), 0.0),
}


def nothing(unit):
    return None, None


def free(unit, change):
    return 0.0, None


def facts(module, known=nothing, price=free):
    def of(unit):
        weight = module.get_parameter(f"{unit.name}.weight").detach()
        return weight.reshape(unit.rows, unit.columns), known, price

    return of


def one_by_one(work, units):
    return [work(unit)() for unit in units]


def applied(module, choices=CHOICES, known=nothing, price=free, units=UNITS):
    return apply_choices(
        units,
        choices,
        facts=facts(module, known, price),
        for_each=one_by_one,
        progress=Silent(),
        made={},
    )


def test_an_unknown_treatment_or_setting_is_refused_with_those_there_are():
    with pytest.raises(SettingError, match="'prune'") as error:
        build_transform("prune", {})
    assert all(name in error.value.hint for name in TRANSFORMS)
    with pytest.raises(SettingError, match="sparsity") as error:
        build_transform("quantize_rtn", {"sparsity": 0.5})
    assert "group_size" in error.value.hint


def test_the_receipt_says_what_was_stored_and_at_what_price():
    module = net()
    treated, receipt = applied(module, price=lambda unit, change: (float(change.abs().sum()), None))
    assert [(a.unit, a.treatment) for a in receipt] == [
        ("0", "quantize_rtn"),
        ("2", "quantize_feedback"),
    ]
    for one in receipt:
        weight = module.get_parameter(f"{one.unit}.weight").detach()
        change = treated[one.unit].weight() - weight
        assert one.stored_bytes == sum(t.nbytes for t in treated[one.unit].tensors.values())
        transform = build_transform(one.treatment, one.settings)
        assert one.stored_bytes == transform.cost(UNITS.named(one.unit)).weight_bytes
        assert one.predicted_damage == pytest.approx(float(change.abs().sum()), rel=1e-5)
        relative = float(change.norm() / weight.norm())
        assert one.relative_error == pytest.approx(relative, rel=1e-5) and 0 < relative < 0.5


def test_each_unit_is_rounded_with_its_own_moment():
    module, c = net(), random(1, 16, 40)
    c = c @ c.transpose(1, 2) / 40
    treated, _ = applied(module, known=lambda unit: (c if unit.name == "2" else None, None))
    transform = build_transform("quantize_feedback", {"bits": 3, "group_size": 8})
    expected = transform.apply(module[2].weight.detach(), c).dense
    assert torch.equal(treated["2"].weight(), expected)
    assert not torch.equal(expected, transform.apply(module[2].weight.detach(), None).dense)


def test_the_module_is_left_as_it_is_and_substitution_and_copy_answer_alike():
    module, x = net(), random(5, 2, 3, 3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    treated, _ = applied(module)
    small = materialise(module, treated)
    with torch.no_grad(), substituted(module, substitutions(treated)):
        inside = module(x)
    assert torch.equal(inside, small(x).detach())
    assert not torch.equal(inside, module(x).detach())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert not set(map(id, small.parameters())) & set(map(id, module.parameters()))


def test_ties_stay_ties_in_the_copy():
    module = Tied()
    unit = Unit("table", "embedding", (9, 4), ("embedding", "linear"))
    choice = Candidate("table", "quantize_rtn", {"bits": 2, "group_size": 0}, Cost(0, 0), 0.0)
    treated, _ = apply_choices(
        Units((unit,), ()),
        {"table": choice},
        facts=facts(module),
        for_each=one_by_one,
        progress=Silent(),
        made={},
    )
    small = materialise(module, treated)
    assert small.head.weight is small.table.weight
    assert torch.equal(small.head.weight, treated["table"].weight())
    assert module.head.weight is module.table.weight


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad):
    module = net()
    with torch.no_grad():
        module[2].weight[1, 3] = bad
    with pytest.raises(ModelError, match="weight 2 holds NaN or infinity"):
        applied(module)


def test_a_weight_of_zeros_has_no_relative_error():
    module = net()
    with torch.no_grad():
        module[2].weight.zero_()
    treated, receipt = applied(module)
    assert receipt[1].relative_error == 0.0 and not treated["2"].weight().any()


def test_treating_in_company_is_the_same_as_alone():
    weight, c = random(6, 16), random(1, 16, 40)
    c = c @ c.transpose(1, 2)
    transforms = [
        build_transform("quantize_feedback", {"bits": 3, "group_size": 8}),
        build_transform("keep_float", {"bits": 16}),
        build_transform("quantize_feedback", {"bits": 2, "group_size": 0}),
        build_transform("zero_n_m", {"n_kept": 2, "m": 4}),
    ]
    for transform, made in zip(transforms, treat(weight, c, transforms), strict=True):
        assert isinstance(made, Replacement)
        assert torch.equal(made.dense, transform.apply(weight, c).dense)


def test_what_the_values_do_not_allow_is_an_error_in_its_place():
    weight = 1e6 * random(6, 16)
    transforms = [
        build_transform("keep_float", {"bits": 16}),
        build_transform("keep_float", {"bits": 32}),
        build_transform("quantize_feedback", {"bits": 2, "group_size": 0}),
    ]
    half, whole, codes = treat(weight, None, transforms)
    assert isinstance(half, SettingError) and isinstance(codes, SettingError)
    assert np.array_equal(whole.dense.numpy(), weight.numpy())


def test_a_bias_takes_up_what_the_price_says_in_a_substitution_and_in_a_copy():
    module, x = net(), random(5, 2, 3, 3)
    added = random(3, seed=4)
    units = Units((UNITS.units[0], replace(UNITS.units[1], bias="2.bias")), ())

    def price(unit, change):
        return 0.0, module[2].bias.detach() + added if unit.bias else None

    treated, _ = applied(module, price=price, units=units)
    plain, _ = applied(module)
    assert treated["0"].bias is None and torch.equal(treated["2"].bias, module[2].bias + added)
    small = materialise(module, treated)
    with torch.no_grad(), substituted(module, substitutions(treated)):
        moved = module(x)
    with torch.no_grad(), substituted(module, substitutions(plain)):
        unmoved = module(x)
    assert torch.allclose(moved, unmoved + added, atol=1e-6)
    assert torch.equal(moved, small(x)) and torch.equal(small[0].bias, module[0].bias)


def test_what_was_made_before_is_not_made_again():
    module = net()
    first, receipt = applied(module)
    name = UNITS.units[0].name
    calls = []

    def price(unit, change):
        calls.append(unit.name)
        return 0.0, None

    again, listed = apply_choices(
        UNITS,
        CHOICES,
        facts=facts(module, price=price),
        for_each=one_by_one,
        progress=Silent(),
        made={name: (first[name], receipt[0])},
    )
    assert calls == [unit.name for unit in UNITS.units[1:]] and again[name] is first[name]
    assert listed == receipt

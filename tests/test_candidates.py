"""What may be done to each weight, at what price, or why not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import PlanError, SettingError
from attar.plan import candidates as menus
from attar.records import Replacement, Silent, Unit, Units
from attar.transform import TRANSFORMS
from attar.transform.apply import build_transform


def unit(columns, rows=6, **more):
    return Unit("a.b", "linear", (rows, columns), ("linear",), macs=rows * columns, **more)


@pytest.mark.parametrize(
    "columns, sizes",
    [
        (7, (0,)),
        (32, (0,)),
        (64, (32, 0)),
        (128, (32, 64, 0)),
        (96, (32, 0)),
        (512, (32, 64, 128, 0)),
        (576, (32, 64)),
        (1024, (32, 64, 128)),
        (672, (32, 112)),
        (27, (0,)),
        (200, (50, 0)),
        (1003, (59,)),
        (1009, (0,)),
    ],
)
def test_group_sizes_divide_a_row_and_long_rows_are_cut(columns, sizes):
    assert menus.group_sizes(columns) == sizes


def menu(of):
    return menus.menu(of, build_transform, by_worth=True)


@given(columns=st.integers(1, 3000), rows=st.sampled_from([6, 100]))
@settings(derandomize=True, max_examples=150, deadline=None)
def test_every_treatment_of_the_menu_fits_a_unit_of_any_width(columns, rows):
    found = menu(unit(columns, rows))
    assert found[-1] == menus.KEEP
    assert len({(name, tuple(sorted(s.items()))) for name, s in found}) == len(found)
    for name, settings_ in found:
        reason = build_transform(name, settings_).rejects(unit(columns, rows))
        assert reason is None or name.startswith("zero")
    widths = {s["bits"] for name, s in found if name == "quantize_feedback"}
    averages = {s["bits"] for name, s in found if name == "quantize_entropy"}
    range_coded = rows == 100 and columns >= 164
    assert widths == ({4, 8} if range_coded else {2, 3, 4, 5, 6, 8})
    assert averages == (set(menus.AVERAGE_BITS) if range_coded else set())


def test_factors_are_as_small_as_the_menu_says_and_left_out_where_they_cannot_be():
    factored = [s for name, s in menu(unit(384, 1536)) if name == "factorize_low_rank"]
    assert len(factored) == len(menus.FACTORED_BITS)
    for bits, settings_ in zip(menus.FACTORED_BITS, factored, strict=True):
        stored = build_transform("factorize_low_rank", settings_).cost(unit(384, 1536)).weight_bytes
        assert stored <= 1.05 * bits * 384 * 1536 / 8
    for left_out in (unit(384, 6), unit(576, 49_152)):
        assert not [name for name, _ in menu(left_out) if name == "factorize_low_rank"]


def test_pins_are_names_patterns_or_names_of_tied_weights():
    tied = replace(unit(8), name="model.embed_tokens", coupled=("lm_head",))
    for pattern in ("model.embed_tokens", "lm_head", "*head", "model.*", "*"):
        assert menus.is_kept(tied, ["x", pattern])
    for pattern in ("model", "LM_HEAD", "head", ""):
        assert not menus.is_kept(tied, [pattern])


def test_a_pin_that_matches_nothing_is_refused_with_the_nearest_names():
    units = Units((unit(8), replace(unit(8), name="layers.0.v_proj")), ())
    menus.check_keep(units, ["a.b", "*.v_proj"])
    with pytest.raises(PlanError, match=r"'layers\.0\.v_prj'") as error:
        menus.check_keep(units, ["a.b", "layers.0.v_prj"])
    assert "layers.0.v_proj" in error.value.hint


def priced(units, treatments, treat, price, build=build_transform):
    def price_all(u, allowed):
        for (name, _), made in zip(allowed, treat(u, [t for _, t in allowed]), strict=True):
            yield made if isinstance(made, SettingError) else price(u, made, name)

    return menus.price_candidates(
        units,
        {u.name: treatments for u in units},
        build=build,
        price=lambda unit: price_all,
        for_each=lambda work: [work(unit)() for unit in units],
        progress=Silent(),
    )


def whole(u, transforms):
    weight = torch.ones(u.rows, u.columns)
    return [Replacement({}, weight * i) for i, _ in enumerate(transforms)]


def test_each_treatment_is_priced_with_its_exact_bytes():
    treatments = [("keep_float", {"bits": 16}), ("quantize_rtn", {"bits": 4, "group_size": 0})]
    asked = []

    def price(u, made, name):
        asked.append((u.name, name))
        return float(made.dense.sum())

    found = priced(Units((unit(8),), ()), treatments, whole, price)["a.b"]
    assert [(c.treatment, c.predicted_damage) for c in found] == [
        ("keep_float", 0.0),
        ("quantize_rtn", 48.0),
    ]
    assert [c.cost.weight_bytes for c in found] == [96, 24 + 12 + 3]
    assert asked == [("a.b", "keep_float"), ("a.b", "quantize_rtn")]


def test_what_does_not_fit_is_refused_with_a_reason_and_never_tried():
    tried = []

    def treat(u, transforms):
        tried.extend(transforms)
        return whole(u, transforms)

    treatments = [("quantize_rtn", {"bits": 4, "group_size": 5}), menus.KEEP]
    found = priced(Units((unit(8),), ()), treatments, treat, lambda *_: 1.0)["a.b"]
    refused = next(c for c in found if c.refused)
    assert "8 columns" in refused.refused and refused.predicted_damage is None
    assert len(tried) == 1 and len(found) == 2


def test_what_the_values_do_not_allow_is_refused_with_its_problem():
    def treat(u, transforms):
        return [SettingError("the weights are too large.", hint="keep them.") for _ in transforms]

    (found,) = priced(Units((unit(8),), ()), [menus.KEEP], treat, lambda *_: 1.0)["a.b"]
    assert found.refused == "the weights are too large." and found.predicted_damage is None


def test_a_price_is_never_below_zero():
    (found,) = priced(Units((unit(8),), ()), [menus.KEEP], whole, lambda *_: -1e-9)["a.b"]
    assert found.predicted_damage == 0.0


def test_settings_of_one_group_size_are_neighbours_on_the_menu():
    sizes = [s["group_size"] for name, s in menu(unit(256)) if name == "quantize_feedback"]
    assert len(set(sizes)) > 1 and sizes == sorted(sizes, key=sizes.index)


def test_the_menu_names_only_what_is_in_the_table():
    assert {name for name, _ in menu(unit(64))} <= set(TRANSFORMS)

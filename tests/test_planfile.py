"""plan.yaml: written, read back, edited, and refused with the line to mend."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import PlanError, SettingError
from attar.plan.planfile import plan_to_dict, plan_to_yaml, read_plan, recipe_from_dict
from attar.records import Budget, Candidate, Plan, Recipe, Round, Unit, Units
from attar.transform.apply import build_transform

NAMES = ("model.embed_tokens", "layers.0.q_proj", "layers.0.v_proj", "3")
UNITS = Units(tuple(Unit(n, "linear", (6, 8), ("linear",), macs=48) for n in NAMES), ())
QUANTIZED = ("quantize_feedback", {"bits": 4, "group_size": 4})


def choice(name, treatment, settings_, nats=0.001234567):
    cost = build_transform(treatment, settings_).cost(UNITS.named(name))
    return Candidate(name, treatment, settings_, cost, nats)


def plan(recipe=None, **more):
    choices = {name: choice(name, *QUANTIZED) for name in NAMES[:-1]}
    choices["3"] = choice("3", "keep_float", {"bits": 16}, 0.0)
    used = sum(c.cost.weight_bytes for c in choices.values()) + 100
    return Plan(
        model=recipe.model if recipe else "smollm2",
        budget=Budget(used, ("3",)),
        choices=choices,
        overhead_bytes=100,
        predicted_damage=0.25,
        rounds=(Round(0.1, 0.1, 0.2, used), Round(0.12, 0.24, 0.19, used)),
        recipe=recipe or Recipe("smollm2", size="1kB", keep=("3",), seed=7),
        notes=("norm x: stays",),
        **more,
    )


def read(text, folder):
    path = folder / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return read_plan(path, lambda *_: UNITS, build_transform)


def edited(folder, old, new, count=1):
    text = plan_to_yaml(plan())
    assert old in text
    return read(text.replace(old, new, count), folder)


def test_a_plan_comes_back_as_it_was_decided(tmp_path):
    made = plan()
    back = read(plan_to_yaml(made), tmp_path)
    assert list(back.choices) == list(made.choices)
    for name in NAMES:
        one, two = made.choices[name], back.choices[name]
        assert (one.treatment, one.settings, one.cost) == (two.treatment, two.settings, two.cost)
        assert two.predicted_damage == pytest.approx(one.predicted_damage, rel=1e-5)
    assert back.budget == made.budget and back.overhead_bytes == made.overhead_bytes
    assert back.weight_bytes == made.weight_bytes
    assert back.recipe == made.recipe and back.seed == 7 and back.model == "smollm2"


RECIPES = [
    Recipe("m"),
    Recipe("m", size="25%", data="a folder/ü: x.txt", slices="label", seed=3),
    Recipe("a.b:c", task="classify", degrid=0, calibration=5, recovery=6, audit=7, rounds=1),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=["least", "text", "numbers"])
def test_a_recipe_comes_back(recipe, tmp_path):
    back = read(plan_to_yaml(plan(recipe)), tmp_path)
    assert back.recipe == Recipe(**{**recipe.__dict__, "keep": ("3",)})
    assert back.data == (recipe.data or "")


def test_an_accepted_licence_is_not_passed_on_with_a_plan():
    assert "accept" not in plan_to_yaml(plan(Recipe("m", accept_licence=True)))


def test_a_unit_is_one_line_and_names_of_digits_stay_names():
    text = plan_to_yaml(plan())
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert sum("treatment:" in line for line in lines) == len(NAMES)
    assert "'3': {treatment: keep_float" in text
    assert text.startswith("#") and yaml.safe_load(text)["attar_plan"] == 1


def test_the_same_plan_is_the_same_text():
    assert plan_to_yaml(plan()) == plan_to_yaml(plan())


def test_a_plan_without_rounds_or_units_is_still_yaml():
    content = yaml.safe_load(
        plan_to_yaml(Plan("m", Budget(1), {}, overhead_bytes=0, predicted_damage=0.0))
    )
    assert content["rounds"] == [] and content["units"] == {} and content["recipe"] == {}
    assert (
        content["units"]
        == plan_to_dict(Plan("m", Budget(1), {}, overhead_bytes=0, predicted_damage=0.0))["units"]
    )


def test_bytes_are_worked_out_again_whatever_is_written(tmp_path):
    made = plan()
    size = made.choices["layers.0.q_proj"].cost.weight_bytes
    back = edited(tmp_path, f"bytes: {size}", "bytes: 1")
    assert back.weight_bytes == made.weight_bytes


def test_fewer_bits_are_taken_over(tmp_path):
    back = edited(tmp_path, "bits: 4", "bits: 2")
    assert back.choices["model.embed_tokens"].settings == {"bits": 2, "group_size": 4}
    assert back.weight_bytes < plan().weight_bytes


def refused(folder, old, new, count=1):
    with pytest.raises((PlanError, SettingError)) as error:
        edited(folder, old, new, count)
    return error.value


def test_an_unknown_unit_is_named_with_the_nearest(tmp_path):
    error = refused(tmp_path, "layers.0.q_proj:", "layers.0.q_porj:")
    assert "'layers.0.q_porj'" in error.problem and "'layers.0.q_proj'" in error.hint


def test_a_unit_without_a_line_is_named(tmp_path):
    text = "\n".join(x for x in plan_to_yaml(plan()).splitlines() if "v_proj" not in x)
    with pytest.raises(PlanError, match=r"no line for 'layers\.0\.v_proj'") as error:
        read(text, tmp_path)
    assert "keep_float" in error.value.hint


def test_over_its_budget_the_unit_that_grew_most_is_named_with_the_bytes_it_needs(tmp_path):
    error = refused(tmp_path, "layers.0.v_proj: {treatment: quantize_feedback, bits: 4",
                    "layers.0.v_proj: {treatment: quantize_feedback, bits: 8")  # fmt: skip
    grown = choice("layers.0.v_proj", "quantize_feedback", {"bits": 8, "group_size": 4})
    more = grown.cost.weight_bytes - plan().choices["layers.0.v_proj"].cost.weight_bytes
    assert f"'layers.0.v_proj' grew by {more:,}" in error.problem
    assert f"{more:,} over its budget" in error.problem
    assert f"{plan().weight_bytes + more}" in error.hint


def test_a_treatment_that_the_unit_cannot_have_is_refused_with_the_reason(tmp_path):
    error = refused(tmp_path, "group_size: 4", "group_size: 5")
    assert "'model.embed_tokens' cannot have quantize_feedback" in error.problem
    assert "8 columns" in error.problem


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("quantize_feedback", "quantise", "'quantise'"),
        ("bits: 4", "bits: 17", "bits"),
        ("group_size: 4", "groupsize: 4", "groupsize"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, old, new, named):
    assert named in refused(tmp_path, old, new).problem


@pytest.mark.parametrize("line", ["", " 5", " {bits: 4}", " {treatment: 5}", " [1]", " null"])
def test_a_line_without_a_treatment_is_refused_by_name(tmp_path, line):
    text = plan_to_yaml(plan())
    start = text.index("  layers.0.q_proj:")
    end = text.index("\n", start)
    with pytest.raises(PlanError, match=r"'layers\.0\.q_proj'"):
        read(text[:start] + "  layers.0.q_proj:" + line + text[end:], tmp_path)


def test_broken_yaml_is_refused_with_its_line(tmp_path):
    text = plan_to_yaml(plan())
    number = next(i for i, x in enumerate(text.splitlines(), 1) if "q_proj" in x)
    with pytest.raises(PlanError) as error:
        read(text.replace("layers.0.q_proj: {", "layers.0.q_proj: {{]"), tmp_path)
    assert f"line {number}" in error.value.problem


@pytest.mark.parametrize(
    "text",
    ["", "[]", "5", "attar_plan: 2\n", "attar_plan: '1'\n", "a: &x 1\nb: *x\n", "\t", "\x00"],
)
def test_what_is_no_plan_is_refused(tmp_path, text):
    with pytest.raises(PlanError) as error:
        read(text, tmp_path)
    assert error.value.hint


def test_bytes_that_are_no_text_and_a_missing_file_are_refused(tmp_path):
    path = tmp_path / "plan.yaml"
    for content in (None, b"\xff\xfe\x00bad"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(PlanError, match=r"plan\.yaml"):
            read_plan(path, lambda *_: UNITS, build_transform)


@pytest.mark.parametrize(
    "key, bad",
    [
        ("weight_bytes", "many"), ("weight_bytes", True), ("overhead_bytes", "1.5"),
        ("units", "[]"), ("model", "5"), ("keep", "3"), ("keep", "[3]"), ("recipe", "[]"),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_named(tmp_path, key, bad):
    content = yaml.safe_load(plan_to_yaml(plan()))
    content[key] = yaml.safe_load(str(bad))
    with pytest.raises(PlanError) as error:
        read(yaml.safe_dump(content, sort_keys=False), tmp_path)
    assert key in error.value.problem or "keeps" in error.value.problem


@pytest.mark.parametrize(
    "bad", [{"sead": 1}, {"seed": "1"}, {"size": 5}, {"seed": True}, {"data": 1}]
)
def test_a_recipe_that_cannot_be_used_is_refused(bad):
    with pytest.raises(PlanError, match=next(iter(bad))):
        recipe_from_dict({"model": "m", "keep": [], "recipe": bad})


# What a plan says elsewhere, and what only the person who types may say.
@pytest.mark.parametrize(
    "bad", [{"model": "other"}, {"keep": "x"}, {"accept_licence": True}, {"accept_licence": "yes"}]
)
def test_a_recipe_cannot_say_what_is_not_its_own(bad):
    with pytest.raises(PlanError, match=next(iter(bad))):
        recipe_from_dict({"model": "m", "keep": [], "recipe": bad})


@given(at=st.integers(0, 10_000), put=st.text(max_size=3), cut=st.integers(0, 5))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_any_edit_gives_a_plan_or_a_refusal(at, put, cut, tmp_path_factory):
    text = plan_to_yaml(plan())
    at %= len(text)
    path = tmp_path_factory.getbasetemp() / "edited.yaml"
    path.write_text(text[:at] + put + text[at + cut :], encoding="utf-8", newline="")
    try:
        back = read_plan(path, lambda *_: UNITS, build_transform)
    except (PlanError, SettingError) as error:
        assert error.hint
    else:
        assert back.weight_bytes <= back.budget.weight_bytes

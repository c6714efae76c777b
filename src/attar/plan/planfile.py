"""plan.yaml: what was decided, to read, edit and apply again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from attar.errors import PlanError
from attar.plan.activation_fields import activations_from_dict, activations_to_dict
from attar.plan.cut_fields import cuts_from_dict, cuts_to_dict, healed_from_dict, rounded
from attar.records import Budget, Candidate, Cut, Equalised, Plan, Recipe, Transform, Unit, Units

VERSION = 1
# Said elsewhere in the plan, for the user alone to say, or without a bearing on the result.
NOT_IN_RECIPE = {"model", "keep", "accept_licence", "threads", "workers"}
HEAD = """\
# One line for each unit: its treatment and settings, the bytes they need, and the nats per
# prediction they are expected to cost. Edit treatments and settings, then: attar apply plan.yaml
# bytes and nats are worked out again then; what you write there changes nothing.
"""


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Turn a plan into what YAML and JSON can hold."""
    return {
        "attar_plan": VERSION,
        "model": plan.model,
        "recipe": recipe_to_dict(plan.recipe),
        "weight_bytes": plan.budget.weight_bytes,
        "keep": list(plan.budget.keep),
        "overhead_bytes": plan.overhead_bytes,
        "predicted_damage": rounded(plan.predicted_damage),
        "rounds": [
            {
                "predicted_damage": rounded(r.predicted_damage),
                "corrected_damage": rounded(r.corrected_damage),
                "measured_damage": rounded(r.measured_damage),
                "weight_bytes": r.weight_bytes,
            }
            for r in plan.rounds
        ],
        "notes": list(plan.notes),
        "equalised": equalised_to_list(plan.equalised),
        **cuts_to_dict(plan),
        "units": {
            name: {
                "treatment": c.treatment,
                **c.settings,
                **activations_to_dict(c),
                "bytes": c.cost.weight_bytes,
                "nats": rounded(c.predicted_damage or 0.0),
            }
            for name, c in plan.choices.items()
        },
    }


def equalised_to_list(equalised: Sequence[Equalised]) -> list[dict[str, Any]]:
    """One line for each change of channels, in order."""
    return [
        {
            "link": one.link,
            "method": one.method,
            **one.settings,
            "nats_before": rounded(one.damage_before),
            "nats_after": rounded(one.damage_after),
        }
        for one in equalised
    ]


def equalised_from_dict(content: Mapping[str, Any]) -> tuple[Equalised, ...]:
    """Read back what `equalised_to_list` made; a plan without it equalises nothing."""
    found = []
    for line in _field(content, "equalised", list) if "equalised" in content else ():
        named = isinstance(line, dict) and all(
            isinstance(line.get(key), str) for key in ("link", "method")
        )
        if not named:
            raise PlanError(
                f"the plan equalises {line!r}, which names no link and method.",
                hint="write {link: NAME, method: fold_scale, alpha: 0.5}, or take the line out.",
            )
        said = ("link", "method", "nats_before", "nats_after")
        settings = {key: value for key, value in line.items() if key not in said}
        nats = [line.get(key, 0.0) for key in said[2:]]
        before, after = (float(n) if isinstance(n, int | float) else 0.0 for n in nats)
        found.append(Equalised(line["link"], line["method"], settings, before, after))
    return tuple(found)


def recipe_to_dict(recipe: Recipe | None) -> dict[str, Any]:
    """Leave out what is at its default, and what the plan says elsewhere."""
    if recipe is None:
        return {}
    unset = Recipe(model="")
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in fields(recipe)
        if field.name not in NOT_IN_RECIPE
        and (value := getattr(recipe, field.name)) != getattr(unset, field.name)
    }


def recipe_from_dict(content: Mapping[str, Any]) -> Recipe:
    """Read back what `plan_to_dict` wrote.

    Raises:
        PlanError: A field is unknown or of the wrong kind.
    """
    given = dict(_field(content, "recipe", dict))
    unset = Recipe(model="")
    known = {field.name for field in fields(unset)} - NOT_IN_RECIPE
    numbers = ("seed", "degrid", "calibration", "recovery", "audit", "rounds")
    for name, value in given.items():
        good = isinstance(value, int) if name in numbers else isinstance(value, str)
        if name == "protect":
            good = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if name not in known or not good or isinstance(value, bool):
            raise PlanError(
                f"the plan's recipe has {name!r}: {value!r}, which cannot be used.",
                hint="undo the last edit, or make the plan again with attar plan.",
            )
    keep = tuple(_field(content, "keep", list))
    if not all(isinstance(pattern, str) for pattern in keep):
        raise PlanError(
            f"the plan keeps {keep}, which are not all names of units.",
            hint="write names between quotes, as in keep: ['3', '*.v_proj'].",
        )
    protect = tuple(given.pop("protect", ()))
    return Recipe(model=_field(content, "model", str), keep=keep, protect=protect, **given)


def plan_to_yaml(plan: Plan) -> str:
    """Write one line per unit, so that a difference between two plans reads line by line."""
    content = plan_to_dict(plan)
    units = content.pop("units")
    rounds = content.pop("rounds")
    equalised = content.pop("equalised")
    listed = {key: content.pop(key) for key in ("contenders", "cuts") if key in content}
    text: str = HEAD + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    text += _lines("rounds", [f"- {_flow(r)}" for r in rounds], "[]")
    text += _lines("equalised", [f"- {_flow(one)}" for one in equalised], "[]")
    for key, lines in listed.items():
        text += _lines(key, [f"- {_flow(one)}" for one in lines], "[]")
    return text + _lines("units", [f"  {_flow(n)}: {_flow(u)}" for n, u in units.items()], "{}")


def _lines(key: str, lines: list[str], empty: str) -> str:
    return f"{key}:\n" + "\n".join(lines) + "\n" if lines else f"{key}: {empty}\n"


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def read_plan(
    path: Path,
    units_of: Callable[[Recipe, Sequence[Cut]], Units],
    build: Callable[[str, Mapping[str, Any]], Transform],
) -> Plan:
    """Read a plan that may have been edited by hand, and work out its bytes again.

    Args:
        units_of: The plan's recipe, and what it cuts, to the units that are left of its model.
        build: Treatment and settings to a transform; raises SettingError on bad ones.

    Raises:
        PlanError: The file is not a plan, names an unknown unit, leaves one out, asks a unit for
            what it cannot have, or needs more bytes than its budget.
    """
    content = _read_yaml(path)
    recipe = recipe_from_dict(content)
    cuts = cuts_from_dict(content)
    units = units_of(recipe, cuts)
    named = _field(content, "units", dict)
    names = [unit.name for unit in units]
    for name in named:
        if name not in names:
            near = get_close_matches(str(name), names, n=1, cutoff=0.0)
            raise PlanError(
                f"the plan names {name!r}, which the model does not have.",
                hint=f"did you mean {near[0]!r}?",
            )
    choices = {unit.name: _choice(unit, named, build) for unit in units}
    budget = Budget(_field(content, "weight_bytes", int), recipe.keep)
    plan = Plan(
        model=content["model"],
        budget=budget,
        choices=choices,
        overhead_bytes=_field(content, "overhead_bytes", int),
        predicted_damage=sum(c.predicted_damage or 0.0 for c in choices.values()),
        seed=recipe.seed,
        data=recipe.data or "",
        recipe=recipe,
        equalised=equalised_from_dict(content),
        cuts=cuts,
        healed=healed_from_dict(content),
    )
    _check_budget(plan, named)
    return plan


def _check_budget(plan: Plan, named: Mapping[str, Any]) -> None:
    """Refuse a plan over its budget; name the edited unit that grew most."""
    over = plan.weight_bytes - plan.budget.weight_bytes
    if over <= 0:
        return
    grown = {
        name: c.cost.weight_bytes - int(named[name].get("bytes", 0) or 0)
        for name, c in plan.choices.items()
    }
    worst = max(grown, key=lambda name: grown[name])
    raise PlanError(
        f"the plan needs {plan.weight_bytes:,} bytes, {over:,} over its budget of "
        f"{plan.budget.weight_bytes:,}; {worst!r} grew by {grown[worst]:,}.",
        hint=f"give {worst!r} fewer bits, or raise weight_bytes to {plan.weight_bytes}.",
    )


def _choice(
    unit: Unit,
    named: Mapping[str, Any],
    build: Callable[[str, Mapping[str, Any]], Transform],
) -> Candidate:
    name = unit.name
    if name not in named:
        raise PlanError(
            f"the plan has no line for {name!r}.",
            hint="give it one: {treatment: keep_float, bits: 16} leaves it as it is.",
        )
    line = named[name]
    if not isinstance(line, dict) or not isinstance(line.get("treatment"), str):
        raise PlanError(
            f"the line of {name!r} has no treatment.",
            hint="write {treatment: quantize_feedback, bits: 4, group_size: 64}.",
        )
    around = activations_from_dict(line, name)
    known = ("treatment", "bytes", "nats", *around)
    settings = {k: v for k, v in line.items() if k not in known}
    transform = build(line["treatment"], settings)
    reason = transform.rejects(unit)
    if reason:
        raise PlanError(
            f"{name!r} cannot have {line['treatment']}: it {reason}.",
            hint="choose other settings, or {treatment: keep_float, bits: 16}.",
        )
    nats = line.get("nats", 0.0)
    damage = float(nats) if isinstance(nats, int | float) else 0.0
    return Candidate(name, line["treatment"], settings, transform.cost(unit), damage, **around)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        # A few lines of references to references would unfold to gigabytes.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise PlanError(
                f"{path} holds references (*name), which plans do not use.",
                hint="write the value itself.",
            )
        content = yaml.safe_load(text)
    except OSError as error:
        hint = "make one with: attar plan MODEL --size 60MB --out plan.yaml"
        if path.is_dir():
            hint = "a folder of a frontier goes with --size, such as --size 60MB."
        raise PlanError(f"cannot read {path}: {error.strerror}.", hint=hint) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise PlanError(
            f"{path} is not readable YAML{place}.",
            hint="undo the last edit, or make the plan again with attar plan.",
        ) from error
    if not isinstance(content, dict) or content.get("attar_plan") != VERSION:
        hint = "make one with: attar plan MODEL --size 60MB --out plan.yaml"
        if isinstance(content, dict) and "attar_frontier" in content:
            hint = "it is a frontier: say which point of it with --size, such as --size 60MB."
        raise PlanError(f"{path} is not an Attar plan (no attar_plan: {VERSION}).", hint=hint)
    return content


def _field(content: Mapping[str, Any], key: str, kind: type) -> Any:
    value = content.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise PlanError(
            f"the plan's {key!r} is {value!r}, which is not a {kind.__name__}.",
            hint="undo the last edit, or make the plan again with attar plan.",
        )
    return value

"""The picture of what each layer was worth: units laid out by layer and role, from their names.

A name like `model.layers.3.mlp.up_proj` holds a stack (`model.layers`), a block (3) and a role
(`mlp.up_proj`). Where most units are linear and the grid is well filled, blocks are rows and roles
are columns; otherwise every unit is a bar, in order of first use.
"""

from __future__ import annotations

from math import log10
from typing import Any

from attar.report.wording import number_text, short_text

FILLED_ENOUGH = 0.6  # of a grid's cells; a sparser grid shows more holes than layers
# Opacities, per cent, of the steps of the worth scale. Between 57 and 76 neither dark nor light
# text has a contrast of 4.5 to 1 on both the light and the dark page, so no step lies there.
TINTS = (6, 18, 30, 44, 57, 76, 98)
DEEP = 5  # the first step with light text on it (dark text on the dark page)


def split_name(name: str) -> tuple[str, int, str] | None:
    """Stack, block number and role of a unit; None where the name has no number to count by."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal() and part.isascii() and len(part) < 7:
            return ".".join(parts[:place]), int(part), ".".join(parts[place + 1 :]) or "weight"
    return None


def short_roles(roles: list[str]) -> dict[str, str]:
    """The shortest ends of the role names that still tell them apart."""
    short = {}
    for role in roles:
        parts = role.split(".")
        for length in range(1, len(parts) + 1):
            end = ".".join(parts[-length:])
            others = [other for other in roles if other != role]
            if not any(other == end or other.endswith("." + end) for other in others):
                break
        short[role] = ".".join(parts[-length:])
    return short


def role_of(unit: dict[str, Any]) -> str:
    """What units are grouped by over the layers: the role, or the whole name outside a stack."""
    place = split_name(unit["name"])
    return unit["name"] if place is None else place[2]


# What the record calls the treatment of a unit that no plan named.
UNTOUCHED = "untouched"


def draw_network(units: list[dict[str, Any]]) -> dict[str, Any]:
    """Cells with their place, tint and bar; `mode` is "grid", "bars" or "none"."""
    if all(unit["worth"] is None and unit["treatment"] == UNTOUCHED for unit in units):
        return {"mode": "none", "scale": None}
    scale = worth_scale([unit["worth"] for unit in units])
    most = max((unit["predicted_damage"] or 0.0 for unit in units), default=0.0)
    cells = {unit["name"]: _cell(unit, row, scale, most) for row, unit in enumerate(units)}
    stacks = _stacks(units)
    n_linear = sum(unit["kind"] != "convolution" for unit in units)
    size = sum(len(stack["blocks"]) * len(stack["roles"]) for stack in stacks)
    placed = sum(len(block["units"]) for stack in stacks for block in stack["blocks"])
    wide = any(len(stack["roles"]) > 1 for stack in stacks)
    is_grid = wide and 2 * n_linear > len(units) and placed >= FILLED_ENOUGH * size
    singles = [unit["name"] for unit in units if split_name(unit["name"]) is None]
    return {
        "mode": "grid" if is_grid else "bars",
        "scale": scale,
        "most_damage": most,
        "cells": cells,
        "singles": singles if is_grid else list(cells),
        "stacks": [_with_headers(stack) for stack in stacks] if is_grid else [],
    }


def worth_scale(worths: list[Any]) -> dict[str, Any] | None:
    """A log scale over the positive worths, in equal steps; None where there are none."""
    positive = [worth for worth in worths if worth is not None and worth > 0]
    if not positive:
        return None
    low, high = min(positive), max(positive)
    return {
        "low": low,
        "middle": (low * high) ** 0.5,
        "high": high,
        "step": (high / low) ** (1 / len(TINTS)),
        "tints": TINTS,
    }


def log_place(value: int | float | None, low: int | float, high: int | float) -> float:
    """Where a value lies between two ends of a log scale, 0 to 100; 0 for what is not positive."""
    if value is None or value <= 0:
        return 0.0
    if high <= low:
        return 50.0
    place = 100 * (log10(value) - log10(low)) / (log10(high) - log10(low))
    return round(min(100.0, max(0.0, place)), 1)


def _cell(
    unit: dict[str, Any], row: int, scale: dict[str, Any] | None, most: int | float
) -> dict[str, Any]:
    place = log_place(unit["worth"], scale["low"], scale["high"]) if scale else 0.0
    step = min(len(TINTS) - 1, int(place / 100 * len(TINTS)))
    damage = unit["predicted_damage"]
    return {
        "name": unit["name"],
        "row": row,
        "label": unit["label"],
        "worth": "" if unit["worth"] is None else short_text(unit["worth"]),
        "worth_long": "not scored" if unit["worth"] is None else number_text(unit["worth"]),
        "damage": "none" if damage is None else number_text(damage, 2),
        "place": round(place),
        "tint": TINTS[step],
        "deep": step >= DEEP,
        # Square root: one embedding would else flatten the bars of all other units.
        "bar": round(100 * (damage / most) ** 0.5) if damage and damage > 0 and most else 0,
        "heads": unit["heads"],
        "refused": unit["refused"],
    }


def _stacks(units: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stacks in order of first use, each with its blocks (by number) and roles."""
    stacks: dict[str, dict[str, Any]] = {}
    for unit in units:
        place = split_name(unit["name"])
        if place is None:
            continue
        name, block, role = place
        stack = stacks.setdefault(name, {"name": name, "roles": [], "by_block": {}})
        if role not in stack["roles"]:
            stack["roles"].append(role)
        stack["by_block"].setdefault(block, {})[role] = unit["name"]
    for stack in stacks.values():
        by_block = stack.pop("by_block")
        stack["blocks"] = [{"number": n, "units": by_block[n]} for n in sorted(by_block)]
    return list(stacks.values())


def _with_headers(stack: dict[str, Any]) -> dict[str, Any]:
    short = short_roles(stack["roles"])
    texts = list(short.values())
    # q_proj, k_proj, … read as q, k, … on a phone; the whole role stands in the header's title.
    ends = {text.rsplit("_", 1)[1] for text in texts if "_" in text}
    cut = len(ends) == 1 and all("_" in text for text in texts)
    tail = f"_{ends.pop()}" if cut and ends else ""
    return stack | {
        "headers": [
            {"role": role, "short": short[role].removesuffix(tail)} for role in stack["roles"]
        ]
    }


def head_strips(units: list[dict[str, Any]]) -> dict[str, Any] | None:
    """One small strip of bars for each unit with heads, all on one log scale."""
    with_heads = [unit for unit in units if unit["heads"]]
    scale = worth_scale([nats for unit in with_heads for nats in unit["heads"]])
    if scale is None:
        return None
    places = [split_name(unit["name"]) for unit in with_heads]
    layers = [place[1] for place in places if place is not None]
    numbered = len(set(layers)) == len(with_heads)  # else "layer 0" would name several
    strips = []
    for unit in with_heads:
        place = split_name(unit["name"])
        heads = unit["heads"]
        known = [nats if nats is not None else 0.0 for nats in heads]
        strips.append(
            {
                "name": unit["name"],
                "title": f"layer {place[1]}" if place and numbered else unit["name"],
                "bars": [
                    round(8 + 0.92 * log_place(n, scale["low"], scale["high"])) for n in heads
                ],
                "nats": [short_text(nats) for nats in heads],
                "most": known.index(max(known)),
                "least": known.index(min(known)),
            }
        )
    return {"scale": scale, "strips": strips}


def slice_table(units: list[dict[str, Any]], labels: list[str], shown: int = 12) -> dict[str, Any]:
    """The units whose worth differs most between slices of the data (highest over lowest)."""
    rows = []
    for unit in units:
        values = [unit["slices"].get(label) for label in labels]
        known = [value for value in values if value is not None and value > 0]
        if len(known) > 1:
            top = max(known)
            rows.append(
                {
                    "name": unit["name"],
                    "ratio": top / min(known),
                    "values": [
                        {"text": short_text(value), "top": value == top} for value in values
                    ],
                }
            )
    rows.sort(key=lambda row: -row["ratio"])
    return {"labels": labels, "rows": rows[:shown], "n_rows": len(rows)}

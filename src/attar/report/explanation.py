"""What an answer rests on: in words for a terminal, as pictures for a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from attar.report.html import page_environment, style_and_script
from attar.report.layout import heading, plain_table, render
from attar.report.record import clean_text, jsonable
from attar.report.wording import duration_text, number_text, percent_text

Facts = Mapping[str, Any]

STRONGEST = 8  # features that are named
MARKED = 3  # of them, with their place in a picture
CELLS = 28  # of a side of a map that is drawn, at most
WINDOW = 30.0  # seconds of sound that are explained
CURVE = (320, 150)  # of the picture of the answer while features are taken away


def explanations_to_text(facts: Facts, width: int = 100, colour: bool = False) -> str:
    """Every explanation: the answer, what speaks for and against it, and whether to trust that."""
    parts: list[RenderableType] = []
    for number, one in enumerate(facts["explanations"]):
        before = facts["explanations"][number - 1] if number else None
        if before is None or before["input"] != one["input"]:
            parts += [heading(one["input"]["name"]), Text(_answer_text(one)), Text("")]
        parts.append(Text(f"{one['method']}, {duration_text(one['seconds'])}", "bold"))
        table = plain_table("what", "", "value", right=["value"])
        largest = max((abs(v) for _, v in strongest(one)), default=0.0) or 1.0
        for name, value in strongest(one):
            bar = "█" * max(1, round(12 * abs(value) / largest))
            table.add_row(
                clean_text(name), f"{'+' if value > 0 else '-'} {bar}", number_text(value)
            )
        parts += [table, *(Text(f"  {line}") for line in _check_lines(one))]
        parts += [Text(f"  caution: {line}") for line in one["problems"]]
        parts.append(Text(""))
    return render(parts, width, colour)


def _answer_text(one: Facts) -> str:
    target = repr(one["target"]) if one["is_log_probability"] else one["target"]
    if not one["is_log_probability"]:
        return (
            f"{one['model']}: {target}, {number_text(one['answer'])}; "
            f"{number_text(one['baseline_answer'])} from {one['baseline']}"
        )
    with_it, without = (math.exp(one[key]) for key in ("answer", "baseline_answer"))
    return (
        f"{one['model']} answers {target} with probability {percent_text(with_it)}; "
        f"with {percent_text(without)} where it is given {one['baseline']}"
    )


def unit_of(one: Facts) -> str:
    """In what the values are."""
    return "nats of log-probability" if one["is_log_probability"] else "units of the output"


def strongest(one: Facts) -> list[tuple[str, float]]:
    """Names and values of the features with the largest values, largest first."""
    values = _by_feature(one)
    names = _names(one, len(values))
    order = sorted(range(len(values)), key=lambda n: -abs(values[n]))[:STRONGEST]
    return [(names[n], values[n]) for n in order if values[n]]


def _by_feature(one: Facts) -> list[float]:
    values, features = (np.asarray(one[key], float).ravel() for key in ("values", "features"))
    known = features >= 0
    return [float(v) for v in np.bincount(features[known].astype(int), values[known])]


def _names(one: Facts, count: int) -> list[str]:
    parts = one["input"]["parts"]
    if parts:
        stays = len(parts) - count  # first tokens that are no feature
        named = [part if part.strip() else repr(part) for part in parts[stays:]]
        return [f"{n + 1 + stays}: {part}" for n, part in enumerate(named)]
    rows = len({row[0] for row in one["features"]}) if np.ndim(one["features"]) == 2 else 1
    columns = count // rows
    if one["input"]["kind"] == "sound":
        seconds = WINDOW / columns
        return [
            f"{seconds * (n % columns):.1f} to {seconds * (n % columns + 1):.1f} s, "
            f"band {n // columns + 1} of {rows} from the lowest"
            for n in range(count)
        ]
    return [
        f"row {n // columns + 1} of {rows}, column {n % columns + 1} of {columns}"
        for n in range(count)
    ]


def _check_lines(one: Facts) -> Iterator[str]:
    checks = one["checks"]
    if checks["gap"] is not None:
        total = float(np.sum(one["values"]))
        whole = one["answer"] - one["baseline_answer"]
        yield f"the parts sum to {number_text(total)} of {number_text(whole)} {unit_of(one)}"
    found = checks["faithfulness"]
    if found is not None:
        low, high = (number_text(found["chance"][end]) for end in (0, -1))
        yield (
            f"taken away most first rather than least first: {number_text(found['area'])} lower on "
            f"average (random orders {low} to {high}; p {number_text(found['p'], 2)})"
        )
        yield (
            "rank correlation with what shuffled weights give: "
            f"{number_text(checks['agreement_with_shuffled_weights'], 2)}; Gini of the parts "
            f"{number_text(checks['sparsity'], 2)}"
        )


# ---------------------------------------------------------------------------------------------
# the page


def explanations_to_html(facts: Facts) -> str:
    """Draw a page of its own, without network and without scripts."""
    shown = jsonable(facts, "", [])["explanations"]
    style, _, _ = style_and_script()
    inputs: list[dict[str, Any]] = []
    for one in shown:
        if not inputs or inputs[-1]["input"] != one["input"]:
            # Where the file lies on somebody's disk is nothing for a page that is handed on.
            name = one["input"]["name"]
            name = name if one["input"]["kind"] == "text" else name.rpartition("/")[2]
            inputs.append(
                {"input": one["input"], "name": name, "answer": _answer_text(one), "by": []}
            )
        inputs[-1]["by"].append(_drawn(one))
    page = page_environment().get_template("explanation.html.j2")
    return page.render(style=style, model=shown[0]["model"], inputs=inputs, unit=unit_of(shown[0]))


def _drawn(one: dict[str, Any]) -> dict[str, Any]:
    """Add what is drawn: tinted tokens, bars, or a map over the picture; and the curves."""
    kind = one["input"]["kind"]
    return one | {
        "tokens": _tinted(one) if kind == "text" else None,
        "bars": _bars(one) if kind == "row" else None,
        "map": _map(one) if kind in ("picture", "sound", "map") else None,
        "curves": _curves(one["checks"]["faithfulness"]),
        "lines": list(_check_lines(one)),
        "strongest": strongest(one),
    }


def _tinted(one: Facts) -> list[dict[str, Any]]:
    largest = max(map(abs, one["values"]), default=0.0) or 1.0
    return [
        {
            "text": part.replace("\n", "↵\n"),
            "value": value,
            "tint": round(70 * (abs(value) / largest) ** 0.5),
            "line": round(4 * (abs(value) / largest) ** 0.5),
            "against": value < 0,
        }
        for part, value in zip(one["input"]["parts"], one["values"], strict=True)
    ]


def _bars(one: Facts) -> list[dict[str, Any]]:
    found = strongest(one)
    largest = max((abs(value) for _, value in found), default=0.0) or 1.0
    return [
        {"name": name, "value": value, "long": round(150 * abs(value) / largest), "y": 24 * n}
        for n, (name, value) in enumerate(found)
    ]


def _map(one: Facts) -> dict[str, Any]:
    """Cells over a square of 280, and outlines of the strongest features."""
    values = _upright(one, "values").astype(float)
    rows, columns = (min(side, CELLS) for side in values.shape)
    at = [np.arange(n) * side // n for n, side in zip((rows, columns), values.shape, strict=True)]
    cells = np.add.reduceat(np.add.reduceat(values, at[0], 0), at[1], 1)
    largest = float(np.abs(cells).max()) or 1.0
    drawn = [
        {
            "x": 280 * column / columns,
            "y": 280 * row / rows,
            "opacity": round(0.75 * (abs(float(cells[row, column])) / largest) ** 0.7, 3),
            "against": bool(cells[row, column] < 0),
        }
        for row in range(rows)
        for column in range(columns)
        if abs(float(cells[row, column])) > 0.02 * largest
    ]
    return {"cells": drawn, "w": 280 / columns, "h": 280 / rows, "marks": list(_marks(one))}


def _upright(one: Facts, key: str) -> np.ndarray:
    """A map as it is drawn: low sounds below."""
    places = np.asarray(one[key])
    return places[::-1] if one["input"]["kind"] == "sound" else places


def _marks(one: Facts) -> Iterator[dict[str, float]]:
    """Outlines of the features with the largest values."""
    sums, features = np.abs(_by_feature(one)), _upright(one, "features")
    for number in np.argsort(-sums)[:MARKED]:
        ys, xs = np.nonzero(features == number)
        tall, wide = (280 / side for side in features.shape)
        yield {
            "x": float(xs.min()) * wide,
            "y": float(ys.min()) * tall,
            "w": float(xs.max() - xs.min() + 1) * wide,
            "h": float(ys.max() - ys.min() + 1) * tall,
        }


def _curves(found: Facts | None) -> dict[str, Any] | None:
    if found is None:
        return None
    lines = found["most_first"], found["least_first"]
    low, high = min(map(min, lines)), max(map(max, lines))
    wide, tall = CURVE

    def path(values: Sequence[float]) -> str:
        points = zip(found["shares_gone"], values, strict=True)
        return " ".join(
            f"{wide * share:.1f},{tall * (1 - (v - low) / ((high - low) or 1)):.1f}"
            for share, v in points
        )

    return {"most": path(lines[0]), "least": path(lines[1]), "low": low, "high": high}

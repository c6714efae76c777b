"""What an audit says beyond the loss itself, for a terminal: better or worse, for whom, by whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from attar.report.layout import facts_table, plain_table
from attar.report.wording import (
    GENERATION_ROWS,
    interval_text,
    number_text,
    percent_text,
    plural,
    size_text,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import RenderableType

SHOWN = 8
# Of a continuation, around the token that differs.
SHOWN_CHARACTERS = 160

CHOICE_SHARES = ("accuracy_before", "accuracy_after", "negative_flips", "positive_flips")


def truth_rows(truth: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Against true answers: whether what changed is for the worse."""
    if truth is None:
        return []
    before, after = truth["accuracy_before"], truth["accuracy_after"]
    negative, positive = truth["negative_flips"], truth["positive_flips"]
    rows = [
        (
            "right answers",
            f"{percent_text(before['value'])} before, {percent_text(after['value'])} after"
            f" (95% interval {interval_text(after, percent=True)})",
        ),
        (
            "right, then wrong",
            f"{percent_text(negative['value'])} (95% interval"
            f" {interval_text(negative, percent=True)}); the reverse"
            f" {percent_text(positive['value'])}; p {number_text(truth['p_value'], 2)}",
        ),
        (
            "could have shown",
            f"a change of {percent_text(truth['smallest_shown'], 2)} of the answers",
        ),
    ]
    if truth["calibration_before"] is not None:
        errors = [truth[f"calibration_{side}"]["ece"] for side in ("before", "after")]
        rows.append(
            (
                "calibration error",
                f"{percent_text(errors[0], 2)} before, {percent_text(errors[1], 2)} after",
            )
        )
    return rows


def slice_parts(slices: Sequence[Mapping[str, Any]], of: str = "slice") -> list[RenderableType]:
    """Who lost how much, most first.

    Args:
        of: What the rows are.
    """
    if not slices:
        return []
    numbers = ("samples", "divergence", "95% interval", "changed", "p worse")
    table = plain_table(of, *numbers, right=numbers)
    for one in slices[:SHOWN]:
        flips = one["flips"]
        table.add_row(
            Text(one["label"]),
            f"{one['n_samples']:,}",
            number_text(one["divergence"]["value"]),
            interval_text(one["divergence"]),
            "" if flips is None else percent_text(flips["value"]),
            number_text(one["p_worse"], 2),
        )
    left = len(slices) - SHOWN
    more = [Text(f"and {left} more in the report")] if left > 0 else []
    return [table, *more, Text("")]


def corruption_parts(verdict: Mapping[str, Any]) -> list[RenderableType]:
    """What both models answer to corrupted inputs, in the order of the table of corruptions."""
    corruptions, certified = verdict["corruptions"], verdict["certified"]
    if not corruptions:
        return []
    wrong = ["newly wrong"] if any(one["truth"] for one in corruptions) else []
    # In 80 columns there is no room for the nats themselves; the page has them.
    numbers = ["added nats", "95% interval", "p", "changed", *wrong]
    table = plain_table("corruption", *numbers, right=numbers)
    for one in corruptions:
        flips, truth = one["flips"], one["truth"]
        cells: list[RenderableType] = [
            Text(f"{one['name']}, {one['strength']}"),
            number_text(one["added"]["value"]),
            interval_text(one["added"]),
            number_text(one["p_added"], 2),
            "" if flips is None else percent_text(flips["value"]),
        ]
        if truth is not None:
            cells.append(percent_text(truth["negative_flips"]["value"]))
        table.add_row(*cells)
    radius = [] if certified is None else [_certified_text(certified)]
    return [table, *radius, Text("")]


def _certified_text(certified: Mapping[str, Any]) -> Text:
    before, after = (number_text(certified[side]["value"]) for side in ("before", "after"))
    return Text(
        f"certified radius (interval bounds; 1 is {certified['unit']}): {before} before, {after} "
        f"after; change {number_text(certified['change']['value'])} "
        f"({interval_text(certified['change'])})"
    )


def responsible_parts(verdict: Mapping[str, Any]) -> list[RenderableType]:
    """Which layers and treatments lost how much of it, and what a bit more would return."""
    units = verdict["responsible"]
    if not units:
        return []
    numbers = ("share", "nats", "one bit more", "returns", "measured")
    table = plain_table("layer", "where", *numbers, right=numbers)
    for one in units[:SHOWN]:
        table.add_row(
            Text(one["unit"]),
            Text(one["where"]),
            percent_text(one["share"]),
            number_text(one["damage"]["value"]),
            size_text(one["cost_bytes"]),
            number_text(one["returned"]),
            "" if one["measured"] is None else number_text(one["measured"]),
        )
    left = [Text(f"and {len(units) - SHOWN} more in the report")] if len(units) > SHOWN else []
    rest = Text(
        f"{percent_text(verdict['unattributed'], 2)} of the divergence is in no layer's weights"
    )
    return [table, *left, rest, *_by_treatment(verdict), *_ways_back(verdict), Text("")]


def _by_treatment(verdict: Mapping[str, Any]) -> list[RenderableType]:
    """One line; nothing where it is not known, or one treatment was given to all."""
    treatments = verdict["treatments_responsible"]
    if len(treatments) < 2:
        return []
    shares = (f"{one['treatment']} {percent_text(one['share'], 2)}" for one in treatments[:SHOWN])
    return [Text(f"by treatment: {'; '.join(shares)}")]


def _ways_back(verdict: Mapping[str, Any]) -> list[RenderableType]:
    """The cheapest way back, and that of several layers together."""
    whole = sum(one["damage"]["value"] for one in verdict["responsible"])
    lines = []
    for one in verdict["rollbacks"]:
        first, *others = one["units"]
        also = f" and {len(others)} more, to {others[-1]}," if others else ""
        lines.append(
            Text(
                f"giving {first}{also} one bit more costs {size_text(one['cost_bytes'])} and"
                f" returned {percent_text(one['measured'] / whole, 2)} of the damage"
            )
        )
    return [lines[0], *lines[1:][-1:]] if lines else []


def generation_parts(generation: Mapping[str, Any] | None) -> list[RenderableType]:
    """How both go on with the same prompts, and where they part."""
    if generation is None:
        return []
    table = plain_table("continuations", "found", "95% interval", right=("found", "95% interval"))
    for name, key, percent in GENERATION_ROWS:
        estimate, write = generation[key], percent_text if percent else number_text
        table.add_row(name, write(estimate["value"]), interval_text(estimate, percent=percent))
    count = Text(
        f"{plural(generation['n_prompts'], 'prompt')}, {generation['most_tokens']} tokens at most;"
        " the likeliest token each time"
    )
    return [table, count, Text(""), *(_parted(one) for one in generation["examples"])]


def _parted(one: Mapping[str, Any]) -> RenderableType:
    """Both texts of one prompt, the token that differs between arrows."""
    table = facts_table()
    table.add_row("prompt", Text(one["prompt"].strip()[-SHOWN_CHARACTERS:], "bold"))
    for side, key in (("original", "before"), ("compressed", "after")):
        marked = f"{one['same'][-SHOWN_CHARACTERS:]}>>{one[key]}<<"
        text = f"{marked}{one[f'{key}_rest'][:SHOWN_CHARACTERS]}".strip()
        table.add_row(side, Text(text.replace("\n", "↵")))
    table.add_row("", "")
    return table


def choices_parts(choices: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """Right answers to multiple-choice questions, by file and by group."""
    if not choices:
        return []
    numbers = ("asked", "right before", "after", "lost", "won", "other", "p")
    table = plain_table("choices", *numbers, right=numbers)
    for one in choices:
        rows = [(one["name"], one["plain"], one["p_plain"])]
        rows += [(f"{one['name']}, by bytes", one["normalised"], one["p_normalised"])]
        rows += [(f"  {g['name']}", g["plain"], g["p_plain"]) for g in one["groups"][:SHOWN]]
        left = len(one["groups"]) - SHOWN
        rows += [(f"  and {left} more in the report", None, None)] if left > 0 else []
        for name, truth, p in rows:
            table.add_row(Text(name), *([] if truth is None else _choice_cells(truth, p)))
    ratios = ", ".join(_ratio_text(one) for one in choices)
    words = "lost: right, then wrong; won: the reverse; other: wrong in another way"
    last = f"probability of the true choice, after over before: {ratios}"
    return [table, Text(words), Text(last), Text("")]


def _choice_cells(truth: Mapping[str, Any], p: float) -> list[str]:
    shares = [truth[key]["value"] for key in CHOICE_SHARES]
    cells = [percent_text(share) for share in (*shares, truth["other_flips"])]
    return [f"{truth['n_predictions']:,}", *cells, number_text(p, 2)]


def _ratio_text(one: Mapping[str, Any]) -> str:
    ratio = one["plain"]["probability_ratio"]
    return f"{number_text(ratio['value'])} ({interval_text(ratio)})"

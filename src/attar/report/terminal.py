"""The same facts in a terminal: what `attar compress` ends with, and the other commands' tables.

Every function returns text; the command line writes it. Nothing depends on colour.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from attar.report.audit_text import (
    choices_parts,
    corruption_parts,
    generation_parts,
    responsible_parts,
    slice_parts,
    truth_rows,
)
from attar.report.cuts import cut_rows
from attar.report.drift_text import drift_parts
from attar.report.layout import bullet, facts_table, heading, plain_table, render
from attar.report.record import (
    clean_text,
    jsonable,
    report_to_json,
    treatment_label,
    verdict_to_json,
    worth_criterion,
)
from attar.report.wording import (
    DISAGREES,
    duration_text,
    interval_text,
    nats_text,
    number_text,
    percent_text,
    plural,
    prediction_noun,
    size_text,
    value_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from attar.records import Candidate, Plan, Report, Scores, Unit, Verdict

SHOWN = 8  # units at each end: with the two headings, both ends fit on a screen of 24 lines
OUTCOME_STYLES = {"passed": "bold green", "failed": "bold red", "undecided": "bold yellow"}


def report_to_text(report: Report, width: int = 100, colour: bool = False) -> str:
    """The table, the continuations, the verdict in words, and where things were written."""
    facts = report_to_json(report)
    return render(_report_parts(facts), width, colour)


def audit_to_text(verdict: Verdict, width: int = 100, colour: bool = False) -> str:
    """What `attar audit` ends with: the same rows without sizes and times."""
    facts = jsonable(verdict_to_json(verdict), "", [])
    table = facts_table()
    for name, value in _loss_rows(facts, "prediction"):
        table.add_row(name, value)
    parts = [
        heading("audit"),
        table,
        Text(""),
        *slice_parts(facts["slices"]),
        *slice_parts(facts["classes"], "answer before"),
        *corruption_parts(facts),
        *responsible_parts(facts),
        *choices_parts(facts["choices"]),
        *generation_parts(facts["generation"]),
        *drift_parts(facts["drift"]),
        *_continuation_parts(facts["continuations"]),
        *_verdict_parts(facts),
        *(bullet("note:", note) for note in facts["notes"]),
    ]
    return render(parts, width, colour)


def models_to_text(
    rows: Sequence[Mapping[str, Any]], width: int = 100, colour: bool = False
) -> str:
    """`attar models`: a block of lines for each model; keys ending in `bytes` are written as sizes.

    Args:
        rows: Each with "name" and any further facts, in the order they are to be shown.
    """
    table = plain_table("model", "what it is")
    for row in rows:
        lines = [
            f"{key.removesuffix('_bytes').replace('_', ' ')}: "
            + (size_text(value) if key.endswith("bytes") else value_text(value))
            for key, value in row.items()
            if key != "name" and value not in ("", None)
        ]
        table.add_row(Text(clean_text(str(row["name"])), "bold"), clean_text("\n".join(lines)))
    return render([table], width, colour)


def _report_parts(facts: Mapping[str, Any]) -> list[RenderableType]:
    size, memory, verdict = facts["size"], facts["memory"], facts["verdict"]
    table = facts_table()
    for name, value in [
        *_size_rows(size),
        *cut_rows(facts["cuts"]),
        *_loss_rows(verdict, prediction_noun(facts["model"]["task"])),
        ("time", duration_text(facts["seconds_total"])),
        (
            "peak memory",
            f"{size_text(memory['peak_bytes'])} measured, "
            f"{size_text(memory['forecast_bytes'])} forecast",
        ),
    ]:
        table.add_row(name, value)
    parts: list[RenderableType] = [heading(facts["model"]["name"]), table, Text("")]
    parts += _continuation_parts(verdict["continuations"])
    parts += _verdict_parts(verdict)
    parts += [bullet("note:", note) for note in facts["plan"]["notes"]]
    if facts["not_finite"]:
        parts.append(Text(f"not finite: {', '.join(facts['not_finite'])}"))
    if size["folder"] is not None:
        page = Path(size["folder"]) / "report" / "report.html"
        parts += [Text(f"\nmodel   {size['folder']}\nreport  {page}", overflow="fold")]
    return parts


def _size_rows(size: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("before, in 16 bits", size_text(size["bytes_before"])),
        ("before, source file", size_text(size["source_bytes"])),
        ("after, everything", f"{size_text(size['bytes_after'])}: {size['smaller']}"),
        ("", f"{size['smaller_than_source']} than the source file"),
    ]
    if size["budget_bytes"]:
        used = percent_text(size["budget_used"])
        rows.append(("budget", f"{size_text(size['budget_bytes'])}, {used} of it used"))
    return rows


def _loss_rows(verdict: Mapping[str, Any], noun: str) -> list[tuple[str, str]]:
    """Divergence, changed predictions, perplexity or cosine, predicted against measured."""
    divergence = verdict["divergence"]
    rows = [
        (
            "divergence, mean",
            f"{nats_text(divergence['value'])} per {noun}"
            f" (95% interval {interval_text(divergence)})",
        ),
        (
            "median and p99",
            f"{number_text(verdict['divergence_median'])} and"
            f" {nats_text(verdict['divergence_p99'])}",
        ),
    ]
    for name, key, percent in (
        ("changed predictions", "flips", True),
        ("perplexity ratio", "perplexity_ratio", False),
        ("cosine to the original", "cosine", False),
    ):
        estimate = verdict[key]
        if estimate is not None:
            write = percent_text if percent else number_text
            between = interval_text(estimate, percent=percent)
            rows.append((name, f"{write(estimate['value'])} (95% interval {between})"))
    foretold = verdict["predicted_damage"]
    predicted = number_text(foretold) if foretold != 0 else "none"
    ratio = verdict["predicted_over_measured"]
    share = "" if not ratio else f" (ratio {number_text(ratio, 2)})"
    share += f": {DISAGREES}" if verdict["prediction_agrees"] is False else ""
    measured = number_text(divergence["value"])
    rows.append(
        ("damage, nats", f"{predicted} predicted, {measured} measured{share}"),
    )
    judged = f"{plural(verdict['n_predictions'], noun)} of {plural(verdict['n_samples'], 'sample')}"
    rows.append(("judged on", judged))
    return rows + truth_rows(verdict["truth"])


def _continuation_parts(continuations: Sequence[Mapping[str, str]]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for turn in continuations:
        table = facts_table()
        table.add_row("prompt", Text(turn["prompt"].strip(), "bold"))
        table.add_row("original", Text(turn["original"].strip()))
        table.add_row("compressed", Text(turn["compressed"].strip()))
        parts += [table, Text("")]
    return parts


def _verdict_parts(verdict: Mapping[str, Any]) -> list[RenderableType]:
    outcome = verdict["outcome"]
    parts: list[RenderableType] = [
        Text(f"verdict: {outcome.upper()}", OUTCOME_STYLES.get(outcome, "bold"))
    ]
    return [*parts, *(bullet("-", reason) for reason in verdict["reasons"])]


def plan_to_text(plan: Plan, units: Iterable[Unit], width: int = 100, colour: bool = False) -> str:
    """Budget, histogram of treatments, the most and the least squeezed units, notes."""
    by_name = {unit.name: unit for unit in units}
    chosen = [(by_name[name], choice) for name, choice in plan.choices.items() if name in by_name]
    chosen.sort(key=lambda pair: _bits(*pair))  # stable: equal bits stay in order of the network
    head = facts_table()
    head.add_row("predicted size", size_text(plan.weight_bytes))
    head.add_row("budget", size_text(plan.budget.weight_bytes))
    head.add_row("not in units", size_text(plan.overhead_bytes))
    head.add_row("predicted damage", f"{number_text(plan.predicted_damage)} nats per prediction")
    if plan.budget.keep:
        head.add_row("kept in 16 bits", clean_text(", ".join(plan.budget.keep)))
    parts: list[RenderableType] = [heading(f"plan for {plan.model}"), head, _histogram(chosen)]
    if len(chosen) <= 2 * SHOWN:
        parts.append(_squeezed("units", chosen))
    else:
        parts.append(_squeezed("most squeezed", chosen[:SHOWN]))
        parts.append(_squeezed("least squeezed", chosen[-SHOWN:][::-1]))
    parts += [bullet("note:", clean_text(note)) for note in plan.notes]
    return render(parts, width, colour)


def _bits(unit: Unit, choice: Candidate) -> float:
    return choice.cost.weight_bytes * 8 / max(1, unit.n_weights)


def _histogram(chosen: Sequence[tuple[Unit, Candidate]]) -> Table:
    """Bytes and weights by treatment; the bar shows the share of weights."""
    rows: dict[tuple[str, str], list[int]] = {}
    for unit, choice in chosen:
        label = treatment_label(choice.settings, _bits(unit, choice))
        row = rows.setdefault((choice.treatment, label), [0, 0, 0])
        row[0] += 1
        row[1] += unit.n_weights
        row[2] += choice.cost.weight_bytes
    all_weights = sum(row[1] for row in rows.values()) or 1
    right = ("units", "weights", "size")
    table = plain_table("treatment", "bits", *right, "share of weights", right=right)
    for (treatment, label), (n_units, weights, stored) in sorted(rows.items()):
        bar = "#" * round(20 * weights / all_weights)
        share = f"{bar} {weights / all_weights:.0%}".strip()
        cells = (treatment, label, f"{n_units:,}", f"{weights:,}", size_text(stored), share)
        table.add_row(*(Text(clean_text(cell)) for cell in cells))
    return table


def _squeezed(title: str, rows: Sequence[tuple[Unit, Candidate]]) -> Table:
    right = ("stored bits", "size", "damage, nats")
    table = plain_table(title, "bits", *right, right=right)
    for unit, choice in rows:
        damage = choice.predicted_damage
        cells = (
            unit.name,
            treatment_label(choice.settings, _bits(unit, choice)),
            f"{_bits(unit, choice):.2f}",
            size_text(choice.cost.weight_bytes),
            "refused" if damage is None else number_text(damage),
        )
        table.add_row(*(Text(clean_text(cell)) for cell in cells))
    return table


def scores_to_text(
    units: Iterable[Unit],
    scores: Mapping[str, Scores],
    slice_relevance: Mapping[str, Mapping[str, float]] | None = None,
    shown: int = SHOWN,
    width: int = 100,
    colour: bool = False,
) -> str:
    """What units are worth: the top and the bottom, with a column for each slice of the data."""
    name = worth_criterion(scores)
    if name is None:
        return "no scores\n"
    criterion = scores[name]
    totals = criterion.totals
    ranked = sorted(
        ((unit.name, totals[unit.name]) for unit in units if unit.name in totals),
        key=lambda item: -item[1],
    )
    per_slice = slice_relevance or {}
    slices = {label: per_slice[label] for label in sorted(per_slice) if label}
    scale = "nats lost per prediction if the unit is removed" if criterion.nats else "no unit"
    title = f"worth by {name} ({scale}), {plural(len(ranked), 'unit')}"
    parts: list[RenderableType] = [Text(clean_text(title), "bold")]
    if len(ranked) <= 2 * shown:
        parts.append(_worth_table("worth", ranked, slices))
    else:
        parts.append(_worth_table("worth most", ranked[:shown], slices))
        parts.append(_worth_table("worth least", ranked[-shown:][::-1], slices))
    return render(parts, width, colour)


def _worth_table(
    title: str,
    rows: Sequence[tuple[str, float]],
    slices: Mapping[str, Mapping[str, Any]],
) -> Table:
    right = ("worth", *slices)
    table = plain_table(title, *right, right=right)
    for name, worth in rows:
        per_slice = [
            number_text(values[name], 2) if name in values else "-" for values in slices.values()
        ]
        cells = (name, number_text(worth, 2), *per_slice)
        table.add_row(*(Text(clean_text(cell)) for cell in cells))
    return table

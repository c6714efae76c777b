"""Several compressed models against one original: one table, and what all of them forget."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.text import Text

from attar.report import wording
from attar.report.html import page_environment, write_report, write_texts
from attar.report.layout import bullet, facts_table, heading, plain_table, render
from attar.report.record import clean_text, jsonable, verdict_to_json
from attar.report.wording import interval_text, number_text, percent_text, plural, size_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.console import RenderableType

    from attar.records import Population

SHOWN = 8
SIDES = ("before", "after")
# Of what was read before a prediction, at the end.
SHOWN_CHARACTERS = 120


def population_to_json(found: Population) -> dict[str, Any]:
    """Every fact, JSON-ready; each model's verdict is that of an audit of it alone."""
    models = [
        {
            "name": name,
            "outcome": report.verdict.outcome,
            "bytes_after": report.bytes_after,
            "verdict": verdict_to_json(report.verdict),
        }
        for name, report in zip(found.names, found.reports, strict=True)
    ]
    facts = {
        "format": "attar audit of several",
        "format_version": 1,
        "original": found.original,
        "models": models,
        "exemplars": None if found.exemplars is None else asdict(found.exemplars),
        "why_no_exemplars": found.why_not,
    }
    not_finite: list[str] = []
    clean: dict[str, Any] = jsonable(facts, "", not_finite)
    clean["not_finite"] = not_finite
    return clean


def population_to_text(found: Population, width: int = 100, colour: bool = False) -> str:
    """One line for each model, why each is judged so, and the exemplars."""
    facts = population_to_json(found)
    numbers = ("size", "nats", "95% interval", "changed", "right")
    table = plain_table("model", "verdict", *numbers, right=numbers)
    for model in facts["models"]:
        table.add_row(Text(model["name"]), model["outcome"].upper(), *_cells(model))
    parts: list[RenderableType] = [
        heading(clean_text(f"audit of {len(found.names)} models against {facts['original']}")),
        table,
    ]
    for model in facts["models"]:
        parts.append(Text(f"{model['name']}: {model['outcome']}", "bold"))
        lines = (*model["verdict"]["reasons"], *used_lines(model["verdict"]))
        parts += [bullet("-", line) for line in lines]
        parts += [bullet("note:", note) for note in model["verdict"]["notes"]]
    parts.append(Text(""))
    if facts["exemplars"] is None:
        parts.append(Text(f"no exemplars: {facts['why_no_exemplars']}"))
    else:
        parts += _exemplar_parts(facts["exemplars"])
    return render(parts, width, colour)


def used_lines(verdict: Mapping[str, Any]) -> list[str]:
    """How a language model writes and answers, a line for each; its own page has the rest."""
    lines = []
    if verdict["generation"] is not None:
        alike = verdict["generation"]["first_divergent_token"]
        again = [verdict["generation"][f"repetition_{side}"]["value"] for side in SIDES]
        lines.append(
            f"goes on alike for {number_text(alike['value'])} tokens ({interval_text(alike)}); "
            f"repeated runs {percent_text(again[0])} before, {percent_text(again[1])} after"
        )
    for one in verdict["choices"]:
        right = [one["plain"][f"accuracy_{side}"]["value"] for side in SIDES]
        lines.append(
            f"{one['name']}: {percent_text(right[0])} right before, {percent_text(right[1])} after "
            f"(p {number_text(one['p_plain'], 2)})"
        )
    return lines


def _cells(model: Mapping[str, Any]) -> list[str]:
    """Size, divergence, changed predictions, and right answers, of one model."""
    verdict = model["verdict"]
    truth, flips = verdict["truth"], verdict["flips"]
    return [
        size_text(model["bytes_after"]),
        number_text(verdict["divergence"]["value"]),
        interval_text(verdict["divergence"]),
        "" if flips is None else percent_text(flips["value"]),
        "" if truth is None else percent_text(truth["accuracy_after"]["value"]),
    ]


def _exemplar_parts(found: Mapping[str, Any]) -> list[RenderableType]:
    share = f"{percent_text(found['share']['value'])}"
    table = facts_table()
    table.add_row(
        "forgotten by most",
        f"{plural(found['n_exemplars'], 'prediction')} of {found['n_predictions']:,}: {share}"
        f" (95% interval {interval_text(found['share'], percent=True)})",
    )
    for name, key in (("right, of these", "right"), ("right, of the rest", "rest")):
        before, after = found[f"{key}_before"], found[f"{key}_after"]
        if before is not None:
            shares = [percent_text(one["value"]) for one in (before, after)]
            table.add_row(name, f"{shares[0]} before, {shares[1]} after")
    parts: list[RenderableType] = [heading("exemplars"), table, Text("")]
    if found["slices"]:
        numbers = ("predictions", "forgotten", "expected", "p more")
        slices = plain_table("slice", *numbers, right=numbers)
        for one in found["slices"][:SHOWN]:
            counts = [f"{one['n_predictions']:,}", f"{one['n_exemplars']:,}"]
            row = (*counts, number_text(one["expected"], 2), number_text(one["p_more"], 2))
            slices.add_row(Text(one["label"]), *row)
        parts.append(slices)
    return [*parts, *_shown(found)]


def _shown(found: Mapping[str, Any]) -> list[RenderableType]:
    """The exemplars themselves, those of the largest divergence."""
    if not found["shown"]:
        return []
    table = plain_table("input", "original", "most others", "true", "agree", "nats",
                        right=("agree", "nats"))  # fmt: skip
    for one in found["shown"][:SHOWN]:
        label = f" ({one['label']})" if one["label"] else ""
        text = f"{one['sample']}{label}: {one['shown'][-SHOWN_CHARACTERS:]}"
        table.add_row(
            Text(text),
            *(Text(one[name]) for name in ("before", "after", "truth")),
            f"{one['agreeing']} of {found['n_models']}",
            number_text(one["divergence"]),
        )
    left = len(found["shown"]) - SHOWN
    return [table, *([Text(f"and {left} more in the report")] if left > 0 else [])]


def population_to_html(found: Population, pages: tuple[str, ...] = ()) -> str:
    """A page of its own, without network and script.

    Args:
        pages: Address of each model's own page; empty for none.
    """
    environment = page_environment()
    return environment.get_template("population.html.j2").render(
        facts=population_to_json(found),
        used_lines=used_lines,
        pages=pages,
        noun=wording.prediction_noun(found.reports[0].task),
        style=environment.get_template("page.css.j2").render(),
    )


def write_population(found: Population, folder: Path) -> Path:
    """Write the page of all, and below it a folder for each model with its own page.

    Raises:
        OutputError: The folder cannot be written, or the disk is full.
    """
    for number, report in enumerate(found.reports, start=1):
        write_report(report, folder / str(number))
    pages = tuple(f"{number}/report.html" for number in range(1, len(found.names) + 1))
    facts = json.dumps(population_to_json(found), indent=1, ensure_ascii=False, allow_nan=False)
    texts = {
        "report.html": population_to_html(found, pages),
        "report.json": facts + "\n",
    }
    return write_texts(texts, folder)[0]

"""One self-contained page: no network, no font, no picture file; the facts are read without script.

Everything from outside (names, texts, reasons) passes through Jinja's autoescape, and the page
carries a content policy that allows only its own script, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from attar.errors import OutputError
from attar.report import wording
from attar.report.drift_text import drift_page
from attar.report.flow import draw_flow
from attar.report.network import draw_network, head_strips, log_place, slice_table
from attar.report.record import report_to_json
from attar.report.sizes import show_sizes, treatment_counts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from attar.records import Report

PARTS = ("page", "sizes")  # of the script and of the style
MOST_TOKENS = 600  # a longer text is no longer read; the JSON has all of it


def report_to_html(report: Report) -> str:
    """The whole page as text; every number in it stands in `report_to_json` too."""
    return page_text(report_to_json(report))


def page_text(facts: dict[str, Any], token: str = "", folder: str = "") -> str:
    """The page of a record that `report_to_json` made.

    Args:
        token: That the page shows to the server it came from; empty for a page that is a file.
        folder: Where the page lies, for lines to type; empty where that is not known.
    """
    style, script, digest = style_and_script()
    verdict = facts["verdict"]
    return (
        page_environment()
        .get_template("page.html.j2")
        .render(
            facts=facts,
            cuts=facts.get("cuts"),  # not in a record of before there were any
            script=script,
            script_hash=digest,
            style=style,
            token=token,
            sizes=show_sizes(facts),
            counts=treatment_counts(facts["units"]),
            noun=wording.prediction_noun(facts["model"]["task"]),
            figures=headline_figures(facts),
            flows=[draw_flow(facts, 1040, (200, 225)), draw_flow(facts, 348, (104, 94))],
            network=draw_network(facts["units"]),
            strips=head_strips(facts["units"]),
            slices=slice_table(facts["units"], facts["slices"]),
            spread=divergence_marks(verdict),
            drift=drift_page(verdict["drift"], folder),
            groups=paired_bars(verdict["groups"]),
            tokens=tint_tokens(verdict["token_divergence"]),
            generation_rows=wording.GENERATION_ROWS,
            continuations=[split_common(turn) for turn in verdict["continuations"]],
            untouched=[unit for unit in facts["units"] if unit["refused"]],
            seconds=_shares(facts["seconds"]),
            memory=_shares(
                {
                    "forecast": facts["memory"]["forecast_bytes"],
                    "measured": facts["memory"]["peak_bytes"],
                }
            ),
            treatments=_treatment_bars(facts["treatments"]),
        )
    )


def style_and_script() -> tuple[str, str, str]:
    """Style and script of a page, and the hash that lets the script run."""
    environment = page_environment()
    style, script = (
        "".join(environment.get_template(f"{name}.{kind}.j2").render() for name in PARTS)
        for kind in ("css", "js")
    )
    return style, script, base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def page_environment() -> Environment:
    """Templates that escape all they are given, with the filters that write numbers."""
    environment = Environment(
        loader=PackageLoader("attar", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": wording.size_text,
        "number": wording.number_text,
        "nats": wording.nats_text,
        "short": wording.short_text,
        "percent": wording.percent_text,
        "duration": wording.duration_text,
        "value": wording.value_text,
    }
    environment.globals |= {"plural": wording.plural, "interval": wording.interval_text}
    return environment


def headline_figures(facts: dict[str, Any]) -> list[dict[str, str]]:
    """The numbers at the top: a name, a value with its unit, and a sentence with the interval."""
    size, verdict = facts["size"], facts["verdict"]
    noun = wording.prediction_noun(facts["model"]["task"])
    divergence = verdict["divergence"]
    entropy = verdict["divergence_over_entropy"]
    of_entropy = ""
    if entropy is not None:
        of_entropy = (
            f" That is {wording.percent_text(entropy, 2)} of the original's own uncertainty."
        )
    found = [
        _figure(
            "Size",
            size["smaller"],
            f"{wording.size_text(size['bytes_before'])} in 16 bits,"
            f" {wording.size_text(size['bytes_after'])} now with every file it needs."
            f" {size['smaller_than_source']} than the source file"
            f" ({wording.size_text(size['source_bytes'])}).",
        ),
        _figure(
            "Mean divergence",
            wording.nats_text(divergence["value"]),
            f"Per {noun}; 95% interval {wording.interval_text(divergence)}.{of_entropy}",
        ),
    ]
    found += _behaviour_figures(verdict, noun)
    if verdict["predicted_damage"] != 0:  # 0: nothing was predicted, as in an audit alone
        found.append(_prediction_figure(verdict))
    return [*found, _tail_figure(verdict, noun)]


def _behaviour_figures(verdict: dict[str, Any], noun: str) -> list[dict[str, str]]:
    """What was measured of flips, perplexity and cosine, each with its interval."""
    found = []
    for name, key, percent, sentence in (
        (
            "Changed predictions",
            "flips",
            True,
            f"This share of {noun}s has another most likely answer.",
        ),
        ("Perplexity ratio", "perplexity_ratio", False, "1 means no change."),
        ("Cosine to the original", "cosine", False, "1 means the same direction."),
    ):
        estimate = verdict[key]
        if estimate is not None:
            write = wording.percent_text if percent else wording.number_text
            between = wording.interval_text(estimate, percent=percent)
            tail = f"{sentence} 95% interval {between}."
            found.append(_figure(name, write(estimate["value"]), tail))
    return found


def _prediction_figure(verdict: dict[str, Any]) -> dict[str, str]:
    ratio = verdict["predicted_over_measured"]
    share = "" if ratio is None else f" Predicted over measured: {wording.number_text(ratio, 2)}."
    share += f" Here {wording.DISAGREES}." if verdict["prediction_agrees"] is False else ""
    return _figure(
        "Predicted damage",
        wording.nats_text(verdict["predicted_damage"]),
        f"Measured: {wording.nats_text(verdict['divergence']['value'])}.{share}",
    )


def _tail_figure(verdict: dict[str, Any], noun: str) -> dict[str, str]:
    return _figure(
        "Worst 1%",
        wording.nats_text(verdict["divergence_p99"]),
        f"One {noun} in a hundred moved at least this far; half of them moved less than"
        f" {wording.number_text(verdict['divergence_median'])} nats.",
    )


def _figure(name: str, value: str, sentence: str) -> dict[str, str]:
    return {"name": name, "value": value, "sentence": sentence}


def divergence_marks(verdict: dict[str, Any]) -> dict[str, Any] | None:
    """Median, mean with its interval, and 99th percentile on one log scale, places in per cent."""
    mean = verdict["divergence"]
    values = [verdict["divergence_median"], *mean.values(), verdict["divergence_p99"]]
    known = [value for value in values if value is not None and value > 0]
    if not known:
        return None
    # Whole decades, so that the ends are round numbers.
    low, high = 10.0 ** _decade(min(known)), 10.0 ** (_decade(max(known) * 0.9999) + 1)
    marks = []
    for name, value, interval in (
        ("median", verdict["divergence_median"], None),
        ("mean", mean["value"], mean),
        ("99th percentile", verdict["divergence_p99"], None),
    ):
        mark = {"name": name, "value": value, "at": log_place(value, low, high), "band": None}
        if interval is not None and None not in interval.values():
            start, end = (log_place(interval[side], low, high) for side in ("low", "high"))
            mark["band"] = {"from": start, "width": max(0.8, end - start)}
        marks.append(mark)
    return {"marks": marks, "low": low, "high": high}


def _decade(value: float) -> int:
    return int(f"{value:.6e}".split("e")[1])


def paired_bars(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups with the lengths of their two bars, per cent of the longest bar of all."""
    keys = ("predicted_damage", "measured_damage")
    longest = max((group[key] or 0.0 for group in groups for key in keys), default=0.0) or 1.0
    return [
        group
        | {f"{key}_bar": round(100 * max(0.0, group[key] or 0.0) / longest, 1) for key in keys}
        for group in groups
    ]


def tint_tokens(tokens: list[list[Any]]) -> dict[str, Any] | None:
    """Tokens with a tint (0 to 100) and an underline of 0 to 4 pixels, by nats over the highest.

    Both follow the square root: differences among small values would else not be seen.
    """
    if not tokens:
        return None
    shown = tokens[:MOST_TOKENS]
    top = max((nats or 0.0 for _, nats in shown), default=0.0)
    drawn = []
    for text, nats in shown:
        share = (max(0.0, nats or 0.0) / top) ** 0.5 if top > 0 else 0.0
        if nats is None:  # not finite: the most there can be
            share = 1.0
        drawn.append(
            {
                "text": text.replace("\n", "↵\n"),
                "nats": nats,
                "tint": round(70 * share),
                "line": round(4 * share),
            }
        )
    worst = sorted(drawn, key=lambda token: -(token["nats"] or 0.0))[:10]
    return {"drawn": drawn, "top": top, "worst": worst, "left_out": len(tokens) - len(shown)}


def split_common(turn: dict[str, str]) -> dict[str, str]:
    """Two continuations cut where they part, at a word."""
    first, second = turn["original"], turn["compressed"]
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    if same < max(len(first), len(second)):
        same = first.rfind(" ", 0, same) + 1
    return turn | {
        "same": first[:same],
        "original_rest": first[same:],
        "compressed_rest": second[same:],
    }


def _shares(values: Mapping[str, int | float]) -> list[dict[str, Any]]:
    longest = max(values.values(), default=0) or 1
    return [
        {"name": name, "value": value, "bar": round(100 * value / longest, 1)}
        for name, value in values.items()
    ]


def _treatment_bars(treatments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    longest = max((row["bytes_before"] for row in treatments), default=0) or 1
    return [
        row
        | {
            "before_bar": round(100 * row["bytes_before"] / longest, 1),
            "after_bar": round(100 * row["bytes_after"] / longest, 1),
        }
        for row in treatments
    ]


def write_report(report: Report, folder: Path) -> tuple[Path, ...]:
    """Write report.html and report.json into `folder`, each whole or not at all.

    Raises:
        OutputError: The folder cannot be written, or the disk is full.
    """
    facts = report_to_json(report)
    texts: dict[str, str | bytes] = {
        "report.html": page_text(facts, folder=str(folder)),
        "report.json": json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    if report.verdict.drift is not None and report.verdict.drift.dictionaries:
        texts["concepts.npz"] = report.verdict.drift.dictionaries
    return write_texts(texts, folder)


def write_texts(texts: Mapping[str, str | bytes], folder: Path) -> tuple[Path, ...]:
    """Write files by name, each whole or not at all.

    Raises:
        OutputError: The folder cannot be written, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tuple(_write_whole(folder / name, text) for name, text in texts.items())
    except OSError as error:
        raise OutputError(
            f"The report cannot be written to {folder}: {error.strerror or error}.",
            hint="name a folder you can write to, or free some disk space.",
        ) from error


def _write_whole(path: Path, content: str | bytes) -> Path:
    # A name of this process, so that two runs into one folder do not mix their halves.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path

"""What `attar bench` found, in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from attar.report.layout import bullet, heading, plain_table, render
from attar.report.record import clean_text
from attar.report.wording import number_text, size_text

if TYPE_CHECKING:
    from attar.records import Bench, BenchRow, Spread

# Name of a figure to what it is called, in the order in which one wants to know.
CALLED = {
    "token_ms": "per token",
    "first_token_ms": "first token",
    "sample_ms": "per sample",
    "load_ms": "load",
    "peak_bytes": "peak memory",
    "answer_mj": "energy per answer, whole processor",
}
# What one waits for, again and again: what models are compared by.
COMPARED = ("token_ms", "first_token_ms", "sample_ms")


def bench_to_text(
    found: Bench,
    wide: dict[tuple[int, str], bool],
    settled: dict[tuple[int, str], Spread],
    width: int = 100,
    colour: bool = False,
) -> str:
    """A table of medians and quartiles, and how often each is as fast as the original.

    Args:
        wide: By row and figure, whether the quartiles lie too far apart to go by.
        settled: By row and figure, the time of the original over that of this row, where all rounds
            agree on which is faster.
    """
    return render(_parts(found, wide, settled), width, colour)


def _parts(
    found: Bench, wide: dict[tuple[int, str], bool], settled: dict[tuple[int, str], Spread]
) -> Iterator[RenderableType]:
    asked = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in found.asked.items())
    yield heading(f"measured on this machine: {asked}")
    right = ("median", "quartiles")
    table = plain_table("model", "engine", "figure", *right, "", right=right)
    for number, row in enumerate(found.rows):
        first = True
        for name, called in CALLED.items():
            if name not in row.figures:
                continue
            value = row.figures[name]
            cells = (
                f"{row.model} ({size_text(row.file_bytes)})" if first else "",
                f"{row.engine} {row.version}" if first else "",
                called,
                _value(name, value.median),
                f"{_value(name, value.low)} – {_value(name, value.high)}",
                _remark(number, name, found, wide, settled),
            )
            table.add_row(*(Text(clean_text(cell)) for cell in cells))
            first = False
    yield table
    yield from (bullet("-", clean_text(line)) for line in _notes(found, wide))


def _remark(
    number: int,
    name: str,
    found: Bench,
    wide: dict[tuple[int, str], bool],
    settled: dict[tuple[int, str], Spread],
) -> str:
    if wide.get((number, name)):
        return "spread too wide"
    if (number, name) in settled:
        ratio = settled[number, name].median
        word = "faster" if ratio > 1 else "slower"
        return f"{number_text(max(ratio, 1 / ratio))}x {word}"
    compared = name in COMPARED and any(row.role == "original" for row in found.rows)
    return "no difference shown" if compared and found.rows[number].role == "given" else ""


def _value(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return size_text(value)
    return f"{number_text(value)} {'mJ' if name.endswith('_mj') else 'ms'}"


def _notes(found: Bench, wide: dict[tuple[int, str], bool]) -> Iterator[str]:
    for number, row in enumerate(found.rows):
        if any(wide.get((number, name)) for name in ("token_ms", "sample_ms")):
            continue  # one over a figure that is none to go by
        yield f"throughput of {row.model} in {row.engine}, one at a time: {_throughput(row)}"
    if any(wide.values()):
        yield (
            "where the quartiles lie more than a quarter of the median apart, something else ran "
            "on this machine: measure again when it is quiet, or with more --rounds"
        )
    if not any("answer_mj" in row.figures for row in found.rows):
        yield "energy was not measured: this machine has no counter that may be read"
    yield from found.left_out


def _throughput(row: BenchRow) -> str:
    if "token_ms" in row.figures:
        return f"{number_text(1000 / row.figures['token_ms'].median)} tokens a second"
    return f"{number_text(1000 / row.figures['sample_ms'].median)} samples a second"

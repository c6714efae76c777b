"""Numbers as a person reads them: sizes, nats, shares, durations.

Takes values of `report_to_json`, where a number that was NaN or infinite is None.
"""

from __future__ import annotations

from math import floor, isfinite, log10
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

NOT_FINITE = "not finite"
# Said where the two are further apart than a prediction should be (`records.AGREES_WITHIN`).
DISAGREES = "prediction and measurement disagree"

# Of continuations: what it is called, its name in the record, and whether it is a share.
GENERATION_ROWS = (
    ("tokens alike before the first that differs, mean", "first_divergent_token", False),
    ("their median", "first_divergent_median", False),
    ("texts that never differ", "never_differs", True),
    ("positions with the same token", "equal_tokens", True),
    ("tokens before the end, original", "length_before", False),
    ("tokens before the end, compressed", "length_after", False),
    ("the same, change", "length_change", False),
    ("texts that ended, original", "ended_before", True),
    ("texts that ended, compressed", "ended_after", True),
    ("repeated runs of 4 tokens, original", "repetition_before", True),
    ("repeated runs of 4 tokens, compressed", "repetition_after", True),
    ("the same, change", "repetition_change", True),
)

PREDICTION_NOUNS = {"language": "token", "transcribe": "token"}


def size_text(n_bytes: int | float | None) -> str:
    """Decimal megabytes, as budgets are typed: 55,999,872 is "56.0 MB"."""
    if n_bytes is None:
        return NOT_FINITE
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # 0.9995: what would round to 1000 of the smaller unit is written as 1 of the larger.
        if abs(n_bytes) >= 0.9995 * step:
            value = n_bytes / step
            return f"{value:.0f} {unit}" if value >= 999.5 else f"{_significant(value, 3)} {unit}"
    return f"{n_bytes:.0f} bytes"


def number_text(value: int | float | None, digits: int = 3) -> str:
    """`digits` significant digits; plain between 0.0001 and a million, else with a power of ten."""
    if value is None or not isfinite(value):
        return NOT_FINITE
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        return _significant(value, digits)
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def nats_text(value: int | float | None) -> str:
    """A number with its unit; without one where there is no number."""
    text = number_text(value)
    return text if text == NOT_FINITE else f"{text} nats"


def short_text(value: int | float | None) -> str:
    """At most five characters from 0.00001 to 9999: ".0031", "4.2", "3e-5"."""
    if value is None or not isfinite(value):
        return "?"
    if value == 0:
        return "0"
    if abs(value) < 0.001:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    text = _significant(value, 2)
    return text.replace("0.0", ".0", 1)


def _significant(value: int | float, digits: int) -> str:
    # Round first, so that 0.9996 counts as 1.00 and not as 1.000.
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = floor(log10(abs(rounded))) if rounded else 0
    return f"{rounded:,.{max(0, digits - 1 - exponent)}f}"


def percent_text(share: int | float | None, digits: int = 3) -> str:
    """A share of 0 to 1 as "14.2%"; a small one is not rounded to nothing."""
    if share is None:
        return NOT_FINITE
    return "0%" if share == 0 else f"{number_text(share * 100, digits)}%"


def times_text(before: int | float, after: int | float) -> str:
    """Bytes before over bytes after as "4.8x smaller"; "1.2x larger" where it grew."""
    if before <= 0 or after <= 0:
        return "not comparable"
    if after > before:
        return f"{after / before:.1f}x larger"
    return f"{before / after:.1f}x smaller"


def duration_text(seconds: int | float | None) -> str:
    """Under a minute with a decimal where that matters, then minutes, then hours."""
    if seconds is None:
        return NOT_FINITE
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def interval_text(estimate: Mapping[str, Any], *, percent: bool = False) -> str:
    """The bounds of a 95% interval: "0.198 to 0.227"."""
    write = percent_text if percent else number_text
    return f"{write(estimate['low'])} to {write(estimate['high'])}"


def prediction_noun(task: str) -> str:
    """What one prediction of a task is called: "token" for text, else "prediction"."""
    return PREDICTION_NOUNS.get(task, "prediction")


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 unit", "211 units"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def value_text(value: Any) -> str:
    """A setting or fact as text: yes and no for bools, lists joined, whole numbers as they are."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        text = number_text(value, 6)
        # It was chosen, not measured: 1.50000 says no more than 1.5.
        return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text
    if isinstance(value, list):
        return ", ".join(value_text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {value_text(item)}" for key, item in value.items())
    return str(value)

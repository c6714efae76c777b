"""How far explanations moved: in words for a terminal; in maps and tinted text for the page."""

from __future__ import annotations

import base64
import json
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.text import Text

from attar.report.layout import plain_table
from attar.report.wording import number_text, percent_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import RenderableType

# Measure to what it is called, and what it is where nothing moved.
MEASURES = {
    "rank_correlation": "rank correlation",
    "top_agreement": "top tenth",
    "sign_agreement": "signs",
    "cosine": "cosine",
    "structural_similarity": "SSIM",
    "mass_moved": "mass moved",
}
ROLES = {
    "floor": "floor",
    "compressed": "this model",
    "reference": "reference",
    "ceiling": "ceiling",
}
# Rank correlation below which the floor is one in name only.
STEADY_FLOOR = 0.9
# Layers of which is told how their share of the relevance fell, and as many of which it rose.
UNITS_SHOWN = 3
# A share that moved by less is not worth a word; all stand in the JSON.
LEAST_MOVED = 0.001
STRONGEST = 3


def drift_parts(drift: Mapping[str, Any] | None) -> list[RenderableType]:
    """The table from floor to ceiling, and where the relevance of layers went."""
    if drift is None:
        return []
    present = [name for name in MEASURES if name in drift["rows"][0]["every"]]
    headers = ("Spearman", "95% interval", *(MEASURES[name] for name in present[1:]))
    tables = []
    for title, rows in drift_groups(drift):
        table = plain_table(title, *headers, right=headers)
        for row in rows:
            first, *others = (row["found"][name] for name in present)
            between = f"{first['low']:.3f} to {first['high']:.3f}"
            numbers = (f"{one['value']:.2f}" for one in others)
            table.add_row(ROLES[row["role"]], f"{first['value']:.3f}", between, *numbers)
        tables.append(table)
    names = "; ".join(f"{ROLES[row['role']]}: {row['model']}" for row in drift["rows"])
    return [
        Text(f"explanations: {drift['method']}"),
        *tables,
        Text(names),
        Text(f"{gap_text(drift)} {caution_text(drift)}".strip()),
        *(Text(line) for line in _moved_lines(drift["units"])),
        *(Text(line) for place in drift.get("concepts", ()) for line in concept_lines(place)),
        Text(""),
    ]


def concept_lines(place: Mapping[str, Any]) -> Iterator[str]:
    """What became of the concepts at one place: counts from floor to ceiling, and which."""
    counts = "; ".join(
        f"{ROLES[row['role']]} {row['n_lost']} lost, {row['n_merged']} merged, "
        f"{percent_text(row['kept'], 2)} kept"
        for row in place["rows"]
    )
    yield f"{place['n_concepts']} concepts of what enters {place['unit']}: {counts}"
    for one in (one for one in place["moved"] if one["lost"]):
        lost = f"; its {one['n_samples']} samples lost {number_text(one['divergence'])} nats"
        yield (
            f"  lost: {examples_text(one['shown'])}; strength {one['strength_ratio']:.2f} x, "
            f"{percent_text(one['kept'], 2)} of how it varies kept"
            f"{lost if one['divergence'] is not None else ''}"
        )
    for first, second in place["merged"]:
        yield f"  merged: {examples_text(first)} with {examples_text(second)}"


def examples_text(shown: Sequence[str]) -> str:
    """Where a concept is met most, quoted, so that words of one space are seen."""
    return ", ".join(json.dumps(one, ensure_ascii=False) for one in shown) or "nothing"


def drift_groups(
    drift: Mapping[str, Any],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Predictions that stayed and that changed, each with a row for each model."""
    same = "all predictions" if drift["n_changed"] is None else "same answer"
    for key, name in (("stayed", same), ("changed", "another answer")):
        count = drift[f"n_{key}"]
        if count:
            rows = [dict(row, found=row[key]) for row in drift["rows"]]
            yield f"{name}, {count:,}", rows


def gap_text(drift: Mapping[str, Any]) -> str:
    """How far the explanations are from what their definition promises."""
    return (
        "The parts of an explanation should sum to what the answer gains over the baseline; they "
        f"miss it by {percent_text(drift['completeness_gap'], 2)} of it, on average."
    )


def caution_text(drift: Mapping[str, Any]) -> str:
    """Say so where even the floor moved; "" where it did not."""
    floor = drift["rows"][0]["every"]["rank_correlation"]["value"]
    if floor >= STEADY_FLOOR:
        return ""
    return (
        f"Rounding to 8 bits alone leaves a rank correlation of {floor:.2f}: explanations of this "
        "model are brittle, and a loss of that size says little."
    )


def units_moved(units: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Those whose share fell most, and those whose share rose most, the most first."""
    moved = [one for one in units if abs(one["after"] - one["before"]) >= LEAST_MOVED]
    fell = [one for one in moved if one["after"] < one["before"]][:UNITS_SHOWN]
    rose = [one for one in reversed(moved) if one["after"] > one["before"]][:UNITS_SHOWN]
    return [fell, rose]


def _moved_lines(units: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for verb, chosen in zip(("fell", "rose"), units_moved(units), strict=True):
        if chosen:
            shares = "; ".join(
                f"{one['unit']} {percent_text(one['before'])} to {percent_text(one['after'])}"
                for one in chosen
            )
            yield f"share of relevance that {verb} most: {shares}"


def drift_page(drift: Mapping[str, Any] | None, folder: str = "") -> dict[str, Any] | None:
    """What the page shows of it; None where it was not asked for.

    Args:
        folder: Where the page lies, for lines to type; empty where that is not known.
    """
    if drift is None:
        return None
    fell, rose = units_moved(drift["units"])
    return {
        "facts": drift,
        "measures": {
            name: title for name, title in MEASURES.items() if name in drift["rows"][0]["every"]
        },
        "roles": ROLES,
        "groups": list(drift_groups(drift)),
        "gap": gap_text(drift),
        "caution": caution_text(drift),
        "units": [*fell, *reversed(rose)],
        "examples": examples_text,
        "folder": folder,
        "spare": partial(_spared, folder) if folder else lambda *_: "",
        "maps": [_map_pair(one) for one in drift["shown"] if not one["tokens"]],
        "texts": [_text_pair(one) for one in drift["shown"] if one["tokens"]],
    }


def _spared(folder: str, unit: str, one: Mapping[str, Any]) -> str:
    """What to protect, for the samples with a concept to lose half of what they lost."""
    nats = one.get("divergence")
    return f"concept={folder}:{unit}:{one['number']}:{nats / 2:.2g}" if nats else ""


def _map_pair(shown: Mapping[str, Any]) -> dict[str, Any]:
    """Two pictures on one scale."""
    sides = [shown["before"], shown["after"]]
    largest = max((abs(v) for side in sides for row in side for v in row), default=0.0)
    return dict(shown) | {
        "sides": [
            {
                "name": name,
                "data": _png(side, largest or 1.0),
                "says": _strongest_cell(side),
            }
            for name, side in zip(("original", "compressed"), sides, strict=True)
        ]
    }


def _png(rows: Sequence[Sequence[float]], largest: float) -> str:
    """A grey picture as a data address: light speaks for the answer, dark against it.

    Brightness follows the square root: differences among small values would else not be seen.
    """
    levels = bytes(
        round(127.5 + 127.5 * (1 if value > 0 else -1) * (abs(value) / largest) ** 0.5)
        for row in rows
        for value in row
    )
    written = BytesIO()
    Image.frombytes("L", (len(rows[0]), len(rows)), levels).save(written, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def _strongest_cell(rows: Sequence[Sequence[float]]) -> str:
    cells = [(abs(v), v, r, c) for r, row in enumerate(rows) for c, v in enumerate(row)]
    _, value, row, column = max(cells, key=lambda cell: cell[0])
    side = "for" if value >= 0 else "against"
    return (
        f"strongest in row {row + 1} of {len(rows)}, column {column + 1} of {len(rows[0])}: "
        f"{percent_text(abs(value), 2)}, {side} the answer"
    )


def _text_pair(shown: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens with a tint and an underline by the size of their share, both models on one scale."""
    sides = [shown["before"][0], shown["after"][0]]
    largest = max((abs(v) for side in sides for v in side), default=0.0) or 1.0
    return dict(shown) | {
        "sides": [
            {"name": name, "drawn": _drawn(shown["tokens"], side, largest)}
            | _strongest(shown, side)
            for name, side in zip(("original", "compressed"), sides, strict=True)
        ]
    }


def _drawn(tokens: Sequence[str], shares: Sequence[float], largest: float) -> list[dict[str, Any]]:
    return [
        {
            "text": token.replace("\n", "↵\n"),
            "share": share,
            "tint": round(70 * (abs(share) / largest) ** 0.5),
            "line": round(4 * (abs(share) / largest) ** 0.5),
            "against": share < 0,
        }
        for token, share in zip(tokens, shares, strict=True)
    ]


def _strongest(shown: Mapping[str, Any], shares: Sequence[float]) -> dict[str, Any]:
    order = sorted(range(len(shares)), key=lambda i: -abs(shares[i]))[:STRONGEST]
    return {"strongest": [{"text": shown["tokens"][i], "share": shares[i]} for i in order]}

"""The figure at the top of the page: bytes of every role, before at the left, after at the right.

Both sides share one scale, so the picture shrinks as the file did. Two widths are drawn and CSS
shows the one that fits: text in an SVG that shrinks to a phone cannot be read.
"""

from __future__ import annotations

from typing import Any

from attar.report.network import role_of, short_roles
from attar.report.wording import size_text

SHOWN = 9  # bands; more become thinner than their labels
LABEL_GAP = 17.0  # a line of text at 12.5 px


def bands(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, bytes before and after of each role over all layers, in order of first use."""
    size = facts["size"]
    if size["bytes_in_units"] is None or not facts["units"]:
        return [_band("the whole model", size["bytes_before"], size["bytes_after"], 0)]
    groups: dict[str, dict[str, Any]] = {}
    for unit in facts["units"]:
        group = groups.setdefault(role_of(unit), _band(role_of(unit), 0, 0, 0))
        group["before"] += unit["bytes_before"]
        group["after"] += unit["bytes_after"]
        group["weights"] += unit["n_weights"]
    short = short_roles(list(groups))
    found = [group | {"name": short[name]} for name, group in groups.items()]
    found = _fold(found)
    in_units = sum(group["before"] for group in found)
    outside = max(0, size["bytes_before"] - in_units)
    found.append(_band("not in units", outside, size["bytes_outside_units"], 0))
    return found


def _band(name: str, before: int, after: int, weights: int) -> dict[str, Any]:
    return {"name": name, "before": before, "after": after, "weights": weights}


def _fold(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the largest; sum the others."""
    ranked = sorted(groups, key=lambda group: -group["before"])
    if len(groups) <= SHOWN:
        return groups
    kept, rest = ranked[: SHOWN - 1], ranked[SHOWN - 1 :]
    other = _band(f"{len(rest)} smaller roles", 0, 0, 0)
    for group in rest:
        for key in ("before", "after", "weights"):
            other[key] += group[key]
    return [*(group for group in groups if group in kept), other]


def draw_flow(facts: dict[str, Any], width: int, margins: tuple[int, int]) -> dict[str, Any]:
    """Coordinates of the figure: `width` of the drawing, `margins` for the labels at its sides."""
    found = bands(facts)
    before = sum(band["before"] for band in found) or 1
    after = sum(band["after"] for band in found) or 1
    height = max(240.0, LABEL_GAP * len(found) + 60)
    per_byte = height / max(before, after)
    left, right = float(margins[0]), float(width - margins[1])
    top, bottom = (height - before * per_byte) / 2, (height - after * per_byte) / 2
    for band in found:
        band["left"] = top + band["before"] * per_byte / 2
        band["right"] = bottom + band["after"] * per_byte / 2
        band["path"] = _ribbon(
            (left, top, band["before"] * per_byte), (right, bottom, band["after"] * per_byte)
        )
        top += band["before"] * per_byte
        bottom += band["after"] * per_byte
        band["before_text"] = size_text(band["before"])
        band["after_text"] = size_text(band["after"])
        bits = band["after"] * 8 / band["weights"] if band["weights"] else None
        band["bits_text"] = "" if bits is None else f"{bits:.1f} bits"
    for side in ("left", "right"):
        places = spread([band[side] for band in found], LABEL_GAP, 8.0, height - 8.0)
        for band, place in zip(found, places, strict=True):
            band[f"{side}_label"] = place
    return {
        "bands": found,
        "width": width,
        "height": height,
        "left": left,
        "right": right,
        "wide": width > 500,
    }


def _ribbon(start: tuple[float, float, float], end: tuple[float, float, float]) -> str:
    """An SVG path between two upright edges, each (x, top, height)."""
    (x0, y0, h0), (x1, y1, h1) = start, end
    middle = (x0 + x1) / 2
    return (
        f"M{x0:.1f} {y0:.2f}C{middle:.1f} {y0:.2f} {middle:.1f} {y1:.2f} {x1:.1f} {y1:.2f}"
        f"L{x1:.1f} {y1 + h1:.2f}C{middle:.1f} {y1 + h1:.2f} {middle:.1f} {y0 + h0:.2f}"
        f" {x0:.1f} {y0 + h0:.2f}Z"
    )


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least `gap` apart, in order, near the wanted ones, between `low` and `high`.

    Where they do not all fit, the last ones pass `high` rather than overlap.
    """
    # Labels that would overlap form a cluster, centred on the mean of the places they want.
    clusters: list[tuple[float, int]] = []
    for place in wanted:
        centre, count = place, 1
        while clusters and centre - gap * (count - 1) / 2 < _end(clusters[-1], gap) + gap:
            other, more = clusters.pop()
            centre, count = (centre * count + other * more) / (count + more), count + more
        clusters.append((centre, count))
    places = [c + gap * (i - (n - 1) / 2) for c, n in clusters for i in range(n)]
    limit = high
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    for index, place in enumerate(places):
        places[index] = max(place, low + index * gap)
    return places


def _end(cluster: tuple[float, int], gap: float) -> float:
    centre, count = cluster
    return centre + gap * (count - 1) / 2

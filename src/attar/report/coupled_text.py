"""What can only be cut together, for a terminal and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from attar.report.layout import bullet, plain_table, render
from attar.report.record import clean_text
from attar.report.wording import plural, size_text

if TYPE_CHECKING:
    from attar.coupling import CoupledGroup, CoupledUnits

FLOAT16_BYTES = 2


def coupled_to_text(found: CoupledUnits, width: int = 100, colour: bool = False) -> str:
    """List the groups with what goes of each, and what must stay with the reason."""
    n_units = sum(group.units for group in found.groups)
    said = f"{plural(len(found.groups), 'group')}, {plural(n_units, 'coupled unit')}"
    parts: list[Any] = [Text(f"what can only be cut together: {said}", "bold")]
    table = plain_table("group", "units", "kind", "bytes each", "go with one", right=("units",))
    for group in found.groups:
        table.add_row(
            clean_text(group.name),
            str(group.units),
            group.kind,
            size_text(group.weights * FLOAT16_BYTES),
            clean_text(_members(group)),
        )
    if found.groups:
        parts.append(table)
    parts.append(Text("must stay:" if found.pinned else "nothing must stay", "bold"))
    parts += [bullet(f"{clean_text(name)}:", clean_text(why)) for name, why in found.pinned.items()]
    return render(parts, width, colour)


def _members(group: CoupledGroup) -> str:
    """Name what goes, and why it belongs together; biases and norms go with their rows unsaid."""
    weights = [one for one in group.members if one.parameter.endswith("weight")]
    places = [one.parameter.rpartition(".")[0] for one in weights]
    shared = places[0] if places else ""
    while shared and not all(place.startswith(shared + ".") for place in places):
        shared = shared.rpartition(".")[0]
    short = [place.removeprefix(shared + ".") for place in places]
    if all(place[:1].isalpha() for place in short):  # a number alone says nothing
        places = short
    said: dict[str, None] = {}
    for member, place in zip(weights, places, strict=True):
        number = member.indices.shape[1]
        said[f"{plural(number, 'column' if member.reads else 'row')} of {place}"] = None
    reasons = f" ({', '.join(group.reasons)})" if group.reasons else ""
    return ", ".join(said) + reasons


def coupled_to_json(found: CoupledUnits) -> dict[str, Any]:
    """Everything a program needs to name what is to be cut."""
    groups = {
        group.name: {
            "kind": group.kind,
            "units": group.units,
            "weights_each": group.weights,
            "reasons": list(group.reasons),
            "members": [
                {
                    "parameter": member.parameter,
                    "dimension": member.dim,
                    "reads": member.reads,
                    "indices": member.indices.tolist(),
                }
                for member in group.members
            ],
        }
        for group in found.groups
    }
    return {"groups": groups, "pinned": dict(found.pinned)}

"""What can only be cut together, for a terminal and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.text import Text

from attar.report.layout import bullet, plain_table, render
from attar.report.record import clean_text
from attar.report.wording import number_text, percent_text, plural, size_text

if TYPE_CHECKING:
    from rich.table import Table

    from attar.coupling import CoupledGroup, CoupledUnits, CutTrial

FLOAT16_BYTES = 2


def coupled_to_text(
    found: CoupledUnits, trial: CutTrial | None = None, width: int = 100, colour: bool = False
) -> str:
    """List the groups with what goes of each, and what must stay with the reason.

    Args:
        trial: What cutting a share of each costs; takes the place of what goes.
    """
    n_units = sum(group.units for group in found.groups)
    said = f"{plural(len(found.groups), 'group')}, {plural(n_units, 'coupled unit')}"
    parts: list[Any] = [Text(f"what can only be cut together: {said}", "bold")]
    if found.groups:
        parts.append(_groups_table(found) if trial is None else _trial_table(found, trial))
    if trial is not None:
        parts += [Text(_trial_line(trial)), Text("")]
    parts.append(Text("must stay:" if found.pinned else "nothing must stay", "bold"))
    parts += [bullet(f"{clean_text(name)}:", clean_text(why)) for name, why in found.pinned.items()]
    return render(parts, width, colour)


def _groups_table(found: CoupledUnits) -> Table:
    table = plain_table("group", "units", "kind", "bytes each", "go with one", right=("units",))
    for group in found.groups:
        table.add_row(
            clean_text(group.name),
            str(group.units),
            group.kind,
            size_text(group.weights * FLOAT16_BYTES),
            clean_text(_members(group)),
        )
    return table


def _trial_table(found: CoupledUnits, trial: CutTrial) -> Table:
    numbers = ("units", "cut", "nats", "without fit")
    table = plain_table("group", "kind", *numbers, "bytes gone", right=numbers)
    for group in found.groups:
        price, cells = trial.prices.get(group.name), ["0", "-", "-", "-"]
        if price is not None:
            gone = size_text(price.weights * FLOAT16_BYTES)
            nats = [number_text(one, 2) for one in (price.refitted, price.plain)]
            cells = [str(len(price.units)), *nats, gone]
        table.add_row(clean_text(group.name), group.kind, str(group.units), *cells)
    return table


def _trial_line(trial: CutTrial) -> str:
    """What all of it at once costs; the nats of the table are of each group alone."""
    return (
        f"all at once: {percent_text(trial.weights / trial.of_weights)} of the parameters go; "
        f"{number_text(trial.predicted, 2)} nats per prediction predicted, "
        f"{number_text(trial.measured, 2)} measured with a network that was cut, "
        f"{number_text(trial.measured_plain, 2)} without fitting the rest again."
    )


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


def coupled_to_json(found: CoupledUnits, trial: CutTrial | None = None) -> dict[str, Any]:
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
    facts: dict[str, Any] = {"groups": groups, "pinned": dict(found.pinned)}
    if trial is not None:
        facts["trial"] = asdict(trial)
    return facts

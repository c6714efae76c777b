"""Look a method up in the table of its kind, by the name that was typed or stands in a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attar.errors import SettingError


def check_name(table: Iterable[str], noun: str, name: str) -> None:
    """Refuse a name that is not in a table.

    Args:
        noun: What the table holds, for people: "treatment".

    Raises:
        SettingError: With the names that are.
    """
    if name not in table:
        raise SettingError(f"there is no {noun} {name!r}.", hint=f"use one of {', '.join(table)}.")


def build(
    table: Mapping[str, type[Any]], noun: str, name: str, settings: Mapping[str, object]
) -> Any:
    """Build a method, a dataclass of its settings, from its name and settings.

    Raises:
        SettingError: The name is not in the table, or a setting is not one of the method's.
    """
    check_name(table, noun, name)
    kind = table[name]
    try:
        return kind(**settings)
    except TypeError as error:
        allowed = ", ".join(kind.__dataclass_fields__)
        raise SettingError(
            f"{name} has no such setting: {', '.join(settings)}.",
            hint=f"its settings are {allowed}.",
        ) from error

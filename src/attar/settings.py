"""Checks of a method's settings, when it is built: plans are edited by hand."""

from typing import Any

from attar.errors import SettingError

WIDTHS = range(2, 9)
WIDTHS_AND_FLOAT = (*WIDTHS, 16)


def check_choice(
    method: str, name: str, value: Any, allowed: range | tuple[int, ...], suggestion: int
) -> None:
    """Raise SettingError unless `value` is one of the whole numbers allowed."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        choices = ", ".join(str(choice) for choice in allowed)
        raise SettingError(
            f"{name} is {value!r}, but {method} takes one of {choices}.",
            hint=f"set {name} to {suggestion}.",
        )


def check_group_size(method: str, value: Any) -> None:
    """Raise SettingError unless `value` is a whole number, 0 (the whole row) or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SettingError(
            f"group_size is {value!r}, but {method} takes a whole number of columns.",
            hint="set group_size to 64, or to 0 for one scale per row.",
        )


def check_flag(method: str, name: str, value: Any) -> None:
    """Raise SettingError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise SettingError(
            f"{name} is {value!r}, but {method} takes true or false.",
            hint=f"set {name} to true or false.",
        )


def check_fraction(method: str, name: str, value: Any) -> None:
    """Raise SettingError unless `value` lies strictly between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise SettingError(
            f"{name} is {value!r}, but {method} takes a fraction between 0 and 1.",
            hint=f"set {name} to 0.5.",
        )


def check_between(method: str, name: str, value: Any, low: int, high: int, suggestion: int) -> None:
    """Raise SettingError unless `value` is a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise SettingError(
            f"{name} is {value!r}, but {method} takes a number from {low} to {high}.",
            hint=f"set {name} to {suggestion}.",
        )

"""Sizes as people write them: `60MB`, `64MiB`, `25%`, `3.1bits`."""

import math
import re

from attar.errors import BudgetError, SettingError
from attar.records import Budget

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(%|[a-z]+)?\s*", re.IGNORECASE)
_HINT = "write a size such as 60MB, 64MiB, 25% (of the 16-bit size) or 3.1bits (per parameter)."


def parse_size(text: str, *, bytes_at_16_bits: int, n_parameters: int) -> int:
    """Read a size as bytes of the whole written model folder.

    Args:
        bytes_at_16_bits: What `25%` is a share of.
        n_parameters: What `3.1bits` is multiplied with.

    Raises:
        BudgetError: The text is not a size, or is zero.
    """
    found = _PATTERN.fullmatch(text)
    if found is None:
        raise BudgetError(f"cannot read the size {text!r}.", hint=_HINT)
    number, unit = float(found[1]), (found[2] or "b").lower()
    if unit == "%":
        size = bytes_at_16_bits * number / 100
    elif unit in ("bit", "bits"):
        size = n_parameters * number / 8  # bits in a byte
    elif unit in _UNITS:
        size = number * _UNITS[unit]
    else:
        raise BudgetError(f"cannot read the unit {found[2]!r} of the size {text!r}.", hint=_HINT)
    if not math.isfinite(size):
        raise BudgetError(f"the size {text!r} is not a number of bytes.", hint=_HINT)
    if int(size) < 1:
        raise BudgetError(f"the size {text!r} is no bytes at all.", hint=_HINT)
    return int(size)


def parse_share(text: str) -> float:
    """Read a share above 0 and below 1, as `10%`.

    Raises:
        SettingError: The text is no such share.
    """
    found = _PATTERN.fullmatch(text)
    share = float(found[1]) / 100 if found is not None and found[2] == "%" else 0.0
    if not 0 < share < 1:
        raise SettingError(
            f"{text!r} is no share between 0% and 100%.", hint="write a share such as 10%."
        )
    return share


def check_fits(least: int, budget: Budget) -> None:
    """Refuse a budget that the smallest model is over.

    Args:
        least: Bytes of the whole folder of that model.

    Raises:
        BudgetError: With a size that can be had.
    """
    if least > budget.weight_bytes:
        raise BudgetError(
            f"no plan fits {budget.weight_bytes:,} bytes; the smallest model that can be written "
            f"needs {least:,}.",
            hint=f"ask for --size {-(-least // 1000)}kB or more"
            + (", or --keep fewer units." if budget.keep else "."),
        )

"""Read how long a compressed model may learn, as people write it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from attar.errors import SettingError

METHODS = ("distill",)
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
WISH = re.compile(r"(?P<method>\w+)=(?P<amount>\d+(?:\.\d+)?)\s*(?P<unit>\w+)")


@dataclass(frozen=True)
class Wish:
    """How to heal, and for how long.

    Attributes:
        seconds: None where steps are named.
        steps: None where a time is named.
    """

    method: str
    seconds: float | None = None
    steps: int | None = None


def parse_wish(text: str) -> Wish | None:
    """Read "distill=10min" or "distill=300steps"; None for "none".

    Raises:
        SettingError: It reads otherwise.
    """
    if text == "none":
        return None
    found = WISH.fullmatch(text)
    if found and found["method"] in METHODS and float(found["amount"]) > 0:
        amount, unit = float(found["amount"]), found["unit"]
        if unit in SECONDS:
            return Wish(found["method"], seconds=amount * SECONDS[unit])
        if unit in ("step", "steps") and amount == int(amount):
            return Wish(found["method"], steps=int(amount))
    raise SettingError(
        f"--heal cannot be {text!r}.",
        hint=f"use --heal none, --heal {METHODS[0]}=10min or --heal {METHODS[0]}=300steps.",
    )

"""Energy from the processor's own counters (RAPL), where the system lets them be read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

COUNTERS = Path("/sys/class/powercap")


def read_counters(folder: Path = COUNTERS) -> dict[str, tuple[int, int]]:
    """Microjoules so far and where the count begins anew, of each package; none where unreadable.

    Only whole packages (`intel-rapl:0`): cores and memory controllers in them are counted there.
    """
    found = {}
    for place in sorted(folder.glob("intel-rapl:*")):
        if place.name.count(":") != 1:
            continue
        try:
            found[place.name] = (
                int((place / "energy_uj").read_text()),
                int((place / "max_energy_range_uj").read_text()),
            )
        except (OSError, ValueError):  # the count is for root alone on many systems
            continue
    return found


def between(
    before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]
) -> float | None:
    """Millijoules that all packages took, whoever used them; None without counters.

    A count that went back began anew once.
    """
    if not before or before.keys() != after.keys():
        return None
    microjoules = 0
    for name, (start, most) in before.items():
        end = after[name][0]
        microjoules += end - start if end >= start else end + most - start
    return microjoules / 1000

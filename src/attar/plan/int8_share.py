"""Which tensors are rounded to 8 bits, and which are too dear: those stay floats."""

from __future__ import annotations

from collections.abc import Mapping, Set

from attar.records import PricedActivation

# At least this share of the multiplications that could be done in integers is.
LEAST_SHARE = 0.9
# A tensor is worth a float only if it causes this share of all damage that rounding does.
DEAR = 0.01

Key = tuple[str, str]
"""See `explain.activation_price`: ("input", first reader) or ("output", maker)."""


def choose_rounded(
    priced: Mapping[Key, PricedActivation],
    macs: Mapping[str, int],
    read_by: Mapping[str, Set[str]],
) -> set[Key]:
    """Choose the tensors to round.

    The dearest are left out, one after the other, as long as enough is multiplied in integers.

    Args:
        priced: Every tensor that may be rounded.
        macs: Of every unit.
        read_by: Units whose product must be rounded by all that read it, or it is made in floats.
    """
    kept = _of_use(set(priced), priced, read_by)
    all_macs = sum(macs.values()) or 1
    for key in sorted(priced, key=lambda key: (-priced[key].damage, key)):
        if key not in kept or priced[key].damage < DEAR * sum(priced[k].damage for k in kept):
            continue
        left = _of_use(kept - {key}, priced, read_by)
        if sum(macs[name] for name in in_integers(left, priced, read_by)) >= LEAST_SHARE * all_macs:
            kept = left
    return kept


def in_integers(
    kept: Set[Key], priced: Mapping[Key, PricedActivation], read_by: Mapping[str, Set[str]]
) -> set[str]:
    """Units that an engine multiplies in integers when these tensors are rounded."""
    rounded = {name for key in kept if key[0] == "input" for name in priced[key].units}
    return {
        name
        for name in rounded
        if ("output", name) in kept
        or (("output", name) not in priced and read_by.get(name, frozenset()) <= rounded)
    }


def _of_use(
    kept: set[Key], priced: Mapping[Key, PricedActivation], read_by: Mapping[str, Set[str]]
) -> set[Key]:
    """Leave out what is rounded for no unit that multiplies in integers."""
    while True:
        done = in_integers(kept, priced, read_by)
        useful = {key for key in kept if done.intersection(priced[key].units)}
        if useful == kept:
            return kept
        kept = useful

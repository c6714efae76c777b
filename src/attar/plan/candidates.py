"""Unit × treatment: what may be done to each weight, at what price, or why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from attar.errors import AttarError, PlanError
from attar.parallel import Work
from attar.records import Candidate, Cost, Progress, Transform, Unit, Units

Treatment = tuple[str, Mapping[str, Any]]
Build = Callable[[str, Mapping[str, Any]], Transform]
Price = Callable[[Unit, Sequence[tuple[str, Transform]]], Iterable[float | AttarError]]
GROUP_SIZES = (32, 64, 128)
# Widths that a plan mixes where a bit can be cut in parts.
AVERAGE_BITS = (1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7)
FIXED_BITS = (4, 8)
# Types of llama.cpp: those that want rows of whole blocks of 256, and those of 32.
LLAMA_TYPES = (
    *("IQ2_S", "Q2_K", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
)
LOW_RANK = 4
# Bits of each number in a factor, and how many two factors take for each weight: with more bits,
# integers lose less.
FACTOR_BITS = 2.75
FACTORED_BITS = (0.5, 1, 1.5, 2)
# A table's rank pays at more, because few of its rows are read often.
FACTORED_BITS_OF_TABLE = (*FACTORED_BITS, 2.5)
# A weight with more numbers than this is not factorized by default: that needs all rows at once,
# and a few hundred megabytes in double precision.
LARGEST_FACTORED = 1 << 24
KEEP: Treatment = ("keep_float", {"bits": 16})
# What engines multiply in integers: one scale for each output channel, no zero point.
INT8: Treatment = ("quantize_feedback", {"bits": 8, "group_size": 0, "symmetric": True})
# Columns from which one range for a whole row is too coarse to be worth pricing.
LONG_ROW = 512
# A weight with more numbers than this is priced with one group size only.
LARGE_WEIGHT = 4_000_000


def menu(unit: Unit, build: Build, *, by_worth: bool) -> list[Treatment]:
    """List the treatments worth pricing for a unit: rounding, zeroing, and leaving it in 16 bits.

    Where codes can be range coded, codes of a fixed width hardly ever are the better choice, and
    zeroing never is: at equal bytes it loses two to seven times as much.

    Args:
        by_worth: See `QuantizeEntropy`: whether what rows and columns are worth is known well.
    """
    coded: list[Treatment] = [
        ("quantize_entropy", {"bits": bits, "by_worth": by_worth}) for bits in AVERAGE_BITS
    ]
    if build(*coded[0]).rejects(unit) is None:
        size = group_sizes(unit.columns)[-1]
        fixed: list[Treatment] = [
            ("quantize_feedback", {"bits": bits, "group_size": size}) for bits in FIXED_BITS
        ]
        return [*coded, *fixed, *_factored(unit, build), KEEP]
    sizes = group_sizes(unit.columns)
    if unit.n_weights > LARGE_WEIGHT:  # one setting of such a weight takes seconds
        sizes = sizes[-1:]
    quantized: list[Treatment] = [
        ("quantize_feedback", {"bits": bits, "group_size": size})
        for size in sizes  # neighbours of one size are rounded together
        for bits in ((2, 3, 4, 5, 6, 8) if size == sizes[-1] else (2, 3, 4))
    ]
    return [*quantized, *_corrected(unit, sizes[-1], build), *_zeroed(unit), KEEP]


def _corrected(unit: Unit, size: int, build: Build) -> list[Treatment]:
    """Few bits with a correction of low rank, where that is smaller than the weight."""
    corrected: list[Treatment] = [
        ("quantize_low_rank", {"bits": bits, "group_size": size, "rank": LOW_RANK})
        for bits in (3, 4)
    ]
    return [one for one in corrected if build(*one).rejects(unit) is None]


def _factored(unit: Unit, build: Build) -> list[Treatment]:
    """Two thin factors in place of a weight, of ranks that make them so small."""
    if unit.n_weights > LARGEST_FACTORED:
        return []
    per_rank = FACTOR_BITS * (unit.rows + unit.columns)
    sizes = FACTORED_BITS_OF_TABLE if unit.kind == "embedding" else FACTORED_BITS
    ranks = [max(1, int(bits * unit.n_weights / per_rank)) for bits in sizes]
    factored: list[Treatment] = [
        ("factorize_low_rank", {"rank": rank, "bits": FACTOR_BITS}) for rank in ranks
    ]
    return [one for one in factored if build(*one).rejects(unit) is None]


def llama_menu(unit: Unit, build: Build) -> list[Treatment]:
    """List the types that llama.cpp can run this unit in; those that do not fit are left out."""
    types: list[Treatment] = [("quantize_llama", {"type": name}) for name in LLAMA_TYPES]
    return [*(t for t in types if build(*t).rejects(unit) is None), KEEP]


def onnx_menu(unit: Unit, *, in_integers: bool) -> list[Treatment]:
    """List what onnxruntime runs this unit in: 4 bits in blocks, 8 bits for each row, floats.

    Args:
        in_integers: Whether its input is rounded to 8 bits. Then floats are no choice: they would
            take bytes to undo what was asked for.
    """
    few: list[Treatment] = [
        ("quantize_feedback", {"bits": 4, "group_size": size}) for size in group_sizes(unit.columns)
    ]
    return [*few, INT8, *([] if in_integers else [KEEP])]


def _zeroed(unit: Unit) -> list[Treatment]:
    """Zeroing with what is kept in few bits; a pattern needs rows of whole blocks of four."""
    treatments: list[Treatment] = [("zero_unstructured", {"kept_fraction": 0.5, "bits": 4})]
    if unit.columns % 4 == 0:
        treatments.append(("zero_n_m", {"n_kept": 2, "m": 4, "bits": 4}))
    return treatments


def group_sizes(columns: int) -> tuple[int, ...]:
    """Sizes that divide a row, finest first; 0 is the whole row."""
    sizes = [size for size in GROUP_SIZES if columns % size == 0 and size < columns]
    if not sizes and columns > max(GROUP_SIZES):
        sizes = [size for size in range(24, 97) if columns % size == 0][-1:]
    if columns > LONG_ROW and sizes and sizes[-1] == min(GROUP_SIZES):
        # Small groups alone would leave the scales of a long row too many bytes.
        sizes += [size for size in range(65, 129) if columns % size == 0][-1:]
    if columns <= LONG_ROW or not sizes:
        sizes.append(0)
    return tuple(sizes)


def check_keep(units: Units, keep: Sequence[str]) -> None:
    """Refuse a pin that matches no unit.

    Raises:
        PlanError: With the nearest names.
    """
    names = [name for unit in units for name in (unit.name, *unit.coupled)]
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise PlanError(
                f"no unit is called {pattern!r}.",
                hint=f"pin one of {', '.join(near or names[:3])}, or a pattern such as '*.v_proj'.",
            )


def is_kept(unit: Unit, keep: Sequence[str]) -> bool:
    """Say whether a pin names the unit or one tied to it."""
    return any(fnmatchcase(name, p) for name in (unit.name, *unit.coupled) for p in keep)


def pinned(
    candidates: Mapping[str, Sequence[Candidate]], units: Units, keep: Sequence[str]
) -> dict[str, Sequence[Candidate]]:
    """Leave units that a pin names nothing but their 16 bits.

    Raises:
        PlanError: A pin names no unit, or one whose 16 bits were not priced.
    """
    check_keep(units, keep)
    found = dict(candidates)
    for unit in units:
        if is_kept(unit, keep):
            found[unit.name] = [
                c
                for c in candidates[unit.name]
                if (c.treatment, dict(c.settings)) == KEEP and c.predicted_damage is not None
            ]
            if not found[unit.name]:
                raise PlanError(
                    f"{unit.name!r} was not priced in 16 bits, so it cannot be kept in them.",
                    hint=f"price again, with attar compress MODEL --keep {unit.name}",
                )
    return found


def price_candidates(
    units: Units,
    treatments: Mapping[str, Sequence[Treatment]],
    *,
    build: Build,
    price: Callable[[Unit], Price],
    for_each: Callable[[Callable[[Unit], Work[list[Candidate]]]], Iterable[list[Candidate]]],
    progress: Progress,
) -> dict[str, list[Candidate]]:
    """Try every treatment on every unit and price the change it makes.

    Args:
        price: Of a unit, what gives nats per prediction of each treatment, or why its values do
            not allow it.
        for_each: Does a piece of work for every unit, in order; may do several at once.
    """

    def price_one(unit: Unit) -> Work[list[Candidate]]:
        return partial(price_unit, unit, treatments[unit.name], build, price(unit))

    candidates: dict[str, list[Candidate]] = {}
    work = {unit.name: unit.n_weights * len(treatments[unit.name]) for unit in units}
    with progress.stage("price", sum(work.values())) as advance:
        for unit, priced in zip(units, for_each(price_one), strict=True):
            candidates[unit.name] = priced
            advance(work[unit.name])
    return candidates


def price_unit(
    unit: Unit,
    treatments: Sequence[Treatment],
    build: Build,
    price: Price,
) -> list[Candidate]:
    """Price all treatments of one unit."""
    built = [(t, build(*t)) for t in treatments]
    candidates = [
        Candidate(unit.name, *t, Cost(0, unit.macs), None, reason)
        for t, transform in built
        if (reason := transform.rejects(unit))
    ]
    allowed = [(t, transform) for t, transform in built if not transform.rejects(unit)]
    prices = price(unit, [(name, transform) for (name, _), transform in allowed])
    for (t, transform), nats in zip(allowed, prices, strict=True):
        cost = transform.cost(unit)
        candidates.append(
            Candidate(unit.name, *t, cost, None, nats.problem)
            if isinstance(nats, AttarError)
            else Candidate(unit.name, *t, cost, max(0.0, nats))
        )
    return candidates


def refusals(candidates: Mapping[str, Sequence[Candidate]]) -> tuple[str, ...]:
    """One line for each reason a treatment was refused, with how many units it was refused for."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, options in candidates.items():
        for option in options:
            if option.refused is not None:
                reasons.setdefault((option.treatment, option.refused), []).append(name)
    return tuple(
        f"{treatment} refused for {len(names)} unit(s) such as {names[0]}: it {reason}"
        for (treatment, reason), names in reasons.items()
    )

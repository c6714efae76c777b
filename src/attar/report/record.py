"""One JSON, the source of all: the page and the terminal show only what stands here.

Floats are rounded to six significant digits. A NaN or an infinity becomes null, and its path is
listed under `not_finite`, so that the file is valid JSON and the fact is not lost.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from attar.records import AGREES_WITHIN
from attar.report.cuts import cuts_to_json, left_to_json
from attar.report.sizes import sizes_to_json
from attar.report.wording import size_text, times_text

if TYPE_CHECKING:
    from attar.records import (
        Applied,
        Candidate,
        Estimate,
        GroupClaim,
        Leftover,
        Plan,
        Report,
        Responsible,
        Scores,
        Unit,
        Verdict,
    )

FORMAT_VERSION = 1
DIGITS = 6
# They turn the rest of a line around, so that a name reads as another one.
BIDI_OVERRIDES = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
BYTES_BEFORE = 2  # sizes "before" are at 16 bits a weight


def report_to_json(report: Report) -> dict[str, Any]:
    """Every fact of a report, JSON-ready, keys in a fixed order.

    Per-channel scores are summarised (lowest, median, highest): an embedding has 49,152 of them.
    Control characters in names and texts are replaced: a model file is not trusted.
    """
    units = units_to_json(report)
    facts = {
        "format": "attar report",
        "format_version": FORMAT_VERSION,
        "summary": _summary(report),
        "model": {
            "name": report.model,
            "origin": report.origin,
            "licence": report.licence,
            "task": report.task,
            "units": len(report.units),
            "weights_in_units": sum(unit.n_weights for unit in report.units),
        },
        "size": _size(report, units),
        "verdict": verdict_to_json(report.verdict),
        "plan": plan_to_json(report.plan),
        "cuts": cuts_to_json(report),
        "worth": _worth(report.scores),
        "units": units,
        "treatments": _treatments(units),
        "frontier": sizes_to_json(
            report.frontier,
            treatment_label,
            {unit.name: unit.n_weights for unit in report.units},
        ),
        "slices": sorted(label for label in report.slice_relevance if label),
        "leftovers": _leftovers(report.receipt.leftovers),
        "seconds": dict(report.seconds),
        "seconds_total": sum(report.seconds.values()),
        "memory": {
            "peak_bytes": report.peak_memory_bytes,
            "forecast_bytes": report.forecast_memory_bytes,
        },
        "provenance": {key: report.provenance[key] for key in sorted(report.provenance)},
    }
    not_finite: list[str] = []
    clean: dict[str, Any] = jsonable(facts, "", not_finite)
    clean["not_finite"] = not_finite
    return clean


def jsonable(value: Any, path: str, not_finite: list[str]) -> Any:
    """A copy in plain JSON types; adds the path of each NaN or infinity to `not_finite`."""
    if isinstance(value, Mapping):
        return {
            clean_text(str(key)): jsonable(item, f"{path}.{key}".lstrip("."), not_finite)
            for key, item in value.items()
        }
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Sequence | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [jsonable(item, f"{path}.{i}", not_finite) for i, item in enumerate(items)]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            not_finite.append(clean_text(path))
            return None
        return float(f"{value:.{DIGITS - 1}e}")
    return clean_text(str(value))


def clean_text(text: str) -> str:
    """Text without control characters: an escape sequence could repaint a terminal."""
    whole = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be written
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if letter in BIDI_OVERRIDES
        or (unicodedata.category(letter) == "Cc" and letter not in "\n\t")
        else letter
        for letter in whole
    )


def _summary(report: Report) -> str:
    if not report.plan.choices:
        return (
            f"{report.model} was compared with its compressed form; Attar changed nothing itself."
        )
    before, after = report.bytes_before, report.bytes_after
    return (
        f"{report.model} weighs {size_text(after)} instead of {size_text(before)} in 16 bits: "
        f"{times_text(before, after)}."
    )


def _size(report: Report, units: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = sum(unit["n_weights"] for unit in units)
    done = bool(report.plan.choices or report.receipt.applied)
    in_units = sum(unit["bytes_after"] for unit in units) if done else 0
    budget = report.plan.budget.weight_bytes if report.plan.choices else None
    return {
        "bytes_before": report.bytes_before,
        "source_bytes": report.source_bytes,
        "bytes_after": report.bytes_after,
        "smaller": times_text(report.bytes_before, report.bytes_after),
        "smaller_than_source": times_text(report.source_bytes, report.bytes_after),
        "budget_bytes": budget,
        "budget_used": report.bytes_after / budget if budget else None,
        "bytes_in_units": in_units if done else None,
        "bytes_outside_units": max(0, report.bytes_after - in_units) if done else None,
        # Every file the model needs, over every weight it had: nothing is left out of the count.
        "bits_per_weight": report.bytes_after * 8 / (report.bytes_before / BYTES_BEFORE)
        if report.bytes_before
        else None,
        "bits_per_weight_in_units": in_units * 8 / numbers if numbers and in_units else None,
        "folder": None if report.folder is None else str(report.folder),
    }


def verdict_to_json(verdict: Verdict) -> dict[str, Any]:
    """The verdict; `predicted_over_measured` is 1 where the prediction was right."""
    measured = verdict.divergence.value
    entropy = verdict.original_entropy
    ratio = _ratio(verdict.predicted_damage, measured)
    return {
        "outcome": verdict.outcome,
        "reasons": list(verdict.reasons),
        "n_predictions": verdict.n_predictions,
        "n_samples": verdict.n_samples,
        "divergence": asdict(verdict.divergence),
        "divergence_median": verdict.divergence_median,
        "divergence_p95": verdict.divergence_p95,
        "divergence_p99": verdict.divergence_p99,
        "jensen_shannon": _estimate(verdict.jensen_shannon),
        "predicted_damage": verdict.predicted_damage,
        "predicted_over_measured": ratio,
        "prediction_agrees": None if not ratio else abs(math.log(ratio)) <= math.log(AGREES_WITHIN),
        "flips": _estimate(verdict.flips),
        "perplexity_ratio": _estimate(verdict.perplexity_ratio),
        "cosine": _estimate(verdict.cosine),
        "original_entropy": entropy,
        # exp(-divergence): the geometric mean, over the original's own answers, of the probability
        # the compressed model gives them over the probability the original gave them.
        "probability_kept": math.exp(-measured) if entropy is not None else None,
        "divergence_over_entropy": None if entropy is None else _ratio(measured, entropy),
        "truth": None if verdict.truth is None else asdict(verdict.truth),
        "checks": [asdict(one) for one in verdict.checks],
        "responsible": [asdict(one) for one in verdict.responsible],
        "treatments_responsible": _by_treatment(verdict.responsible),
        "rollbacks": [asdict(one) for one in verdict.rollbacks],
        "unattributed": verdict.unattributed,
        **_in_use(verdict),
        "drift": None if verdict.drift is None else asdict(verdict.drift, dict_factory=_no_file),
        "policy": {"name": verdict.policy, "sha256": verdict.policy_sha256},
        "groups": [_group(group) for group in verdict.groups],
        "changed": [asdict(changed) for changed in verdict.changed],
        "continuations": [
            {"prompt": prompt, "original": original, "compressed": compressed}
            for prompt, original, compressed in verdict.continuations
        ],
        "token_divergence": [[token, nats] for token, nats in verdict.token_divergence],
    }


def _no_file(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if type(value) is not bytes}


def _by_treatment(responsible: Sequence[Responsible]) -> list[dict[str, Any]]:
    """What units treated alike are responsible for together, the most first."""
    found: dict[str, dict[str, Any]] = {}
    for one in responsible:
        if one.treatment:
            line = found.setdefault(one.treatment, {"n_units": 0, "nats": 0.0, "share": 0.0})
            line["n_units"] += 1
            line["nats"] += one.damage.value
            line["share"] += one.share
    lines = [{"treatment": name, **line} for name, line in found.items()]
    return sorted(lines, key=lambda line: -line["nats"])


def _in_use(verdict: Verdict) -> dict[str, Any]:
    """For whom it is worse, how models write and answer, and what could not be compared."""
    several = ("slices", "classes", "corruptions", "choices")
    one = {name: getattr(verdict, name) for name in ("generation", "certified")}
    return {
        **{name: [asdict(one) for one in getattr(verdict, name)] for name in several},
        **{name: None if found is None else asdict(found) for name, found in one.items()},
        "notes": list(verdict.notes),
    }


def _estimate(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else asdict(estimate)


def _ratio(part: float, whole: float) -> float | None:
    """None where a ratio would say nothing: nothing measured, or not finite."""
    return part / whole if whole > 0 and math.isfinite(whole) and math.isfinite(part) else None


def _group(group: GroupClaim) -> dict[str, Any]:
    measured = group.measured_damage
    return {
        "group": group.group,
        "n_units": len(group.units),
        "predicted_damage": group.predicted_damage,
        "measured_damage": measured,
        "predicted_over_measured": _ratio(group.predicted_damage, measured),
        "bytes_before": group.bytes_before,
        "bytes_after": group.bytes_after,
        "units": list(group.units),
    }


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """What was decided for the whole; the choice for each unit stands with the unit."""
    return {
        "model": plan.model,
        "budget_bytes": plan.budget.weight_bytes,
        "keep": list(plan.budget.keep),
        "weight_bytes": plan.weight_bytes,
        "overhead_bytes": plan.overhead_bytes,
        "predicted_damage": plan.predicted_damage,
        "rounds": [asdict(turn) for turn in plan.rounds],
        "seed": plan.seed,
        "data": plan.data,
        "notes": list(plan.notes),
        "equalised": [vars(one) for one in plan.equalised],
    }


def worth_criterion(scores: Mapping[str, Scores]) -> str | None:
    """The criterion that prices units in nats; the first one where none does; None without any."""
    in_nats = [name for name, score in scores.items() if score.nats]
    return next(iter(in_nats), None) or next(iter(scores), None)


def _worth(scores: Mapping[str, Scores]) -> dict[str, Any]:
    name = worth_criterion(scores)
    return {
        "criterion": name,
        "in_nats": scores[name].nats if name is not None else False,
        "other_criteria": [other for other in scores if other != name],
    }


def units_to_json(report: Report) -> list[dict[str, Any]]:
    """One entry for each unit in order of first use; what was applied wins over the plan."""
    applied = {record.unit: record for record in report.receipt.applied}
    worth = worth_criterion(report.scores)
    return [
        _identity(unit)
        | left_to_json(report.left.get(unit.name))
        | _done(unit, report.plan.choices.get(unit.name), applied.get(unit.name))
        | {
            "worth": None if worth is None else report.scores[worth].totals.get(unit.name),
            "scores": {
                name: score.totals[unit.name]
                for name, score in report.scores.items()
                if unit.name in score.totals
            },
            "channels": None if worth is None else _channels(report.scores[worth], unit.name),
            "heads": list(report.head_relevance.get(unit.name, ())),
            "slices": {
                label: report.slice_relevance[label][unit.name]
                for label in sorted(report.slice_relevance)
                if label and unit.name in report.slice_relevance[label]
            },
        }
        for unit in report.units
    ]


def _identity(unit: Unit) -> dict[str, Any]:
    return {
        "name": unit.name,
        "kind": unit.kind,
        "shape": list(unit.shape),
        "groups": unit.groups,
        "n_weights": unit.n_weights,
        "macs": unit.macs,
        "coupled": list(unit.coupled),
        "bytes_before": unit.n_weights * BYTES_BEFORE,
    }


def _done(unit: Unit, planned: Candidate | None, applied: Applied | None) -> dict[str, Any]:
    """What was decided for one unit and what became of it."""
    chosen = applied or planned
    stored = unit.n_weights * BYTES_BEFORE
    if applied is not None:
        stored = applied.stored_bytes
    elif planned is not None:
        stored = planned.cost.weight_bytes
    settings = chosen.settings if chosen else {}
    bits = stored * 8 / max(1, unit.n_weights)
    return {
        "treatment": chosen.treatment if chosen else "untouched",
        "label": treatment_label(settings, bits),
        "settings": {key: settings[key] for key in sorted(settings)},
        "bytes_after": stored,
        "stored_bits": bits,
        "planned_bytes": None if planned is None else planned.cost.weight_bytes,
        "planned_damage": None if planned is None else planned.predicted_damage,
        "predicted_damage": chosen.predicted_damage if chosen else None,
        "relative_error": None if applied is None else applied.relative_error,
        "refused": chosen.refused if chosen else None,
    }


def treatment_label(settings: Mapping[str, Any], stored_bits: float) -> str:
    """A few characters that tell treatments apart: "3", "2:4", "50%", "16".

    Bits of a code where codes are stored, what is kept where weights are zeroed; a treatment that
    says neither is named by the bits a weight takes in the file.
    """
    parts = []
    if "bits" in settings:
        parts.append(f"{settings['bits']:.3g}")
    counts = [settings.get(key) for key in ("n_kept", "m")]
    if None not in counts:
        parts.append(":".join(str(count) for count in counts))
    kept = settings.get("kept_fraction")
    if kept is None and "sparsity" in settings:
        kept = 1 - float(settings["sparsity"])
    if kept is not None:
        parts.append(f"{float(kept):.0%}")
    return " ".join(parts) or f"{stored_bits:.0f}"


def _channels(score: Scores, name: str) -> dict[str, float] | None:
    values = sorted(score.channels[name].tolist()) if name in score.channels else []
    if not values:
        return None
    return {"lowest": values[0], "median": values[len(values) // 2], "highest": values[-1]}


def _treatments(units: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Units and bytes of each treatment, the most bytes first."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for unit in units:
        key = (unit["treatment"], unit["label"])
        empty = {"units": 0, "bytes_before": 0, "bytes_after": 0, "predicted_damage": 0.0}
        row = found.setdefault(key, {"treatment": key[0], "label": key[1], **empty})
        row["units"] += 1
        row["bytes_before"] += unit["bytes_before"]
        row["bytes_after"] += unit["bytes_after"]
        row["predicted_damage"] += unit.get("predicted_damage") or 0.0
    return sorted(found.values(), key=lambda row: (-row["bytes_after"], row["treatment"]))


def _leftovers(leftovers: Sequence[Leftover]) -> list[dict[str, Any]]:
    """Tensors stored as they are, by reason."""
    by_reason: dict[str, dict[str, Any]] = {}
    for leftover in leftovers:
        row = by_reason.setdefault(leftover.reason, {"reason": leftover.reason, "numbers": 0})
        row["numbers"] += math.prod(leftover.shape)
        row.setdefault("names", []).append(leftover.name)
    return list(by_reason.values())

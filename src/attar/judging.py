"""Judge what was written: read it back, run it beside the original, and say what changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attar import cut_again, protecting
from attar.activations import RoundedModule, roundings
from attar.audit.examples import changed_predictions, token_divergence
from attar.audit.fidelity import Keep, Measured, measure, measure_for_report
from attar.audit.not_finite import first_not_finite
from attar.audit.policy import Policy, read_policy
from attar.audit.verdict import judge, with_details
from attar.decide import Decided
from attar.disk import HELD_AT_MOST_BYTES
from attar.errors import BudgetError
from attar.explain.statistics import STREAMS, samples_at_once, statistics_bytes
from attar.export.run import class_names, continue_text
from attar.gguf_names import FILE as GGUF_FILE
from attar.inputs import read_tokenizer
from attar.load.folder import load_folder, read_folder
from attar.load.model import load_model
from attar.load.onnx_model import read_onnx
from attar.matching import Matched, match
from attar.memory import forecast, machine_bytes
from attar.onnx_names import FILE as ONNX_FILE
from attar.plan.size import parse_size
from attar.records import Batch, GroupClaim, Model, Verdict
from attar.session import Session
from attar.sites import Roundings, substituted
from attar.transform.apply import build_transform, substitutions
from attar.transform.quantize_feedback import CHUNK_WEIGHTS

PROMPTS = ("The capital of France is", "To make a cup of tea, first")
CONTINUED_TOKENS = 32
# Share of the audit data on which each group of units is measured by itself.
GROUP_SHARE = 0.125
# A model with more roles than this is grouped by its blocks instead.
MOST_GROUPS = 12
EVERYTHING = Matched()
# Batches on which tokens are also taken by their numbers, where the tokenizers' differ; and the
# share of what is lost by their names below which the tokenizer is at fault.
TRIED_BY_NUMBER, BLAMED_BELOW = 4, 0.5


def forecast_memory(session: Session) -> int:
    """Say the peak memory of the run before its heavy part starts; warn where it is too much."""
    wanted = forecast(
        session.model,
        session.units,
        session.data.calibration,
        samples_at_once=STREAMS * samples_at_once(session.model.task.name),
        statistics_bytes=statistics_bytes(session.units),
        priced_weights_at_once=CHUNK_WEIGHTS,
        learns=session.recipe.heal != "none",
    )
    there = machine_bytes()
    if there is not None and wanted > there:
        session.progress.note(
            f"warning: this run needs about {wanted / 1e9:.1f} GB of memory, and the machine has "
            f"{there / 1e9:.1f} GB; it may be ended by the system before it is done. Weights of "
            f"more than {HELD_AT_MOST_BYTES / 1e9:.1f} GB in float32 stay on disk if they come "
            "from a folder or a file."
        )
    return wanted


def open_policy(path: Path) -> Policy:
    """Read a policy; its size is one of bytes, because a share or bits need a model.

    Raises:
        SettingError: See `read_policy`.
        BudgetError: A size that cannot be read.
    """

    def parse(text: str) -> int:
        if text.rstrip().endswith(("%", "bits", "bit")):
            raise BudgetError(f"a policy limits bytes, not {text}.", hint="write size: 60MB")
        return parse_size(text, bytes_at_16_bits=0, n_parameters=0)

    return read_policy(path, parse)


def judge_folder(session: Session, folder: Path, decided: Decided) -> Verdict:
    """Load what was written as a stranger would, and compare it with the original."""
    if session.recipe.to == "gguf":
        return judge_compressed(session, load_model(str(folder / GGUF_FILE)), decided)
    if session.recipe.to == "onnx":
        return judge_compressed(session, _of_onnx(session, folder / ONNX_FILE, decided), decided)
    code = None
    if session.model.architecture.builder == "factory":
        code = session.original.module
    return judge_compressed(
        session, load_folder(read_folder(folder, build_transform), code), decided
    )


def judged_by(session: Session) -> tuple[str, ...]:
    """Say what ran the file that was written, where that is not Attar itself."""
    if session.recipe.to != "onnx":
        return ()
    if find_spec("onnxruntime") is None:
        return ("judged by the same numbers in torch: onnxruntime is not installed",)
    return (f"judged by running {ONNX_FILE} in onnxruntime {version('onnxruntime')}",)


def _of_onnx(session: Session, file: Path, decided: Decided) -> Model:
    """Open the file in onnxruntime; where there is none, do in torch what it says."""
    if find_spec("onnxruntime") is not None:
        return read_onnx(file)
    weights = substitutions(decided.treated)
    rounds = roundings(decided.plan.choices)
    return replace(session.model, module=RoundedModule(session.model.module, weights, rounds))


def judge_compressed(session: Session, small: Model, decided: Decided) -> Verdict:
    """Compare a model that was made as decided with the original, as a whole and by groups."""
    with session.timed("audit"):
        measured = _measure(session, small)
        verdict = judge(
            measured,
            family=session.divergence.family,
            predicted_damage=decided.plan.predicted_damage,
            seed=session.recipe.seed,
            slices=session.data.audit_slices,
            classes=_classes(session),
            labelled=bool(session.data.answers),
        )
        verdict = protecting.checked(session, _located(session, small, verdict, measured))
        return with_details(
            verdict,
            groups=_group_claims(session, _weights(session, small.module, decided), decided),
            **_details(session, small, measured),  # type: ignore[arg-type]
        )


def judge_models(session: Session, other: Model) -> Verdict:
    """Compare the session's model with any other that answers the same question.

    Raises:
        DataError: The two do not answer the same question.
    """
    return compare_models(session, other)[0]


def compare_models(session: Session, other: Model) -> tuple[Verdict, Measured]:
    """Do what `judge_models` does, and keep what was measured.

    Raises:
        DataError: The two do not answer the same question.
    """
    matched = match(session, other)
    with session.timed("audit"):
        measured = _measure(session, other, matched, session.finished.once)
        verdict = judge(
            measured,
            family=session.divergence.family,
            predicted_damage=0.0,  # nobody predicted anything
            seed=session.recipe.seed,
            slices=session.data.audit_slices,
            classes=_classes(session),
            labelled=bool(session.data.answers),
        )
        verdict = _located(session, other, replace(verdict, notes=matched.notes), measured)
        verdict = _tokenizer_blamed(session, other, matched, verdict)
        details = _details(session, other, measured)
        return with_details(verdict, **details), measured  # type: ignore[arg-type]


def _tokenizer_blamed(
    session: Session, other: Model, matched: Matched, verdict: Verdict
) -> Verdict:
    """Say first that the tokenizer is at fault, where the weights go with the original's."""
    if matched.renumbering is None:
        return verdict
    some = replace(session, data=replace(session.data, audit=session.data.audit[:TRIED_BY_NUMBER]))
    by_name, by_number = (
        _measure(some, other, one).mean_divergence for one in (matched, matched.by_number())
    )
    if not by_number < BLAMED_BELOW * by_name:
        return verdict
    reason = (
        f"the tokenizer of {other.name} is at fault, and not its weights: read by its own numbers "
        f"of tokens it lost {by_name:.3g} nats, and by those of {session.model.name} "
        f"{by_number:.3g}"
    )
    return replace(verdict, reasons=(reason, *verdict.reasons))


def _measure(
    session: Session, other: Model, matched: Matched = EVERYTHING, keep: Keep | None = None
) -> Measured:
    """Run both on the audit data; answers are numbered as the original's."""
    data = session.data
    found = measure_for_report(
        matched.before(session.original),
        matched.after(other),
        data.audit,
        session.divergence,
        progress=session.progress,
        answers=matched.answers(data.answers),
        keep=keep,
    )
    return matched.in_places(found)


def _located(session: Session, other: Model, verdict: Verdict, measured: Measured) -> Verdict:
    """Say where NaN or infinity begins, where there is any."""
    bad = measured.sample[~np.isfinite(measured.divergence)]
    if not len(bad):
        return verdict
    batch = _batch_of(session, int(bad[0]))
    for model in (session.original, other):
        run = partial(model.task.forward, model.module, batch)
        part = first_not_finite(model.module, run)
        if part is not None:
            kind = type(model.module.get_submodule(part)).__name__
            where = f"its part {part} ({kind})" if part else f"the whole module ({kind})"
            reason = f"in {model.name}, the first NaN or infinity leaves {where}"
            return replace(verdict, reasons=(*verdict.reasons, reason))
    return verdict


def _batch_of(session: Session, sample: int) -> Batch:
    """The batch of the audit data that holds a sample."""
    for batch in session.data.audit:
        count = len(next(iter(batch.values())))
        if sample < count:
            return batch
        sample -= count
    raise AssertionError("a sample that was measured is in a batch")


def _weights(
    session: Session, small: nn.Module, decided: Decided
) -> Mapping[str, Callable[[], Tensor]]:
    """Weights and biases as they were read back; a graph does not give its own out."""
    if session.recipe.to == "onnx":
        return substitutions(decided.treated)
    names = [f"{unit.name}.weight" for unit in session.units]
    names += [unit.bias for unit in session.units if unit.bias]
    return {name: _constant(small.get_parameter(name)) for name in names}


def _group_claims(
    session: Session, all_tensors: Mapping[str, Callable[[], Tensor]], decided: Decided
) -> list[GroupClaim]:
    """Compress one group of units at a time, and compare what is lost with what was predicted.

    Where units were cut, that is a group of its own, and the others are compared with what it left.
    """
    healed = decided.plan.healed
    if healed is not None and healed.steps:
        return []  # each part has learned to make good what the others do
    n = max(1, round(len(session.data.audit) * GROUP_SHARE))
    original, task = session.model.module, session.model.task
    claims = cut_again.claims(session, session.data.audit[:n])
    for group, names in _groups(session).items():
        changed = [f"{name}.weight" for name in names]
        changed += [bias for name in names if (bias := session.units.named(name).bias)]
        weights = {name: all_tensors[name] for name in changed if name in all_tensors}
        rounds = roundings({name: decided.plan.choices[name] for name in names})

        def compressed(
            batch: Batch,
            weights: Mapping[str, Callable[[], Tensor]] = weights,
            rounds: Roundings = rounds,
        ) -> Tensor:
            with substituted(original, weights, rounds):
                return task.forward(original, batch)

        found = measure(
            session.model,
            compressed,
            session.data.audit[:n],
            session.divergence,
            progress=session.progress,
            stage=f"audit {group}",
        )
        choices = [decided.plan.choices[name] for name in names]
        claims.append(
            GroupClaim(
                group=group,
                units=tuple(names),
                predicted_damage=sum(c.predicted_damage or 0.0 for c in choices),
                measured_damage=found.mean_divergence,
                bytes_before=sum(2 * session.units.named(name).n_weights for name in names),
                bytes_after=sum(c.cost.weight_bytes for c in choices),
            )
        )
    return claims


def _constant(weight: Tensor) -> Callable[[], Tensor]:
    return lambda: weight.detach()


def _groups(session: Session) -> dict[str, list[str]]:
    """Group units by role: the last word of their name, without numbers."""
    groups: dict[str, list[str]] = {}
    for unit in session.units:
        role = re.sub(r"\d+", "", unit.name.rpartition(".")[2]).strip("._")
        groups.setdefault(role or unit.kind, []).append(unit.name)
    if len(groups) <= MOST_GROUPS:
        return groups
    by_kind: dict[str, list[str]] = {}
    for unit in session.units:
        by_kind.setdefault(unit.kind, []).append(unit.name)
    return by_kind


@dataclass(frozen=True)
class Naming:
    """How answers and inputs are called in a report.

    Attributes:
        name_of: Number of an answer to its name.
        shown: By sample: token ids (with `decode`), or the name of the sample.
        decode: Token ids to text; None where samples are no text.
    """

    name_of: Callable[[int], str]
    shown: Sequence[Any]
    decode: Callable[[list[int]], str] | None = None


def naming(session: Session) -> Naming | None:
    """Names for answers and inputs; None where there is no most likely answer."""
    model, data = session.model, session.data
    if model.task.name in ("language", "transcribe") and "tokenizer.json" in model.files:
        tokenizer = read_tokenizer(model.files)
        name = "tokens" if model.task.name == "language" else "decoder_tokens"
        texts = [row for batch in data.audit for row in batch[name]]
        return Naming(lambda t: str(tokenizer.decode([t])), texts, tokenizer.decode)
    if session.divergence.family != "categorical":
        return None
    labels = _names_of_answers(model)
    return Naming(lambda c: labels[c], list(data.shown))


def _classes(session: Session) -> list[str]:
    """Names of the answers, where they are classes; else none."""
    model = session.model
    if session.divergence.family != "categorical" or model.task.name in ("language", "transcribe"):
        return []
    return _names_of_answers(model)


def _names_of_answers(model: Model) -> list[str]:
    with torch.no_grad():
        n_classes = model.task.forward(model.module, model.examples).shape[-1]
    return class_names(model.files, n_classes)


def _details(session: Session, other: Model, measured: Measured) -> dict[str, object]:
    """Add examples a person can judge."""
    called = naming(session)
    if called is None:
        return {}
    changed = changed_predictions(measured, called.name_of, called.shown, called.decode)
    details: dict[str, object] = {"changed": changed}
    if called.decode is not None:
        details["token_divergence"] = token_divergence(measured, called.shown, called.name_of)
    if called.decode is not None and session.model.task.name == "language":
        details["continuations"] = [
            (
                prompt,
                *(
                    continue_text(m, prompt, max_tokens=CONTINUED_TOKENS, seed=0)
                    for m in (session.original, other)
                ),
            )
            for prompt in PROMPTS
        ]
    return details

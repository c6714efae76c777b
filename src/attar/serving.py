"""What the other commands hand out: answers of a model, the list of models, JSON, comparisons."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from attar.audit.evidence import bundle, read_key
from attar.audit.policy import Policy
from attar.coupling import CoupledUnits, CutTrial
from attar.errors import DataError, ModelError
from attar.export.run import classify_pictures, continue_text, embed_texts, transcribe
from attar.inputs import PICTURE_SUFFIXES
from attar.load.built_ins import is_cached
from attar.load.catalogue import CATALOGUE, built_in
from attar.load.mel import log_mel
from attar.load.model import load_model, save_huggingface
from attar.memory import peak_bytes
from attar.records import Budget, Model, Plan, Receipt, Report, Scores, Verdict
from attar.report.coupled_text import coupled_to_json
from attar.report.record import jsonable, report_to_json
from attar.session import Session, state_hash, tensors_hash

DIGITS = 4  # of a cosine or a probability: more than the model is worth


@dataclass(frozen=True)
class Answer:
    """What `attar run` prints, and the same for programs."""

    text: str
    facts: Mapping[str, Any]


# ---------------------------------------------------------------------------------------------
# run


def run(model: Model, inputs: Sequence[str], *, max_tokens: int = 64, seed: int = 0) -> Answer:
    """Let a model answer: go on with a text, name pictures, compare texts, or write down speech.

    Args:
        inputs: A prompt, or files; a folder stands for the pictures in it.
        max_tokens: Written at most, by a language or speech model.
        seed: Of every draw.

    Raises:
        DataError: Nothing to answer, or a file that does not fit.
        ModelError: A model that answers none of these.
    """
    answers = {
        "language": lambda: _continued(model, " ".join(inputs), max_tokens, seed),
        "classify": lambda: _classified(model, inputs),
        "embed": lambda: _compared(model, inputs),
        "transcribe": lambda: _transcribed(model, inputs, max_tokens),
    }
    if model.task.name not in answers:
        raise ModelError(
            f"{model.name} answers {model.task.name}, which `attar run` has no words for.",
            hint="load it in Python with attar.load and call its module",
        )
    if not inputs:
        wanted = {"language": 'a text: attar run MODEL "Once upon a time"', "embed": "two texts"}
        raise DataError(
            "there is nothing to answer.",
            hint=f"give {wanted.get(model.task.name, 'the files after the model')}",
        )
    return answers[model.task.name]()


def _continued(model: Model, prompt: str, max_tokens: int, seed: int) -> Answer:
    written = continue_text(model, prompt, max_tokens=max_tokens, seed=seed)
    return Answer(prompt + written, {"prompt": prompt, "continuation": written})


def _classified(model: Model, inputs: Sequence[str]) -> Answer:
    found = classify_pictures(model, _picture_files(inputs))
    lines, facts = [], []
    for file, ranked in found:
        lines.append(str(file))
        lines += [f"  {chance:6.1%}  {name}" for name, chance in ranked]
        classes = [{"name": n, "probability": round(chance, DIGITS)} for n, chance in ranked]
        facts.append({"file": str(file), "classes": classes})
    return Answer("\n".join(lines), {"pictures": facts})


def _picture_files(inputs: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, inputs):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        pictures = [p for p in inside if p.suffix.lower() in PICTURE_SUFFIXES]
        if path.is_dir() and not pictures:
            raise DataError(f"the folder {path} holds no pictures.", hint="give .png or .jpg files")
        files += pictures or [path]
    return files


def _compared(model: Model, texts: Sequence[str]) -> Answer:
    vectors = embed_texts(model, texts)
    cosines = _cosines(vectors)
    width = max(len(str(len(texts))), 2)
    lines = [f"{number:>{width}}  {text}" for number, text in enumerate(texts, start=1)]
    if len(texts) > 1:
        lines += ["", "cosine " + "".join(f"{n:>9}" for n in range(1, len(texts) + 1))]
        for number, row in enumerate(cosines, start=1):
            lines.append(f"{number:>6} " + "".join(f"{value:9.3f}" for value in row))
    facts = {"texts": list(texts), "vectors": vectors.tolist(), "cosines": cosines}
    return Answer("\n".join(lines), facts)


def _cosines(vectors: Tensor) -> list[list[float]]:
    unit = normalize(vectors.double(), dim=1)
    return [[round(value, DIGITS) for value in row] for row in (unit @ unit.T).tolist()]


def _transcribed(model: Model, inputs: Sequence[str], max_tokens: int) -> Answer:
    mels = int(model.examples["features"].shape[1])
    heard = {
        file: transcribe(
            model, Path(file), lambda samples: log_mel(samples, mels), max_tokens=max_tokens
        )
        for file in inputs
    }
    one = len(heard) == 1
    lines = [text if one else f"{file}: {text}" for file, text in heard.items()]
    return Answer("\n".join(lines), {"files": heard})


# ---------------------------------------------------------------------------------------------
# models


def model_rows() -> list[dict[str, Any]]:
    """The built-in models with what decides whether one wants them."""
    return [
        {
            "name": entry.name,
            "is": entry.title,
            "task": entry.task,
            "licence": entry.licence
            + (", to be accepted first" if entry.licence_must_be_accepted else ""),
            "terms": entry.licence_url,
            "download_bytes": entry.download_bytes,
            "parameters": f"{entry.parameters:,}",
            "stored_as": entry.stored_as,
            "grid": entry.grid,
            "cached": "yes" if is_cached(entry.name) else "no",
        }
        for entry in CATALOGUE.values()
    ]


def describe_model(name: str) -> str:
    """One line with licence and size, to be read before anything is fetched.

    Raises:
        ModelError: No built-in has that name.
    """
    return f"{name}: {built_in(name).describe()}"


def get_model(
    name: str, *, degrid: int | None = None, accept_licence: bool = False, out: Path | None = None
) -> Model:
    """Fetch a built-in model into the cache, and write a copy where one is asked for.

    Args:
        degrid: Seed of the equivalent copy off its quantization grid.
        out: Hugging Face folder to write.

    Raises:
        ModelError: Unknown name, licence not accepted, no network, or no such copy of this model.
        OutputError: The folder exists or cannot be written.
    """
    model = load_model(built_in(name).name, seed_degrid=degrid, accept_licence=accept_licence)
    if out is not None:
        save_huggingface(model, out)
    return model


# ---------------------------------------------------------------------------------------------
# explain and audit, for programs


def explanation_to_json(
    session: Session,
    scores: Mapping[str, Scores],
    slices: Mapping[str, Mapping[str, float]],
    coupled: CoupledUnits | None = None,
    trial: CutTrial | None = None,
) -> dict[str, Any]:
    """Every score of every unit and channel; higher = keep.

    Args:
        coupled: What can only be cut together, where that was asked for.
        trial: What cutting a share of it costs, where that was asked for.
    """
    criteria = {
        name: {
            "nats": score.nats,
            "units": dict(score.totals),
            "channels": {unit: values.tolist() for unit, values in score.channels.items()},
        }
        for name, score in scores.items()
    }
    facts = {
        "format": "attar explanation",
        "model": session.model.name,
        "criteria": criteria,
        "slices": slices,
        "leftovers": leftover_reasons(session),
    }
    if coupled is not None:
        facts["coupled"] = coupled_to_json(coupled, trial)
    clean: dict[str, Any] = jsonable(facts, "", [])
    return clean


def leftover_reasons(session: Session) -> dict[str, str]:
    """Tensors that no plan decides about, and why."""
    return {left.name: left.reason for left in session.units.leftovers}


def audit_report(session: Session, other: Model, verdict: Verdict, folder: Path | None) -> Report:
    """Put a comparison of two models into the form that the page and the JSON are made from.

    Args:
        folder: Where the other model lies, to be weighed; None for one in memory.
    """
    unset = Plan(session.model.name, Budget(0), {}, 0, verdict.predicted_damage)
    return Report(
        model=f"{session.model.name} and {other.name}",
        origin=session.model.origin,
        licence=session.model.licence,
        task=session.model.task.name,
        plan=unset,
        receipt=Receipt((), session.units.leftovers),
        verdict=verdict,
        units=session.units.units,
        scores={},
        head_relevance={},
        slice_relevance={},
        bytes_before=session.bytes_at_16_bits,
        source_bytes=session.model.source_bytes,
        bytes_after=_weigh(other, folder),
        folder=None,
        seconds=dict(session.seconds),
        peak_memory_bytes=peak_bytes(),
        forecast_memory_bytes=0,
        provenance=session.provenance() | _of_both(session, other, folder),
    )


def _of_both(session: Session, other: Model, folder: Path | None) -> dict[str, Any]:
    """What tells the other model and the data from any others."""
    files = [folder] if folder is not None and folder.is_file() else []
    if folder is not None and folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.is_file())
    return {
        "compressed_sha256": state_hash(other.module),
        "compressed_files": {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files
        },
        "audit_data_sha256": tensors_hash(session.data.audit),
    }


def evidence(report: Report, policy: Policy | None, key: Path) -> bytes:
    """Sign what an audit found; see `audit.evidence`.

    Args:
        policy: That it was held to.
        key: File of the private key.
    """
    facts = report_to_json(report)
    chosen = {name: facts[name] for name in ("model", "size", "verdict", "provenance")}
    return bundle(chosen, None if policy is None else policy.text, read_key(key))


def _weigh(model: Model, folder: Path | None) -> int:
    if folder is not None and folder.is_dir():
        return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return model.source_bytes

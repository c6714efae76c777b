"""An original that compressed models are held against, in the ways that were asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from attar import attributing, behaving, corrupting, drifting, judging, serving
from attar.audit.fidelity import Measured
from attar.audit.policy import Policy, with_policy
from attar.disk import dense
from attar.errors import ModelError, SettingError
from attar.load.picture_graphs import HINT, check_told, shape_of, with_pictures
from attar.load.tensors import TENSOR_SUFFIXES
from attar.parallel import one_thread
from attar.records import Behaviours, Model, Progress, Recipe, Report
from attar.session import Session, open_model, open_recipe, tensors_hash


@dataclass(frozen=True)
class Wishes:
    """What an audit is asked for beside the verdict.

    Attributes:
        policy: Limits that the verdict is held to beside its own rule, from `judging.open_policy`.
        attribute: Whether to say which units' changes are responsible for what was lost.
        drift: Whether to say how far explanations of predictions moved.
        reference: A third model that answers the same question, shown beside the drift.
        behaviours: What language models are asked to do beside predicting the audit data.
        corruptions: Whether to say what both answer to corrupted inputs.
        pictures: How converted files read them that do not say so; see `picture_graphs`.
    """

    policy: Policy | None = None
    attribute: bool = False
    drift: bool = False
    reference: Recipe | None = None
    behaviours: Behaviours = field(default_factory=Behaviours)
    corruptions: bool = False
    pictures: str = ""


class Auditor:
    """The original, its audit data, and all that is read once for every compressed model.

    Raises:
        AttarError: What was asked for does not go together, or with this model.
    """

    def __init__(
        self,
        original: Recipe,
        compressed: Sequence[Recipe],
        wishes: Wishes,
        progress: Progress | None,
    ) -> None:
        has_reference = wishes.reference is not None
        drifting.check_asked(wishes.policy, drift=wishes.drift, reference=has_reference)
        self._read = behaving.read_asked(wishes.behaviours)
        check_told(wishes.pictures)
        self._wishes = wishes
        # What cannot be opened is refused before data is made; of several, none is held meanwhile.
        opened: Model | None = None
        for one in compressed:
            opened = None
            opened = self._open(one)
        lent = None if opened is None else opened.architecture.config.get("picture")
        self._opened = opened if len(compressed) == 1 else None
        self.session = open_recipe(
            original, progress, lambda model: self._reading(model, original.data, lent)
        )
        self._lent = self.session.model.architecture.config.get("picture")
        behaving.check_asked(self.session.model, wishes.behaviours)
        if wishes.corruptions:
            corrupting.check_asked(self.session.model)
        self._reference = None if wishes.reference is None else open_model(wishes.reference)

    def _open(self, recipe: Recipe) -> Model:
        return with_pictures(open_model(recipe), self._wishes.pictures)

    def _reading(self, model: Model, data: str | None, lent: Mapping[str, Any] | None) -> Model:
        """The original, as it reads pictures where pictures are the data."""
        told = self._wishes.pictures
        if data is not None and Path(data).suffix.lower() in TENSOR_SUFFIXES:
            if told:
                raise SettingError(
                    f"{data} holds tensors, which are given as they are.",
                    hint="leave --pictures out.",
                )
            return model
        model = with_pictures(model, told, lent)
        if shape_of(model) is not None and "picture" not in model.architecture.config:
            raise ModelError(
                f"{model.name} does not say how it reads pictures: what black and white are.",
                hint=HINT,
            )
        return model

    @contextmanager
    def keeping(self, out: Path | None) -> Iterator[None]:
        """Keep what is finished beside `out`, and go on from what is kept there; see `resuming`.

        What is asked for is not in the key: a step is named by all it depends on, so that what is
        asked for in addition goes on from what is there.
        """
        if out is None:
            yield
            return
        whole, data = self.session, self.session.data
        also = {
            "original": model_hash(whole.model, Path(whole.recipe.model)),
            "audit data": tensors_hash(data.audit),
            "true answers": list(data.answers),
            "labels": list(data.audit_slices),
        }
        with whole.keeping(out, also) as self.session:
            yield
        self.session = whole

    def against(self, compressed: Recipe) -> tuple[Report, Measured]:
        """Open one compressed model, and compare."""
        wishes, other = (
            self._wishes,
            with_pictures(self._opened or self._open(compressed), "", self._lent),
        )
        session = _about(self.session, other, Path(compressed.model))
        if wishes.drift:
            drifting.check_models(session, other, self._reference)
        verdict, measured = judging.compare_models(session, other)
        verdict = behaving.with_behaviours(session, other, verdict, wishes.behaviours, self._read)
        if wishes.corruptions:
            verdict = corrupting.with_corruptions(session, other, verdict)
        if wishes.attribute:
            treatments = attributing.treatments_of(Path(compressed.model))
            verdict = attributing.with_attribution(session, other, verdict, treatments)
        if wishes.drift:
            if wishes.reference is not None and self._reference is not None:
                session = _about(session, self._reference, Path(wishes.reference.model))
            verdict = drifting.with_drift(session, other, verdict, self._reference, measured)
        report = serving.audit_report(session, other, verdict, Path(compressed.model))
        if wishes.policy is not None:
            verdict = with_policy(verdict, wishes.policy, report.bytes_after)
        return replace(report, verdict=verdict), measured


def _about(session: Session, model: Model, path: Path) -> Session:
    """Name steps by a model too, where they are kept."""
    finished = session.finished
    if finished.folder is None:
        return session
    return replace(session, finished=finished.within(model_hash(model, path)))


def model_hash(model: Model, path: Path) -> str:
    """sha256 of all that an audit may see of a model.

    Its numbers, what it answers, the files that travel with it, and of a graph, which holds its
    numbers where nobody sees them, the files at `path`.
    """
    digest = hashlib.sha256()
    for name, tensor in model.module.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(dense(tensor).contiguous().flatten().view(torch.uint8).numpy().data)
    with one_thread(), torch.no_grad():
        answers = model.task.forward(model.module, model.examples)
    digest.update(tensors_hash([{"answers": answers}]).encode())
    for name, content in sorted(model.files.items()):
        digest.update(name.encode() + hashlib.sha256(content).digest())
    if model.architecture.builder == "onnx":
        for file in (path, path.with_suffix(".bin")):
            if file.is_file():
                with file.open("rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()

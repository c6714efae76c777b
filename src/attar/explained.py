"""What explaining gives back: scores of units, and explanations of answers as facts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from attar import explaining, pipeline
from attar.explaining import Explanation, Wish
from attar.records import Model, Progress, Scores, Silent, Statistics
from attar.report.explanation import explanations_to_html
from attar.report.html import write_texts
from attar.session import Session
from attar.subjects import Subject


class UnitScores(Mapping[str, Scores]):
    """Scores by criterion, with the statistics they came from."""

    def __init__(self, session: Session, statistics: Statistics) -> None:
        self.session = session
        self.statistics = statistics
        self._scores = pipeline.score_all(session, statistics)

    def __getitem__(self, criterion: str) -> Scores:
        return self._scores[criterion]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)


class Explanations(tuple[Explanation, ...]):
    """One for each input and method."""

    def to_json(self) -> dict[str, Any]:
        """Every number of every place, and every check, as facts."""
        return explanations_to_json(self)

    def report(self, folder: str | Path) -> Path:
        """Write report.html and report.json; the page.

        Raises:
            OutputError: The folder cannot be written.
        """
        facts = self.to_json()
        texts = {
            "report.html": explanations_to_html(facts),
            "report.json": json.dumps(facts, indent=1, ensure_ascii=False) + "\n",
        }
        return write_texts(texts, Path(folder))[0]


def explain_inputs(
    model: Model,
    inputs: str | Sequence[str],
    *,
    methods: Sequence[str] = (),
    target: str | None = None,
    data: str | None = None,
    seed: int = 0,
    check: bool = True,
    progress: Progress | None = None,
) -> Explanations:
    """Say what an answer of a model rests on in its input.

    Args:
        inputs: A prompt; texts to embed; files of pictures or sounds; or numbers of rows of `data`.
        methods: Names in `attar.attribute.METHODS`, or "all"; what suits the input if left out.
        target: A class, a token, or the number of an output; the model's own answer if left out.
        check: Test what each method says; takes most of the time.

    Raises:
        AttarError: Nothing to explain, no such method or target, or numbers that are not finite.
    """
    asked = [inputs] if isinstance(inputs, str) else list(inputs)
    wish = Wish(asked, methods, target, data, seed, check)
    return Explanations(explaining.explain_inputs(model, wish, progress or Silent()))


def explanations_to_json(found: Sequence[Explanation]) -> dict[str, Any]:
    """Write explanations as facts: every number of every place, and every check."""
    return {"explanations": [_facts(one) for one in found]}


def _facts(one: Explanation) -> dict[str, Any]:
    subject, curves = one.subject, one.curves
    return {
        "model": one.model,
        "model_sha256": one.sha256,
        "input": {"name": subject.name, "kind": subject.kind, "parts": list(subject.parts)},
        "target": subject.target,
        "is_log_probability": subject.asked.direction is None,
        "answer": one.answer,
        "baseline": one.baseline,
        "baseline_answer": one.baseline_answer,
        "method": one.method,
        "settings": dict(one.settings),
        "seed": one.seed,
        "seconds": round(one.seconds, 3),
        "values": one.values.tolist(),
        "features": one.features.tolist(),
        "picture": _picture(subject),
        "checks": {
            "gap": one.gap,
            "sparsity": one.sparsity,
            "agreement_with_shuffled_weights": one.agreement,
            "faithfulness": None
            if curves is None
            else {
                "area": curves.area,
                "chance": list(curves.chance),
                "p": curves.p,
                "shares_gone": list(curves.shares),
                "most_first": list(curves.most_first),
                "least_first": list(curves.least_first),
            },
        },
        "problems": list(one.problems),
    }


def _picture(subject: Subject) -> str | None:
    """Show what the model is given as a PNG in base64, brought to the range of a screen."""
    if subject.kind not in ("picture", "sound"):
        return None
    pixels = next(iter(subject.sample.values()))[0].float()
    if pixels.dim() == 2:
        pixels = pixels.flip(0)[None].expand(3, -1, -1)
    pixels = pixels.mean(0, keepdim=True).expand(3, -1, -1) if len(pixels) != 3 else pixels
    low, high = pixels.min(), pixels.max()
    levels = ((pixels - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()

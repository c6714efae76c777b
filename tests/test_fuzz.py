"""Broken files either load or give an AttarError: nothing else, no long wait, no huge allocation.

Every break is drawn from a fixed seed: the same files at home as in CI.
"""

import random
import resource
import shutil
import time
from pathlib import Path

import pytest
import toy_code
import yaml
from tiny_models import LLAMA, random_model, write_gguf, write_huggingface

from attar.errors import AttarError
from attar.load.folder import load_folder, read_folder
from attar.load.model import load_model
from attar.plan.planfile import read_plan
from attar.records import Unit, Units
from attar.transform.apply import build_transform

LONGEST_SECONDS = 5.0
MOST_BYTES = 400 * 2**20
UNITS = Units(
    (Unit("a", "linear", (8, 64), ("linear",)), Unit("b.c", "linear", (3, 32), ("linear",))), ()
)
PLAN = """\
attar_plan: 1
model: some/model
recipe: {size: 3kB, seed: 1}
weight_bytes: 3000
keep: []
overhead_bytes: 100
predicted_damage: 0.1
notes: []
rounds: []
units:
  a: {treatment: quantize_rtn, bits: 4, group_size: 32, bytes: 304, nats: 0.05}
  b.c: {treatment: keep_float, bits: 16, bytes: 192, nats: 0.0}
"""


def breaks(content: bytes, seed: int) -> bytes:
    """Flip, cut, repeat or overwrite at places where readers look first more often than last."""
    draws = random.Random(seed)
    broken = bytearray(content)
    # A header is short and does all the harm: half of the places lie in the first 2 %.
    reach = len(broken) if draws.random() < 0.5 else max(16, len(broken) // 50)
    for _ in range(draws.choice([1, 1, 2, 8])):
        at = draws.randrange(min(reach, len(broken)))
        match draws.choice(["flip", "set", "cut", "repeat", "huge", "text"]):
            case "flip":
                broken[at] ^= 1 << draws.randrange(8)
            case "set":
                broken[at] = draws.choice([0, 1, 0x22, 0x5B, 0x7B, 0x7F, 0x80, 0xFF])
            case "cut":
                del broken[at:]
            case "repeat":
                broken[at:at] = broken[at : at + 40]
            case "huge":
                broken[at : at + 8] = b"\xff" * draws.choice([3, 4, 7, 8])
            case "text":
                broken[at : at + 1] = draws.choice(
                    [b"-1", b"1e999", b"null", b"[[[[", b"&a *a", b"999999999999"]
                )
        if not broken:
            break
    return bytes(broken)


def loads_or_refuses(load) -> None:
    """Run a reader under the three rules; the peak counts since the process began."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    try:
        load()
    except AttarError as error:
        assert error.problem and error.hint
    assert time.perf_counter() - start < LONGEST_SECONDS
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MOST_BYTES


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A tiny model in each format."""
    home = tmp_path_factory.mktemp("sources")
    write_gguf(home / "m.gguf", random_model(LLAMA), LLAMA)
    write_huggingface(home / "hf", random_model(LLAMA), LLAMA)
    (home / "plan.yaml").write_text(PLAN)
    _write_attar_folder(home)
    return home


def _write_attar_folder(home):
    """Compress the tiny GGUF with random tokens: two seconds."""
    import torch

    import attar

    model = attar.load(home / "m.gguf")
    tokens = torch.randint(0, 61, (12, 16), generator=torch.Generator().manual_seed(0))
    attar.compress(model, size="30kB", data={"tokens": tokens}, out=home / "attar")
    shutil.rmtree(home / "attar" / "report")


@pytest.mark.parametrize("seed", range(60))
def test_a_broken_gguf(sources, tmp_path, seed):
    path = tmp_path / "m.gguf"
    path.write_bytes(breaks((sources / "m.gguf").read_bytes(), seed))
    loads_or_refuses(lambda: load_model(str(path)))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_broken_hugging_face_folder(sources, tmp_path, name, seed):
    shutil.copytree(sources / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / name
    path.write_bytes(breaks(path.read_bytes(), seed))
    loads_or_refuses(lambda: load_model(str(tmp_path / "hf")))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("name", ["attar.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_attar_folder(sources, tmp_path, name, seed):
    shutil.copytree(sources / "attar", tmp_path / "attar")
    path = next((tmp_path / "attar").glob(f"{name}*"))
    path.write_bytes(breaks(path.read_bytes(), seed))
    if name == "model.safetensors":
        _sign_again(tmp_path / "attar")
    loads_or_refuses(lambda: load_folder(read_folder(tmp_path / "attar", build_transform)))


def _sign_again(folder: Path) -> None:
    """Give a broken file the hash that a hostile folder would state, so that it is read at all."""
    import hashlib
    import json

    described = json.loads((folder / "attar.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    described["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    (folder / "attar.json").write_text(json.dumps(described))


@pytest.mark.parametrize("seed", range(150))
def test_a_broken_plan(sources, tmp_path, seed):
    path = tmp_path / "plan.yaml"
    path.write_bytes(breaks((sources / "plan.yaml").read_bytes(), seed))
    loads_or_refuses(lambda: read_plan(path, lambda *_: UNITS, build_transform))


def test_the_plan_itself_is_read(sources):
    plan = read_plan(sources / "plan.yaml", lambda *_: UNITS, build_transform)
    assert plan.weight_bytes < 3000 and list(plan.choices) == ["a", "b.c"]


@pytest.mark.timeout(20)
def test_references_that_unfold_to_gigabytes_are_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "plan.yaml").write_text("\n".join([*lines, PLAN.replace("keep: []", "keep: *a11")]))
    with pytest.raises(AttarError, match="references"):
        read_plan(tmp_path / "plan.yaml", lambda *_: UNITS, build_transform)


def test_a_tag_in_a_plan_runs_nothing(tmp_path):
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load("!!python/object/apply:os.getcwd []")
    (tmp_path / "plan.yaml").write_text(
        PLAN.replace("some/model", "!!python/object/apply:os.getcwd []")
    )
    loads_or_refuses(lambda: read_plan(tmp_path / "plan.yaml", lambda *_: UNITS, build_transform))


@pytest.mark.parametrize("seed", range(30))
def test_broken_arrays(tmp_path, seed):
    from toy_code import classifier

    from attar.load.tensors import tensor_splits

    module, examples = classifier()
    model = load_model(module, examples=examples, task="classify")
    path = toy_code.save_data(tmp_path / "x.npz", 20)
    path.write_bytes(breaks(path.read_bytes(), seed))
    loads_or_refuses(lambda: tensor_splits(model, str(path), None, seed=0, slices=None))

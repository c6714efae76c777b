"""Tensors on disk: the same numbers as in memory, and memory given back."""

import copy
import errno
import json
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LLAMA, TOKENS, random_model, state_of, write_gguf
from torch import nn

import attar
from attar import disk, judging
from attar.disk import DiskWeight, Scratch, Stash, dense, give_back, on_disk
from attar.errors import ModelError, OutputError
from attar.explain import gatherer
from attar.load.model import load_model
from attar.load.tensor_files import float32_bytes, map_safetensors, read_header
from attar.memory import resident_bytes
from attar.records import Recipe, Silent
from attar.session import open_session

KINDS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
SIZES = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 160, "head_dim": 32}
CONFIG = {**LLAMA, **SIZES}


@pytest.fixture
def everything_on_disk(monkeypatch):
    """Also what is too small to be worth it."""
    monkeypatch.setattr(disk, "HELD_AT_MOST_BYTES", 0)
    monkeypatch.setattr(disk, "SMALLEST_BYTES", 1)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(tensor, folder):
    """A tensor as it lies in a mapped file."""
    safetensors.torch.save_file({"w": tensor}, folder / "w.safetensors")
    return map_safetensors(folder / "w.safetensors")["w"]


# ---------------------------------------------------------------------------------------------
# weights


class Net(nn.Module):
    def __init__(self, table, inner, head):
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)
        self.inner = nn.Parameter(inner, requires_grad=False)
        self.head = nn.Parameter(head, requires_grad=False)

    def forward(self, tokens, shift):
        x = F.embedding(tokens, self.table) + shift
        x = torch.tanh(F.linear(x, self.inner, torch.ones(33)))
        return x @ self.head.t() @ self.table.detach()


def nets(dtype):
    """The same weights in memory and on disk."""
    weights = [random(*shape, seed=seed).to(dtype) for seed, shape in enumerate(SHAPES)]
    scratch = Scratch(on_disk=True)
    placed = [scratch.empty(tuple(w.shape), dtype).copy_(w) for w in weights]
    return Net(*(w.float() for w in weights)), Net(*map(DiskWeight, placed))


SHAPES = ((123, 7), (33, 7), (123, 33))


@KINDS
def test_a_weight_on_disk_answers_and_goes_back_bit_for_bit_as_one_in_memory(
    dtype, everything_on_disk
):
    tokens, answers = torch.arange(10).reshape(2, 5) * 12, []
    for net in nets(dtype):
        shift = random(2, 5, 7, seed=9).requires_grad_()
        out = net(tokens, shift)
        out.square().sum().backward()
        with torch.inference_mode():
            inside = net(tokens, shift)
        answers.append((out.detach(), shift.grad, inside))
    assert all(torch.equal(one, two) for one, two in zip(*answers, strict=True))


def test_autograd_keeps_no_numbers_of_a_weight_on_disk(everything_on_disk):
    kept = []
    _, net = nets(torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        net(torch.zeros(1, 3, dtype=torch.long), random(1, 3, 7).requires_grad_())
    weights = {tuple(shape) for shape in SHAPES} | {shape[::-1] for shape in SHAPES}
    found = [t for t in kept if tuple(t.shape) in weights]
    assert found and all(type(t) is DiskWeight for t in found)


def test_a_weight_on_disk_looks_like_float32_and_is_not_changed_or_copied(everything_on_disk):
    _, net = nets(torch.float16)
    weight = net.inner
    assert weight.dtype == torch.float32 and weight.shape == (33, 7)
    assert isinstance(weight, nn.Parameter) and type(weight) is DiskWeight
    assert copy.deepcopy(net).inner is weight and type(net.state_dict()["inner"]) is DiskWeight
    before = dense(weight)
    for change in (lambda: weight.mul_(2), lambda: weight.copy_(before)):
        with pytest.raises(RuntimeError, match="changed in place"):
            change()
    assert torch.equal(torch.zeros(33, 7).sub_(weight.detach()), -before)
    assert torch.equal(dense(weight), before)


@KINDS
def test_dense_numbers_of_a_weight_on_disk_lie_in_memory(dtype, tmp_path):
    tensor = random(37, 11).to(dtype)
    weight = DiskWeight(stored(tensor, tmp_path))
    assert torch.equal(dense(weight), tensor.float()) and not on_disk(dense(weight))
    assert on_disk(weight) and on_disk(weight.stored)


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_what_was_read_is_given_back_and_can_be_read_again(tmp_path):
    large = stored(torch.ones(64 * 2**18), tmp_path)  # 64 MB
    before = resident_bytes()
    assert float(large.sum()) == large.numel()
    assert resident_bytes() - before > 0.9 * large.nbytes
    give_back(large)
    assert resident_bytes() - before < 0.1 * large.nbytes
    weight = DiskWeight(large.view(4096, 4096))
    F.linear(torch.ones(3, 4096), weight)
    assert resident_bytes() - before < 0.3 * large.nbytes
    assert float(large.sum()) == large.numel()


# ---------------------------------------------------------------------------------------------
# scratch


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_scratch_holds_what_was_written_without_holding_memory():
    scratch, before = Scratch(on_disk=True), resident_bytes()
    made = [scratch.zeros(1000, 4096) for _ in range(4)]
    for number, tensor in enumerate(made):
        assert not tensor.any()
        tensor += number
        give_back(tensor)
    assert resident_bytes() - before < 20e6
    assert [float(tensor.mean()) for tensor in made] == [0, 1, 2, 3]


def test_scratch_in_memory_leaves_tensors_alone():
    scratch, tensor = Scratch(on_disk=False), random(300, 300)
    assert scratch.moved(tensor) is tensor and not on_disk(scratch.zeros(300, 300))
    assert not scratch.zeros(3, 3).any()


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=9),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]),
)
@settings(derandomize=True, max_examples=30, deadline=None)
def test_tensors_in_one_scratch_do_not_touch(shapes, dtype):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "SMALLEST_BYTES", 1)
        patch.setattr(disk, "SMALLEST_FILE_BYTES", 1 << 13)
        scratch = Scratch(on_disk=True)
        tensors = [random(*shape, seed=n).mul(9).to(dtype) for n, shape in enumerate(shapes)]
        moved = [scratch.moved(tensor) for tensor in tensors]
        for one, two in zip(moved, tensors, strict=True):
            assert torch.equal(one, two) and on_disk(one) == (two.numel() > 0)


def test_scratch_has_no_name_and_a_full_disk_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tensor = Scratch(on_disk=True).zeros(1000, 1000)
    assert on_disk(tensor) and not list(tmp_path.iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match="No space left") as error:
        Scratch(on_disk=True).zeros(1000, 1000)
    assert "TMPDIR" in error.value.hint
    monkeypatch.setattr(disk.os, "pwrite", full)
    with pytest.raises(OutputError, match="No space left"):
        Stash(on_disk=True).put(tensor)


def test_what_is_put_aside_comes_back_with_its_strides(everything_on_disk):
    stash = Stash(on_disk=True)
    whole = random(3, 7, 5)
    for tensor in (whole, whole.transpose(0, 2), whole[:, 1:3], whole[:1].expand(4, 7, 5)):
        found = stash.put(tensor)()
        assert torch.equal(found, tensor) and found.stride() == tensor.stride()
    assert stash.put(whole)() is not whole and Stash(on_disk=False).put(whole)() is whole
    stash.clear()
    assert torch.equal(stash.put(whole + 1)(), whole + 1)


# ---------------------------------------------------------------------------------------------
# files


def test_a_mapped_file_holds_what_safetensors_reads(tmp_path):
    path = tmp_path / "some.safetensors"
    kinds = list(disk.SAFETENSORS_TYPES.values())
    held = {f"t{n}": random(3, n).mul(9).abs().to(kind) for n, kind in enumerate(kinds)}
    safetensors.torch.save_file(held, path)
    found = map_safetensors(path)
    assert found.keys() == held.keys()
    for name, tensor in held.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
    assert float32_bytes(read_header(path)) == 4 * sum(t.numel() for t in held.values())


def test_numbers_that_a_file_does_not_align_are_read(tmp_path):
    numbers = random(5)
    header = {"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}
    text = json.dumps(header).encode()
    text += b" " * (3 - len(text) % 8)
    content = len(text).to_bytes(8, "little") + text + numbers.numpy().tobytes()
    (tmp_path / "odd.safetensors").write_bytes(content)
    assert len(text) % 4 and torch.equal(
        map_safetensors(tmp_path / "odd.safetensors")["w"], numbers
    )


@pytest.mark.parametrize("cut", [0, 5, 60, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path, cut):
    path = tmp_path / "some.safetensors"
    safetensors.torch.save_file({"w": random(9, 9)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        map_safetensors(path)


# ---------------------------------------------------------------------------------------------
# models


def folder_in_pieces(folder: Path):
    """A Llama in bfloat16 in two files with an index, as large models are stored."""
    folder.mkdir()
    state = {name: t.bfloat16() for name, t in state_of(random_model(CONFIG)).items()}
    halves = [dict(list(state.items())[part::2]) for part in range(2)]
    places = {}
    for number, half in enumerate(halves):
        safetensors.torch.save_file(half, folder / f"model-{number}.safetensors")
        places |= dict.fromkeys(half, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def compressed(source, out):
    tokens = torch.randint(61, (14, 16), generator=torch.Generator().manual_seed(1))
    report = attar.compress(source, size="45%", out=out, data=tokens)
    return {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}, report


def test_on_disk_and_in_memory_the_same_bytes_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(gatherer, "KEPT_BY_HALF_FROM", 64)
    source = folder_in_pieces(tmp_path / "llama")
    held, report = compressed(source, tmp_path / "held")
    assert {applied.treatment for applied in report.receipt.applied} >= {"quantize_entropy"}
    monkeypatch.setattr(disk, "HELD_AT_MOST_BYTES", 0)
    monkeypatch.setattr(disk, "SMALLEST_BYTES", 1)
    model = attar.load(source)
    kinds = {name: type(p) for name, p in model.module.named_parameters()}
    assert all((kind is DiskWeight) == ("norm" not in name) for name, kind in kinds.items())
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    on, again = compressed(source, tmp_path / "on-disk")
    assert on == held
    assert again.verdict.divergence == report.verdict.divergence
    assert [g.measured_damage for g in again.verdict.groups] == [
        g.measured_damage for g in report.verdict.groups
    ]


def test_a_gguf_file_and_a_degridded_folder_on_disk_are_the_same_models(tmp_path, monkeypatch):
    config = {**LLAMA, "vocab_size": len(TOKENS)}
    file = write_gguf(tmp_path / "tiny.gguf", random_model(config), config)
    source = folder_in_pieces(tmp_path / "llama")
    held = [load_model(file), load_model(source, seed_degrid=3)]
    monkeypatch.setattr(disk, "HELD_AT_MOST_BYTES", 0)
    monkeypatch.setattr(disk, "SMALLEST_BYTES", 1)
    for one, two in zip(held, [load_model(file), load_model(source, seed_degrid=3)], strict=True):
        assert disk.lies_on_disk(two.module) and not disk.lies_on_disk(one.module)
        numbers = dict(one.module.named_parameters())
        for name, parameter in two.module.named_parameters():
            assert torch.equal(dense(parameter), numbers[name]), name


class Noting(Silent):
    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)


def test_a_run_that_needs_more_memory_than_there_is_says_so(
    tmp_path, monkeypatch, everything_on_disk
):
    model, progress = load_model(folder_in_pieces(tmp_path / "llama")), Noting()
    tokens = torch.randint(61, (14, 16), generator=torch.Generator().manual_seed(1))
    session = open_session(Recipe(model="llama"), model, progress, {"tokens": tokens})
    wanted = judging.forecast_memory(session)
    assert wanted > resident_bytes() / 2 and not progress.lines
    monkeypatch.setattr(judging, "machine_bytes", lambda: 10**6)
    judging.forecast_memory(session)
    (line,) = progress.lines
    assert "needs about" in line and "0.0 GB" in line


def test_a_model_made_smaller_in_python_stays_on_disk(tmp_path, everything_on_disk):
    model = attar.load(folder_in_pieces(tmp_path / "llama"))
    tokens = torch.randint(61, (14, 16), generator=torch.Generator().manual_seed(1))
    plan = attar.plan(model, attar.explain(model, tokens), size="45%", rounds=1)
    small = attar.apply(model, plan)
    assert disk.lies_on_disk(small.module)
    assert small.module.lm_head.weight is small.module.model.embed_tokens.weight
    assert attar.audit(model, small).divergence.value > 0

"""The written folder: it comes back bit for bit, or is refused; it appears whole or not at all."""

import hashlib
import json
import lzma

import pytest
import safetensors.torch
import torch
from tiny_models import LLAMA, random_model

from attar.errors import ModelError, OutputError
from attar.export.attar_folder import (
    COMPRESS_FROM_BYTES,
    check_output,
    file_contents,
    replaced_folder,
    weigh,
    write_files,
)
from attar.load.folder import is_attar_folder, load_folder, read_folder
from attar.load.tasks import TASKS
from attar.transform.apply import build_transform

TREATMENTS = [
    ("quantize_feedback", {"bits": 3, "group_size": 8, "symmetric": False}),
    ("keep_float", {"bits": 16, "bfloat16": False}),
    ("zero_n_m", {"n_kept": 2, "m": 4, "bits": 4}),
    ("quantize_rtn", {"bits": 8, "group_size": 0}),
]
TOKENS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def made():
    """Contents of a folder, and the module that it stands for."""
    module = random_model(LLAMA)
    module.requires_grad_(False)
    tensors, units, leftovers = {}, {}, {}
    matrices = [n for n, p in module.named_parameters() if p.dim() == 2]
    for number, name in enumerate(matrices):
        treatment, settings = TREATMENTS[number % len(TREATMENTS)]
        holder, weight = name.removesuffix(".weight"), module.get_parameter(name)
        replacement = build_transform(treatment, settings).apply(weight, None)
        tensors |= {f"{holder}/{part}": tensor for part, tensor in replacement.tensors.items()}
        units[holder] = {
            "treatment": treatment,
            **settings,
            "shape": list(weight.shape),
            "nats": 0.1,
        }
        weight.copy_(replacement.dense)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.copy_(parameter.half().float())
            leftovers[name] = parameter.half()
    description = {
        "attar": 1, "model": "toy", "origin": "random", "licence": "none", "source_bytes": 5,
        "task": "language", "builder": "causal-language", "config": LLAMA, "folded": [],
        "examples": {"tokens": {"shape": [2, 6], "dtype": "int64"}}, "units": units,
    }  # fmt: skip
    files = {"labels.txt": b"few", "tokenizer.json": b"much the same " * 1000}
    return file_contents(tensors | leftovers, description, files), module


@pytest.fixture
def folder(made, tmp_path):
    path = tmp_path / "small"
    path.mkdir()
    write_files(path, made[0])
    return path


def read(path):
    return read_folder(path, build_transform)


def refused(path, match):
    with pytest.raises(ModelError, match=match) as error:
        load_folder(read(path))
    assert error.value.hint


def test_a_folder_answers_bit_for_bit_as_what_was_decided(made, folder):
    model = load_folder(read(folder))
    for name, tensor in made[1].state_dict().items():
        assert torch.equal(model.module.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(
            TASKS["language"].forward(made[1], {"tokens": TOKENS}),
            model.task.forward(model.module, {"tokens": TOKENS}),
        )
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    assert not model.module.training
    assert all(not p.requires_grad for p in model.module.parameters())


def test_what_travels_with_a_model_comes_back(folder):
    model = load_folder(read(folder))
    assert model.files == {"labels.txt": b"few", "tokenizer.json": b"much the same " * 1000}
    assert (model.licence, model.source_bytes, model.task.name) == ("none", 5, "language")
    assert model.origin == "random, compressed by Attar"
    assert model.examples["tokens"].shape == (2, 6) and model.examples["tokens"].dtype == torch.long


def test_long_files_are_packed_and_short_ones_not(made, folder):
    assert (folder / "labels.txt").read_bytes() == b"few"
    packed = (folder / "tokenizer.json.xz").read_bytes()
    assert lzma.decompress(packed) == b"much the same " * 1000
    assert len(b"few") < COMPRESS_FROM_BYTES
    assert weigh(made[0]) == sum(file.stat().st_size for file in folder.iterdir())
    assert is_attar_folder(folder) and not is_attar_folder(folder.parent)


def test_the_same_input_gives_the_same_bytes(made):
    whole = bytes(made[0]["model.safetensors"])
    stored = safetensors.torch.load(whole)
    description = json.loads(bytes(made[0]["attar.json"]))
    description.pop("weights_sha256")
    again = [
        {name: bytes(content) for name, content in file_contents(order, description, {}).items()}
        for order in (stored, dict(reversed(stored.items())))
    ]
    assert again[0] == again[1]
    assert again[0]["model.safetensors"] == whole
    # And as safetensors itself writes them.
    assert whole == safetensors.torch.save(stored, metadata={"format": "attar"})


def test_one_changed_bit_of_the_weights_is_refused(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused(folder, "not the file attar.json describes")


def rewrite(folder, change_tensors=None, change_description=None):
    """Change what is inside and make the hash fit again."""
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    description = json.loads((folder / "attar.json").read_text())
    if change_tensors:
        change_tensors(stored)
    weights = safetensors.torch.save(stored)
    description["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    if change_description:
        change_description(description)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "attar.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    "name, match", [("model.embed_tokens/codes", "codes"), ("model.norm.weight", r"model\.norm")]
)
def test_a_missing_tensor_is_named(folder, name, match):
    rewrite(folder, lambda stored: stored.pop(name))
    refused(folder, match)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens/codes", "model.embed_tokens/scale", "model.norm.weight"]
)
def test_a_tensor_of_another_shape_is_refused(folder, name):
    def cut(stored):
        stored[name] = stored[name][:-1].clone()

    rewrite(folder, cut)
    refused(folder, "tensor|codes")


def test_a_scale_that_is_no_number_is_refused(folder):
    def spoil(stored):
        stored["model.embed_tokens/scale"][0, 0] = float("nan")

    rewrite(folder, spoil)
    refused(folder, "scale")


def test_a_leftover_that_is_no_number_or_not_the_models_is_refused(folder):
    def spoil(stored):
        stored["model.norm.weight"][0] = float("inf")

    rewrite(folder, spoil)
    refused(folder, r"model\.norm\.weight")

    def add(stored):
        stored["model.norm.weight"][0] = 1.0
        stored["model.extra"] = torch.ones(3)

    rewrite(folder, add)
    refused(folder, r"model\.extra")


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_a_folder_of_another_version_is_refused(folder, version):
    rewrite(folder, None, lambda d: d.update(attar=version))
    refused(folder, "not a description that this Attar reads")


@pytest.mark.parametrize(
    "key, bad, match",
    [
        ("builder", "pickle", "pickle"), ("builder", 5, "builder"), ("config", [], "config"),
        ("config", {"model_type": "none such"}, "none such|configuration"),
        ("task", "poetry", "poetry"),
        ("units", {"x": 5}, "'x'"), ("units", {"x": {"treatment": "keep_float"}}, "'x'"),
        ("examples", {"tokens": {"shape": [2, 6], "dtype": "object"}}, "example"),
        ("examples", {"tokens": 5}, "example"), ("source_bytes", "many", "source_bytes"),
    ],
)  # fmt: skip
def test_a_description_that_says_something_else_is_refused(folder, key, bad, match):
    rewrite(folder, None, lambda d: d.update({key: bad}))
    refused(folder, match)


def test_a_unit_of_another_shape_is_refused(folder):
    rewrite(folder, None, lambda d: d["units"]["model.embed_tokens"].update(shape=[61, 31]))
    refused(folder, "shape|codes|columns|tensor")


@pytest.mark.parametrize("bad", [{"group_size": "8"}, {"bits": 99}, {"bits": None}, {"nose": 1}])
def test_settings_that_cannot_be_are_refused(folder, bad):
    rewrite(folder, None, lambda d: d["units"]["model.embed_tokens"].update(bad))
    with pytest.raises(ValueError) as error:  # of Attar's own, both are
        load_folder(read(folder))
    assert error.value.hint


@pytest.mark.parametrize("name", ["model.safetensors", "attar.json"])
def test_a_missing_or_truncated_file_is_named(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    refused(folder, name)
    (folder / name).unlink()
    refused(folder, name)


def test_a_packed_file_that_is_damaged_is_named(folder):
    (folder / "tokenizer.json.xz").write_bytes(b"not packed")
    refused(folder, "tokenizer.json.xz cannot be unpacked")


def test_code_that_a_folder_names_is_never_run(folder):
    def name_code(description):
        description.update(builder="factory", config={"factory": "os:getcwd"})

    rewrite(folder, None, name_code)
    with pytest.raises(ModelError, match="not run") as error:
        load_folder(read(folder))
    assert "--factory os:getcwd" in error.value.hint


# --- writing


def test_a_folder_appears_when_all_went_well(tmp_path):
    out = tmp_path / "deep" / "out"
    with replaced_folder(out) as partial:
        write_files(partial, {"a": b"1"})
        assert not out.exists()
    assert (out / "a").read_bytes() == b"1"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_exception_leaves_what_was_there_before_and_nothing_else(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_bytes(b"0")
    with pytest.raises((error, OutputError)), replaced_folder(out) as partial:
        write_files(partial, {"new": b"1"})
        raise error("in the middle")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["old"]


def test_an_exception_leaves_no_folder_where_none_was(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(ValueError, match="middle"), replaced_folder(out):
        raise ValueError("in the middle")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_whole(tmp_path):
    out = tmp_path / "out"
    for number in (1, 2):
        with replaced_folder(out) as partial:
            write_files(partial, {f"file{number}": b"x"})
    assert [p.name for p in out.iterdir()] == ["file2"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_attar_did_not_write_is_never_replaced(tmp_path, folder):
    out = tmp_path / "out"
    check_output(out, force=False)
    out.mkdir()
    check_output(out, force=True)  # empty: nothing is lost
    (out / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(OutputError):
            check_output(out, force=force)
    with pytest.raises(OutputError, match="exists"):
        check_output(folder, force=False)
    check_output(folder, force=True)
    with pytest.raises(OutputError, match="not a folder"):
        check_output(out / "thesis.txt", force=True)
    with pytest.raises(OutputError, match="cannot write"):
        check_output(out / "thesis.txt" / "below", force=False)

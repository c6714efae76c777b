"""Writing GGUF: read back bit for bit, compressed end to end, and what is refused."""

import json
import random

import gguf
import pytest
import torch
import xllamacpp
from tiny_models import GEMMA, LLAMA, random_model, state_of, write_gguf

from attar import pipeline
from attar.cli import main
from attar.errors import ModelError, OutputError, PlanError, SettingError
from attar.export import attar_folder, gguf_model
from attar.gguf_names import FAMILIES, gguf_name, transformers_name
from attar.inputs import read_tokenizer
from attar.load.gguf_file import read_gguf
from attar.load.gguf_model import read_gguf_model
from attar.load.model import load_model
from attar.records import Recipe
from attar.transform.llama_blocks import TYPES
from attar.transform.quantize_llama import QuantizeLlama

LETTERS = "abcdefgh the 12\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", random_model(LLAMA), LLAMA)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    drawn = random.Random(0)
    path.write_text("".join(drawn.choice(LETTERS) for _ in range(9000)))
    return path


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.model_type)
def test_names_there_and_back(family):
    for layer in (0, 17):
        for short in family.layer_names:
            name = transformers_name(f"blk.{layer}.{short}.weight", family)
            assert gguf_name(name, family) == f"blk.{layer}.{short}.weight"
    assert gguf_name("model.embed_tokens.weight", family) == "token_embd.weight"
    assert gguf_name("model.rotary.weight", family) is None


def test_a_file_written_is_read_back_as_it_was(source, tmp_path):
    parts = read_gguf_model(source)
    stored = {name: gguf_model.Stored(tensor) for name, tensor in parts.state.items()}
    made = gguf_model.file_contents(stored, parts.architecture.config, parts.files, "tiny")
    path = tmp_path / "again.gguf"
    path.write_bytes(bytes(made[gguf_model.FILE]))
    again = read_gguf_model(path)
    assert again.files == parts.files
    assert again.architecture.config == parts.architecture.config
    assert again.state.keys() == parts.state.keys()
    assert all(torch.equal(again.state[name], tensor) for name, tensor in parts.state.items())
    # And in the order of llama.cpp, as the converter wrote it.
    ours, theirs = read_gguf(path), read_gguf(source)
    assert ours.metadata["tokenizer.ggml.pre"] == theirs.metadata["tokenizer.ggml.pre"]


def test_gemmas_gains_and_pieces_of_words_are_read_back(tmp_path):
    module = random_model(GEMMA)
    vocabulary = {"<unk>": 0, "<bos>": 1, "<0x41>": 2, "\u2581\u2581": 3, "ab": 4, "a": 5, "b": 6}
    tokenizer = {
        "added_tokens": [{"id": 1, "content": "<bos>", "special": True}],
        "normalizer": {"type": "Replace"},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {}}]},
        "model": {"byte_fallback": True, "unk_token": "<unk>", "vocab": vocabulary, "merges": []},
    }
    files = {"tokenizer.json": json.dumps(tokenizer).encode()}
    config = {**GEMMA, "bos_token_id": 1}
    stored = {name: gguf_model.Stored(tensor) for name, tensor in state_of(module).items()}
    path = tmp_path / "gemma.gguf"
    path.write_bytes(bytes(gguf_model.file_contents(stored, config, files, "g")[gguf_model.FILE]))
    file = read_gguf(path)
    assert file.metadata["tokenizer.ggml.tokens"][:5] == ["<unk>", "<bos>", "<0x41>", "  ", "ab"]
    assert file.metadata["tokenizer.ggml.token_type"][:8] == [2, 3, 6, 1, 1, 1, 1, 4]
    assert file.metadata["tokenizer.ggml.add_bos_token"] is True
    state = read_gguf_model(path).state
    for name, tensor in state_of(module).items():
        # The gain is stored as 1 + w in float32, and read as that less 1.
        assert torch.allclose(state[name], tensor, atol=2e-7), name


@pytest.fixture(scope="module")
def compressed(source, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "small"
    recipe = Recipe(
        str(source), "70%", data=str(text), to="gguf", calibration=256, recovery=64, audit=64
    )
    return pipeline.compress(recipe, out), out


def test_the_file_fits_its_budget_and_holds_what_was_planned(compressed, source):
    report, out = compressed
    path = out / gguf_model.FILE
    assert report.bytes_after == path.stat().st_size <= report.plan.budget.weight_bytes
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    kinds = set()
    for unit, choice in report.plan.choices.items():
        tensor = read[gguf_name(f"{unit}.weight", FAMILIES["llama"])]
        wanted = choice.settings.get("type", "F16")
        assert tensor.tensor_type.name == wanted
        kinds.add(wanted)
    assert kinds - {"F16"} and report.verdict.divergence.value < 10
    written, original = load_model(str(path)), load_model(str(source))
    assert (written.files, written.licence) == (original.files, original.licence)


def test_the_folder_and_the_file_can_be_run(compressed, capsys):
    for model in (compressed[1], compressed[1] / gguf_model.FILE):
        assert main(["run", str(model), "the", "--max-tokens", "3"]) == 0
        assert capsys.readouterr().out.strip()


def test_a_folder_with_a_gguf_file_is_replaced_only_when_asked(compressed, source, capsys):
    typed = ["compress", str(source), "--size", "70%", "--to", "gguf", "--out", str(compressed[1])]
    assert main(typed) == 2
    assert "--force" in capsys.readouterr().err
    # And then by any of Attar's forms, but not where a file of another name lies.
    attar_folder.check_output(compressed[1], force=True)
    with pytest.raises(OutputError, match="not a folder that Attar wrote"):
        attar_folder.check_output(source.parent, force=True)


def test_what_cannot_be_written_is_refused_before_any_work(source, text, tmp_path):
    with pytest.raises(SettingError, match="--to cannot be 'tflite'"):
        pipeline.compress(Recipe(str(source), "70%", to="tflite"), tmp_path / "x")
    with pytest.raises(ModelError, match="cannot be written as GGUF"):
        gguf_model.check_model({"model_type": "bert"}, {}, "b")
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        gguf_model.check_model(LLAMA, {}, "b")
    tokenizer = {
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"vocab": {"a": 0}, "merges": []},
    }
    with pytest.raises(ModelError, match="by a rule"):
        gguf_model.check_model(LLAMA, {"tokenizer.json": json.dumps(tokenizer).encode()}, "b")
    with pytest.raises(SettingError, match="--to cannot be 'tflite'"):
        pipeline.plan(
            Recipe(str(source), "70%", data=str(text), to="tflite", audit=64, recovery=64)
        )
    assert not (tmp_path / "x").exists()


def test_a_plan_with_a_treatment_llama_cpp_does_not_know_is_refused(compressed, text, tmp_path):
    plan = (compressed[1] / "report" / "plan.yaml").read_text()
    edited = tmp_path / "plan.yaml"
    first = next(line for line in plan.splitlines() if "quantize_llama" in line)
    name = first.split(":")[0]
    line = f"{name}: {{treatment: quantize_rtn, bits: 4, group_size: 32}}"
    edited.write_text(plan.replace(first, line))
    with pytest.raises(PlanError, match="does not know"):
        pipeline.apply_plan_file(edited, tmp_path / "out", recipe=Recipe(""))


def test_llama_cpp_gives_the_same_answers(compressed):
    check_answers_of_llama_cpp(compressed[1] / gguf_model.FILE)


@pytest.mark.parametrize("name", ["IQ4_XS", "IQ3_S", "IQ2_S"])
def test_llama_cpp_reads_blocks_of_256_as_we_do(name, source, tmp_path):
    config, parts = {**LLAMA, "intermediate_size": 256}, read_gguf_model(source)
    stored = {n: gguf_model.Stored(t) for n, t in state_of(random_model(config)).items()}
    for layer in (0, 1):
        own = f"model.layers.{layer}.mlp.down_proj.weight"
        made = QuantizeLlama(name).apply(stored[own].values.float(), None).tensors["blocks"]
        stored[own] = gguf_model.Stored(made, TYPES[name].number)
    path = tmp_path / "wide.gguf"
    described = {**parts.architecture.config, **config}
    made = gguf_model.file_contents(stored, described, parts.files, "w")
    path.write_bytes(bytes(made[gguf_model.FILE]))
    check_answers_of_llama_cpp(path)


def check_answers_of_llama_cpp(path):
    """It rounds activations to 8 bits and keeps keys and values in 16, so nearly the same."""
    prompt = "the 12 cab of the"
    wanted = xllamacpp.CommonParams()
    wanted.model.path = str(path)
    wanted.n_ctx, wanted.cpuparams.n_threads = 64, 1
    server = xllamacpp.Server(wanted)
    asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 50}
    (found,) = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    del server  # it says goodbye, and should not after pytest's last line
    model = load_model(str(path))
    tokens = read_tokenizer(model.files).encode(prompt).ids
    with torch.no_grad():
        outputs = model.task.forward(model.module, {"tokens": torch.tensor([tokens])})
    expected = outputs[0, -1].log_softmax(-1)
    theirs = {one["id"]: one["logprob"] for one in found["top_logprobs"]}
    assert len(theirs) >= 50
    given = torch.full_like(expected, -30.0)
    given[list(theirs)] = torch.tensor(list(theirs.values()))
    divergence = float((expected.exp() * (expected - given))[list(theirs)].sum())
    # Rows of q and k in another order, or another vocabulary, would be off by a nat or more.
    assert abs(divergence) < 0.01
    assert float(expected.exp() @ (expected - expected.flip(0))) > 0.5

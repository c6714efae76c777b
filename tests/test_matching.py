"""Models that differ in more than weights: what can be compared, and what is said of the rest."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy_code
import toys
from tiny_models import LLAMA, TOKENS, random_model, write_gguf, write_huggingface
from torch import nn
from writing_models import FEW

import attar
from attar.audit.not_finite import first_not_finite
from attar.errors import DataError, ModelError
from attar.load.model import load_model
from attar.load.openers import OPENERS, QUANTIZERS, quantized

# --- tokenizers


def padded(model, rows):
    """The same language model with more rows than tokens."""
    from copy import deepcopy

    module = deepcopy(model.module)
    for name in ("model.embed_tokens", "lm_head"):
        layer = module.get_submodule(name)
        more = torch.full((rows, layer.weight.shape[1]), 9.0)
        layer.weight = nn.Parameter(torch.cat([layer.weight, more]), requires_grad=False)
    return replace(model, module=module, name="padded")


def tokens(n=60, length=6, high=250):
    draws = torch.Generator().manual_seed(0)
    return {"tokens": torch.randint(high, (n, length), generator=draws)}


def test_rows_after_the_last_token_are_left_out_and_said(tmp_path):
    model = toys.language_model()  # 264 rows
    text = tmp_path / "t.txt"
    text.write_text(toys.numbered_text(900))
    before = attar.audit(model, model, text)
    found = attar.audit(model, padded(model, 8), text)
    assert found.verdict.divergence.value == pytest.approx(0.0, abs=1e-6)
    assert found.verdict.flips.value == 0.0
    (note,) = found.verdict.notes
    assert "264 outputs and padded 272" in note and "first 264" in note
    assert before.verdict.notes == () and before.verdict.n_predictions == found.n_predictions
    swapped = attar.audit(padded(model, 8), model, text)
    assert swapped.verdict.flips.value == 0.0 and len(swapped.verdict.notes) == 1


def another_order(seed):
    """Of all but the two special tokens, whose numbers a tokenizer gives out by itself."""
    return np.append(np.random.default_rng(seed).permutation(259), np.arange(259, 264))


def renamed(model, order):
    """The same weights with a tokenizer that gives token t the number order[t]."""
    known = json.loads(model.files["tokenizer.json"])
    known["model"]["vocab"] = {
        token: int(order[number]) for token, number in known["model"]["vocab"].items()
    }
    files = {**model.files, "tokenizer.json": json.dumps(known).encode()}
    return replace(model, files=files, name="renamed")


def renumbered(model, order):
    """The same model in every respect, with its tokens in another order."""
    from copy import deepcopy

    module = deepcopy(model.module)
    for name in ("model.embed_tokens", "lm_head"):
        layer = module.get_submodule(name)
        moved = torch.empty_like(layer.weight)
        moved[torch.from_numpy(order)] = layer.weight.detach()
        layer.weight = nn.Parameter(moved, requires_grad=False)
    return replace(renamed(model, order), module=module)


def test_a_shuffled_tokenizer_is_named_first_and_weights_are_not_blamed():
    model, order = toys.language_model(), another_order(0)
    found = attar.audit(model, renamed(model, order), tokens()).verdict
    first, *rest = found.reasons
    assert first.startswith("the tokenizer of renamed is at fault, and not its weights")
    assert first.endswith("by those of toy language 0") and rest
    assert found.divergence.value > 0 and found.flips.value > 0.5
    (note,) = found.notes
    assert "compared by the names of tokens" in note and " numbers stand for different ones" in note


def test_the_same_model_with_its_tokens_in_another_order_is_the_same():
    model, order = toys.language_model(), another_order(1)
    found = attar.audit(model, renumbered(model, order), tokens()).verdict
    assert found.divergence.value == pytest.approx(0.0, abs=1e-6) and found.flips.value == 0.0
    assert found.perplexity_ratio.value == pytest.approx(1.0, abs=1e-5)
    assert not any("at fault" in reason for reason in found.reasons)
    assert "compared by the names of tokens" in found.notes[0]
    back = attar.audit(renumbered(model, order), model, tokens()).verdict
    assert back.flips.value == 0.0


def test_what_needs_the_same_tokens_is_refused_where_tokenizers_differ():
    model, order = toys.language_model(), another_order(1)
    other = renumbered(model, order)
    with pytest.raises(DataError, match="the tokenizers differ, so weights of tokens do too"):
        attar.audit(model, other, tokens(), attribute=True)
    with pytest.raises(DataError, match="the tokenizers of toy language and renamed differ"):
        attar.audit(model, other, tokens(), drift=True)


def sentences():
    some = tokens()
    return {**some, "attention": torch.ones_like(some["tokens"])}


def test_encoders_with_tokens_in_another_order_are_compared_by_name():
    model, order = toys.sentence_model(), another_order(2)
    other = renamed(model, order)
    found = attar.audit(model, other, sentences()).verdict
    assert found.reasons[0].startswith("the tokenizer of renamed is at fault, and not its weights")
    (note,) = found.notes
    assert "compared by the names of tokens" in note
    from copy import deepcopy

    module = deepcopy(model.module)
    module.vectors.weight.data[torch.from_numpy(order)] = model.module.vectors.weight.detach()
    same = attar.audit(model, replace(other, module=module), sentences()).verdict
    assert same.divergence.value == pytest.approx(0.0, abs=1e-9)
    assert same.notes == (note,) and not any("at fault" in reason for reason in same.reasons)


def test_encoders_are_refused_where_the_data_holds_a_token_that_one_does_not_know():
    model, gone = toys.sentence_model(), 200  # a letter that no merge is made of
    known = json.loads(model.files["tokenizer.json"])
    known["model"]["vocab"] = {
        "another letter" if number == gone else token: number
        for token, number in known["model"]["vocab"].items()
    }
    other = replace(model, files={"tokenizer.json": json.dumps(known).encode()}, name="another")
    held = sentences()
    held["tokens"][:, 2] = gone
    with pytest.raises(
        DataError, match="the audit data holds 1 that only toy embed knows"
    ) as error:
        attar.audit(model, other, held)
    assert "know the same tokens" in error.value.hint
    held["tokens"][held["tokens"] == gone] = 41
    found = attar.audit(model, other, held).verdict
    assert found.divergence.value == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("swapped", [False, True])
def test_rows_after_the_last_token_neither_write_nor_answer(tmp_path, monkeypatch, swapped):
    from attar import behaving

    sides = []

    def compare(name, items, before, after, seed):
        sides.append(np.concatenate([*before, *after]).reshape(2, -1))
        return original(name, items, before, after, seed)

    original = behaving.compare_choices
    monkeypatch.setattr(behaving, "compare_choices", compare)
    model = toys.language_model()
    more, text, asked = padded(model, 8), tmp_path / "t.txt", tmp_path / "q.jsonl"
    text.write_text(toys.numbered_text(900))
    question = {"context": "Word 1 is", "choices": [" word", " row", " a number"], "answer": 0}
    asked.write_text((json.dumps(question) + "\n") * 4)
    pair = (more, model) if swapped else (model, more)
    found = attar.audit(*pair, text, generate=4, choices=[asked]).verdict
    assert found.generation.equal_tokens.value == 1.0
    assert np.allclose(*sides[0], atol=1e-6)


def test_tokenizers_that_differ_say_how(text_here, typed):
    write_gguf(text_here / "a.gguf", random_model(LLAMA), LLAMA)
    other = [*TOKENS]
    other[40], other[41] = other[41], other[40]
    assert TOKENS[40] != TOKENS[41]
    write_gguf(text_here / "b.gguf", random_model(LLAMA), LLAMA, tokens=other)
    code, shown = typed("audit", "a.gguf", "b.gguf", *FEW, "--generate", "2")
    said = " ".join(shown.out.split())
    assert code in (0, 1, 3) and "the tokenizers differ: a.gguf has 61 tokens and b.gguf 61" in said
    assert f"2 numbers stand for different ones, first 40 is {TOKENS[40]!r} and" in said
    assert "the tokenizers differ, so it was neither let write nor asked" in said
    other[TOKENS.index("q")] = "never seen"
    write_gguf(text_here / "b.gguf", random_model(LLAMA), LLAMA, tokens=other)
    code, shown = typed("audit", "a.gguf", "b.gguf", *FEW)
    assert code == 2 and "3 numbers stand for different ones" in shown.err
    assert "hint: compare models whose tokenizers know the same tokens" in shown.err


def test_a_vocabulary_with_more_at_its_end_is_compared_on_what_both_know(text_here, typed):
    config = {**LLAMA, "vocab_size": 63}
    write_gguf(text_here / "a.gguf", random_model(LLAMA), LLAMA)
    write_gguf(text_here / "b.gguf", random_model(config), config, tokens=[*TOKENS, "S", "T"])
    code, shown = typed("audit", "a.gguf", "b.gguf", *FEW, "--json", "x.json")
    facts = json.loads((text_here / "x.json").read_text())
    assert code in (0, 1, 3) and "first 61" in facts["notes"][0]
    assert "note: a.gguf has 61 outputs and b.gguf 63" in " ".join(shown.out.split())


def test_a_token_that_one_alone_knows_is_refused():
    from attar.matching import match
    from attar.records import Recipe, Silent
    from attar.session import open_session

    model = toys.language_model()
    session = open_session(Recipe(model="m"), padded(model, 8), Silent(), tokens(high=270))
    with pytest.raises(DataError, match=r"token 26\d, which only padded knows: both know 264"):
        match(session, model)


def test_vocabularies_without_names_and_of_two_sizes_are_refused():
    model = toys.language_model()
    bare = replace(padded(model, 8), files={})
    with pytest.raises(DataError, match=r"toy language has 264 tokens and padded 272.*tokenizer"):
        attar.audit(replace(model, files={}), bare, tokens())


# --- labels

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]


def seen(n=60):
    return {"pixels": torch.randn(n, 3, 33, 33, generator=torch.Generator().manual_seed(3))}


def labelled(names, order=range(7), **config):
    """The toy picture model with its answers in another order, or some of them."""
    model = toys.picture_model("\n".join(names).encode())
    last = model.module[-1]
    order = list(order)
    layer = nn.Linear(5, len(order))
    layer.weight = nn.Parameter(last.weight[order], requires_grad=False)
    layer.bias = nn.Parameter(last.bias[order], requires_grad=False)
    module = nn.Sequential(*model.module[:-1], layer).eval().requires_grad_(False)
    picture = {"picture": {**toys.PICTURE, **config}}
    architecture = replace(model.architecture, config=picture)
    return replace(model, module=module, architecture=architecture, name=f"toy {len(order)}")


def test_labels_in_another_order_are_paired_by_name():
    order = [3, 0, 6, 1, 2, 5, 4]
    other = labelled([NAMES[i] for i in order], order)
    answers = np.arange(60) % 7
    found = attar.audit(labelled(NAMES), other, {**seen(), "answers": torch.tensor(answers)})
    assert found.verdict.flips.value == 0.0
    assert found.verdict.truth.accuracy_change.value == 0.0
    (note,) = found.verdict.notes
    assert "first class 0 is 'ant' and 'dog'" in note and "by name on 7 labels" in note
    assert "left out" not in note
    # without names they are compared by their places, and nothing is said
    bare = replace(other, files={})
    found = attar.audit(replace(labelled(NAMES), files={}), bare, seen())
    assert found.verdict.flips.value > 0.5 and found.verdict.notes == ()


def test_a_label_that_one_alone_has_is_left_out_with_its_true_answers():
    order = [0, 1, 3, 4, 5, 6]
    other = labelled([NAMES[i] for i in order], order)
    answers = torch.arange(60) % 7
    found = attar.audit(labelled(NAMES), other, {**seen(), "answers": answers})
    (note,) = found.verdict.notes
    assert "toy 7 has 7 and toy 6 6" in note and "on 6 labels, and the rest is left out" in note
    assert found.verdict.flips.value == 0.0
    judged = [i for i in answers.tolist() if i != 2]
    assert found.verdict.truth.n_predictions <= len(judged)
    assert found.verdict.divergence.value == pytest.approx(0.0, abs=1e-6)
    # names in the report are those of the original
    noisy = replace(other, module=nn.Sequential(*other.module[:-1], nn.Linear(5, 6)).eval())
    changed = attar.audit(labelled(NAMES), noisy, seen()).verdict.changed
    named = {one.before.split(" (")[0] for one in changed}
    assert named and named <= set(NAMES) - {"cat"}


def test_labels_that_share_nothing_are_refused():
    with pytest.raises(DataError, match=r"'ant' and 'ANT'.*they share 0"):
        attar.audit(labelled(NAMES), labelled([name.upper() for name in NAMES]), seen())


def test_outputs_of_two_sizes_without_names_are_refused_by_name():
    other = replace(labelled(NAMES[:6], range(6)), files={})
    with pytest.raises(DataError, match=r"toy 7 gives 7 numbers and toy 6 6") as error:
        attar.audit(labelled(NAMES), other, seen())
    assert "labels.txt" in error.value.hint


def test_a_labels_file_of_another_length_names_nothing():
    wrong = labelled(NAMES[:5])
    assert attar.audit(labelled(NAMES), wrong, seen()).verdict.notes == ()
    with pytest.raises(DataError, match=r"name 7 and 5"):
        attar.audit(labelled(NAMES), labelled(NAMES[:5], range(6)), seen())


def test_layers_are_not_blamed_for_labels_in_another_order():
    from attar.attributing import with_attribution
    from attar.judging import judge_models
    from attar.records import Recipe, Silent
    from attar.session import open_session

    other = labelled(NAMES[::-1], range(6, -1, -1))
    session = open_session(Recipe(model="m"), labelled(NAMES), Silent(), seen())
    with pytest.raises(DataError, match="labels differ"):
        with_attribution(session, other, judge_models(session, other), {})


# --- inputs


def classifier(side):
    torch.manual_seed(side)
    module = nn.Sequential(nn.Linear(side, 9), nn.ReLU(), nn.Linear(9, 4))
    return attar.load(module, examples=torch.zeros(2, side), task="classify")


def test_inputs_of_another_size_are_refused_with_both_sizes():
    with pytest.raises(DataError, match=r"reads pixels of 8 and Sequential pixels of 5") as error:
        attar.audit(classifier(8), classifier(5), torch.randn(60, 8))
    assert "names and sizes" in error.value.hint


def test_pictures_that_are_wanted_otherwise_are_given_as_the_original_wants_and_said():
    other = labelled(NAMES, size=48)
    (note,) = attar.audit(labelled(NAMES), other, seen()).verdict.notes
    assert "size 33 and 48" in note and "as toy 7 wants them" in note


def test_data_without_labels_gets_what_needs_none():
    found = attar.audit(classifier(8), classifier(8), torch.randn(60, 8)).verdict
    assert found.truth is None and found.flips.value == 0.0 and found.outcome == "passed"


# --- NaN


def test_the_first_part_that_gives_nan_is_the_innermost():
    class Divides(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

        def forward(self, x):
            return {"one": (self.inner(x), [x / 0])}

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = Divides(), nn.Identity()

        def forward(self, x):
            return self.last(self.first(x)["one"][1][0])

    whole = Whole()
    assert first_not_finite(whole, lambda: whole(torch.ones(2, 3))) == "first"
    whole.first.inner[0].weight.data[1, 1] = float("inf")
    assert first_not_finite(whole, lambda: whole(torch.ones(2, 3))) == "first.inner.0"
    assert first_not_finite(nn.ReLU(), lambda: None) is None
    numbers = nn.Embedding(3, 2)
    assert first_not_finite(numbers, lambda: numbers(torch.tensor([1]))) is None


def test_no_hook_is_left_behind_by_an_error():
    module = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        first_not_finite(module, lambda: module(torch.ones(2, 4)))
    assert not any(part._forward_hooks for part in module.modules())


def test_a_model_that_answers_nan_is_failed_with_where_it_begins(tmp_path, typed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = toy_code.save_data(tmp_path / "x.npz")
    more = ["--task", "classify", "--data", data]
    code, shown = typed("audit", "toy_code:classifier", "toy_code:overflowing", *more)
    words = " ".join(shown.out.split())
    assert code == 1 and "answers NaN or infinity, first at sample 0" in words
    assert "in toy_code:overflowing, the first NaN or infinity leaves its part 3 (Linear)" in words
    _, shown = typed("audit", "toy_code:overflowing", "toy_code:classifier", *more)
    assert "in toy_code:overflowing, the first" in " ".join(shown.out.split())


# --- what cannot be opened


@pytest.mark.parametrize("kind", OPENERS)
def test_a_file_of_another_tool_names_what_opens_it(tmp_path, kind):
    file = tmp_path / (kind if kind == "saved_model.pb" else f"model{kind}")
    file.write_bytes(b"whatever")
    source = tmp_path if kind == "saved_model.pb" else file
    with pytest.raises(ModelError) as error:
        load_model(str(source))
    what, opener = OPENERS[kind]
    assert what in error.value.problem and error.value.hint == opener


def test_a_folder_of_another_tool_names_what_opens_it(tmp_path):
    (tmp_path / "m.mlpackage").mkdir()
    with pytest.raises(ModelError, match="Core ML") as error:
        load_model(str(tmp_path / "m.mlpackage"))
    assert "coremltools" in error.value.hint


@pytest.mark.parametrize("method", [*QUANTIZERS, "of its own", None, 3])
def test_a_folder_that_is_quantized_already_names_what_opens_it(tmp_path, method):
    more = {"quantization_config": {"quant_method": method, "bits": 4}}
    folder = write_huggingface(tmp_path / "m", random_model(LLAMA), LLAMA, **more)
    with pytest.raises(ModelError, match="quantized already") as error:
        load_model(str(folder))
    assert QUANTIZERS.get(method, "transformers") in error.value.hint
    assert "package.module:factory" in error.value.hint
    assert str(quantized("m", more["quantization_config"])) == str(error.value)
    assert "already, which" in quantized("m", None).problem


def test_what_cannot_be_opened_is_refused_by_an_audit(tmp_path, typed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.tflite").write_bytes(b"\x1c\x00\x00\x00TFL3")
    data = toy_code.save_data(tmp_path / "x.npz")
    words = ["toy_code:classifier", "small.tflite", "--task", "classify", "--data", data]
    code, shown = typed("audit", *words)
    assert code == 2 and "small.tflite is a model of LiteRT" in shown.err
    assert "hint: ai-edge-litert runs it" in shown.err
    # before the original's data is read or made, which may take minutes; of several models too
    missing = [*words[:-1], "no-such-data.npz"]
    for named in (missing, [words[0], "toy_code:other", *missing[1:]]):
        code, shown = typed("audit", *named)
        assert code == 2 and "small.tflite is a model of LiteRT" in shown.err


def test_a_model_that_answers_nan_is_not_let_write(text_here, typed):
    module = random_model(LLAMA)
    write_gguf(text_here / "a.gguf", module, LLAMA)
    for name in ("up_proj", "down_proj"):
        getattr(module.model.layers[1].mlp, name).weight.data.mul_(1e30)
    write_gguf(text_here / "b.gguf", module, LLAMA)
    words = ["audit", "a.gguf", "b.gguf", *FEW, "--generate", 2, "--json", "x.json"]
    code, shown = typed(*words)
    facts = json.loads((text_here / "x.json").read_text())
    assert code == 1 and facts["generation"] is None
    assert "neither let write nor asked" in facts["notes"][0]
    words = " ".join(shown.out.split())
    assert "in b.gguf, the first NaN or infinity leaves its part" in words
    assert "model.layers.1.mlp.down_proj" in words

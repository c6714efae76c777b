"""What an answer rests on, from the command line and from Python, of every kind of input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_code
import toys

import attar
from attar import explaining
from attar.errors import DataError
from attar.explained import explanations_to_json
from attar.explaining import Wish, explain_inputs
from attar.export.run import embed_texts
from attar.records import Silent
from attar.report.explanation import explanations_to_html, explanations_to_text


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_code.save_data(Path("d.npz"), count=30)
    return tmp_path


def explained(model, *inputs, **more):
    found = explain_inputs(model, Wish(inputs, **more), Silent())
    facts = explanations_to_json(found)
    json.dumps(facts, allow_nan=False)
    return found, explanations_to_text(facts, 80), explanations_to_html(facts)


def test_a_text_is_explained_token_by_token():
    model = toys.language_model()
    found, told, page = explained(model, "one two", methods=["all"])
    assert {one.method for one in found} == set(explaining.METHODS) - {"grad_cam"}
    sample = found[0].subject.sample
    outputs = model.task.forward(model.module, sample).log_softmax(-1)[0, -1]
    for one in found:
        assert len(one.values) == len(one.subject.parts)
        assert one.method == "saliency" or float(one.values[0]) == 0  # it stays
        assert one.answer == pytest.approx(float(outputs[one.subject.asked.answer]), abs=1e-5)
        assert 0 < one.curves.p <= 1 and -1 <= one.agreement <= 1
    assert "with probability" in told and all(len(line) <= 80 for line in told.splitlines())
    assert page.count("<h3>") == len(found) and "<script" not in page


def test_python_explains_and_writes_a_page(tmp_path):
    found = attar.explain_inputs(toys.language_model(), "one two", check=False)
    assert found.report(tmp_path / "page").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "page/report.json").read_text()) == found.to_json()


def test_another_token_may_be_asked_for():
    model = toys.language_model()
    (own,), _, _ = explained(model, "one two three", check=False)
    (other,), _, _ = explained(model, "one two three", target="t", check=False)
    assert own.curves is None and own.agreement is None
    assert other.subject.target == "t" and not torch.equal(own.values, other.values)
    with pytest.raises(DataError, match="is 9 tokens"):
        explained(model, "one two three", target="two three")


def test_a_sentence_is_near_another_because_of_its_tokens():
    model = toys.sentence_model()
    found, told, _ = explained(model, "one two three", "two two", target="two")
    assert len(found) == 2 and "nearness to 'two'" in told
    for one in found:
        vectors = embed_texts(model, [one.subject.name, "two"])
        wanted = float(vectors[0] @ vectors[1] / vectors[1].norm())
        assert one.answer == pytest.approx(wanted, abs=1e-5)


def test_pictures_are_explained_in_squares(tmp_path):
    toys.write_pictures(tmp_path, 2)
    files = sorted(map(str, tmp_path.iterdir()))
    model = toys.picture_model()
    found, told, page = explained(model, *files, methods=["all"])
    assert len(found) == 2 * len(explaining.METHODS)
    assert "row 1 of 7" in told and page.count("data:image/png;base64") == len(found)
    assert str(tmp_path) not in page
    with pytest.raises(DataError, match="no class 'clasp 1'") as refused:
        explained(model, files[0], target="clasp 1")
    assert "class 1" in refused.value.hint


def test_a_word_is_heard_in_bands_of_sound(tmp_path):
    import soundfile

    noise = np.random.default_rng(0).standard_normal(16_000) * 0.1
    soundfile.write(tmp_path / "noise.wav", noise, 16_000)
    file, model = str(tmp_path / "noise.wav"), toys.speech_model()
    (one,), told, page = explained(model, file, methods=["occlusion"], check=False)
    assert one.values.shape == (80, 3000) and " s, band " in told and "<svg" in page
    again = one.subject.sample["decoder_tokens"]
    assert one.subject.asked.position == again.shape[1] - 1 == 3


def test_rows_of_numbers_start_at_the_means_of_their_columns(here, typed):
    command = ["explain", "toy_code:classifier", "--task", "classify", "--data", "d.npz"]
    code, shown = typed(*command, "4", "7", "--report", "page", "--json", "x.json")
    assert code == 0 and "row 4 of d.npz" in shown.out
    assert "where it is given the mean of each column" in " ".join(shown.out.split())
    facts = json.loads(Path("x.json").read_text())
    assert facts == json.loads(Path("page/report.json").read_text())
    one = facts["explanations"][1]
    module, _ = toy_code.classifier()
    inputs = torch.from_numpy(np.load("d.npz")["inputs"])
    outputs = module(torch.stack([inputs[7], inputs.mean(0)])).log_softmax(-1)
    target = int(one["target"].removeprefix("class "))
    assert target == int(outputs[0].argmax())
    assert one["answer"] == pytest.approx(float(outputs[0, target]), abs=1e-5)
    assert one["baseline_answer"] == pytest.approx(float(outputs[1, target]), abs=1e-5)
    assert sum(one["values"]) == pytest.approx(one["answer"] - one["baseline_answer"], rel=0.05)
    assert "<svg" in Path("page/report.html").read_text()


def test_a_compressed_model_is_explained_like_the_original(here, typed):
    made = ["compress", "toy_code:classifier", "--task", "classify", "--data", "d.npz"]
    sizes = ["--calibration", "12", "--recovery", "6", "--audit", "12", "--rounds", "1"]
    assert typed(*made, *sizes, "--size", "60%", "--out", "small")[0] in (0, 3)
    asked = ["--data", "d.npz", "3", "--no-check", "--json"]
    assert typed("explain", "toy_code:classifier", "--task", "classify", *asked, "a.json")[0] == 0
    code, shown = typed(
        *("explain", "small", "--task", "classify", "--factory", "toy_code:classifier"),
        *(*asked, "b.json"),
    )
    assert code == 0, shown.err
    one, other = (
        np.array(json.loads(Path(file).read_text())["explanations"][0]["values"])
        for file in ("a.json", "b.json")
    )
    assert not np.array_equal(one, other) and np.corrcoef(one, other)[0, 1] > 0.9


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["3", "--method", "guessing"], "use one of saliency"),
        (["3", "--target", "class 99"], "there is no class 'class 99'"),
        (["99"], "a number from 0 to 29"),
        (["three"], "has no row 'three'"),
        (["3", "--method", "grad_cam"], "grad_cam explains pictures"),
        (["--method", "occlusion"], "are about an INPUT"),
        (["3", "--units"], "are about the whole model"),
    ],
)
def test_what_cannot_be_explained_is_refused_with_what_to_type(here, typed, words, says):
    command = ["explain", "toy_code:classifier", "--task", "classify", "--data", "d.npz"]
    code, shown = typed(*command, *words, "--report", "page")
    assert code == 2 and says in " ".join(shown.err.split())
    assert not Path("page").exists()


def test_numbers_without_a_file_are_refused(here, typed):
    code, shown = typed("explain", "toy_code:classifier", "--task", "classify", "3")
    assert code == 2 and "attar explain MODEL 0 --data d.npz" in " ".join(shown.err.split())


def test_numbers_that_are_not_finite_are_said(monkeypatch):
    nowhere = type("Nowhere", (), {"complete": False, "__call__": lambda _, q: q.point[0] / 0})
    monkeypatch.setitem(explaining.METHODS, "saliency", nowhere)
    model = toys.language_model()
    with pytest.raises(DataError, match="numbers that are not finite") as refused:
        explained(model, "one two", methods=["saliency"])
    assert "occlusion" in refused.value.hint


def test_a_method_that_fails_its_check_says_so():
    model = toys.language_model()
    (one,), told, page = explained(model, "one two three two one", methods=["saliency"])
    assert one.gap is None
    if one.curves.p > 0.05:
        assert "caution: taking away" in told and "Caution:" in page
    assert one.problems or one.curves.p <= 0.05

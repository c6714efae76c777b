"""Several compressed models: one line each, and the inputs that most of them forget."""

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import toy_code
from hypothesis import given, settings
from hypothesis import strategies as st
from report_cases import HOSTILE, efficientnet, failed, writing
from scipy import stats
from test_verdict import measured
from torch import nn
from writing_models import FEW, write_models

import attar
from attar.audit.exemplars import agreed, find_exemplars, over_represented
from attar.comparing import worst
from attar.errors import DataError
from attar.records import Estimate, Exemplar, Exemplars, ExemplarSlice, Population
from attar.report.population import (
    population_to_html,
    population_to_json,
    population_to_text,
    write_population,
)

TOY = ["--task", "classify"]


def found(before, after, *, truth=None, labels=(), divergence=None, samples=None):
    """Exemplars of models that give these answers, by plain numbers."""
    models = []
    for own in after:
        one = measured(np.ones(len(before)) if divergence is None else divergence, samples=samples)
        known = np.arange(len(before)) if truth is not None else np.zeros(0, int)
        models.append(
            replace(
                one,
                answer_before=np.array(before),
                answer_after=np.array(own),
                surprise_at=known,
                truth=np.array(truth if truth is not None else [], int),
            )
        )
    return find_exemplars(
        models, labels, seed=0, name_of="abcdefgh".__getitem__, shown=[], decode=None
    )


@settings(derandomize=True, max_examples=80, deadline=None)
@given(
    st.integers(1, 7).flatmap(
        lambda k: st.lists(st.lists(st.integers(0, 3), min_size=k, max_size=k), min_size=1)
    )
)
def test_agreed_is_the_answer_of_more_than_half(rows):
    answers = np.array(rows).T
    middle, count = agreed(answers)
    for row, answer, n in zip(rows, middle, count, strict=True):
        commonest, times = Counter(row).most_common(1)[0]
        if 2 * times > len(row):
            assert (answer, n) == (commonest, times)
        else:
            assert 2 * n <= len(row)


def test_an_exemplar_is_changed_by_most_and_in_the_same_way():
    before = [0, 0, 0, 0, 0]
    after = [[0, 1, 1, 1, 1], [0, 1, 1, 2, 1], [0, 1, 0, 3, 0], [0, 1, 1, 1, 0]]
    # kept; all agree; 3 of 4; 2 of 4 agree only; 2 of 4
    exemplars = found(before, after, divergence=[1, 2, 3, 4, 5])
    assert (exemplars.n_models, exemplars.n_predictions, exemplars.n_exemplars) == (4, 5, 2)
    assert exemplars.share.value == pytest.approx(0.4)
    assert [(one.sample, one.before, one.after, one.agreeing) for one in exemplars.shown] == [
        ("sample 2", "a", "b", 3), ("sample 1", "a", "b", 4),
    ]  # fmt: skip
    assert [one.truth for one in exemplars.shown] == ["", ""]
    assert exemplars.right_before is None and exemplars.rest_after is None


def test_an_answer_that_cannot_be_seen_is_shown_in_quotes():
    spaces = {0: " ", 1: "\n", 2: "c"}
    one = replace(measured([1.0]), answer_before=np.array([0]), answer_after=np.array([1]))
    known = replace(one, surprise_at=np.array([0]), truth=np.array([2]))
    (shown,) = find_exemplars(
        [known] * 3, [], seed=0, name_of=spaces.__getitem__, shown=[], decode=None
    ).shown
    assert (shown.before, shown.after, shown.truth) == ("' '", "'\\n'", "c")


def test_right_answers_are_those_of_a_plain_loop():
    draws = np.random.default_rng(5)
    truth = draws.integers(0, 3, 200)
    before = np.where(draws.random(200) < 0.8, truth, draws.integers(0, 3, 200))
    after = [np.where(draws.random(200) < 0.5, before, draws.integers(0, 3, 200)) for _ in range(3)]
    exemplars = found(before, after, truth=truth)
    sums = {"right": [0, 0.0, 0.0], "rest": [0, 0.0, 0.0]}
    for i in range(200):
        answer, times = Counter(int(own[i]) for own in after).most_common(1)[0]
        kind = sums["right" if times >= 2 and answer != before[i] else "rest"]
        kind[0] += 1
        kind[1] += before[i] == truth[i]
        kind[2] += sum(own[i] == truth[i] for own in after) / 3
    assert exemplars.n_exemplars == sums["right"][0] > 5
    for name, (n, was, now) in sums.items():
        assert getattr(exemplars, f"{name}_before").value == pytest.approx(was / n)
        assert getattr(exemplars, f"{name}_after").value == pytest.approx(now / n)


def test_a_slice_with_too_many_exemplars_is_found_by_fishers_test():
    labels = ["night"] * 20 + ["day"] * 80
    changed = [1] * 9 + [0] * 11 + [1] * 6 + [0] * 74
    exemplars = found([0] * 100, [changed] * 3, labels=labels)
    night, day = exemplars.slices
    assert (night.label, night.n_predictions, night.n_exemplars) == ("night", 20, 9)
    assert night.expected == pytest.approx(3.0) and day.expected == pytest.approx(12.0)
    p = stats.fisher_exact([[9, 11], [6, 74]], alternative="greater").pvalue
    assert night.p_more == pytest.approx(2 * p)  # Holm over two slices
    assert day.p_more > 0.999
    assert exemplars.shown[0].label == "night"
    assert found([0] * 4, [[1] * 4] * 3, labels=["a"] * 4).slices == ()


def test_predictions_of_one_sample_are_drawn_together():
    """One text that was forgotten whole is no evidence about its label."""
    sample = np.repeat(np.arange(8), 25)
    inside, forgotten = sample < 4, sample == 0
    assert over_represented(forgotten, inside, sample, 0) > 0.3
    alone = np.arange(200)
    assert over_represented(forgotten, inside, alone, 0) < 1e-6


# --- several models


@pytest.fixture
def toys_here(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    inputs = draws.standard_normal((300, toy_code.SIDE), dtype=np.float32)
    with torch.no_grad():
        answers = toy_code.classifier()[0](torch.tensor(inputs)).argmax(1).numpy()
    np.savez("x.npz", inputs=inputs, answers=answers)
    return tmp_path


def test_several_models_get_a_line_each_and_the_worst_decides(toys_here, typed):
    one, other = "toy_code:classifier", "toy_code:other"
    words = ["audit", one, one, other, other, other, *TOY, "--data", "x.npz"]
    code, shown = typed(*words, "--json", "x.json", "--report", "r")
    facts = json.loads((toys_here / "x.json").read_text())
    assert code == 1
    assert [model["outcome"] for model in facts["models"]] == ["passed", *["failed"] * 3]
    assert facts["exemplars"]["n_models"] == 4
    # three of four are the same ruined model: what it changes is what most change
    changed = facts["models"][1]["verdict"]["flips"]["value"]
    assert facts["exemplars"]["share"]["value"] == pytest.approx(changed, rel=1e-4)
    assert shown.out.count("FAILED") == 3 and "forgotten by most" in shown.out
    page = (toys_here / "r" / "report.html").read_text()
    assert all((toys_here / "r" / link).is_file() for link in re.findall(r'href="(\d.*?)"', page))
    assert page.count("report.html") == 4
    single, _ = typed("audit", one, other, *TOY, "--data", "x.npz", "--json", "y.json")
    assert single == 1
    alone = json.loads((toys_here / "y.json").read_text())
    together = facts["models"][1]["verdict"]
    assert alone.keys() == together.keys()
    assert all(alone[name] == together[name] for name in ("outcome", "flips", "n_predictions"))
    # the last bits of a sum follow where tensors lie in memory
    assert alone["divergence"] == pytest.approx(together["divergence"], rel=1e-4)


def test_two_models_get_a_table_and_no_exemplars(toys_here, typed):
    one = "toy_code:classifier"
    code, shown = typed("audit", one, one, one, *TOY, "--data", "x.npz", "--json", "x.json")
    facts = json.loads((toys_here / "x.json").read_text())
    assert code == 0 and facts["exemplars"] is None
    assert "with 3 compressed models or more; there are 2" in facts["why_no_exemplars"]
    assert "no exemplars: " in shown.out and shown.out.count("PASSED") == 2


def test_numbers_have_no_answer_that_is_forgotten(toys_here, typed):
    np.savez("r.npz", inputs=np.load("x.npz")["inputs"])
    one = "toy_code:regressor"
    words = ["audit", one, one, one, one, "--task", "regress", "--data", "r.npz"]
    code, shown = typed(*words)
    assert code == 0 and "no exemplars: outputs that are numbers" in shown.out


def test_language_models_show_what_was_read_before(text_here, typed):
    names = write_models(text_here, 0.03, 0.03, 0.03)
    code, shown = typed("audit", *names, *FEW, "--generate", 2, "--json", "x.json")
    facts = json.loads((text_here / "x.json").read_text())
    assert code in (0, 1, 3) and facts["exemplars"]["n_exemplars"] > 0
    assert all(model["verdict"]["generation"]["n_prompts"] == 2 for model in facts["models"])
    assert shown.out.count("goes on alike for") == 3
    first = facts["exemplars"]["shown"][0]
    assert re.fullmatch(r"sample \d+, token \d+", first["sample"])
    assert first["agreeing"] >= 2 and first["before"] != first["after"]


@pytest.mark.parametrize("option", ["--junit", "--evidence"])
def test_what_is_about_one_model_is_refused_with_several(toys_here, typed, option):
    one = "toy_code:classifier"
    more = ["--sign", "k.pem"] if option == "--evidence" else []
    (toys_here / "k.pem").write_text("")
    code, shown = typed("audit", one, one, one, *TOY, option, "f", *more)
    assert code == 2 and "hint" in shown.err
    code, shown = typed("audit", "verify", "a.zip", "b.zip")
    assert code == 2 and "one FILE" in shown.err


def classifier(noise, seed=0):
    """A small classifier, or one that differs from it by noise."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return attar.load(module, examples=torch.zeros(2, 8), task="classify")


def samples(n):
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(1))


def test_python_compares_several_models():
    original, small = classifier(0), [classifier(0.2, seed) for seed in (1, 2, 3)]
    audits = attar.audit(original, small, samples(900))
    assert len(audits.verdicts) == 3
    assert audits.verdicts[0] == attar.audit(original, small[0], samples(900)).verdict
    flips = [verdict.flips.value for verdict in audits.verdicts]
    assert 0 < audits.exemplars.share.value < max(flips)
    assert len(audits.exemplars.shown) == min(24, audits.exemplars.n_exemplars)
    with pytest.raises(DataError, match="no model to compare"):
        attar.audit(original, [], samples(900))


def test_python_writes_the_page_of_several(tmp_path):
    audits = attar.audit(classifier(0), [classifier(0.2, 1)] * 3, samples(300))
    assert "What compression forgets" in audits.report(tmp_path / "p.html").read_text()


# --- shown


def several():
    """Three models, with texts from outside."""
    reports = (efficientnet(), failed(), writing())
    shown = (Exemplar(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, 2, 1.5),)
    share = Estimate(0.12, 0.1, 0.14)
    exemplars = Exemplars(
        3, 900, 108, share, share, share, None, None,
        (ExemplarSlice(HOSTILE, 90, 30, 10.8, 0.0004),), shown,
    )  # fmt: skip
    return Population(HOSTILE, (HOSTILE, "two", "three"), reports, exemplars)


def test_the_worst_verdict_is_that_of_the_worst_model():
    assert worst(several()) is several().reports[1]
    assert worst(replace(several(), reports=(efficientnet(),) * 3)).verdict.outcome == "passed"


def test_the_page_of_several_shows_text_as_text_and_needs_no_network():
    html = population_to_html(several(), ("1/report.html", "2/report.html", "3/report.html"))
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html
    assert "url(" not in html and "http" not in html.replace("http-equiv", "")
    assert "2 of 3" in html and "0.00040" in html and "108" in html
    assert "blimp.jsonl: 61.0% right before" in html


def test_the_terminal_of_several_holds_no_escape_sequence():
    text = population_to_text(several())
    assert "\x1b" not in text and "UNDECIDED" not in text
    assert "FAILED" in text and "2 of 3" in text and "0.00040" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_the_record_of_several_is_strict_json_and_names_what_is_not_finite(tmp_path):
    facts = population_to_json(several())
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert "models.1.verdict.divergence.value" in facts["not_finite"]
    page = write_population(several(), tmp_path / "r")
    assert page == tmp_path / "r" / "report.html"
    assert json.loads(page.with_suffix(".json").read_text()) == facts
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == [
        "1", "2", "3", "report.html", "report.json",
    ]  # fmt: skip

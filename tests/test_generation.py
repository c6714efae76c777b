"""How both models go on with the same prompts, against plain loops."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from report_cases import efficientnet, writing
from writing_models import FEW, write_models

from attar.audit.generation import (
    END,
    compare_continuations,
    earliest,
    first_difference,
    median,
    repeated_share,
    text_length,
)
from attar.audit.policy import LIMITS, with_policy
from attar.decode import continue_greedily, language_step
from attar.errors import DataError
from attar.judging import open_policy
from attar.load.questions import read_prompts
from attar.report.html import report_to_html
from attar.report.terminal import audit_to_text

ENDS = frozenset({0})
# Texts as a model writes them: an end token, where there is one, is the last.
TEXTS = st.lists(st.integers(1, 3), min_size=1, max_size=12).flatmap(
    lambda text: st.sampled_from([[*text, *([1] * 12)][:12], [*text[:11], 0]])
)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)


def compared(before, after, **more):
    return compare_continuations(before, after, ends=ENDS, most_tokens=12, seed=0, **more)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(PAIRS)
def test_every_mean_is_that_of_a_plain_loop(pairs):
    before, after = zip(*pairs, strict=True)
    found = compared(before, after)
    alike, never, equal, places, lengths, repeated = [], 0, 0, 0, [], []
    for one, other in pairs:
        at = 0
        while at < min(len(one), len(other)) and one[at] == other[at]:
            at += 1
        never += one == other
        alike.append(at)
        for i in range(max(len(one), len(other))):
            places += 1
            equal += i < len(one) and i < len(other) and one[i] == other[i]
        own = [[token for token in text if token != 0] for text in (one, other)]
        lengths.append([len(text) for text in own])
        shares = []
        for text in own:
            seen, again, runs = [], 0, 0
            for i in range(len(text) - 3):
                run = text[i : i + 4]
                again += run in seen
                seen.append(run)
                runs += 1
            shares.append(again / runs if runs else 0.0)
        repeated.append(shares)
    assert found.first_divergent_token.value == pytest.approx(np.mean(alike))
    assert found.first_divergent_median.value == np.median(alike)
    assert found.never_differs.value == pytest.approx(never / len(pairs))
    assert found.equal_tokens.value == pytest.approx(equal / places)
    for side, name in enumerate(("before", "after")):
        mean = np.mean([one[side] for one in lengths])
        assert getattr(found, f"length_{name}").value == pytest.approx(mean)
        mean = np.mean([one[side] for one in repeated])
        assert getattr(found, f"repetition_{name}").value == pytest.approx(mean)
        mean = np.mean([pair[side][-1] == 0 for pair in pairs])
        assert getattr(found, f"ended_{name}").value == pytest.approx(mean)
    change = found.repetition_after.value - found.repetition_before.value
    assert found.repetition_change.value == pytest.approx(change)
    change = found.length_after.value - found.length_before.value
    assert found.length_change.value == pytest.approx(change)


def test_a_difference_of_pairs_has_an_interval_of_pairs():
    """Every text is longer by one token, however different the texts are."""
    before = [[1] * n for n in (2, 5, 9)]
    after = [[1] * (n + 1) for n in (2, 5, 9)]
    change = compared(before, after).length_change
    assert (change.value, change.low, change.high) == (1.0, 1.0, 1.0)
    assert compared(before, after).length_before.low < compared(before, after).length_before.high


def test_the_same_texts_never_differ():
    texts = [[1, 2, 0], [3, 3, 3]]
    found = compared(texts, texts)
    assert found.never_differs.value == found.equal_tokens.value == 1.0
    assert found.first_divergent_token.value == 3.0 and found.ended_after.value == 0.5
    assert first_difference([1, 2], [1, 2]) is None
    assert earliest([[1], [1]], texts, texts, str, ENDS) == []


def test_an_end_that_comes_earlier_is_a_difference():
    assert first_difference([1, 0], [1, 2, 3]) == 1
    assert text_length([1, 0], ENDS) == 1 and text_length([1, 2], ENDS) == 2


def test_repetition_counts_runs_that_stood_there_before():
    assert repeated_share([1, 2, 3]) == 0.0
    assert repeated_share([1, 2, 3, 4, 5, 6]) == 0.0
    assert repeated_share([7] * 8) == pytest.approx(4 / 5)
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_the_interval_of_a_median_lies_around_it():
    values = np.array([0, 1, 1, 2, 30])
    found = median(values, seed=0)
    assert found.value == 1.0 and found.low <= 1.0 <= found.high and found.high > 1.0


def test_examples_are_those_that_part_first_with_the_token_apart():
    def decode(tokens):
        return "".join("<abcdef"[token] for token in tokens)

    before = [[1, 2, 3, 4], [1, 0], [1, 1, 2], [2, 2]]
    after = [[1, 2, 4, 4], [1, 3], [1, 1, 2], [3, 2]]
    found = earliest([[5], [5, 6], [6], [6, 6]], before, after, decode, ENDS)
    assert [(one.prompt, one.position) for one in found] == [("ff", 0), ("ef", 1), ("e", 2)]
    assert (found[0].before, found[0].before_rest, found[0].after) == ("b", "b", "c")
    assert (found[1].same, found[1].before, found[1].after) == ("a", END, "c")
    whole = found[2].same + found[2].before + found[2].before_rest
    assert whole == "abcd"


@pytest.mark.parametrize("cached", [True, False])
def test_rows_written_together_are_those_written_alone(cached):
    model = toys.language_model()
    if not cached:

        class Rereads(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model.module

            def forward(self, tokens):
                return self.inner(tokens).logits

        model = replace(model, module=Rereads())
    starts = torch.tensor([[5, 9, 200], [7, 7, 31], [1, 2, 3]])
    found = continue_greedily(
        language_step(model), starts, most_tokens=7, ends=frozenset({40}), n_known=250
    )
    for start, written in zip(starts, found, strict=True):
        tokens = start.tolist()
        for _ in range(7):
            with torch.no_grad():
                logits = toys.language_model().module(torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(logits[:250].argmax()))
            if tokens[-1] == 40:
                break
        assert written == tokens[3:]


def test_a_row_stops_at_its_end_and_the_others_go_on():
    def step(new, cache):
        logits = torch.zeros(len(new), 6)
        wanted = new[:, -1] + torch.tensor([1, 2])
        return logits.scatter(1, wanted.clamp(max=5)[:, None], 1.0), cache

    found = continue_greedily(
        step, torch.tensor([[0], [0]]), most_tokens=4, ends=frozenset({2}), n_known=6
    )
    assert found == [[1, 2], [2]]


# --- typed


def test_an_audit_lets_both_models_write(text_here, typed):
    write_models(text_here, 0.03)
    (text_here / "p.txt").write_text("the cat\n\n  dogs and \nthe 12\n")
    code, shown = typed("audit", "a.gguf", "b.gguf", *FEW, "--generate", 6, "--json", "x.json")
    assert code in (0, 1, 3)
    facts = json.loads((text_here / "x.json").read_text())["generation"]
    assert facts["n_prompts"] == 6 and facts["most_tokens"] == 48
    assert 0 <= facts["equal_tokens"]["value"] < 1
    assert facts["first_divergent_token"]["low"] <= facts["first_divergent_token"]["value"]
    positions = [one["position"] for one in facts["examples"]]
    assert len(positions) == 3 and positions == sorted(positions)
    assert f">>{facts['examples'][0]['after']}<<" in shown.out.replace("\n", "")
    code, shown = typed("audit", "a.gguf", "a.gguf", *FEW, "--prompts", "p.txt", "--json", "y.json")
    facts = json.loads((text_here / "y.json").read_text())["generation"]
    assert code == 0 and facts["n_prompts"] == 3
    assert facts["never_differs"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert facts["examples"] == [] and facts["repetition_change"]["value"] == 0


def test_more_prompts_than_sequences_are_said_and_not_made_up(text_here, typed):
    write_models(text_here)
    _, shown = typed("audit", "a.gguf", "a.gguf", *FEW, "--generate", 99, "--json", "x.json")
    n = json.loads((text_here / "x.json").read_text())["generation"]["n_prompts"]
    assert n == 8 and "8 sequences" in shown.err and "not 99" in shown.err


def test_without_asking_nothing_is_written(text_here, typed):
    write_models(text_here)
    _, shown = typed("audit", "a.gguf", "a.gguf", *FEW, "--json", "x.json")
    facts = json.loads((text_here / "x.json").read_text())
    assert facts["generation"] is None and facts["choices"] == []
    assert "repeated runs" not in shown.out


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_prompts_that_are_none_are_refused(text_here, typed, text):
    write_models(text_here)
    (text_here / "p.txt").write_text(text)
    code, shown = typed("audit", "a.gguf", "a.gguf", *FEW, "--prompts", "p.txt")
    assert code == 2 and "p.txt holds no prompts" in shown.err and "load" not in shown.err


def test_prompts_are_read_a_line_each_and_bounded(tmp_path, monkeypatch):
    file = tmp_path / "p.txt"
    file.write_text("one\r\n two \n\nthree\u2028four\n")
    assert read_prompts(file) == ("one", "two", "three\u2028four")
    monkeypatch.setattr("attar.load.questions.MOST_LINES", 2)
    with pytest.raises(DataError, match="more than"):
        read_prompts(file)


def test_only_a_language_model_writes(text_here, typed):
    import toy_code

    data = toy_code.save_data(text_here / "x.npz")
    toy = "toy_code:classifier"
    typed_words = ["audit", toy, toy, "--task", "classify", "--data", data, "--generate", 3]
    code, shown = typed(*typed_words)
    assert code == 2 and "only a language model" in shown.err
    assert "hint: leave --generate" in shown.err


# --- shown and limited


def test_the_page_and_the_terminal_mark_the_token_that_differs_without_colour():
    report = writing()
    html = report_to_html(report)
    assert "▸<mark>&lt;script&gt;" in html and "Going on with prompts" in html
    assert "▸<mark>\n</mark>◂ on" in html
    text = audit_to_text(report.verdict, width=120)
    assert "and so>>↵<<" in text  # the compressed model's token is the end of a line
    assert "and so>><script>" in text and "<< on" in text
    assert "11 prompts, 48 tokens at most" in text
    for name in ("their median", "repeated runs of 4 tokens, compressed"):
        assert name in text and name in html
    assert "note:" in text and "the vocabularies differ in their padding" in html


def test_limits_of_writing_are_held_and_some_are_the_least_that_may_be(tmp_path):
    verdict = writing().verdict  # alike: 0.1 (0.05 to 0.15); repetition + 1.2 (1.15 to 1.25)
    file = tmp_path / "policy.yaml"

    def outcome(text):
        file.write_text(text)
        found = with_policy(verdict, open_policy(file), 1)
        return found.checks[-1].outcome, found.reasons[-1]

    assert outcome("first_divergent_token: 0.05")[0] == "passed"
    assert outcome("first_divergent_token: 0.1")[0] == "undecided"
    failed, reason = outcome("first_divergent_token: 20")
    assert failed == "failed" and "the limit is at least 20: failed" in reason
    assert outcome("repetition_increase: 1.2")[0] == "undecided"
    assert outcome("repetition_increase: 1%")[0] == "failed"
    assert outcome("equal_tokens: 30%")[0] == "passed"
    names = ("first_divergent_token", "equal_tokens", "repetition_increase")
    assert all(LIMITS[name](efficientnet().verdict) is None for name in names)

"""Multiple choice: read, scored and compared, against plain loops and scipy."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from report_cases import efficientnet, writing
from scipy import stats
from writing_models import FEW, write_models

from attar.audit import choices as choices_file
from attar.audit.choices import bytes_of, chosen, compare_choices, log_likelihoods, rows_of
from attar.audit.policy import CHOICES_LIMITS, with_policy
from attar.errors import DataError, SettingError
from attar.inputs import read_tokenizer
from attar.judging import open_policy
from attar.load import questions
from attar.load.questions import read_questions
from attar.records import ChoiceItem
from attar.report.html import report_to_html
from attar.report.terminal import audit_to_text

ITEM = {"context": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}


def written(folder, *rows):
    file = folder / "q.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return file


# --- read


def test_both_forms_of_a_question_are_read(tmp_path):
    blimp = {"sentence_good": "She runs.", "sentence_bad": "She run.", "field": "syntax",
             "linguistics_term": "agreement"}  # fmt: skip
    own = {**ITEM, "group": "sums\u2028"}
    assert read_questions(written(tmp_path, blimp, "", own)) == (
        ChoiceItem("", ("She runs.", "She run."), 0, "agreement"),
        ChoiceItem("2 + 2 =", (" 3", " 4"), 1, "sums\u2028"),
    )
    bare = {name: ITEM[name] for name in ("choices", "answer")}
    assert read_questions(written(tmp_path, bare))[0].context == ""


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1]", "no JSON object"),
        ({**ITEM, "choices": "ab"}, "no list of choices"),
        ({**ITEM, "choices": [" 3", 4]}, "no list of choices"),
        ({**ITEM, "choices": [" 3", ""]}, "no list of choices"),
        ({**ITEM, "choices": [" 3"]}, "has 1 choices"),
        ({**ITEM, "choices": ["x"] * 27}, "has 27 choices"),
        ({**ITEM, "answer": 2}, "the answer 2"),
        ({**ITEM, "answer": -1}, "the answer -1"),
        ({**ITEM, "answer": True}, "the answer True"),
        ({**ITEM, "answer": "B"}, "the answer 'B'"),
        ({"choices": ["a", "b"]}, "the answer None"),
        ({**ITEM, "context": 3}, "context that is no text"),
        ({**ITEM, "group": 3}, "group that is no text"),
        ({"sentence_good": "a"}, "sentence_bad"),
        ({**ITEM, "context": "a" * 100_000}, "characters"),
    ],
)
def test_a_line_that_is_no_question_is_named_by_its_number(tmp_path, row, problem):
    file = written(tmp_path, ITEM, row)
    with pytest.raises(DataError) as error:
        read_questions(file)
    assert problem in error.value.problem and "line 2 of" in error.value.problem
    assert '"answer": 1' in error.value.hint


def test_a_file_of_no_questions_or_too_many_is_refused(tmp_path, monkeypatch):
    for content, problem in ((b"\n", "no questions"), (b"\xff\xfe", "as text")):
        (tmp_path / "q.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=problem):
            read_questions(tmp_path / "q.jsonl")
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"1 of 2 questions .* no group"):
        read_questions(written(tmp_path, ITEM, {**ITEM, "group": "x"}))
    monkeypatch.setattr(questions, "LARGEST_FILE_BYTES", 20)
    with pytest.raises(DataError, match="more than"):
        read_questions(written(tmp_path, ITEM))


# --- scored


def encoder():
    tokenizer = read_tokenizer(toys.language_model().files)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def test_a_choice_follows_the_tokens_of_its_context():
    encode = encoder()
    one, two = rows_of(ChoiceItem("ab", (" c", " de"), 0), encode, [7])
    assert one == ([7, *encode("ab"), *encode(" c")], 3)
    assert two == ([7, *encode("ab"), *encode(" de")], 3)
    # a space at the end of the context is the choice's
    assert rows_of(ChoiceItem("ab ", ("c", "de"), 0), encode, [7]) == [one, two]
    assert rows_of(ChoiceItem("ab\n", ("c", "d"), 0), encode, [7])[0][0] == [
        7, *encode("ab"), *encode("\nc"),
    ]  # fmt: skip
    assert rows_of(ChoiceItem(" ", ("c", "d"), 0), encode, [], [9])[0][0] == [9, *encode(" c")]
    assert rows_of(ChoiceItem("", ("c", "d"), 0), encode, [], [9])[0] == ([9, *encode("c")], 1)
    with pytest.raises(DataError, match="nothing stands before 'c'"):
        rows_of(ChoiceItem("", ("c", "d"), 0), encode, [])


def test_a_long_context_loses_its_beginning(monkeypatch):
    monkeypatch.setattr(choices_file, "MOST_TOKENS", 6)
    encode = encoder()
    ((tokens, begin), (cut, first)) = rows_of(
        ChoiceItem("abcdefgh", ("xy", "stuvwxyz"), 0), encode, [7]
    )
    assert tokens == encode("efgh") + encode("xy") and begin == 4
    assert cut == encode("h") + encode("stuvw") and first == 1


def test_log_likelihoods_are_those_of_one_row_at_a_time():
    model, encode = toys.language_model(), encoder()
    draws = np.random.default_rng(0)
    texts = ["".join(draws.choice(list("abcdef "), n)) for n in (3, 40, 90, 1, 7, 300)]
    rows = [row for text in texts for row in rows_of(ChoiceItem("Q" + text, (" x", text + "y"), 0),
                                                     encode, [7])]  # fmt: skip
    seen = []
    found = log_likelihoods(lambda t: model.module(t).logits, rows, seen.append)
    assert sum(seen) == len(rows) == 12
    for (tokens, begin), value in zip(rows, found, strict=True):
        with torch.no_grad():
            logs = model.module(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        wanted = sum(float(logs[at - 1, tokens[at]]) for at in range(begin, len(tokens)))
        assert value == pytest.approx(wanted, rel=1e-5)


def test_the_likeliest_choice_and_the_one_for_its_bytes_may_differ():
    item = ChoiceItem("q", (" yes", " certainly", " é"), 0)
    assert [bytes_of(choice) for choice in item.choices] == [3, 9, 2]
    logs = np.array([-6.0, -9.0, -7.0])
    assert chosen(item, logs, normalised=False) == 0  # -6
    assert chosen(item, logs, normalised=True) == 1  # -2, -1, -3.5
    assert chosen(item, np.array([-3.0, -3.0, -9.0]), normalised=False) == 0


# --- compared


def many(n=90, seed=3):
    draws = np.random.default_rng(seed)
    items, before, after = [], [], []
    for i in range(n):
        k = int(draws.integers(2, 5))
        words = tuple("w" * int(draws.integers(1, 9)) for _ in range(k))
        items.append(ChoiceItem("q", words, int(draws.integers(k)), f"g{i % 3}"))
        before.append(draws.normal(-9, 3, k))
        after.append(before[-1] + draws.normal(0, 2 + 2 * (i % 3 == 1), k))
    return items, before, after


@pytest.mark.parametrize("way", ["plain", "normalised"])
def test_answers_flips_and_tests_are_those_of_a_plain_loop(way):
    items, before, after = many()
    found = getattr(compare_choices("f", items, before, after, 0), way)
    kinds = {"kept": 0, "worse": 0, "better": 0, "other": 0}
    right, ratios = 0, []
    for item, one, two in zip(items, before, after, strict=True):
        lengths = [len(c.encode()) if way == "normalised" else 1 for c in item.choices]
        first, second = (int(np.argmax([v / n for v, n in zip(side, lengths, strict=True)]))
                         for side in (one, two))  # fmt: skip
        was, now = first == item.answer, second == item.answer
        right += was
        kind = "worse" if was and not now else "better" if now and not was else "kept"
        if not was and not now and first != second:
            kind = "other"
        kinds[kind] += 1
        chances = [np.exp(side) / np.exp(side).sum() for side in (one, two)]
        ratios.append(chances[1][item.answer] / chances[0][item.answer])
    assert min(kinds.values()) > 0
    assert found.n_predictions == 90
    assert found.accuracy_before.value == pytest.approx(right / 90)
    assert found.accuracy_after.value == pytest.approx(
        (right - kinds["worse"] + kinds["better"]) / 90
    )
    assert found.negative_flips.value == pytest.approx(kinds["worse"] / 90)
    assert found.positive_flips.value == pytest.approx(kinds["better"] / 90)
    assert found.other_flips == pytest.approx(kinds["other"] / 90)
    wanted = stats.binomtest(kinds["worse"], kinds["worse"] + kinds["better"]).pvalue
    assert found.p_value == pytest.approx(wanted)
    assert found.probability_ratio.value == pytest.approx(stats.gmean(ratios))


def test_groups_are_tested_together_and_the_one_that_lost_most_is_first():
    items, before, after = many(300)
    found = compare_choices("f", items, before, after, 0)
    assert {one.name for one in found.groups} == {"g0", "g1", "g2"}
    lost = [one.plain.accuracy_change.value for one in found.groups]
    assert lost == sorted(lost)
    own = sorted(one.plain.p_value for one in found.groups)
    holm = np.maximum.accumulate([min(1.0, (3 - i) * p) for i, p in enumerate(own)])
    assert sorted(one.p_plain for one in found.groups) == pytest.approx(list(holm))
    assert found.p_plain == found.plain.p_value
    alone = [replace(item, group="") for item in items]
    assert compare_choices("f", alone, before, after, 0).groups == ()


def test_the_same_answers_change_nothing():
    items, before, _ = many()
    found = compare_choices("f", items, before, before, 0)
    assert found.plain.negative_flips.value == found.plain.other_flips == 0.0
    assert found.plain.p_value == 1.0 and found.plain.probability_ratio.value == 1.0


# --- typed


def test_an_audit_asks_both_models(text_here, typed):
    write_models(text_here, 0.03)
    rows = [{"context": f"the {i}", "choices": [" a", " b1", " 12"], "answer": i % 3,
             "group": "even" if i % 2 else "odd"} for i in range(20)]  # fmt: skip
    written(text_here, *rows)
    (text_here / "pairs.jsonl").write_text(
        '{"sentence_good": "the a", "sentence_bad": "a the"}\n' * 3
    )
    code, shown = typed("audit", "a.gguf", "b.gguf", *FEW, "--choices", "q.jsonl",
                        "--choices", "pairs.jsonl", "--json", "x.json")  # fmt: skip
    assert code in (0, 1, 3)
    one, two = json.loads((text_here / "x.json").read_text())["choices"]
    assert (one["name"], two["name"]) == ("q.jsonl", "pairs.jsonl")
    assert one["plain"]["n_predictions"] == 20 and len(one["groups"]) == 2
    assert one["plain"]["probability_ratio"]["value"] != 1.0
    assert two["groups"] == []
    assert "q.jsonl, by bytes" in shown.out and "pairs.jsonl" in shown.out
    code, _ = typed("audit", "a.gguf", "a.gguf", *FEW, "--choices", "q.jsonl", "--json", "y.json")
    (same,) = json.loads((text_here / "y.json").read_text())["choices"]
    assert code == 0 and same["plain"]["p_value"] == 1.0
    assert same["plain"]["probability_ratio"]["value"] == 1.0
    assert same["plain"]["accuracy_before"] == one["plain"]["accuracy_before"]


def test_a_wrong_line_is_refused_before_any_model_is_opened(text_here, typed):
    written(text_here, ITEM, "{}")
    code, shown = typed("audit", "none.gguf", "none.gguf", *FEW, "--choices", "q.jsonl")
    assert code == 2 and "line 2 of q.jsonl" in shown.err


def test_only_a_language_model_is_asked(text_here, typed):
    import toy_code

    data = toy_code.save_data(text_here / "x.npz")
    written(text_here, ITEM)
    words = ["toy_code:classifier", "toy_code:classifier", "--task", "classify", "--data", data]
    code, shown = typed("audit", *words, "--choices", "q.jsonl")
    assert code == 2 and "only a language model" in shown.err and "hint: " in shown.err


# --- shown and limited


def test_the_page_and_the_terminal_show_each_file_and_group():
    report = writing()
    html, text = report_to_html(report), audit_to_text(report.verdict, width=120)
    for name in ("blimp.jsonl", "island_effects"):
        assert name in html and name in text
    assert "likeliest for its bytes" in html and "blimp.jsonl, by bytes" in text
    assert "probability of the true choice, after over before: 0.930" in text
    assert "<script>alert" not in html


def test_limits_of_choices_hold_for_every_file(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text("any_choices: {lost_accuracy: 20%, lost_accuracy_normalised: 5%}")
    policy = open_policy(file)
    found = with_policy(writing().verdict, policy, 1)  # lost 6% (-1% to 14%)
    outcomes = {c.name: c.outcome for c in found.checks if "choices" in c.name}
    assert outcomes == {
        "choices blimp.jsonl: lost_accuracy": "passed",
        "choices blimp.jsonl: lost_accuracy_normalised": "undecided",
    }
    none = with_policy(efficientnet().verdict, policy, 1)
    assert {c.outcome for c in none.checks if "choices" in c.name} == {"undecided"}
    (asked,) = writing().verdict.choices
    assert all(CHOICES_LIMITS[name](asked) is not None for name in CHOICES_LIMITS)
    for text in ("any_choices: 3", "any_choices: {flips: 1}"):
        file.write_text(text)
        with pytest.raises(SettingError, match=r"any_choices|flips"):
            open_policy(file)


def test_a_policy_without_limits_of_choices_keeps_its_hash(tmp_path):
    """As written before there were any: evidence that was signed names it."""
    import hashlib

    file = tmp_path / "policy.yaml"
    file.write_text("divergence: 0.05\n")
    text = '{"any_slice": {}, "limits": {"divergence": 0.05}, "size": null}'
    assert open_policy(file).sha256 == hashlib.sha256(text.encode()).hexdigest()

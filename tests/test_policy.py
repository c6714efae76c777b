"""Limits written down beforehand: read, held against what was found, and told to a build server."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from report_cases import efficientnet, embedder, failed, writing

from attar.audit.policy import LIMITS, SLICE_LIMITS, check, read_policy, with_policy
from attar.errors import AttarError, SettingError
from attar.judging import open_policy
from attar.records import Estimate
from attar.report.junit import report_to_junit
from attar.report.record import report_to_json


def policy(tmp_path, text):
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    return open_policy(file)


@pytest.mark.parametrize(
    "low, high, limit, outcome",
    [
        (0.1, 0.3, 0.3, "passed"),
        (0.1, 0.3, 0.2, "undecided"),
        (0.1, 0.3, 0.1, "undecided"),
        (0.1, 0.3, 0.0999, "failed"),
        (0.0, 0.0, 0.0, "passed"),
    ],
)
def test_an_interval_passes_below_fails_above_and_else_is_undecided(low, high, limit, outcome):
    assert check("x", Estimate((low + high) / 2, low, high), limit).outcome == outcome


def test_what_the_data_cannot_say_is_undecided_not_passed():
    assert check("x", None, 1e9).outcome == "undecided"
    assert check("x", Estimate(float("nan"), 0.0, 0.0), 1e9).outcome == "undecided"


def test_the_outcome_is_the_worst_of_all_checks_and_names_each(tmp_path):
    verdict = efficientnet().verdict  # 0.0611 nats, 5% negative flips (0 to 10%)
    held = policy(tmp_path, "divergence: 0.08\nnegative_flips: 10%\nsize: 3MB\n")
    found = with_policy(verdict, held, 2_999_999)
    assert found.outcome == "passed" and found.policy == "policy.yaml"
    assert [c.outcome for c in found.checks] == ["passed"] * 3
    assert found.reasons[-1] == "size: 2,999,999; the limit is 3,000,000: passed"
    assert with_policy(verdict, held, 3_000_001).outcome == "failed"
    unsure = with_policy(verdict, policy(tmp_path, "negative_flips: 0.04"), 1)
    assert unsure.outcome == "undecided"
    assert "negative_flips: 0.05 (0 to 0.1); the limit is 0.04: undecided" in unsure.reasons
    assert with_policy(failed().verdict, held, 1).outcome == "failed"


def test_every_slice_is_held_to_the_limit_of_any(tmp_path):
    verdict = efficientnet().verdict
    found = with_policy(verdict, policy(tmp_path, "any_slice:\n  divergence: 0.15\n"), 1)
    outcomes = {c.name: c.outcome for c in found.checks}
    assert outcomes == {
        "slice night: divergence": "undecided", "slice <b>day</b>: divergence": "passed",
    }  # fmt: skip
    none = with_policy(
        replace(verdict, slices=()), policy(tmp_path, "any_slice: {divergence: 9}"), 1
    )
    assert none.outcome == "undecided" and none.checks[-1].found is None


def test_lost_accuracy_is_the_fall_and_not_the_rise(tmp_path):
    verdict = efficientnet().verdict  # accuracy fell by 4% (-1% to 10%)
    found = with_policy(verdict, policy(tmp_path, "lost_accuracy: 0.1"), 1).checks[-1]
    assert found.found == Estimate(0.04, -0.01, 0.1) and found.outcome == "passed"


@pytest.mark.parametrize("name", LIMITS)
def test_every_limit_says_something_of_some_model(name):
    cases = [case().verdict for case in (efficientnet, embedder, writing)]
    language = replace(cases[0], perplexity_ratio=Estimate(1.1, 1.0, 1.2))
    assert any(LIMITS[name](verdict) is not None for verdict in (*cases, language))


def test_every_limit_of_a_slice_says_something():
    (night, day) = efficientnet().verdict.slices
    assert all(SLICE_LIMITS[name](day) is not None for name in SLICE_LIMITS)
    assert SLICE_LIMITS["negative_flips"](night) is None  # no true answers there


def test_the_hash_is_of_what_is_said_and_not_of_how(tmp_path):
    one = policy(tmp_path, "divergence: 0.05\nchanged_predictions: 2%\n")
    two = policy(tmp_path, "# ours\n{changed_predictions: 0.02, divergence: 5.0e-2}\n")
    other = policy(tmp_path, "divergence: 0.05\nchanged_predictions: 3%\n")
    assert one.sha256 == two.sha256 != other.sha256


@pytest.mark.parametrize(
    "text, problem, hint",
    [
        ("", "no limits", "divergence"),
        ("- 1", "no limits", "divergence"),
        ("divergense: 1", "'divergense', which is not measured", "divergence"),
        ("any_slice: {flips: 1}", "'flips'", "negative_flips"),
        ("any_slice: 3", "any_slice", "indent"),
        ("divergence: low", "'low'", "0.05"),
        ("divergence: -1", "-1", "from 0 on"),
        ("divergence: true", "True", "from 0 on"),
        ("divergence: .nan", "nan", "from 0 on"),
        ("size: 25%", "not 25%", "60MB"),
        ("size: big", "big", "60MB"),
        ("a: [", "cannot be read", "divergence"),
        ("x: !!python/object/apply:os.system ['true']", "cannot be read", "divergence"),
    ],
)
def test_a_policy_that_cannot_be_held_says_what_to_write(tmp_path, text, problem, hint):
    with pytest.raises(AttarError) as error:
        policy(tmp_path, text)
    assert problem in error.value.problem and hint in error.value.hint


def test_a_policy_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingError, match=r"none\.yaml"):
        read_policy(tmp_path / "none.yaml", int)


def test_a_build_server_reads_one_case_for_each_check(tmp_path):
    report = efficientnet()
    held = policy(tmp_path, "divergence: 0.01\nchanged_predictions: 0.05\nnegative_flips: 50%\n")
    report = replace(report, verdict=with_policy(report.verdict, held, 1), model="a<b>&\x1b[31m")
    suite = ElementTree.fromstring(report_to_junit(report))
    assert suite.attrib["tests"] == "3" and suite.attrib["failures"] == "1"
    assert suite.attrib["errors"] == "1" and "a<b>&" in suite.attrib["name"]
    cases = {case.attrib["name"]: [child.tag for child in case] for case in suite}
    assert cases == {
        "divergence": ["failure"], "changed_predictions": ["error"], "negative_flips": [],
    }  # fmt: skip
    assert "0.0611 (0.048 to 0.079)" in suite[0][0].attrib["message"]


def test_the_record_holds_checks_and_the_hash_of_the_policy(tmp_path):
    held = policy(tmp_path, "divergence: 0.08")
    report = efficientnet()
    facts = report_to_json(replace(report, verdict=with_policy(report.verdict, held, 1)))
    assert facts["verdict"]["policy"] == {"name": "policy.yaml", "sha256": held.sha256}
    (only,) = facts["verdict"]["checks"]
    assert only["name"] == "divergence" and only["limit"] == 0.08

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from report_cases import CASES, HOSTILE, efficientnet, failed, hostile, smollm2

from attar.report.html import report_to_html
from attar.report.record import clean_text, jsonable, report_to_json, treatment_label
from attar.report.terminal import report_to_text
from attar.report.wording import (
    duration_text,
    number_text,
    percent_text,
    short_text,
    size_text,
    times_text,
    value_text,
)

ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@ALL
def test_the_record_survives_a_round_trip_through_strict_json(case):
    facts = report_to_json(case())
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


@ALL
def test_the_same_report_gives_the_same_text(case):
    assert json.dumps(report_to_json(case())) == json.dumps(report_to_json(case()))


def test_provenance_in_another_order_gives_the_same_text():
    report = smollm2()
    turned = replace(report, provenance=dict(reversed(report.provenance.items())))
    assert json.dumps(report_to_json(turned)) == json.dumps(report_to_json(report))


def test_units_carry_what_was_applied_in_order_of_the_network():
    report = smollm2()
    facts = report_to_json(report)
    assert [unit["name"] for unit in facts["units"]] == [unit.name for unit in report.units]
    for unit, applied in zip(facts["units"], report.receipt.applied, strict=True):
        assert unit["bytes_after"] == applied.stored_bytes
        assert unit["treatment"] == applied.treatment
        worth = report.scores["fisher"].totals[applied.unit]
        assert unit["worth"] == pytest.approx(worth, rel=1e-5)


def test_a_plan_without_a_receipt_shows_what_was_planned():
    report = smollm2()
    facts = report_to_json(replace(report, receipt=replace(report.receipt, applied=())))
    name = "model.layers.3.mlp.up_proj"
    (unit,) = (unit for unit in facts["units"] if unit["name"] == name)
    assert unit["bytes_after"] == report.plan.choices[name].cost.weight_bytes
    assert unit["relative_error"] is None


def test_treatments_add_up_to_the_units():
    facts = report_to_json(smollm2())
    assert sum(row["units"] for row in facts["treatments"]) == 211
    stored = sum(row["bytes_after"] for row in facts["treatments"])
    assert stored == facts["size"]["bytes_in_units"]
    assert stored + facts["size"]["bytes_outside_units"] == facts["size"]["bytes_after"]


def test_worth_is_the_criterion_in_nats_even_when_it_is_not_the_first():
    facts = report_to_json(smollm2())
    assert facts["worth"] == {
        "criterion": "fisher",
        "in_nats": True,
        "other_criteria": ["magnitude", "wanda"],
    }


def test_what_is_not_finite_is_null_and_named():
    facts = report_to_json(failed())
    assert facts["verdict"]["divergence"]["value"] is None
    assert "verdict.divergence.value" in facts["not_finite"]
    assert "verdict.divergence.high" in facts["not_finite"]
    assert facts["verdict"]["predicted_over_measured"] is None


def test_what_was_not_measured_is_null_but_not_called_infinite():
    facts = report_to_json(CASES["embedder"]())
    assert facts["verdict"]["flips"] is None
    assert facts["verdict"]["probability_kept"] is None
    assert facts["not_finite"] == []


def test_floats_keep_six_digits():
    assert jsonable([0.123456789, 1234567.0, 2.5e-9], "", []) == [0.123457, 1234570.0, 2.5e-9]


def test_probability_kept_is_the_geometric_mean_over_a_plain_loop():
    original = [0.7, 0.2, 0.1]
    compressed = [0.5, 0.3, 0.2]
    logarithm = 0.0
    for p, q in zip(original, compressed, strict=True):
        logarithm += p * math.log(q / p)
    divergence = -logarithm
    report = smollm2()
    estimate = replace(report.verdict.divergence, value=divergence)
    report = replace(report, verdict=replace(report.verdict, divergence=estimate))
    kept = report_to_json(report)["verdict"]["probability_kept"]
    # Six digits are kept.
    assert kept == pytest.approx((5 / 7) ** 0.7 * 1.5**0.2 * 2**0.1, rel=1e-5)


def test_control_characters_and_lone_surrogates_do_not_reach_the_record():
    text = json.dumps(report_to_json(hostile()), ensure_ascii=False)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert clean_text("a\ud800b\x00\n\tc").encode() == "a?b\N{REPLACEMENT CHARACTER}\n\tc".encode()
    assert "<script>" in HOSTILE
    assert "<script>" in text  # the record keeps what it can; each reader escapes for itself


def test_leftovers_are_summed_by_reason():
    (row,) = report_to_json(smollm2())["leftovers"]
    assert row["numbers"] == 60 * 576
    assert len(row["names"]) == 60


def test_bits_per_weight_count_the_whole_folder():
    report = efficientnet()
    size = report_to_json(report)["size"]
    expected = report.bytes_after * 8 / (report.bytes_before / 2)
    assert size["bits_per_weight"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"bits": 3, "group_size": 64}, "3"),
        ({"bits": 3.2019}, "3.2"),
        ({"n_kept": 2, "m": 4}, "2:4"),
        ({"sparsity": 0.3}, "70%"),
        ({"kept_fraction": 0.5, "bits": 4}, "4 50%"),
        ({}, "16"),
    ],
)
def test_a_treatment_has_a_short_label(settings, label):
    assert treatment_label(settings, 16.0) == label


def test_a_folder_is_text_in_the_record():
    assert report_to_json(smollm2(Path("some/where")))["size"]["folder"] == str(Path("some/where"))


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (value_text, 1.5, "1.5"),
        (value_text, 3.0, "3"),
        (value_text, 0.25, "0.25"),
        (size_text, 55_999_872, "56.0 MB"),
        (size_text, 999_999, "1.00 MB"),
        (size_text, 269_030_016, "269 MB"),
        (size_text, 17, "17 bytes"),
        (size_text, 1_912_000_000, "1.91 GB"),
        (number_text, 0.9996, "1.00"),
        (number_text, 0.412, "0.412"),
        (number_text, 0.0000123, "1.23e-5"),
        (number_text, -0.5, "-0.500"),
        (number_text, 12345.6, "12,300"),
        (number_text, float("nan"), "not finite"),
        (number_text, None, "not finite"),
        (short_text, 0.0314, ".031"),
        (short_text, 0.0998, "0.10"),
        (short_text, 0.00031, "3e-4"),
        (short_text, 4.21, "4.2"),
        (percent_text, 0.0312, "3.12%"),
        (percent_text, 0.0, "0%"),
        (duration_text, 59.7, "1 min 0 s"),
        (duration_text, 3.14, "3.1 s"),
        (duration_text, 7320.0, "2 h 2 min"),
    ],
)
def test_numbers_read_as_people_write_them(write, value, text):
    assert write(value) == text


def test_growth_is_not_called_smaller():
    assert times_text(269, 56) == "4.8x smaller"
    assert times_text(50, 60) == "1.2x larger"
    assert times_text(0, 60) == "not comparable"


@pytest.mark.parametrize(
    ("times", "agrees"), [(1.4, True), (1 / 1.4, True), (1.6, False), (1 / 1.6, False), (0.0, None)]
)
def test_a_prediction_that_is_far_off_is_said_to_be_wherever_it_is_shown(times, agrees):
    report = smollm2()
    measured = report.verdict.divergence.value
    verdict = replace(report.verdict, predicted_damage=times * measured)
    report = replace(report, verdict=verdict)
    assert report_to_json(report)["verdict"]["prediction_agrees"] is agrees
    for shown in (report_to_text(report), report_to_html(report)):
        said = " ".join(shown.split())
        assert ("prediction and measurement disagree" in said) == (agrees is False)

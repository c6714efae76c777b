import re

import pytest
from report_cases import (
    CASES,
    HOSTILE,
    audit_only,
    efficientnet,
    embedder,
    failed,
    hostile,
    smollm2,
)
from report_parts import convolution_units

from attar.records import Units
from attar.report.terminal import (
    audit_to_text,
    models_to_text,
    plan_to_text,
    report_to_text,
    scores_to_text,
)

ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@ALL
@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_wider_than_the_terminal(case, width):
    lines = report_to_text(case(), width).splitlines()
    assert max(map(len, lines)) <= width


@ALL
def test_without_colour_there_is_no_escape_sequence(case):
    assert "\x1b" not in report_to_text(case())


def test_colour_adds_only_escape_sequences():
    coloured = report_to_text(smollm2(), colour=True)
    assert "\x1b[" in coloured
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [line.rstrip() for line in plain.splitlines()] == report_to_text(smollm2()).splitlines()


def test_the_table_says_what_compress_promises():
    text = report_to_text(smollm2(), 80)
    for fact in (
        "269 MB",
        "91.7 MB",
        "4.6x smaller",
        "0.412 nats per token (95% interval 0.391 to 0.437)",
        "0.193 and 3.87 nats",
        "23.1% (95% interval 21.9% to 24.4%)",
        "1.31 (95% interval 1.28 to 1.35)",
        "0.366 predicted, 0.412 measured",
        "5 min 26 s",
        "1.91 GB measured, 2.05 GB forecast",
        "The capital of France is",
        "verdict: PASSED",
        "perplexity on the audit text rose by 31%",
        "report.html",
    ):
        assert fact in text, fact


def test_a_failed_verdict_says_so_with_its_reasons():
    text = report_to_text(failed())
    assert "verdict: FAILED" in text
    assert "97% of predictions changed" in text
    assert "not finite" in text
    assert "nan" not in text.lower().replace("finance", "")


def test_an_audit_alone_names_no_folder_and_no_prediction():
    text = report_to_text(audit_only())
    assert "report.html" not in text
    assert "none predicted" in text


def test_an_embedder_has_a_cosine_and_no_changed_predictions():
    text = audit_to_text(embedder().verdict, 80)
    assert "0.991 (95% interval 0.990 to 0.992)" in text
    assert "changed predictions" not in text
    assert "perplexity" not in text


def test_slices_and_true_answers_are_told():
    text = audit_to_text(efficientnet().verdict)
    assert "5.00% (95% interval 0% to 10.0%); the reverse 1.00%; p 0.21" in text
    assert "78.0% before, 74.0% after" in text
    assert "4.1% before, 6.7% after" in text
    lines = [line.split() for line in text.splitlines()]
    (night,) = [line for line in lines if line and line[0] == "night"]
    assert night == ["night", "8", "0.190", "0.0950", "to", "0.380", "3.00%", "0.0040"]
    (day,) = [line for line in lines if line and line[0] == "<b>day</b>"]
    assert day[1] == "88"
    (answer,) = [line for line in lines if line and line[0] == "espresso" and "0.210" in line]
    assert answer[1] == "13" and answer[-1] == "0.0020"
    (first,) = [line for line in lines if line and line[0] == "_blocks.3"]
    assert first == ["_blocks.3", "row", "5", "82.0%", "0.0500", "41.0", "kB", "0.0310", "0.0290"]
    text = " ".join(text.split())
    assert "giving _blocks.3 one bit more costs 41.0 kB and returned 48% of the damage" in text
    assert "_blocks.3 and 1 more, to _fc, one bit more costs 201 kB and returned 56%" in text
    assert "by treatment: quantize_rtn, 3 bits 82%; keep_float, 16 bits 18%" in text
    assert "0.40% of the divergence is in no layer's weights" in text


def test_drift_is_told_from_the_floor_to_the_ceiling():
    text = audit_to_text(efficientnet().verdict)
    lines = [line.split() for line in text.splitlines()]
    rows = [line for line in lines if line[:1] in (["floor"], ["reference"], ["ceiling"])]
    mine = [line for line in lines if line[:2] == ["this", "model"]]
    assert len(mine) == 2 and len(rows) == 6  # same answer, another answer
    assert mine[0][2:] == ["0.810", "0.790", "to", "0.820", "0.71", "0.76", "0.80", "0.61", "0.10"]
    assert [line[0] for line in rows[:3]] == ["floor", "reference", "ceiling"]
    text = " ".join(text.split())
    assert "same answer, 61" in text and "another answer, 3" in text
    assert "reference: a second training" in text and "they miss it by 2.1% of it" in text
    assert "share of relevance that fell most: _blocks.3 31.0% to 24.0%" in text
    assert "share of relevance that rose most: _fc 12.0% to 19.0%" in text


def test_markup_in_names_is_text():
    text = report_to_text(hostile(), 100)
    assert "[red]" in text
    assert "\u202e" not in text


def test_a_plan_shows_budget_histogram_and_both_ends():
    report = smollm2()
    text = plan_to_text(report.plan, Units(report.units, ()), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "most squeezed" in text
    assert "least squeezed" in text
    assert "model.layers.0.*" in text
    weights = sum(unit.n_weights for unit in report.units)
    shown = [line.split() for line in text.splitlines() if line.startswith(" quantize_feedback")]
    shown += [line.split() for line in text.splitlines() if line.startswith(" zero_smallest")]
    assert sum(int(row[-5].replace(",", "")) for row in shown) == weights


def test_a_small_plan_is_shown_whole():
    report = efficientnet()
    names = [unit.name for unit in report.units[:5]]
    plan = report.plan
    small = type(plan)("x", plan.budget, {n: plan.choices[n] for n in names}, 0, 0.1)
    text = plan_to_text(small, report.units)
    assert "most squeezed" not in text
    assert all(name in text for name in names)


def test_scores_are_ranked_with_a_column_for_each_slice():
    report = smollm2()
    text = scores_to_text(report.units, report.scores, report.slice_relevance, width=80)
    totals = report.scores["fisher"].totals
    ranked = sorted(totals, key=totals.get, reverse=True)
    lines = [line for line in text.splitlines() if line.startswith(" model.")]
    assert [line.split()[0] for line in lines[:8]] == ranked[:8]
    assert lines[8].split()[0] == ranked[-1]
    assert "code   prose   questions" in text
    assert "nats" in text


def test_scores_without_nats_do_not_claim_them():
    report = smollm2()
    text = scores_to_text(report.units, {"magnitude": report.scores["magnitude"]})
    assert "nats" not in text
    assert "no unit" in text


def test_without_scores_the_table_says_so():
    assert scores_to_text(convolution_units(), {}) == "no scores\n"


def test_models_are_listed_with_sizes_and_without_markup():
    text = models_to_text(
        [
            {"name": "smollm2", "licence": "Apache-2.0", "download_bytes": 93_000_000},
            {"name": HOSTILE, "licence": "", "cached": True},
        ],
        80,
    )
    assert "download: 93.0 MB" in text
    assert "cached: yes" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80

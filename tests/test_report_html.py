import json
import os
import re
import sys
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from report_cases import CASES, audit_only, efficientnet, embedder, failed, hostile, smollm2

from attar.errors import OutputError
from attar.report.flow import draw_flow, spread
from attar.report.html import report_to_html, split_common, tint_tokens, write_report
from attar.report.network import TINTS, draw_network, head_strips, short_roles, split_name
from attar.report.record import report_to_json
from attar.report.wording import number_text, size_text

ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
VOID = {"img", "meta", "link", "br", "wbr", "input", "stop", "path"}


@cache
def html_of(case):
    return report_to_html(case())


class Page(HTMLParser):
    """The text, tables and addresses of a page; complains where tags do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.addresses, self.ids, self.text = [], [], [], []
        self.tags, self.rows, self.handlers = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        for name, value in attributes:
            if name in ("href", "src", "srcset", "action", "data", "xlink:href"):
                self.addresses.append(value)
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(text)
        if {"td", "th"} & set(self.open) and self.rows:
            self.rows[-1][-1] += text

    @property
    def words(self):
        return re.sub(r"\s+", " ", "".join(self.text))


@ALL
def test_tags_nest_and_ids_are_single(case):
    page = Page(html_of(case))
    assert len(page.ids) == len(set(page.ids))


@ALL
def test_the_page_needs_no_network(case):
    page = Page(html_of(case))
    assert [a for a in page.addresses if not a.startswith(("#", "data:"))] == []
    style = html_of(case).split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "@font-face" not in style


@ALL
def test_links_inside_the_page_lead_somewhere(case):
    page = Page(html_of(case))
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)


@ALL
def test_only_our_script_is_in_the_page(case):
    page = Page(html_of(case))
    assert page.tags.count("script") == 1
    assert page.handlers == []


def test_the_content_policy_names_the_hash_of_the_script():
    import base64
    import hashlib

    html = html_of(smollm2)
    script = html.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}" in html or f"script-src 'sha256-{digest}'" in html


def test_hostile_text_is_shown_as_text():
    html = html_of(hostile)
    assert "<script>alert" not in html
    assert "</title><" not in html.split("</head>")[1]
    words = Page(html).words
    assert "<script>alert(1)</script>" in words
    assert "{{7*7}}" in words


@ALL
def test_numbers_on_the_page_are_those_of_the_record(case):
    facts = report_to_json(case())
    words = Page(html_of(case)).words
    verdict, size = facts["verdict"], facts["size"]
    for fact in (
        number_text(verdict["divergence"]["value"]),
        number_text(verdict["divergence_p99"]),
        number_text(verdict["divergence"]["low"]),
        size_text(size["bytes_before"]),
        size_text(size["source_bytes"]),
        size_text(size["bytes_after"]),
        f"{size['bytes_after']:,}",
        size["smaller"],
        size_text(facts["memory"]["peak_bytes"]),
        size_text(facts["memory"]["forecast_bytes"]),
        verdict["outcome"].capitalize(),
        *verdict["reasons"],
        *facts["plan"]["notes"],
    ):
        assert re.sub(r"\s+", " ", fact) in words, fact


def test_the_table_of_units_holds_every_unit_of_the_record():
    facts = report_to_json(smollm2())
    rows = {row[0].split("shared")[0]: row for row in Page(html_of(smollm2)).rows if len(row) > 3}
    for unit in facts["units"]:
        row = rows[unit["name"]]
        assert row[1] == number_text(unit["worth"])
        assert float(row[2]) == pytest.approx(unit["stored_bits"], abs=0.005)
        assert row[3].startswith(unit["treatment"])
        assert row[4] == size_text(unit["bytes_before"])
        assert row[5] == size_text(unit["bytes_after"])
        assert row[6] == number_text(unit["predicted_damage"])


def test_the_picture_has_one_cell_for_each_unit():
    html = html_of(smollm2)
    assert len(re.findall(r'<a class="cell', html)) == 211
    assert len(re.findall(r'<a class="cell', html_of(CASES["vision"]))) == 50


def test_a_page_of_211_units_stays_under_two_megabytes():
    assert len(html_of(smollm2).encode()) < 2_000_000


def test_an_audit_alone_claims_no_compression():
    words = Page(html_of(audit_only)).words
    assert "Attar did not compress this model" in words
    assert "Predicted damage" not in words


def test_drift_is_a_table_with_maps_or_tinted_tokens():
    page = html_of(efficientnet)
    words = Page(page).words
    assert "same answer, 61" in words and "this model" in words and "0.790 to 0.820" in words
    assert page.count("data:image/png;base64,") == 2
    assert "strongest in row 1 of 2, column 2 of 2: 40%, for the answer" in words
    page = html_of(smollm2)
    assert 'class="token against" style="--t:43;--u:2" title="-30%"> is↵' in page
    assert "strongest: capital 70%; is -30%; The 0%" in " ".join(Page(page).words.split())


def test_a_failed_report_is_not_dressed_up():
    words = Page(html_of(failed)).words
    assert "Failed" in words
    assert "not finite" in words
    assert "verdict.divergence.value" in words
    assert not re.search(r"\b(nan|inf|None)\b", words)


def test_an_embedder_says_that_it_has_no_answer_to_change():
    words = Page(html_of(embedder)).words
    assert "no most likely answer" in words
    assert "0.9912" in words


def test_slices_and_true_answers_stand_on_the_page_as_text():
    page = Page(report_to_html(efficientnet()))
    rows = [row for row in page.rows if row and row[0] in ("night", "<b>day</b>")]
    assert [row[0] for row in rows] == ["night", "<b>day</b>"]
    assert rows[0][2] == "0.190" and rows[0][-2] == "0.0040"
    assert rows[0][5:8] == ["", "", ""]  # no true answer is known there
    assert rows[1][5:8] == ["70.0%", "65.0%", "0.40"]
    (answer,) = [row for row in page.rows if row and row[0] == "espresso" and row[1] == "13"]
    assert answer[2] == "0.210" and answer[-2] == "0.0020"
    assert "5.00% were right and are wrong now, 1.00% the other way round (p 0.21)" in page.words
    assert ["best temperature", "1.09", "1.19"] in page.rows
    layers = [row for row in page.rows if row and row[0] in ("_blocks.3", "_fc")]
    assert [
        "_blocks.3",
        "row 5",
        "82.0%",
        "0.0500",
        "0.0400 to 0.0600",
        "41.0 kB",
        "0.0310",
        "0.0290",
    ] in layers
    assert ["_fc", "", "18.0%", "0.0110", "0 to 0.0200", "160 kB", "0.00400", ""] in layers


def test_names_become_places():
    assert split_name("model.layers.3.mlp.up_proj") == ("model.layers", 3, "mlp.up_proj")
    assert split_name("_blocks.12._expand_conv") == ("_blocks", 12, "_expand_conv")
    assert split_name("features.3.conv.0.0") == ("features", 3, "conv.0.0")
    assert split_name("2") == ("", 2, "weight")
    assert split_name("lm_head") is None


def test_roles_are_shortened_only_as_far_as_they_stay_apart():
    roles = ["self_attn.q_proj", "encoder_attn.q_proj", "mlp.up_proj"]
    assert short_roles(roles) == {
        "self_attn.q_proj": "self_attn.q_proj",
        "encoder_attn.q_proj": "encoder_attn.q_proj",
        "mlp.up_proj": "up_proj",
    }


def test_a_transformer_is_a_grid_and_a_convolutional_net_is_bars():
    grid = draw_network(report_to_json(smollm2())["units"])
    assert grid["mode"] == "grid"
    (stack,) = grid["stacks"]
    assert [header["short"] for header in stack["headers"]] == [
        *("q", "k", "v", "o"),
        *("gate", "up", "down"),
    ]
    assert [block["number"] for block in stack["blocks"]] == list(range(30))
    assert grid["singles"] == ["model.embed_tokens"]
    assert draw_network(report_to_json(CASES["vision"]())["units"])["mode"] == "bars"
    assert draw_network([])["mode"] == "none"


def test_the_unit_worth_most_has_the_deepest_tint():
    units = report_to_json(smollm2())["units"]
    cells = draw_network(units)["cells"]
    ranked = sorted(units, key=lambda unit: unit["worth"])
    tints = [cells[unit["name"]]["tint"] for unit in ranked]
    assert tints == sorted(tints)
    assert (tints[0], tints[-1]) == (TINTS[0], TINTS[-1])


def test_no_tint_hides_its_text():
    def luminance(colour):
        parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    css = html_of(smollm2).split("<style>")[1]
    themes = re.findall(
        r"--paper: #(\w+);.*?--ink: #(\w+);.*?--rose: (\d+) (\d+) (\d+);.*?--deep-ink: #(\w+);",
        css,
        re.S,
    )
    assert len(themes) == 2
    for paper, ink, *rose, deep in themes:
        paper, ink = (bytes.fromhex(colour) for colour in (paper, ink))
        deep = bytes.fromhex(deep * 2 if len(deep) == 3 else deep)
        for step, tint in enumerate(TINTS):
            cell = [p + (int(r) - p) * tint / 100 for p, r in zip(paper, rose, strict=True)]
            assert contrast(cell, deep if step >= 5 else ink) >= 4.5, (tint, paper)


def test_the_flow_is_to_scale():
    facts = report_to_json(smollm2())
    flow = draw_flow(facts, 1040, (200, 225))
    before = sum(band["before"] for band in flow["bands"])
    after = sum(band["after"] for band in flow["bands"])
    assert before == facts["size"]["bytes_before"]
    assert after == facts["size"]["bytes_after"]
    for band in flow["bands"]:
        _x, top, *_, bottom = re.findall(r"-?[\d.]+", band["path"])
        height = float(bottom) - float(top)
        # Coordinates are written with two decimals.
        assert height == pytest.approx(band["before"] / before * flow["height"], abs=0.02)


@pytest.mark.parametrize("wanted", [[50, 51, 52], [0, 0, 0, 0], [99, 100, 100], [10, 90]])
def test_labels_never_overlap_and_stay_inside(wanted):
    places = spread([float(place) for place in wanted], 17.0, 8.0, 92.0)
    assert all(b - a >= 17.0 - 1e-9 for a, b in pairwise(places))
    assert min(places) >= 8.0
    assert max(places) <= 92.0


def test_the_highest_head_is_marked():
    report = smollm2()
    strips = head_strips(report_to_json(report)["units"])["strips"]
    for strip in strips:
        nats = report.head_relevance[strip["name"]]
        assert nats[strip["most"]] == max(nats)
        assert nats[strip["least"]] == min(nats)


def test_tokens_that_moved_more_are_darker_and_thicker():
    drawn = tint_tokens([["a", 0.0], ["b", 0.5], ["c", 2.0], ["d", None]])["drawn"]
    assert [token["tint"] for token in drawn] == [0, 35, 70, 70]
    assert [token["line"] for token in drawn] == [0, 2, 4, 4]


def test_continuations_are_cut_at_a_word():
    cut = split_common({"prompt": "", "original": " a boat", "compressed": " a bone"})
    assert (cut["same"], cut["original_rest"], cut["compressed_rest"]) == (" a ", "boat", "bone")
    same = split_common({"prompt": "", "original": "x y", "compressed": "x y"})
    assert (same["same"], same["original_rest"], same["compressed_rest"]) == ("x y", "", "")


def test_page_and_record_are_written_whole(tmp_path):
    report = smollm2()
    page, record = write_report(report, tmp_path / "new" / "folder")
    assert page.read_text("utf-8") == report_to_html(report)
    assert json.loads(record.read_text("utf-8")) == report_to_json(report)
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.json"]


def test_a_folder_that_cannot_be_made_is_an_error_with_a_hint(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError) as caught:
        write_report(smollm2(), tmp_path / "file")
    assert str(tmp_path / "file") in caught.value.problem
    assert "folder" in caught.value.hint


@pytest.mark.skipif(sys.platform == "win32", reason="replaces a function of the posix module")
def test_a_full_disk_leaves_the_old_report_and_no_half(tmp_path, monkeypatch):
    write_report(smollm2(), tmp_path)
    old = (tmp_path / "report.html").read_bytes()

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("pathlib.Path.replace", full)
    ruined = replace(smollm2(), model="other")
    with pytest.raises(OutputError, match="No space left"):
        write_report(ruined, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]

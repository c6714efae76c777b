"""The page of a frontier in a real browser: a file alone, whose slider moves the plan."""

from dataclasses import replace

import pytest
from browser_parts import press, texts, visit
from report_cases import CASES

from attar.report.frontier import frontier_to_html
from attar.report.wording import size_text

pytestmark = pytest.mark.browser


def case():
    report = CASES["language"]()
    points = tuple(replace(point, is_made=False) for point in report.frontier.points)
    return replace(report.frontier, points=points), report


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    frontier, report = case()
    file = tmp_path_factory.mktemp("frontier") / "frontier.html"
    file.write_text(frontier_to_html(frontier, report.units, "language", "my sizes"))
    return file


def treated(window, unit):
    return window.find_element("css selector", f"#u{unit} .then").get_property("textContent")


def expected(frontier, report, point, unit):
    return frontier.points[point].choices[report.units[unit].name].treatment


@pytest.mark.parametrize("width", [380, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_loads_without_network_and_message_and_fits_the_screen(chromium, page, width, scheme):
    chromium.get_log("browser")
    visit(chromium, page, width, scheme)
    assert chromium.get_log("browser") == []
    requests = chromium.execute_script("return performance.getEntriesByType('resource').length")
    assert requests == 0
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width


def test_the_slider_shows_the_plan_at_each_point(chromium, page):
    frontier, report = case()
    visit(chromium, page)
    slider = chromium.find_element("id", "size")
    assert int(slider.get_attribute("value")) == len(frontier.points) // 2
    for point in (0, len(frontier.points) - 1):
        chromium.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
            slider,
            point,
        )
        for unit in (0, 5, len(report.units) - 1):
            assert treated(chromium, unit).startswith(expected(frontier, report, point, unit))
        assert texts(chromium, "size-now") == [size_text(frontier.points[point].weight_bytes)]
        most = chromium.find_element("id", "now-plan").text.split(" × ")
        assert int(most[0]) <= len(report.units) and len(most) >= 2
        counted = chromium.execute_script(
            "const n = {}; document.querySelectorAll('#units .then').forEach("
            "one => { n[one.textContent] = (n[one.textContent] || 0) + 1; });"
            "return Math.max(...Object.values(n))"
        )
        assert int(most[0]) == counted


def test_the_command_makes_what_the_slider_shows_with_its_pins(chromium, page):
    visit(chromium, page)
    press(chromium, "#u2 .pin")
    command = chromium.find_element("id", "command").text
    assert command.startswith("attar apply 'my sizes' --size ")
    assert "--keep model.layers.0.self_attn.k_proj" in command
    assert treated(chromium, 2) == "keep_float 16"
    press(chromium, "#unpin")
    assert "--keep" not in chromium.find_element("id", "command").text


def test_units_are_filtered_and_sorted(chromium, page):
    visit(chromium, page)
    chromium.find_element("id", "filter").send_keys("layers.3. v_proj")
    assert chromium.find_element("id", "filter-count").text == "1 of 211 shown"
    press(chromium, "#units th:nth-child(2) button")
    assert chromium.get_log("browser") == []


def test_a_click_on_a_point_moves_the_slider(chromium, page):
    visit(chromium, page)
    dot = chromium.find_element("css selector", ".curve .wide [data-point='1']")
    chromium.execute_script("arguments[0].dispatchEvent(new MouseEvent('click'))", dot)
    assert chromium.find_element("id", "size").get_attribute("value") == "1"


def test_without_script_every_size_and_one_plan_are_there(chromium, page):
    visit(chromium, page, script=False)
    try:
        assert not chromium.find_element("id", "size").is_displayed()
        assert not chromium.find_element("css selector", ".pin").is_displayed()
        text = chromium.find_element("tag name", "body").text
        assert "58.9 MB" in text and "model.layers.29.mlp.down_proj" in text
        assert "attar apply 'my sizes'" in text
    finally:
        visit(chromium, page)

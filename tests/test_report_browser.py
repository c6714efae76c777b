"""The page in a real browser, from a file, with every request to a network refused."""

import shlex
from fnmatch import fnmatchcase

import pytest
from browser_parts import choose, press, texts, visit
from report_cases import CASES

from attar.report.html import write_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    return {name: write_report(case(), root / name)[0] for name, case in CASES.items()}


def names(window):
    return window.execute_script(
        "return [...document.querySelectorAll('#units tbody tr')]"
        ".filter(row => !row.hidden).map(row => row.cells[0].textContent)"
    )


@pytest.mark.parametrize("case", CASES)
def test_the_page_loads_without_a_console_message(chromium, pages, case):
    chromium.get_log("browser")
    visit(chromium, pages[case])
    assert chromium.get_log("browser") == []
    requests = chromium.execute_script("return performance.getEntriesByType('resource').length")
    assert requests == 0


@pytest.mark.parametrize("width", [380, 768, 1280])
@pytest.mark.parametrize("case", CASES)
def test_the_page_is_never_wider_than_the_screen(chromium, pages, case, width):
    visit(chromium, pages[case], width)
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    assert chromium.execute_script("return innerWidth") == width


@pytest.mark.parametrize("width", [380, 1280])
def test_no_cell_of_the_picture_cuts_its_text(chromium, pages, width):
    visit(chromium, pages["language"], width)
    cut = chromium.execute_script(
        "return [...document.querySelectorAll('a.cell')]"
        ".filter(cell => cell.scrollWidth > cell.clientWidth + 1).length"
    )
    assert cut == 0


def test_labels_of_the_flow_stay_inside_the_drawing(chromium, pages):
    for width in (380, 1280):
        visit(chromium, pages["language"], width)
        outside = chromium.execute_script(
            "return [...document.querySelectorAll('.flow svg')]"
            ".filter(svg => svg.getBoundingClientRect().width)"
            ".flatMap(svg => [...svg.querySelectorAll('text')].filter(text => {"
            "const [a, b] = [text.getBoundingClientRect(), svg.getBoundingClientRect()];"
            "return a.left < b.left - 1 || a.right > b.right + 1; }).map(t => t.textContent))"
        )
        assert outside == []


def test_sorting_by_worth_puts_the_most_first_then_the_least(chromium, pages):
    visit(chromium, pages["language"])
    totals = CASES["language"]().scores["fisher"].totals
    ranked = sorted(totals, key=totals.get, reverse=True)
    button = chromium.find_element("css selector", "#units th:nth-child(2) button")
    chromium.execute_script("arguments[0].click()", button)
    assert names(chromium)[:3] == ranked[:3]
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    chromium.execute_script("arguments[0].click()", button)
    assert names(chromium)[0].startswith(ranked[-1])


def test_sorting_by_name_counts_layers_as_numbers(chromium, pages):
    visit(chromium, pages["vision"])
    button = chromium.find_element("css selector", "#units th:nth-child(1) button")
    chromium.execute_script("arguments[0].click()", button)
    blocks = [name for name in names(chromium) if name.startswith("_blocks")]
    order = [int(name.split(".")[1]) for name in blocks]
    assert order == sorted(order)


def test_filtering_shows_only_what_matches_and_counts_it(chromium, pages):
    visit(chromium, pages["language"])
    chromium.find_element("id", "filter").send_keys("layers.3. V_PROJ")
    assert names(chromium) == ["model.layers.3.self_attn.v_proj"]
    assert chromium.find_element("id", "filter-count").text == "1 of 211 shown"


def test_a_treatment_is_filtered_for_beside_the_words(chromium, pages):
    visit(chromium, pages["language"])
    choose(chromium, "filter-treatment", "zero_smallest")
    shown = names(chromium)
    assert chromium.find_element("id", "filter-count").text == f"{len(shown)} of 211 shown"
    halved = [
        choice.unit
        for choice in CASES["language"]().plan.choices.values()
        if choice.treatment == "zero_smallest"
    ]
    assert shown == halved
    chromium.find_element("id", "filter").send_keys("layers.5.")
    assert all(".5." in name for name in names(chromium))
    choose(chromium, "filter-treatment", "")
    assert len(names(chromium)) == 7


def test_the_slider_begins_at_this_model_and_says_that_it_was_measured(chromium, pages):
    visit(chromium, pages["language"])
    assert texts(chromium, "size-now", "now-measured", "now-moved", "size-known") == [
        "58.9 MB",
        "0.392",
        "0 of 211 units",
        "measured: this model",
    ]
    assert chromium.execute_script("return document.querySelectorAll('.cell.moved').length") == 0
    ring = chromium.find_element("css selector", ".curve .wide .here")
    made = chromium.find_element("css selector", ".curve .wide circle.measured")
    assert ring.get_attribute("cx") == made.get_attribute("cx")


def test_arrow_keys_on_the_slider_move_the_plan_everywhere(chromium, pages):
    from selenium.webdriver.common.keys import Keys

    visit(chromium, pages["language"])
    slider = chromium.find_element("id", "size")
    slider.send_keys(Keys.ARROW_LEFT)
    assert texts(chromium, "size-now", "now-bits", "now-measured", "now-moved") == [
        "56.8 MB",
        "3.38",
        "–",
        "211 of 211 units",
    ]
    assert slider.get_attribute("aria-valuetext").startswith("56.8 MB, 0.48")
    assert "predicted only, uncertain" in chromium.find_element("id", "size-known").text
    row = chromium.find_element("id", "u1").get_property("textContent")
    assert "→ quantize_entropy 3" in row
    cell = chromium.find_element("css selector", ".picture tbody a.cell")
    assert cell.text.startswith("3") and "moved" in cell.get_attribute("class")
    assert "56.8 MB" in chromium.find_element("id", "picture-size").text
    assert chromium.find_element("id", "command").text == (
        "attar apply out/smollm2/report --size 56.762MB --out out/smollm2-56.762MB"
    )
    assert chromium.find_element("css selector", "table.sizes tr.now").text.startswith("56.8 MB")
    slider.send_keys(Keys.END)
    assert texts(chromium, "size-known") == ["predicted only"]
    slider.send_keys(Keys.HOME)
    assert texts(chromium, "size-now") == ["31.5 MB"]


def test_a_click_on_a_point_moves_the_slider(chromium, pages):
    visit(chromium, pages["language"])
    dot = chromium.find_element("css selector", ".curve .wide [data-point='7']")
    chromium.execute_script("arguments[0].dispatchEvent(new MouseEvent('click'))", dot)
    assert chromium.find_element("id", "size").get_attribute("value") == "7"
    assert texts(chromium, "size-now") == ["82.0 MB"]


def test_pins_give_the_line_to_type(chromium, pages):
    visit(chromium, pages["language"])
    for place in (2, 5):
        press(chromium, f"#u{place} .pin")
    pins = "--keep model.layers.0.self_attn.k_proj --keep model.layers.0.mlp.gate_proj"
    assert texts(chromium, "pins", "pins-now") == [pins, "2 of 211 units."]
    assert pins in chromium.find_element("id", "command").text
    assert "attar view out/smollm2" in chromium.find_element("id", "sizes").text
    press(chromium, "#unpin")
    assert not chromium.find_element("id", "pins").is_displayed()
    assert "--keep" not in chromium.find_element("id", "command").text


def test_a_unit_is_pinned_from_the_picture_by_keyboard(chromium, pages):
    visit(chromium, pages["language"])
    chromium.execute_script("document.querySelector('.picture tbody a.cell').focus()")
    button = chromium.find_element("css selector", "#inspector button")
    chromium.execute_script("arguments[0].focus()", button)
    chromium.switch_to.active_element.send_keys(" ")
    assert texts(chromium, "pins") == ["--keep model.layers.0.self_attn.q_proj"]
    pressed = chromium.switch_to.active_element.get_attribute("aria-pressed")
    assert pressed == "true"
    assert chromium.execute_script("return document.querySelectorAll('.cell.pinned').length") == 1


def test_what_is_typed_for_a_hostile_name_is_quoted(chromium, pages):
    visit(chromium, pages["hostile"])
    press(chromium, "#u0 .pin")
    box = chromium.find_element("css selector", "#u0 .pin")
    words = shlex.split(chromium.find_element("id", "command").get_property("textContent"))
    name = box.get_attribute("value")
    assert fnmatchcase(name, words[words.index("--keep") + 1])
    assert words[:2] == ["attar", "apply"] and words.count("--keep") == 1


def test_a_copied_command_is_the_one_that_is_shown(chromium, pages):
    visit(chromium, pages["language"])
    press(chromium, '[data-copy="command"]')
    picked = chromium.execute_script("return getSelection().toString()")
    assert picked.strip() == chromium.find_element("id", "command").text


def test_arrow_keys_walk_the_picture_and_tell_about_each_unit(chromium, pages):
    from selenium.webdriver.common.keys import Keys

    visit(chromium, pages["language"])
    chromium.execute_script("document.querySelector('.picture tbody a.cell').focus()")
    chromium.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    told = chromium.find_element("id", "inspector").text
    assert "layers.0.self_attn.k_proj" in told
    assert "treatment: quantize_feedback bits 4, group_size 64, symmetric no" in told
    chromium.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert "layers.1.self_attn.k_proj" in chromium.find_element("id", "inspector").text
    stops = chromium.execute_script(
        "return document.querySelectorAll('.picture a.cell[tabindex=\"0\"]').length"
    )
    assert stops == 1


def test_a_token_tells_its_number_on_focus(chromium, pages):
    visit(chromium, pages["language"])
    token = chromium.find_element("css selector", ".token:nth-child(5)")
    chromium.execute_script("arguments[0].focus()", token)
    nats = token.get_attribute("data-nats")
    assert f"{nats} nats" in chromium.find_element("id", "token-readout").text


def test_the_dark_page_is_dark_and_the_light_one_light(chromium, pages):
    def paper():
        colour = chromium.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour[4:-1].split(","))

    visit(chromium, pages["language"], scheme="dark")
    assert paper() < 150
    visit(chromium, pages["language"], scheme="light")
    assert paper() > 700


def test_without_script_every_fact_is_there_and_no_dead_control(chromium, pages):
    visit(chromium, pages["language"], script=False)
    try:
        assert not chromium.find_element("id", "filter").is_displayed()
        assert not chromium.find_element("id", "inspector").is_displayed()
        text = chromium.find_element("tag name", "body").text
        assert not chromium.find_element("id", "size").is_displayed()
        assert not chromium.find_element("css selector", ".pin").is_displayed()
        for fact in (
            "269 MB",
            "0.412",
            "measured: this model",
            "predicted only, uncertain",
            "Passed",
            "model.layers.29.mlp.down_proj",
            "Paris (0.83)",
        ):
            assert fact in text
        link = chromium.find_element("css selector", ".picture tbody a.cell")
        assert link.get_attribute("href").endswith("#u1")
    finally:
        visit(chromium, pages["language"])


def test_a_script_that_slips_in_is_not_run(chromium, pages):
    visit(chromium, pages["hostile"])
    chromium.execute_script(
        "const s = document.createElement('script');"
        "s.textContent = 'window.slipped = true'; document.body.append(s)"
    )
    assert chromium.execute_script("return window.slipped === undefined")
    chromium.get_log("browser")

"""The page in a real browser, from a file, with every request to a network refused."""

import os
import shutil
from pathlib import Path

import pytest
from report_cases import CASES

from attar.report.html import write_report

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium")
    driver = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip("chromium or chromedriver is not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    yield window
    window.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    return {name: write_report(case(), root / name)[0] for name, case in CASES.items()}


def visit(chromium, page: Path, width=1280, scheme="light", script=True):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    scheme = {"name": "prefers-color-scheme", "value": scheme}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    # A window that no one looks at has no focus, and tells no element of it.
    chromium.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
    chromium.get(page.as_uri())
    return chromium


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
        for fact in ("269 MB", "0.412", "Passed", "model.layers.29.mlp.down_proj", "Paris (0.83)"):
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

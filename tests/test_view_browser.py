"""`attar view` in a real browser: what the slider and the pins ask for, and what is shown of it."""

import shutil
import threading
import time
from pathlib import Path

import pytest
from browser_parts import press, texts, visit
from toy_code import save_data

from attar import pipeline
from attar.records import Recipe
from attar.viewing import Viewer

pytestmark = pytest.mark.browser
FACTORY = "toy_code:classifier"


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("viewed")
    data = str(save_data(folder / "data.npz"))
    numbers = {"calibration": 20, "recovery": 20, "audit": 20}
    recipe = Recipe(FACTORY, "50%", task="classify", data=data, **numbers)
    pipeline.compress(recipe, folder / "small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), ":")
        with Viewer(folder / "small", 0, [f"--factory={FACTORY}"]) as made:
            thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            yield made
            made.shutdown()
            thread.join()


@pytest.fixture
def window(chromium, viewer):
    chromium.get_log("browser")
    return visit(chromium, viewer.address)


def until(found, seconds=60):
    """Wait for what a page will show; say what it shows when it does not."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "it was never shown"
        time.sleep(0.05)
    return value


def status(window):
    return texts(window, "size-status")[0]


def test_the_served_page_asks_nobody_else_and_says_nothing_on_the_console(window):
    assert window.get_log("browser") == []
    addresses = window.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert all(address.startswith(window.current_url) for address in addresses)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280])
def test_the_served_page_is_not_wider_than_the_screen(chromium, viewer, width, scheme):
    visit(chromium, viewer.address, width, scheme)
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_pin_is_solved_at_once(window):
    before = texts(window, "now-predicted")[0]
    press(window, "#u2 .pin")
    until(lambda: "with the pins" in texts(window, "size-known")[0])
    assert "→ keep_float 16" in window.find_element("id", "u2").get_property("textContent")
    assert float(texts(window, "now-predicted")[0]) != float(before)
    press(window, "#unpin")
    until(lambda: texts(window, "size-known") == ["measured: this model"])
    assert window.get_log("browser") == []


def test_any_size_is_solved_and_one_that_cannot_be_says_why(window):
    from selenium.webdriver.common.keys import Keys

    field = window.find_element("id", "any-size")
    field.send_keys("6.1kB", Keys.ENTER)
    until(lambda: "solved now" in texts(window, "size-known")[0])
    assert texts(window, "size-now")[0].startswith(("5.9", "6.0", "6.1"))
    assert "--size " in texts(window, "command")[0]
    field.clear()
    field.send_keys("10B", Keys.ENTER)
    until(lambda: "no plan fits 10 bytes" in status(window))
    field.clear()
    window.find_element("id", "size").send_keys(Keys.END)
    assert status(window) == ""


def test_a_model_is_made_from_the_page_and_its_report_opened(window, viewer):
    from selenium.webdriver.common.keys import Keys

    window.find_element("id", "size").send_keys(Keys.END)
    press(window, "#apply")
    until(lambda: status(window).startswith("making"))
    assert window.find_element("id", "apply").get_attribute("disabled")
    link = until(lambda: window.find_elements("css selector", "#size-status a"))[0]
    try:
        assert "see its report" in link.text
        press(window, "#size-status a")
        until(lambda: "/made/1/" in window.current_url)
        assert "attar report" in window.title
        assert texts(window, "size-known") == ["measured: this model"]
        press(window, "#u0 .pin")
        until(lambda: "with the pins" in texts(window, "size-known")[0])
    finally:
        shutil.rmtree(viewer.making.now()["folder"])

"""Slices and classes are pinned in the page, which gives the line to type, and are solved again."""

import shlex
from pathlib import Path

import pytest
from browser_parts import press, texts, visit
from test_protect import save_samples, wanted

from attar import pipeline
from attar.errors import AttarError
from attar.protecting import asked
from attar.records import Recipe
from attar.viewing import open_report, solve_again


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("protected")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_samples(Path("d.npz"))
        pipeline.compress(wanted(), Path("small"))
    return folder / "small"


@pytest.mark.browser
def test_a_ticked_slice_gives_the_line_to_type(chromium, small):
    chromium.get_log("browser")
    window = visit(chromium, small / "report" / "report.html")
    report = open_report(small)
    lost = {one["label"]: one["divergence"]["value"] for one in report.facts["verdict"]["slices"]}
    press(window, 'input.spare[value^="a:"]')
    (word,) = shlex.split(texts(window, "pins")[0])[1:]
    assert asked(Recipe("", protect=(word,))) == [("a", pytest.approx(lost["a"] / 2, rel=0.05))]
    assert f"--protect {word}" in window.find_element("id", "command").text
    assert texts(window, "pins-now") == ["1 slice loses less."]
    press(window, 'input.spare[value^="class="]')  # a sample has one label
    (word,) = shlex.split(texts(window, "pins")[0])[1:]
    assert word.startswith("class=") and word.partition(":")[0][6:].isdecimal()
    press(window, "#unpin")
    assert "--protect" not in window.find_element("id", "command").text
    assert window.execute_script("return document.querySelectorAll('.spare:checked').length") == 0
    assert window.get_log("browser") == []


def test_a_slice_takes_its_bytes_from_the_others(small):
    shown = open_report(small)
    free = solve_again(shown, "3.4kB", ())
    spared = solve_again(shown, "3.4kB", (), ["a:0.001"])
    assert spared["point"]["plan"] != free["point"]["plan"]
    assert float(spared["point"]["predicted"]) > float(free["point"]["predicted"])
    with pytest.raises(AttarError, match="spares the protected slices"):
        solve_again(shown, "3.4kB", (), ["a:1e-9"])
    with pytest.raises(AttarError, match="is not a slice and the nats"):
        solve_again(shown, "3.4kB", (), ["a"])
    assert solve_again(shown, "3.4kB", (), ["class=1:1e-9"])["point"] == free["point"]

"""A concept is pinned in the page of an audit, and a run is held to what its samples may lose."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from browser_parts import press, texts, visit
from test_protect import save_samples, towers, wanted

from attar import concept_slices, pipeline, protecting
from attar.auditing import Wishes
from attar.concept_slices import Known, least_of, read_file, strongest, to_file
from attar.errors import AttarError
from attar.explain.dictionary import Dictionary
from attar.plan.planfile import plan_to_dict, recipe_from_dict
from attar.records import Recipe
from attar.report.html import write_report


def rougher():
    """The original with its weights on a grid, as another tool would leave them."""
    module, examples = towers()
    for weight in module.parameters():
        weight.data = (weight.data * 12).round() / 12
    return module, examples


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Two models, an audit of both with its page, and the audit's report."""
    folder = tmp_path_factory.mktemp("concepts")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_samples(Path("d.npz"))
        plain = wanted(size="", slices=None)
        other = Recipe("test_concept_slices:rougher", task="classify")
        report = pipeline.audit(plain, other, Wishes(drift=True))
        write_report(report, Path("audit"))
        yield report


def concept_of(report):
    """The concept whose samples lost most, as the page says it."""
    found = [(place.unit, one) for place in report.verdict.drift.concepts for one in place.moved]
    unit, one = max(found, key=lambda pair: pair[1].divergence)
    return f"concept=audit:{unit}:{one.number}", one


@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_of_the_samples_has_a_concept_by_its_strongest_place(seed):
    draws = np.random.default_rng(seed)
    where = [(int(sample), n) for n, sample in enumerate(draws.integers(0, 33, 123))]
    strengths = draws.random((123, 5)) * (draws.random((123, 5)) < 0.4)
    strengths[:, 3] = 0
    strengths[7:, 4] = 0
    peaks = strongest(strengths, where, 33)
    for sample in range(33):
        own = [strengths[n] for n, (at, _) in enumerate(where) if at == sample]
        assert np.array_equal(peaks[sample], np.max(own, 0) if own else np.zeros(5))
    least = least_of(peaks)
    for k in range(5):
        met = sorted((one for one in peaks[:, k] if one > 0), reverse=True)
        assert least[k] == (met[min(3, len(met)) - 1] if met else np.inf)
    assert (peaks[:, :3] >= least[:3]).sum(0).tolist() == [3, 3, 3]


def known(unit="layers.1", model="m"):
    directions = np.eye(3)[:2]
    return Known(unit, Dictionary(np.ones(3), np.zeros(3), directions), np.ones(2), 4, model)


def test_the_file_says_the_same_again_in_the_same_bytes(tmp_path):
    content = to_file([known(), known("head")])
    assert content == to_file([known(), known("head")])
    (tmp_path / "concepts.npz").write_bytes(content)
    one, two = read_file(str(tmp_path))
    assert (one.unit, two.unit, one.most, one.model) == ("layers.1", "head", 4, "m")
    assert np.array_equal(two.dictionary.directions, np.eye(3)[:2])
    for broken in (content[:50], b"", b"PK\x03\x04", to_file([])[:-1]):
        (tmp_path / "concepts.npz").write_bytes(broken)
        with pytest.raises(AttarError, match=r"cannot be read") as error:
            read_file(str(tmp_path))
        assert "--drift --report" in error.value.hint


def test_samples_are_labelled_by_what_the_original_meets(here):
    label, one = concept_of(here)
    session = protecting.labelled(pipeline.open_recipe(wanted("3.4kB", f"{label}:1", slices=None)))
    _, unit, number = concept_slices.parts(label)
    (place,) = (place for place in read_file("audit") if place.unit == unit)
    module = session.model.module
    for batches, labels in (
        (session.data.calibration, [x for own in session.data.slices for x in own]),
        (session.data.audit, session.data.audit_slices),
    ):
        entered = []
        hook = module.get_submodule(unit).register_forward_pre_hook(
            lambda _, x, entered=entered: entered.append(x[0].detach())
        )
        with torch.no_grad():
            module(torch.cat([batch["inputs"] for batch in batches]))
        hook.remove()
        own = place.dictionary.strengths(entered[0].double().numpy())[:, number]
        truth = [label if u >= place.least[number] * (1 - 1e-6) else "rest" for u in own]
        assert [x if x == label else "rest" for x in labels] == truth and label in truth
    assert session.data.audit_slices.count(label) == one.n_samples


def test_a_run_is_held_to_what_the_concept_may_lose(here):
    label, _ = concept_of(here)

    def lost(nats, out):
        line = f"{label}:{nats:.3g}"
        report = pipeline.compress(
            wanted("3.4kB", line, slices=None, rounds=1), Path(out), force=True
        )
        assert recipe_from_dict(plan_to_dict(report.plan)).protect == (line,)
        (check,) = [c for c in report.verdict.checks if c.name == f"protected {label}: divergence"]
        return check.found.value

    free = lost(100.0, "free")
    assert lost(free / 2, "spared") < 0.75 * free


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("concept=audit:3:0.1", "names no concept"),
        ("concept=audit:right.0:x:0.1", "names no concept"),
        ("concept=nowhere:right.0:1:0.1", "there is no nowhere"),
        ("concept=audit:other:1:0.1", "no concepts of what enters other"),
        ("concept=audit:UNIT:99:0.1", "has no concept 99"),
        ("concept=stale:UNIT:0:0.1", "of another model"),
    ],
)
def test_what_is_no_concept_is_two_lines(here, typed, says):
    unit = here.verdict.drift.concepts[0].unit
    Path("stale").mkdir(exist_ok=True)
    Path("stale/concepts.npz").write_bytes(to_file([known(unit)]))
    with pytest.raises(AttarError, match=says) as error:
        session = pipeline.open_recipe(wanted("3.4kB", typed.replace("UNIT", unit), slices=None))
        protecting.labelled(session)
    assert error.value.hint


@pytest.mark.browser
def test_a_ticked_concept_gives_the_options_to_type(here, chromium):
    chromium.get_log("browser")
    window = visit(chromium, Path("audit/report.html").resolve())
    assert texts(window, "concept-pins") == [""]
    tick = window.find_element("css selector", "input.spare.concept").get_attribute("value")
    press(window, "input.spare.concept")
    option, word = shlex.split(texts(window, "concept-pins")[0])
    assert (option, word) == ("--protect", tick)
    ((label, nats),) = protecting.asked(Recipe("", protect=(word,)))
    session = pipeline.open_recipe(wanted("3.4kB", word, slices=None))
    assert label in protecting.labelled(session).data.audit_slices and nats > 0
    assert window.find_element("id", "concepts-now").text.startswith("1 concept.")
    press(window, "input.spare.concept")
    assert texts(window, "concept-pins") == [""]
    assert not window.find_element("id", "concept-copy").is_displayed()
    assert window.get_log("browser") == []

"""The frontier: corrections between measured points, the file, the page, and any size from it."""

import json
import math
from copy import deepcopy
from dataclasses import replace

import pytest
from test_decide import divergence_by_hand, sharp_classifier
from toy_code import samples, save_data

from attar import decide, pipeline, sizing
from attar.cli import main
from attar.errors import PlanError
from attar.load.model import load_model
from attar.plan.frontier import corrected, read_prices, spread_sizes
from attar.records import FrontierPoint, Recipe, Silent
from attar.report.curve import draw_frontier
from attar.session import open_recipe, open_session
from attar.transform.apply import build_transform, materialise


def point(size, predicted, measured=None):
    return FrontierPoint(size, predicted, predicted, measured)


def test_sizes_go_from_the_least_to_the_most_by_equal_ratios():
    sizes = spread_sizes(1000, 8000, 4)
    assert sizes == [1000, 2000, 4000, 8000]
    assert spread_sizes(5, 5, 4) == spread_sizes(5, 3, 4) == [5]
    assert spread_sizes(1, 3, 9) == [1, 2, 3]


def test_a_correction_is_drawn_between_its_measured_neighbours():
    points = [point(1000, 1.0, 4.0), point(2000, 0.5), point(4000, 0.25, 0.25), point(8000, 0.1)]
    one, two, three, four = corrected(points, 1e-6)
    assert one.corrected_damage == pytest.approx(4.0) and three.corrected_damage == 0.25
    assert two.corrected_damage == pytest.approx(0.5 * 2)  # halfway between log 4 and log 1
    assert four.corrected_damage == pytest.approx(0.1)
    assert [p.is_sure for p in (one, two, three, four)] == [True, False, True, True]


def test_beyond_what_was_measured_a_correction_far_from_one_is_not_sure():
    near, far = (corrected([point(10, 1.0, m), point(20, 0.5)], 1e-6)[1] for m in (1.4, 1.6))
    assert near.is_sure and near.corrected_damage == pytest.approx(0.7)
    assert not far.is_sure


def test_a_ratio_of_noise_corrects_nothing():
    (only,) = corrected([point(10, 1e-9, 1e-7)], 1e-6)
    assert only.corrected_damage == 1e-9


def test_the_drawing_stays_inside_its_edges():
    drawn = draw_frontier([point(10, 3.0, 5.0), point(20, 0.02), point(40, 1e-5)], 720, 400)
    for mark in drawn["marks"]:
        assert drawn["left"] <= mark["x"] <= drawn["width"] and 0 < mark["y"] <= drawn["floor"]
    assert [m["kind"] for m in drawn["marks"]] == ["measured", "sure", "sure"]
    assert draw_frontier([point(10, 0.0)], 720, 400)["marks"] == []
    noise = draw_frontier([point(10, 0.1, -1e-9), point(20, 0.01)], 720, 400)["marks"]
    assert [mark["kind"] for mark in noise] == ["measured", "sure"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier") / "points"
    save_data(folder.parent / "data.npz")
    recipe = Recipe(
        model="toy_code:classifier",
        task="classify",
        data=str(folder.parent / "data.npz"),
        calibration=20,
        recovery=20,
        audit=20,
    )
    return folder, pipeline.frontier(recipe, folder, force=False, progress=None)


def test_points_are_smaller_where_more_is_lost(made):
    _, frontier = made
    sizes = [p.weight_bytes for p in frontier.points]
    damages = [p.predicted_damage for p in frontier.points]
    assert sizes == sorted(sizes) and len(sizes) > 3
    assert damages == sorted(damages, reverse=True)
    measured = [p for p in frontier.points if p.measured_damage is not None]
    assert measured and all(math.isfinite(p.measured_damage) for p in measured)


def test_every_point_when_applied_loses_what_it_says_or_is_flagged():
    """Enough samples that two measurements of one plan differ little."""
    module, examples = sharp_classifier()
    model = load_model(deepcopy(module), examples=examples, task="classify")
    recipe = Recipe(model.name, task="classify", calibration=150, recovery=250, audit=250, rounds=1)
    session = open_session(recipe, model, Silent(), {"inputs": samples(660)})
    statistics = decide.explain(session)
    candidates = decide.price(session, statistics)
    points = sizing.frontier(session, candidates, statistics).points
    for point in points:
        sized = replace(session, recipe=replace(recipe, size=f"{point.weight_bytes}B"))
        applied = decide.plan(sized, candidates, statistics)
        small = materialise(session.model.module, applied.treated)
        found = divergence_by_hand(session, small, session.data.audit)
        off = max(found / point.corrected_damage, point.corrected_damage / found)
        assert off <= 1.5 or not point.is_sure, point
        assert applied.plan.weight_bytes <= point.weight_bytes
    assert sum(point.is_sure for point in points) >= len(points) / 2


def test_the_file_gives_the_same_prices_back(made):
    folder, frontier = made
    session = open_recipe(frontier.recipe)
    found, equalised, cuts = read_prices(
        folder / "frontier.json", lambda *_: session.units, build_transform
    )
    assert found == {name: list(of) for name, of in frontier.candidates.items()}
    assert equalised == cuts == ()
    assert "<svg" in (folder / "frontier.html").read_text()


def test_any_size_is_applied_without_pricing(made, tmp_path, monkeypatch):
    folder, frontier = made
    monkeypatch.setattr("attar.decide.price", None)
    size = (frontier.points[2].weight_bytes + frontier.points[3].weight_bytes) // 2
    asked = Recipe("", f"{size / 1000}kB", factory="toy_code:classifier")
    report = pipeline.apply_frontier_file(folder, tmp_path / "out", recipe=asked)
    assert report.bytes_after <= size
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("attar_frontier"), "not a frontier"),
        (lambda c: c["units"].popitem(), "does not list the units"),
        (lambda c: next(iter(c["units"].values())).clear(), "no prices"),
        (lambda c: next(iter(c["units"].values()))[0].update(nats=-1.0), "not nats"),
        (lambda c: next(iter(c["units"].values()))[0].update(nats=True), "not nats"),
        (lambda c: next(iter(c["units"].values()))[0].pop("treatment"), "no treatment"),
    ],
)
def test_a_damaged_file_is_refused(made, tmp_path, change, says):
    folder, frontier = made
    session = open_recipe(frontier.recipe)
    content = json.loads((folder / "frontier.json").read_text())
    change(content)
    path = tmp_path / "frontier.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match=says):
        read_prices(path, lambda *_: session.units, build_transform)


def test_the_command_line_asks_for_one_size_or_all(capsys, tmp_path):
    assert main(["plan", "toy_code:classifier"]) == 2
    assert "--size SIZE" in capsys.readouterr().err
    assert (
        main(["plan", "toy_code:classifier", "--size", "50%", "--frontier", str(tmp_path / "f")])
        == 2
    )
    (tmp_path / "plan.yaml").write_text('{"attar_frontier": 1}')
    assert main(["apply", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "o")]) == 2
    assert "--size" in capsys.readouterr().err
    assert main(["apply", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "goes with --size" in capsys.readouterr().err

"""`attar view`: what is solved, what is refused, what is made."""

import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from report_cases import audit_only
from toy_code import save_data

from attar import decide, pipeline
from attar.cli import main
from attar.errors import AttarError, PlanError, SettingError
from attar.plan.frontier import read_prices
from attar.records import Budget, Recipe
from attar.report.html import write_report
from attar.session import open_recipe
from attar.transform.apply import build_transform
from attar.trials import Trials
from attar.viewing import Viewer, open_report, solve_again

TESTS = str(Path(__file__).parent)
FACTORY = "toy_code:classifier"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A compressed toy with its report."""
    folder = tmp_path_factory.mktemp("view")
    save_data(folder / "data.npz")
    recipe = Recipe(
        FACTORY,
        "50%",
        task="classify",
        data=str(folder / "data.npz"),
        calibration=20,
        recovery=20,
        audit=20,
    )
    pipeline.compress(recipe, folder / "small")
    return folder / "small"


@pytest.fixture
def viewer(small, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", TESTS, prepend=":")
    with Viewer(small, 0, [f"--factory={FACTORY}"]) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def talk(viewer, path, question=None, body=None, **headers):
    """Status and content of one answer; a question is sent as the page sends it."""
    line = http.client.HTTPConnection("127.0.0.1", viewer.server_port, timeout=60)
    sent = {"X-Attar-Token": viewer.token, "Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    content = body if question is None else json.dumps(question)
    line.request("GET" if content is None else "POST", path, content, sent)
    answer = line.getresponse()
    text = answer.read().decode()
    line.close()
    return answer.status, text


def wish(size="50%", keep=()):
    return {"size": size, "keep": list(keep)}


# --- what compress stores


def test_the_prices_in_the_report_make_any_size_without_pricing(small, tmp_path, monkeypatch):
    facts = json.loads((small / "report" / "report.json").read_text())["frontier"]
    assert facts["options"] == ["--factory", FACTORY]
    smallest = facts["points"][2]["bytes"]
    monkeypatch.setattr("attar.decide.price", None)
    words = ["apply", str(small), "--size", f"{smallest}B", "--factory", FACTORY]
    assert main([*words, "--out", str(tmp_path / "other")]) in (0, 1, 3)
    written = sum(file.stat().st_size for file in (tmp_path / "other").iterdir() if file.is_file())
    assert written <= smallest
    assert (tmp_path / "other" / "report" / "frontier.json").exists()


def test_the_same_size_from_the_stored_prices_is_the_same_plan(small, tmp_path):
    asked = Recipe("", "50%", factory=FACTORY)
    pipeline.apply_frontier_file(small / "report", tmp_path / "same", recipe=asked)
    plans = [(folder / "report" / "plan.yaml").read_text() for folder in (small, tmp_path / "same")]
    assert plans[0].split("units:")[1] == plans[1].split("units:")[1]


def test_a_pin_from_the_stored_prices_is_one_of_a_run_of_its_own(small, tmp_path):
    data = str(small.parent / "data.npz")
    asked = Recipe("", "70%", factory=FACTORY, keep=("5",))
    pipeline.apply_frontier_file(small, tmp_path / "pinned", recipe=asked)
    numbers = {"calibration": 20, "recovery": 20, "audit": 20}
    own = Recipe(FACTORY, "70%", task="classify", data=data, keep=("5",), **numbers)
    pipeline.compress(own, tmp_path / "own")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("pinned", "own"))
    assert one == two
    kept = json.loads((tmp_path / "pinned" / "report" / "frontier.json").read_text())
    assert kept["keep"] == ["5"]


def test_a_pin_that_names_nothing_and_one_without_a_size_are_refused(small, tmp_path, capsys):
    asked = Recipe("", "70%", factory=FACTORY, keep=("nothing",))
    with pytest.raises(PlanError, match="no unit is called 'nothing'"):
        pipeline.apply_frontier_file(small, tmp_path / "out", recipe=asked)
    plan = str(small / "report" / "plan.yaml")
    assert main(["apply", plan, "--keep", "5", "--out", str(tmp_path / "out")]) == 2
    assert "--keep goes with --size" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_only_measured_point_is_the_model_itself(small):
    report = json.loads((small / "report" / "report.json").read_text())
    points = report["frontier"]["points"]
    made = [point for point in points if point["is_made"]]
    assert [point for point in points if point["measured_damage"] is not None] == made
    assert made[0]["bytes"] == report["plan"]["weight_bytes"]
    table = report["frontier"]["treatments"]
    for place, unit in zip(made[0]["plan"], report["units"], strict=True):
        assert table[place]["treatment"] == unit["treatment"]
        assert table[place]["settings"] == unit["settings"]
    sizes = [point["bytes"] for point in points]
    assert sizes == sorted(sizes)
    assert len(sizes) > 5


# --- solving


def test_a_solved_size_is_the_plan_that_the_same_prices_give(small):
    session = open_recipe(open_report(small).recipe)
    path = small / "report" / "frontier.json"
    candidates, *_ = read_prices(path, lambda *_: session.units, build_transform)
    shown = open_report(small)
    overhead = shown.facts["frontier"]["overhead_bytes"]
    trials = Trials(session, decide.explain(session))
    for point in shown.facts["frontier"]["points"]:
        budget = Budget(point["bytes"])
        if point["is_made"]:
            continue
        expected = decide.solve(trials, candidates, budget, overhead)
        found = solve_again(shown, f"{point['bytes']}B", ())
        names = [found["treatments"][place][0] for place in found["point"]["plan"]]
        assert names == [choice.treatment for choice in expected.values()]
        assert found["point"]["bytes"] == point["bytes"]
        lost = sum(choice.predicted_damage for choice in expected.values())
        assert lost == pytest.approx(point["predicted_damage"], rel=1e-4)


def test_pins_take_their_bytes_from_the_others(small):
    shown = open_report(small)
    free, pinned = solve_again(shown, "70%", ()), solve_again(shown, "70%", ("5",))
    last = pinned["treatments"][pinned["point"]["plan"][-1]]
    assert last[0] == "keep_float" and last[1] == "16"
    assert float(pinned["point"]["predicted"]) > float(free["point"]["predicted"])
    assert pinned["point"]["bytes"] <= 0.7 * shown.facts["size"]["bytes_before"]


@pytest.mark.parametrize(
    ("size", "keep", "says"),
    [
        ("1kB", (), "no plan fits 1,000 bytes"),
        ("big", (), "cannot read the size"),
        ("50%", ("*",), "or --keep fewer"),
        ("50%", ("x",), "no unit is called 'x'"),
    ],
)
def test_what_cannot_be_solved_says_why(small, size, keep, says):
    with pytest.raises(AttarError, match=says):
        solve_again(open_report(small), size, keep)


def test_a_decider_that_tries_plans_out_is_not_asked_again(small):
    shown = open_report(small)
    other = replace(shown, recipe=replace(shown.recipe, decide="qbert"))
    with pytest.raises(PlanError, match="no prices"):
        solve_again(other, "50%", ())


# --- the server


def test_the_page_carries_the_token_and_may_ask_only_its_own_server(viewer):
    status, page = talk(viewer, "/")
    assert status == 200
    assert f'<meta name="attar-token" content="{viewer.token}">' in page
    assert "connect-src 'self'" in page
    stored = (viewer.shown[0].report / "report.html").read_text()
    assert 'attar-token" content' not in stored and "connect-src" not in stored


def test_the_files_of_the_report_are_handed_out(viewer):
    assert json.loads(talk(viewer, "/report.json")[1])["format"] == "attar report"
    assert talk(viewer, "/plan.yaml")[1].startswith("#")
    assert json.loads(talk(viewer, "/made/0/frontier.json")[1])["attar_frontier"] == 1


def test_a_question_is_answered(viewer):
    status, text = talk(viewer, "/solve", wish("70%", ["5"]))
    assert status == 200
    assert json.loads(text) == json.loads(json.dumps(solve_again(viewer.shown[0], "70%", ("5",))))
    status, text = talk(viewer, "/solve", wish("1B"))
    assert status == 400
    assert "kB or more" in json.loads(text)["hint"]


@pytest.mark.parametrize(
    "path",
    ["/../data.npz", "/%2e%2e/data.npz", "/report/report.html", "/made/7/", "/x?y", "/etc"],
)
def test_nothing_else_is_handed_out(viewer, path):
    assert talk(viewer, path)[0] == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"X_Attar_Token": "wrong"},
        {"X_Attar_Token": "é"},
        {"X_Attar_Token": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
)
def test_other_sites_are_refused(viewer, headers):
    assert talk(viewer, "/solve", wish(), **headers)[0] == 403
    assert talk(viewer, "/apply", wish(), **headers)[0] == 403
    assert viewer.making.now()["state"] == "none"


def test_the_token_is_not_given_to_another_name_of_this_machine(viewer):
    status, text = talk(viewer, "/", Host="evil.example")
    assert status == 403
    assert viewer.token not in text


def test_the_page_may_say_where_it_is(viewer):
    here = f"http://127.0.0.1:{viewer.server_port}"
    assert talk(viewer, "/solve", wish("70%"), Origin=here)[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "{",
        "null",
        '{"size": 3, "keep": []}',
        '{"size": "50%"}',
        '{"size": "50%", "keep": [1]}',
        '{"size": "50%", "keep": "x"}',
        '{"size": "50%", "keep": [], "protect": "x"}',
        '{"size": "50%", "keep": [], "protect": [1]}',
        '{"size": "' + 50 * "1" + '", "keep": []}',
        100_000 * "[",
    ],
)
def test_a_question_that_is_none_is_refused(viewer, body):
    assert talk(viewer, "/solve", body=body)[0] == 400


def test_too_long_a_question_is_refused_unread(viewer):
    assert talk(viewer, "/solve", body=b"", Content_Length=str(1 << 21))[0] == 413
    assert talk(viewer, "/solve", body=b"", Content_Length="-1")[0] == 411


def test_a_model_is_made_beside_and_its_report_is_shown(viewer, small):
    status, text = talk(viewer, "/apply", wish("70%", ["5"]))
    assert status == 200, text
    assert talk(viewer, "/apply", wish("50%"))[0] == 400  # one at a time
    now = until_it_ends(viewer)
    assert now["state"] == "done", now
    folder = Path(now["folder"])
    try:
        assert folder.parent == small.parent
        plan = (folder / "report" / "plan.yaml").read_text()
        assert "keep_float" in plan.split("units:")[1].splitlines()[3]
        status, page = talk(viewer, now["page"])
        assert status == 200 and viewer.token in page
        assert talk(viewer, now["page"] + "solve", wish("80%"))[0] == 200
        assert json.loads(talk(viewer, "/progress")[1])["page"] == now["page"]
    finally:
        shutil.rmtree(folder)


def until_it_ends(viewer):
    for _ in range(600):
        now = json.loads(talk(viewer, "/progress")[1])
        if now["state"] != "running":
            return now
        time.sleep(0.2)
    return now


def test_a_run_that_fails_says_what_it_said(viewer):
    viewer.options = ()
    assert talk(viewer, "/apply", wish("50%"))[0] == 200
    now = until_it_ends(viewer)
    assert now["state"] == "failed"
    assert "--factory toy_code:classifier" in now["line"]
    assert not Path(now["folder"]).exists()


def test_closing_ends_what_is_being_made(viewer, small):
    assert talk(viewer, "/apply", wish("50%"))[0] == 200
    viewer.making.stop()
    now = until_it_ends(viewer)
    assert now["state"] == "failed"
    assert not Path(now["folder"]).exists()


# --- the command


def test_a_folder_without_a_report_is_refused(tmp_path, capsys):
    assert main(["view", str(tmp_path), "--no-browser"]) == 2
    assert "attar compress wrote" in capsys.readouterr().err
    for text in ("{", "[]", "{}", '{"format_version": 1}', '{"format_version": 1, "size": {}}'):
        (tmp_path / "report.json").write_text(text)
        assert main(["view", str(tmp_path), "--no-browser"]) == 2


def test_a_port_in_use_is_refused(viewer, small, capsys):
    port = viewer.server_port
    with pytest.raises(SettingError, match=f"port {port} is in use"):
        Viewer(small, port)
    assert main(["view", str(small), "--port", str(port), "--no-browser"]) == 2
    assert "--port 0" in capsys.readouterr().err


def test_the_report_of_an_audit_is_shown_without_sizes(tmp_path):
    write_report(audit_only(), tmp_path)
    with Viewer(tmp_path, 0) as viewer:
        assert b"What other sizes would cost" not in viewer.pages[0]
        with pytest.raises(PlanError, match="no prices"):
            solve_again(viewer.shown[0], "50%", ())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_cleanly(small, number):
    # As in a terminal: what starts tests in the background has its children ignore the signal.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; from attar.cli import main; raise SystemExit(main())"
    words = [sys.executable, "-c", code, "view", str(small), "--port", "0", "--no-browser"]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline().startswith("report  http://127.0.0.1:")
    time.sleep(0.3)
    run.send_signal(number)
    _, said = run.communicate(timeout=30)
    assert (run.returncode, said) == (0, "")

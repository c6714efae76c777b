"""What the commands print, write and return, on models small enough for a test."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_code
import toys
from tiny_models import LLAMA, random_model, write_gguf

from attar import command_output, serving
from attar.load.catalogue import CATALOGUE
from attar.progress import BarProgress, open_progress

TOY = ["toy_code:classifier", "--task", "classify"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def data(here):
    return str(toy_code.save_data(here.parent / "x.npz"))


def test_compress_ends_with_the_table_and_says_where_things_are(typed, here, data):
    code, shown = typed("compress", *TOY, "--data", data, "--size", "8kB", "--out", "out")
    assert code == 0
    assert "verdict: PASSED" in shown.out
    for line in shown.out.splitlines():
        name, _, place = line.partition(" ")
        if name in ("model", "report"):
            assert Path(place.strip()).exists()
    weighed = sum(file.stat().st_size for file in (here / "out").iterdir() if file.is_file())
    assert 0.9 * 8000 < weighed <= 8000
    stages = [line for line in shown.err.splitlines() if line.endswith("…")]
    assert stages[0] == "load toy_code:classifier …" and "price …" in stages


def test_the_same_command_writes_the_same_bytes(typed, here, data):
    for out in ("one", "two"):
        assert typed("compress", *TOY, "--data", data, "--size", "7kB", "--out", out)[0] == 0
    for name in ("model.safetensors", "attar.json"):
        assert (here / "one" / name).read_bytes() == (here / "two" / name).read_bytes()


def test_applying_a_plan_writes_what_compress_wrote(typed, here, data):
    typed("compress", *TOY, "--data", data, "--size", "7kB", "--out", "whole")
    code, shown = typed("plan", *TOY, "--data", data, "--size", "7kB", "--out", "plan.yaml")
    assert code == 0 and "predicted damage" in shown.out and "plan.yaml" in shown.out
    code, shown = typed("apply", "plan.yaml", "--out", "again", "--factory", TOY[0])
    assert code == 0 and "verdict" in shown.out
    one, two = (here / name / "model.safetensors" for name in ("whole", "again"))
    assert one.read_bytes() == two.read_bytes()


def test_a_plan_without_a_file_is_printed_only(typed, here, data):
    assert typed("plan", *TOY, "--data", data, "--size", "8kB")[0] == 0
    assert list(here.iterdir()) == []


def test_a_ruined_model_is_written_and_fails(typed, here, data, monkeypatch):
    from attar.audit import verdict

    monkeypatch.setattr(verdict, "CHANGED_PREDICTIONS_LIMIT", -1.0)
    code, shown = typed("compress", *TOY, "--data", data, "--size", "8kB", "--out", "out")
    assert code == 1 and "verdict: FAILED" in shown.out
    assert (here / "out" / "attar.json").exists()


@pytest.mark.parametrize(("outcome", "code"), [("passed", 0), ("failed", 1), ("undecided", 3)])
def test_the_exit_code_is_the_verdict(outcome, code):
    class Verdict:
        pass

    found = Verdict()
    found.outcome = outcome
    assert command_output.exit_code.__wrapped__(found) == code


def test_keep_pins_units(typed, here, data):
    arguments = ["plan", *TOY, "--data", data, "--size", "9kB", "--out", "plan.yaml"]
    assert typed(*arguments, "--keep", "5", "--keep", "0*")[0] == 0
    lines = (here / "plan.yaml").read_text().splitlines()
    kept = [line for line in lines if "keep_float" in line]
    assert {line.split(":")[0].strip() for line in kept} >= {"'5'", "'0'"}


def test_explain_lists_units_by_worth_and_leftovers_with_reasons(typed, here, data):
    code, shown = typed("explain", *TOY, "--data", data, "--units", "--json", "e.json")
    assert code == 0 and "nats lost per prediction" in shown.out
    assert "3.bias: is a vector" in shown.out
    facts = json.loads((here / "e.json").read_text())
    assert set(facts["criteria"]["price"]["units"]) == {"0", "3", "5"}
    assert len(facts["criteria"]["taylor"]["channels"]["3"]) == 48
    assert "2 groups, 112 coupled units" in shown.out and "5: they are the answer" in shown.out
    row = next(line for line in shown.out.splitlines() if line.startswith(" 3 "))
    assert (
        "48" in row and "neuron" in row and "150 bytes" in row
    )  # 64 in, 10 out and a bias, 2 bytes
    assert "1 row of 3, 1 column of 5" in row
    assert facts["coupled"]["groups"]["0"]["members"][2]["parameter"] == "3.weight"
    assert facts["coupled"]["pinned"] == {"5": "they are the answer"}


def test_explain_tries_a_cut(typed, here, data):
    code, shown = typed("explain", *TOY, "--data", data, "--try-cut", "25%", "--json", "e.json")
    trial = json.loads((here / "e.json").read_text())["coupled"]["trial"]
    assert code == 0 and [len(one["units"]) for one in trial["prices"].values()] == [16, 12]
    said = " ".join(shown.out.split())
    assert "all at once:" in said and "measured with a network that was cut" in said
    assert trial["weights"] == 16 * 17 + 64 * 48 - 48 * 36 + 12 + 12 * 10
    assert trial["measured"] < trial["measured_plain"] and "not units" not in shown.out
    code, shown = typed("explain", *TOY, "--data", data, "--try-cut", "25")
    assert code == 2 and "no share" in shown.err


def test_explain_by_another_criterion(typed, data):
    code, shown = typed("explain", *TOY, "--data", data, "--criterion", "magnitude")
    assert code == 0 and "worth by magnitude" in shown.out


def test_the_criteria_in_the_help_are_those_of_the_table(typed):
    from attar.explain import CRITERIA

    shown = typed("explain", "--help")[1].out
    assert all(name in " ".join(shown.split()) for name in CRITERIA)


def test_audit_compares_and_writes_the_page(typed, here, data):
    typed("compress", *TOY, "--data", data, "--size", "8kB", "--out", "out")
    more = ["--data", data, "--factory", TOY[0], "--json", "a.json", "--report", "page"]
    code, shown = typed("audit", *TOY, "out", *more)
    assert code == 0 and "verdict: PASSED" in shown.out and "none predicted" in shown.out
    assert json.loads((here / "a.json").read_text())["outcome"] == "passed"
    page = (here / "page" / "report.html").read_text()
    assert "was compared with its compressed form" in page


def test_audit_of_two_different_models_fails(typed, here, data, monkeypatch):
    other = ["toy_code:classifier", "toy_code:other"]
    assert typed("audit", *other, "--task", "classify", "--data", data)[0] == 1


# --- run


def test_run_goes_on_with_a_text(typed, here):
    write_gguf(here / "m.gguf", random_model(LLAMA), LLAMA)
    code, shown = typed("run", "m.gguf", "the", "cat", "--max-tokens", "5", "--json", "r.json")
    facts = json.loads((here / "r.json").read_text())
    assert code == 0 and facts["prompt"] == "the cat" and facts["continuation"]
    assert shown.out == f"the cat{facts['continuation']}\n"


def test_run_names_pictures_of_a_folder(here):
    toys.write_pictures(here / "p", 2)
    (here / "p" / "notes.txt").write_text("not a picture")
    labels = b"ant\nbee\ncow\ndog\nelk\nfox\ngnu\n"
    answer = serving.run(toys.picture_model(labels), ["p"])
    assert [Path(one["file"]).name for one in answer.facts["pictures"]] == [
        "picture00.png",
        "picture01.png",
    ]
    first = answer.facts["pictures"][0]["classes"]
    assert first[0]["name"] in labels.decode().split() and first[0]["name"] in answer.text
    assert first[0]["probability"] >= first[1]["probability"]


def test_run_compares_texts():
    answer = serving.run(toys.sentence_model(), ["a cat", "a dog", "a cat"])
    cosines = answer.facts["cosines"]
    assert cosines[0][2] == 1.0 and cosines[0][1] == cosines[1][0] < 1.0
    assert len(answer.facts["vectors"][1]) == 7


def test_run_writes_down_speech(here):
    import wave

    with wave.open("tone.wav", "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(range(256)) * 100)
    answer = serving.run(toys.speech_model(), ["tone.wav"], max_tokens=3)
    assert list(answer.facts["files"]) == ["tone.wav"]
    assert answer.text == answer.facts["files"]["tone.wav"]


# --- models


def test_models_lists_every_model_with_licence_and_size(typed, here):
    code, shown = typed("models")
    assert code == 0
    for entry in CATALOGUE.values():
        assert entry.name in shown.out and entry.licence.split()[0] in shown.out
    assert "92.9 MB" in shown.out and "--degrid" in shown.out


def test_getting_a_model_shows_its_licence_before_anything_is_fetched(typed, here, monkeypatch):
    fetched = []

    def fake(name, **settings):
        fetched.append((name, settings))
        return toys.language_model()

    monkeypatch.setattr(serving, "load_model", fake)
    code, shown = typed("models", "get", "smollm2")
    assert code == 0 and shown.out.startswith("smollm2: SmolLM2-135M-Instruct; 93 MB to fetch")
    assert fetched == [("smollm2", {"seed_degrid": None, "accept_licence": False})]


def test_a_licence_must_be_accepted_first(typed, here):
    code, shown = typed("models", "get", "gemma3-270m")
    assert code == 2 and "Gemma Terms of Use" in shown.out and "--accept-licence" in shown.err


def test_the_copy_off_the_grid_gets_a_name_of_its_own(typed, here, monkeypatch):
    def fake(name, *, seed_degrid, accept_licence):
        assert seed_degrid == 3
        return toys.language_model()

    written = []
    monkeypatch.setattr(serving, "load_model", fake)
    monkeypatch.setattr(serving, "save_huggingface", lambda _model, out: written.append(out))
    assert typed("models", "get", "smollm2", "--degrid", "3")[0] == 0
    assert written == [Path("smollm2-degrid-3")]


# --- help and progress


def test_help_needs_no_torch_and_comes_at_once():
    script = (
        "import sys, time; start = time.process_time()\n"
        "from attar.cli import main; main(['--help'])\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "sys.stderr.write(str(time.process_time() - start))"
    )
    # Its own seconds, and the best of three: the machine may be busy with other things.
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "compress" in done.stdout
        seconds.append(float(done.stderr))
        if seconds[-1] < 0.3:
            break
    assert min(seconds) < 0.3


def test_nothing_typed_is_a_wish_for_help(typed):
    code, shown = typed()
    assert code == 0 and "compress" in shown.out


def test_the_version_is_printed(typed):
    code, shown = typed("--version")
    assert code == 0 and shown.out.startswith("attar 0.")


@pytest.mark.parametrize(
    "command", ["compress", "plan", "apply", "explain", "audit", "run", "models"]
)
def test_every_option_of_a_command_is_explained(typed, command):
    code, shown = typed(command, "--help")
    assert code == 0
    for line in shown.out.split("Options:")[1].splitlines():
        if line.startswith("  --"):
            assert len(line.split("  ")) > 2 or len(line) > 25, line


class Screen:
    """A stderr that is, or is not, a terminal."""

    def __init__(self, is_terminal):
        self.text = ""
        self.is_terminal = is_terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return self.is_terminal


def test_without_a_terminal_a_stage_is_one_line_and_no_control_characters():
    screen = Screen(is_terminal=False)
    with open_progress(screen) as progress, progress.stage("explain", 3) as advance:
        for _ in range(3):
            advance(1)
    assert screen.text == "explain …\n"


def test_a_long_stage_gets_a_line_with_its_seconds(monkeypatch):
    times = iter([0.0, 75.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    screen = Screen(is_terminal=False)
    with open_progress(screen) as progress, progress.stage("price", 3):
        pass
    assert screen.text == "price …\nprice: 75 s\n"


def test_on_a_terminal_a_stage_has_a_name_a_bar_and_the_remaining_time(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Screen(is_terminal=True)
    with open_progress(screen) as progress:
        assert isinstance(progress, BarProgress)
        with progress.stage("explain", 4) as advance:
            advance(1)
            advance(1)
            progress._bars.refresh()
    assert "explain" in screen.text and "50%" in screen.text and "left" in screen.text


def test_an_interrupted_stage_leaves_no_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    with open_progress(Screen(is_terminal=True)) as progress:
        with pytest.raises(KeyboardInterrupt), progress.stage("explain", 4):
            raise KeyboardInterrupt
        assert progress._bars.tasks == []

"""Every item of "Bad input": two lines on stderr, exit code 2, nothing half-written."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_code
from tiny_models import LLAMA, random_model, write_gguf, write_huggingface
from toys import numbered_text

from attar.cli import main

TOY = ["toy_code:classifier", "--task", "classify"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to type commands in; the cache is empty too."""
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def data(here):
    return str(toy_code.save_data(here.parent / "x.npz"))


@pytest.fixture
def refused(here, capsys):
    """Run a command that must fail by the rules; return its two lines."""

    def run(*arguments):
        before = sorted(here.rglob("*"))
        code = main([str(one) for one in arguments])
        written = capsys.readouterr()
        assert code == 2, written
        problem, hint = written.err.strip().splitlines()[-2:]
        assert problem.startswith("error: ") and hint.startswith("hint: ")
        assert "Traceback" not in written.err
        assert sorted(here.rglob("*")) == before  # nothing half-written
        return problem, hint

    return run


def compress(model, *more, size="8kB", out="out"):
    return ["compress", *model, "--size", size, "--out", out, *more]


# --- models


def test_an_unknown_model_gets_the_nearest_name(refused):
    problem, hint = refused(*compress(["smolm2"]))
    assert "smolm2" in problem and "smollm2" in hint


def test_a_path_that_is_not_there_is_named(refused):
    assert "no/such/folder" in refused(*compress(["no/such/folder"]))[0]


@pytest.mark.parametrize("kept", [0, 3, 20, 400, -1], ids=str)
def test_truncated_safetensors_are_refused(here, refused, kept):
    folder = write_huggingface(here / "m", random_model(LLAMA), LLAMA)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:kept])
    assert "model.safetensors" in refused(*compress([folder]))[0]


@pytest.mark.parametrize("kept", [0, 3, 20, 400, -1], ids=str)
def test_a_truncated_gguf_is_refused(here, refused, kept):
    path = write_gguf(here / "m.gguf", random_model(LLAMA), LLAMA)
    path.write_bytes(path.read_bytes()[:kept])
    assert "m.gguf" in refused(*compress([path]))[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": 3}', "\x00"])
def test_a_broken_config_is_refused(here, refused, text):
    folder = write_huggingface(here / "m", random_model(LLAMA), LLAMA)
    (folder / "config.json").write_text(text)
    assert refused(*compress([folder]))[1] != "hint: "


def test_a_folder_of_something_else_is_refused(here, refused):
    (here / "pictures").mkdir()
    assert "config.json" in refused(*compress([here / "pictures"]))[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(here, refused, value):
    module = random_model(LLAMA)
    module.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    folder = write_huggingface(here / "m", module, LLAMA)
    assert "layers.1.mlp.up_proj" in refused(*compress([folder]))[0]


def test_a_weight_of_a_users_own_module_that_is_not_finite_is_named(refused, data):
    broken = ["toy_code:broken", "--task", "classify", "--data", data]
    assert "3.weight" in refused(*compress(broken))[0]


def test_code_that_is_not_there_is_named(refused):
    assert "toy_code:nothing" in refused(*compress(["toy_code:nothing"]))[0]


def test_a_module_whose_outputs_mean_nothing_known_is_asked_about(refused, data):
    assert "--task" in refused(*compress(["toy_code:classifier", "--data", data]))[1]


# --- sizes


@pytest.mark.parametrize("size", ["", "lots", "12 parsecs", "-3MB", "0", "1e3MB", "nan", "5%%"])
def test_an_unreadable_size_is_refused_with_examples(refused, data, size):
    arguments = ["compress", *TOY, "--data", data, f"--size={size}", "--out", "out"]
    assert "60MB" in refused(*arguments)[1]


def test_a_size_out_of_reach_names_the_smallest(refused, data):
    problem, hint = refused(*compress([*TOY, "--data", data], size="1kB"))
    assert "smallest" in problem and "--size" in hint


def test_the_smallest_size_that_is_named_can_be_reached(here, refused, data, capsys):
    _, hint = refused(*compress([*TOY, "--data", data], size="1kB"))
    smallest = hint.split("--size ")[1].split()[0]
    assert main(compress([*TOY, "--data", data], size=smallest)) in (0, 1, 3)


def test_a_unit_to_keep_that_is_not_there_is_named(refused, data):
    assert "headd" in refused(*compress([*TOY, "--data", data, "--keep", "headd"]))[0]


# --- data


def test_no_data_for_a_users_own_module_is_refused(refused):
    assert "--data" in refused(*compress(TOY))[1]


def test_data_that_is_not_there_is_named(refused):
    assert "nowhere.npz" in refused(*compress([*TOY, "--data", "nowhere.npz"]))[0]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_little_data_is_refused(here, refused, count):
    path = toy_code.save_data(here / "few.npz", count)
    assert str(count) in refused(*compress([*TOY, "--data", path]))[0]


def test_data_of_another_shape_is_refused(here, refused):
    path = toy_code.save_data(here / "wide.npz", side=toy_code.SIDE + 1)
    assert "17" in refused(*compress([*TOY, "--data", path]))[0]


def test_data_that_is_not_finite_is_refused(here, refused):
    np.savez(here / "nan.npz", inputs=np.full((99, toy_code.SIDE), np.nan, np.float32))
    assert "NaN" in refused(*compress([*TOY, "--data", here / "nan.npz"]))[0]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip at all"])
def test_broken_arrays_are_refused(here, refused, content):
    (here / "x.npz").write_bytes(content)
    assert "x.npz" in refused(*compress([*TOY, "--data", here / "x.npz"]))[0]


def test_a_text_that_is_empty_short_or_no_text_is_refused(here, refused):
    path = write_gguf(here / "m.gguf", random_model(LLAMA), LLAMA)
    for content in (b"", b"short", b"\xff\xfe\x00broken"):
        (here / "t.txt").write_bytes(content)
        assert refused(*compress([path, "--data", here / "t.txt"]))[1] != "hint: "


def test_pictures_for_a_language_model_are_refused(here, refused):
    path = write_gguf(here / "m.gguf", random_model(LLAMA), LLAMA)
    (here / "p").mkdir()
    (here / "p" / "a.png").write_bytes(b"")
    assert "text" in refused(*compress([path, "--data", here / "p"]))[0]


def test_a_number_of_samples_below_one_is_refused(here, refused):
    path = write_gguf(here / "m.gguf", random_model(LLAMA), LLAMA)
    (here / "t.txt").write_text(numbered_text(60))
    assert refused(*compress([path, "--data", here / "t.txt", "--calibration", "0"]))[1]


# --- where it is written


def test_a_folder_that_exists_is_refused_without_force(here, refused, data):
    (here / "out").mkdir()
    assert "--force" in refused(*compress([*TOY, "--data", data]))[1]


def test_force_does_not_replace_what_attar_did_not_write(here, refused, data):
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("years of work")
    problem, _ = refused(*compress([*TOY, "--data", data, "--force"]))
    assert "not a folder that Attar wrote" in problem


def test_a_file_in_the_way_is_refused(here, refused, data):
    (here / "file").write_text("")
    assert "file" in refused(*compress([*TOY, "--data", data], out="file/out"))[0]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, which nobody can write")
def test_a_folder_that_cannot_be_written_is_refused(refused, data):
    assert "/proc" in refused(*compress([*TOY, "--data", data], out="/proc/attar-out"))[0]


@pytest.mark.parametrize("out", ["out", "new/folder/out"])
def test_a_full_disk_leaves_nothing(monkeypatch, refused, data, out):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    problem, hint = refused(*compress([*TOY, "--data", data], out=out))
    assert "No space left on device" in problem and "space" in hint


def test_a_full_disk_leaves_the_earlier_result(monkeypatch, here, refused, data):
    assert main(compress([*TOY, "--data", data])) == 0
    before = {f: f.read_bytes() for f in (here / "out").rglob("*") if f.is_file()}

    def full(*_arguments, **_settings):
        raise OSError(28, "No space left on device")

    for way in ("write_text", "write_bytes"):  # the report, after the weights
        monkeypatch.setattr(Path, way, full)
    refused(*compress([*TOY, "--data", data, "--force"]))
    assert {f: f.read_bytes() for f in (here / "out").rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("command", ["explain", "audit", "run"])
def test_a_json_file_that_cannot_be_written_is_refused_before_any_work(refused, command):
    given = {"audit": ["smollm2", "smollm2"]}.get(command, ["smollm2"])
    assert "nowhere" in refused(command, *given, "--json", "nowhere/x.json")[0]


def test_an_interruption_between_two_renames_leaves_the_earlier_result(monkeypatch, here):
    from attar.export.attar_folder import replaced_folder

    (here / "out").mkdir()
    (here / "out" / "kept").write_text("old")
    rename = Path.rename

    def interrupted(path, target):
        if "partial" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replaced_folder(here / "out") as partial:
        (partial / "kept").write_text("new")
    assert [file.read_text() for file in here.rglob("*") if file.is_file()] == ["old"]


# --- plans


@pytest.fixture
def plan_file(here, data):
    path = here / "plan.yaml"
    assert main(["plan", *TOY, "--data", data, "--size", "8kB", "--out", str(path)]) == 0
    return path


def apply(path):
    return ["apply", path, "--out", "out", "--factory", "toy_code:classifier"]


def edited(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_a_plan_that_names_an_unknown_unit_is_refused_with_the_nearest(plan_file, refused):
    problem, hint = refused(*apply(edited(plan_file, "'3':", "'33':")))
    assert "'33'" in problem and "'3'" in hint


def test_a_plan_over_its_budget_names_the_unit_that_grew(plan_file, refused):
    edited(plan_file, "weight_bytes: 8000", "weight_bytes: 6000")
    lines = plan_file.read_text().splitlines()
    lines = [
        "  '3': {treatment: keep_float, bits: 16, bytes: 10, nats: 0}"
        if line.startswith("  '3':")
        else line
        for line in lines
    ]
    plan_file.write_text("\n".join(lines))
    problem, hint = refused(*apply(plan_file))
    assert "budget" in problem and "'3'" in hint


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("units:", "units: ["),
        ("attar_plan: 1", "attar_plan: 2"),
        ("weight_bytes: 8000", "weight_bytes: many"),
        ("treatment: ", "treatment: magic_"),
        ("recipe:", "recipe: 3\nother:"),
        ("model: toy_code:classifier", "model: [1]"),
        ("bits: ", "bits: 1"),
        ("bits: ", "bits: '"),
        ("group_size: ", "group_sise: "),
    ],
)
def test_an_edit_that_breaks_a_plan_is_refused(plan_file, refused, old, new):
    assert refused(*apply(edited(plan_file, old, new)))[1] != "hint: "


def test_a_plan_does_not_choose_which_code_runs(plan_file, refused):
    edited(plan_file, "toy_code:classifier", "toy_code:regressor")
    assert "not run just because" in refused(*apply(plan_file))[0]


def test_a_plan_that_is_not_there_is_named(refused):
    assert "none.yaml" in refused(*apply("none.yaml"))[0]


def test_a_plan_is_not_written_over_another_without_force(plan_file, refused, data):
    arguments = ["plan", *TOY, "--data", data, "--size", "8kB", "--out", plan_file]
    assert "--force" in refused(*arguments)[1]


# --- written folders


@pytest.fixture
def written(here, data):
    assert main(compress([*TOY, "--data", data])) == 0
    return here / "out"


def test_a_folder_does_not_choose_which_code_runs(written, refused):
    assert "--factory toy_code:classifier" in refused("run", written, "x.png")[1]


def test_weights_that_were_exchanged_are_refused(written, refused):
    content = bytearray((written / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (written / "model.safetensors").write_bytes(content)
    problem, _ = refused("run", written, "x.png", "--factory", *TOY)
    assert "model.safetensors" in problem


@pytest.mark.parametrize("text", ["", "{", "[]", '{"attar": 99}', '{"attar": 1}'])
def test_a_broken_description_is_refused(written, refused, text):
    (written / "attar.json").write_text(text)
    assert "attar.json" in refused("run", written, "x.png")[0]


def test_two_models_that_answer_different_questions_are_not_compared(refused, data, here):
    path = write_gguf(here / "m.gguf", random_model(LLAMA), LLAMA)
    assert "language" in refused("audit", *TOY, path, "--data", data)[0]


# --- commands


@pytest.mark.parametrize(
    "typed",
    [
        ["compres"],
        ["compress", "smollm2"],
        ["compress", "smollm2", "--sise", "60MB"],
        ["explain", "smollm2", "--criterion", "luck"],
        ["models", "get", "smollm3"],
        ["run", "smollm2", "--max-tokens", "0"],
        ["compress", "smollm2", "--size", "60MB", "--out", "o", "--seed", "x"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_typed_is_refused_with_what_can(refused, typed):
    assert refused(*typed)[1] != "hint: "


def test_debug_shows_where_an_error_comes_from(here):
    from attar.errors import ModelError

    with pytest.raises(ModelError):
        main(["run", "smolm2", "--debug"])


# --- Ctrl-C

INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.path.insert(0, {tests!r})
from attar.cli import main
sys.exit(main())  # as the installed command
"""


@pytest.mark.parametrize("stage", ["load", "measure", "audit"])
def test_an_interruption_leaves_nothing(here, data, stage):
    script = INTERRUPTIBLE.format(tests=str(Path(__file__).parent))
    rounds = "50" if stage == "measure" else "1"
    command = compress([*TOY, "--data", data, "--rounds", rounds], out="new/out")
    command = [sys.executable, "-c", script, *command]
    before = sorted(here.rglob("*"))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=here) as process:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith(stage):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130, (seen, rest)
    assert rest.strip().splitlines()[-1] == "interrupted; nothing was written."
    assert "Traceback" not in rest
    assert sorted(here.rglob("*")) == before

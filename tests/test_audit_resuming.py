"""An audit that was killed goes on from what it had finished, and finds the same bits."""

import signal
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import toy_code
from test_fidelity import CATEGORICAL, classifier, random
from test_resuming import KILLED, Steps, kept
from toys import toy
from writing_models import FEW, write_models

from attar import auditing
from attar.audit import fidelity
from attar.cli import main
from attar.load.model import load_model
from attar.records import Silent
from attar.resuming import Finished

EVERYTHING = ["--attribute", "--drift", "--corruptions"]
TOYS = ("toy_code:classifier", "toy_code:other")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_code.save_data(Path("d.npz"), count=240)
    return tmp_path


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.setattr(fidelity, "KEPT_TOGETHER", 1)
    return Steps(monkeypatch)


def audit(out, *more, models=TOYS):
    sizes = ["--calibration", "120", "--recovery", "40", "--audit", "80"]
    return ["audit", *models, "--task", "classify", "--data", "d.npz", *sizes, "--json", out, *more]


def called(step):
    """What a step is called without the model it is about."""
    return step.rpartition(": ")[2]


def test_a_killed_audit_goes_on_and_finds_the_same(here, capsys):
    asked = ["--attribute", "--corruptions"]
    failed = main(audit("whole.json", *asked))
    assert failed == 1
    script = KILLED.format(tests=str(Path(__file__).parent), after=7)
    run = [sys.executable, "-c", script, *audit("found.json", *asked)]
    killed = subprocess.run(run, cwd=here, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (here / "found.json").exists() and (here / "found.json.unfinished").is_dir()
    capsys.readouterr()
    assert main(audit("found.json", *asked)) == failed
    said = capsys.readouterr().err
    assert "going on from found.json.unfinished: 6 steps are finished" in said
    assert Path("found.json").read_bytes() == Path("whole.json").read_bytes()
    assert sorted(p.name for p in here.iterdir()) == ["d.npz", "found.json", "whole.json"]


def test_an_audit_that_ends_anywhere_does_nothing_twice(here, steps, capsys):
    assert main(audit("whole.json", *EVERYTHING)) == 1
    every, done = list(steps.made), []
    kinds = Counter(called(step).split()[0] for step in every)
    assert {"batches", "corruption", "changes", "shares", "returned", "halved"} <= set(kinds)
    assert {"prediction", "completeness", "relevance", "concepts"} <= set(kinds)
    for after in (1, 20, 45, None):
        steps.again(after)
        assert main(audit("found.json", *EVERYTHING)) == (1 if after is None else 130)
        done += steps.made
    assert sorted(done) == sorted(every)
    assert Path("found.json").read_bytes() == Path("whole.json").read_bytes()


def test_what_is_asked_for_in_addition_goes_on_from_what_is_there(here, steps, monkeypatch, capsys):
    monkeypatch.setattr(fidelity, "KEPT_TOGETHER", 32)
    steps.again(2)
    assert main(audit("found.json", "--corruptions")) == 130
    first = [called(step).split()[0] for step in steps.made]
    assert first == ["batches", "corruption"]
    steps.again()
    assert main(audit("found.json", "--attribute")) == 1
    assert not any(called(step).startswith("batches") for step in steps.made)
    assert any(called(step) == "shares" for step in steps.made)


def test_another_compressed_model_is_compared_anew(here, steps, monkeypatch, capsys):
    steps.again(1)
    assert main(audit("found.json", "--corruptions")) == 130
    build = toy_code.other

    def changed():
        module, examples = build()
        module[1].running_mean[0] += 0.5  # a buffer, not a parameter
        return module, examples

    monkeypatch.setattr(toy_code, "other", changed)
    steps.again(1)
    assert main(audit("found.json", "--corruptions")) == 130
    assert [called(step).split()[0] for step in steps.made] == ["batches"]


@pytest.mark.parametrize("change", ["audit data", "true answers", "seed"])
def test_other_data_or_another_seed_is_another_audit(here, steps, capsys, change):
    steps.again(1)
    main(audit("found.json", "--corruptions"))
    more = ["--seed", "3"] if change == "seed" else []
    held = dict(np.load("d.npz"))
    if change == "audit data":
        held["inputs"] = held["inputs"] + 0.25
    if change == "true answers":
        held["answers"] = np.arange(240) % 10
    np.savez("d.npz", **held)
    steps.again(1)
    capsys.readouterr()
    main(audit("found.json", "--corruptions", *more))
    assert change in capsys.readouterr().err.split("(other ")[1].split(")")[0]
    assert [called(step).split()[0] for step in steps.made] == ["batches"]


def test_restart_does_all_of_it_again(here, steps, capsys):
    steps.again(1)
    main(audit("found.json", "--corruptions"))
    steps.again(1)
    capsys.readouterr()
    main(audit("found.json", "--corruptions", "--restart"))
    assert "going on" not in capsys.readouterr().err and len(steps.made) == 1


def test_of_several_models_those_that_are_finished_are_not_run_again(here, steps, capsys):
    models = (*TOYS, "toy_code:overflowing", "toy_code:classifier")
    assert main(audit("whole.json", models=models)) == 1
    each = len(steps.made) // 3
    steps.again(2 * each)
    assert main(audit("found.json", models=models)) == 130
    steps.again()
    assert main(audit("found.json", models=models)) == 1
    assert len(steps.made) == each
    assert Path("found.json").read_bytes() == Path("whole.json").read_bytes()


def test_what_language_models_wrote_and_answered_is_kept(text_here, steps, capsys):
    original, other = write_models(text_here, 0.02)
    Path("q.jsonl").write_text(
        '{"question": "Word 1 is", "choices": [" word", " row"], "answer": 0}\n' * 3
    )
    asked = ["--generate", "2", "--choices", "q.jsonl", "--report", "page", "--json", "f.json"]
    command = ["audit", original, other, *FEW, *asked]
    whole = main(command)
    expected, every = Path("f.json").read_bytes(), list(steps.made)
    roles = [called(step).split()[0] for step in every if "by" in called(step).split()]
    assert Counter(roles) == {"prompts": 2, "questions": 2}
    Path("f.json").unlink()
    steps.again(len(every) - 1)
    assert main(command) == 130
    assert Path("page.unfinished").is_dir()
    steps.again()
    assert main(command) == whole
    assert steps.made == every[-1:]
    assert Path("f.json").read_bytes() == expected and not Path("page.unfinished").exists()


# --- the parts


@pytest.mark.parametrize("together", [1, 3, 7, 32])
def test_parts_that_are_kept_add_up_to_the_same_bits(tmp_path, monkeypatch, together):
    monkeypatch.setattr(fidelity, "KEPT_TOGETHER", together)
    one, two = classifier(), classifier(1)
    batches = [{"inputs": random(5, 5, seed=seed)} for seed in range(7)]
    model = toy("classify", one, examples=batches[0])

    def measured(keep):
        return fidelity.measure_for_report(
            model,
            lambda batch: model.task.forward(two, batch),
            batches,
            CATEGORICAL,
            progress=Silent(),
            answers=[n % 7 for n in range(35)],
            keep=keep,
        )

    whole, folder = measured(None), tmp_path / "kept"
    folder.mkdir()
    parts, again = measured(Finished(folder).once), measured(Finished(folder).once)
    assert len(list(folder.iterdir())) == -(-7 // together)
    for found in (parts, again):
        for field in fields(whole):
            expected, own = getattr(whole, field.name), getattr(found, field.name)
            assert np.array_equal(expected, own), field.name


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("array", [np.zeros(0, int), np.arange(3.0), np.eye(3, 5), np.array(2.5)])
def test_arrays_come_back_with_their_bits_and_layout(tmp_path, array, order):
    given = np.array(array, order=order)
    given.flags.writeable = False
    found = kept(tmp_path, [given])[0]
    assert found.dtype == given.dtype and np.array_equal(found, given)
    assert found.shape == given.shape
    assert found.flags.c_contiguous == given.flags.c_contiguous


def test_the_steps_of_two_parts_are_told_apart_and_given_up_together(tmp_path):
    told = []
    whole = Finished(tmp_path, told.append)
    one, two = whole.within("one"), whole.within("two").within("inner")
    assert [part.once("step", lambda n=n: n) for n, part in enumerate((whole, one, two))] == [
        0, 1, 2,
    ]  # fmt: skip
    assert [part.once("step", lambda: 9) for part in (whole, one, two)] == [0, 1, 2]
    two.give_up(OSError(28, "No space left on device"))
    one.give_up(OSError(28, "No space left on device"))
    assert told == ["what is finished is not kept: No space left on device"]
    assert not tmp_path.exists() and whole.once("step", lambda: 9) == 9


def test_a_model_is_told_from_others_by_all_an_audit_may_see(tmp_path):
    def hashed(**more):
        model = load_model("toy_code:classifier", task="classify")
        module = model.module
        if "parameter" in more:
            module[3].weight.data[0, 0] += 1
        if "buffer" in more:
            module[1].running_var[3] *= 2
        files = {"labels.txt": more["labels"]} if "labels" in more else {}
        return auditing.model_hash(replace(model, files=files), tmp_path)

    changes = [{}, {"parameter": 1}, {"buffer": 1}, {"labels": b"a"}, {"labels": b"b"}]
    assert len({hashed(**change) for change in changes}) == len(changes)
    assert hashed() == hashed()

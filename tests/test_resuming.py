"""A run that was killed goes on from what it had finished, and writes the same bytes."""

import hashlib
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import toy_code

from attar import decide, resuming
from attar.cli import main
from attar.errors import OutputError, Terminated, WorkerError
from attar.explain.statistics import Curvatures
from attar.kernels.symmetric import Symmetric
from attar.records import Unit
from attar.resuming import Finished
from attar.transform.apply import Treated, build_transform

TOY = ["toy_code:classifier", "--task", "classify"]
KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from attar import resuming
from attar.cli import main
put, count = resuming._put, 0
def dying(path, *parts):
    global count
    put(path, *parts)
    count += 1
    if count == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
resuming._put = dying
sys.exit(main())
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_code.save_data(Path("d.npz"), count=240)
    return tmp_path


def compress(out="out", size="8kB", *more):
    return ["compress", *TOY, "--data", "d.npz", "--size", size, "--out", out, *more]


def hashes(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.*")}


@pytest.fixture
def expected(here):
    assert main(compress("whole")) == 0
    assert not (here / "whole.unfinished").exists()
    return hashes(here / "whole")


class Steps:
    """Counts what is made, and can end the run after some step has been kept."""

    def __init__(self, monkeypatch):
        self.made, self.after, self.error = [], None, Terminated
        write = resuming._write

        def counted(path, step, value):
            if self.after is not None and len(self.made) >= self.after:
                raise self.error
            write(path, step, value)
            self.made.append(step)

        monkeypatch.setattr(resuming, "_write", counted)

    def again(self, after=None, error=Terminated):
        self.made, self.after, self.error = [], after, error


@pytest.fixture
def steps(monkeypatch):
    return Steps(monkeypatch)


def test_a_killed_run_goes_on_and_writes_the_same_bytes(here, expected, capsys):
    script = KILLED.format(tests=str(Path(__file__).parent), after=9)
    run = [sys.executable, "-c", script, *compress()]
    killed = subprocess.run(run, cwd=here, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (here / "out").exists() and (here / "out.unfinished").is_dir()
    capsys.readouterr()
    assert main(compress()) == 0
    said = capsys.readouterr().err.splitlines()
    # The first file is run.json.
    assert "going on from out.unfinished: 8 steps are finished …" in said
    assert "explain …" not in said  # statistics were not gathered again
    assert hashes(here / "out") == expected
    assert sorted(p.name for p in here.iterdir()) == ["d.npz", "out", "whole"]


def test_a_run_that_ends_anywhere_goes_on_without_doing_anything_twice(here, steps, capsys):
    assert main(compress("whole")) == 0
    kinds = Counter(step.split()[0] for step in steps.made)
    assert set(kinds) == {"statistics", "row", "coherence", "price", "treated", "damage", "prices"}
    expected, every = hashes(here / "whole"), list(steps.made)
    done = []
    for after in (1, 3, 2, 4, None):  # each goes on from where the one before it ended
        steps.again(after)
        assert main(compress()) == (0 if after is None else 130)
        done += steps.made
    assert sorted(done) == sorted(every)
    assert hashes(here / "out") == expected
    assert not (here / "out.unfinished").exists()


def test_lost_workers_leave_what_is_finished_and_an_interruption_nothing(here, steps, capsys):
    lost = WorkerError("workers were lost.", hint="find them.")
    steps.again(2, lost)
    assert main(compress()) == 2
    said = capsys.readouterr().err
    assert "out.unfinished keeps what is finished: the same command goes on from there" in said
    steps.again(2, KeyboardInterrupt)
    assert main(compress()) == 130
    assert [p.name for p in here.iterdir()] == ["d.npz"]
    steps.again(0, lost)  # nothing was finished, so nothing is kept
    assert main(compress("new/out")) == 2
    assert [p.name for p in here.iterdir()] == ["d.npz"]


def test_what_was_asked_otherwise_is_done_afresh_and_said(here, expected, steps, capsys):
    steps.again(3)
    main(compress(size="9kB"))
    steps.again()
    capsys.readouterr()
    assert main(compress()) == 0
    assert "out.unfinished is of another run (other size): all is done again" in (
        capsys.readouterr().err
    )
    assert "statistics" in steps.made and hashes(here / "out") == expected


@pytest.mark.parametrize("change", ["weights", "data", "code"])
def test_other_weights_data_or_code_of_the_model_are_another_run(
    here, steps, capsys, monkeypatch, change
):
    steps.again(3)
    main(compress())
    if change == "data":
        toy_code.save_data(Path("d.npz"), count=239)
    else:
        build = toy_code.classifier

        def changed():
            module, examples = build()
            if change == "code":
                module[2] = torch.nn.Tanh()
            else:
                module[5].weight.data[0, 0] += 1
            return module, examples

        monkeypatch.setattr(toy_code, "classifier", changed)
    steps.again(1)
    capsys.readouterr()
    main(compress())
    assert f"{change}" in capsys.readouterr().err.split("(other ")[1].split(")")[0]
    assert steps.made == ["statistics"]


def test_threads_and_workers_are_no_other_run(here, steps, capsys):
    steps.again(3)
    main(compress())
    steps.again(0)
    main(compress("out", "8kB", "--threads", "1"))
    assert "going on from out.unfinished: 3 steps are finished" in capsys.readouterr().err


def test_restart_does_all_of_it_again(here, steps, capsys):
    steps.again(3)
    main(compress())
    steps.again(1)
    capsys.readouterr()
    main(compress("out", "8kB", "--restart"))
    assert "going on" not in capsys.readouterr().err and steps.made == ["statistics"]


def test_a_damaged_step_is_refused_with_the_way_out(here, steps, capsys):
    steps.again(1)
    main(compress())
    (file,) = (here / "out.unfinished").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    capsys.readouterr()
    steps.again()
    assert main(compress()) == 2
    said = capsys.readouterr().err
    assert "cannot be read" in said and "hint: add --restart" in said


def test_a_full_disk_ends_keeping_and_not_the_run(here, expected, monkeypatch, capsys):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resuming, "_write", full)
    assert main(compress()) == 0
    assert "what is finished is not kept: No space left on device" in capsys.readouterr().err
    assert hashes(here / "out") == expected and not (here / "out.unfinished").exists()


def test_a_folder_that_no_run_made_is_left_alone(here, capsys):
    (here / "out.unfinished").mkdir()
    (here / "out.unfinished" / "mine").touch()
    for more in ((), ("--restart",)):
        assert main(compress("out", "8kB", *more)) == 2
        assert "is not what a run leaves" in capsys.readouterr().err
    assert (here / "out.unfinished" / "mine").exists()


def test_plans_and_frontiers_go_on_too(here, steps, capsys):
    plan = ["plan", *TOY, "--data", "d.npz"]
    for more in (["--size", "8kB", "--out", "p.yaml"], ["--frontier", "sizes"]):
        steps.again(5)
        assert main([*plan, *more]) == 130
        steps.again()
        capsys.readouterr()
        assert main([*plan, *more]) == 0
        assert f"going on from {more[-1]}.unfinished: 5 steps" in capsys.readouterr().err
        assert "statistics" not in steps.made and not Path(f"{more[-1]}.unfinished").exists()


# --- one step, one file


def kept(tmp_path, value):
    """Write and read back."""
    folder = tmp_path / "kept"
    folder.mkdir(exist_ok=True)
    Finished(folder).once("a step", lambda: value)
    return Finished(folder).once("a step", lambda: pytest.fail("made again"))


def test_plain_values_come_back_as_they_were(tmp_path):
    value = {"a": [1, (2.5, None)], "b": {"c": True, "": "x"}, "d": 0.1 + 0.2, "e": ()}
    assert kept(tmp_path, value) == value


@pytest.mark.parametrize("dtype", resuming.TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5)])
def test_tensors_come_back_with_their_bits_and_layout(tmp_path, dtype, shape):
    tensor = (torch.arange(float(torch.Size(shape).numel())).reshape(shape) * 3).to(dtype)
    for given in (tensor, tensor.T if len(shape) == 2 else tensor):
        found = kept(tmp_path, [given])[0]
        assert found.dtype == dtype and found.stride() == given.stride()
        assert torch.equal(found, given)
        (tmp_path / "kept").joinpath(next((tmp_path / "kept").iterdir()).name).unlink()


def test_curvature_comes_back_as_small_and_as_shared_as_it_was(tmp_path):
    draws = torch.Generator().manual_seed(0)
    sums = Symmetric(7)
    sums.add_outer(torch.randn(9, 7, generator=draws))
    packed, rows = sums.packed(), torch.rand(3, generator=draws)
    curvatures = Curvatures(
        {
            "a": ((rows, packed, packed, None, torch.rand(2, 7, generator=draws)),),
            "b": ((rows, sums, sums, sums, None),),
        }
    )
    found = kept(tmp_path, curvatures)
    assert found._kept["a"][0][1] is found._kept["a"][0][2]
    assert found._kept["a"][0][0] is found._kept["b"][0][0]
    for name in ("a", "b"):
        (one,), (other,) = found[name], curvatures[name]
        assert one.first is one.second
        assert torch.equal(one.first, other.first) and torch.equal(one.rows, other.rows)
    assert torch.equal(found["a"][0].means, curvatures["a"][0].means)
    assert found["b"][0].means is None


@pytest.mark.parametrize(
    ("treatment", "settings"),
    [
        ("quantize_entropy", {"bits": 3}),
        ("quantize_feedback", {"bits": 3, "group_size": 32}),
        ("quantize_low_rank", {"bits": 3, "group_size": 32, "rank": 2}),
        ("factorize_low_rank", {"bits": 3, "rank": 43}),
        ("quantize_llama", {"type": "Q4_0"}),
        ("quantize_levels", {"levels": "nf4", "group_size": 32}),
        ("zero_n_m", {"n_kept": 2, "m": 4, "bits": 4}),
        ("zero_unstructured", {"kept_fraction": 0.5, "bits": 4}),
        ("keep_float", {"bits": 16}),
    ],
)
def test_a_treated_unit_comes_back_as_it_was_made(tmp_path, treatment, settings):
    weight = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    unit = Unit("a", "linear", (96, 96), ("linear",))
    transform = build_transform(treatment, settings)
    made = transform.apply(weight, None)
    treated = Treated(unit, transform, made.tensors, made.unpacked)
    found = kept(tmp_path, treated)
    assert (found.unit, found.transform) == (unit, transform)
    assert all(torch.equal(found.tensors[name], t) for name, t in treated.tensors.items())
    assert torch.equal(found.weight(), treated.weight())


def test_a_file_makes_nothing_but_records(tmp_path):
    kept(tmp_path, Unit("a", "linear", (9, 9), ("linear",)))
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(file.read_bytes().replace(b'\\"Unit\\"', b'\\"Path\\"'))
    with pytest.raises(OutputError, match="cannot be read"):
        Finished(tmp_path / "kept").once("a step", lambda: None)


def test_written_choices_name_unit_treatment_and_settings():
    from attar.records import Candidate, Cost

    def written(**settings):
        return decide._written({"a": Candidate("a", "quantize_rtn", settings, Cost(1, 1), 0.5)})

    assert written(bits=3) != written(bits=4)
    assert written(bits=3) == '{"a": ["quantize_rtn", {"bits": 3}]}'

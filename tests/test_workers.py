"""Work in other processes over Ray: the same bytes, also when a worker is killed."""

import hashlib
import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import toy_code

from attar import pipeline, workers
from attar.errors import ModelError, PlanError, WorkerError
from attar.load.model import load_model
from attar.records import Recipe, Silent
from attar.session import open_session
from attar.transform.apply import Treated

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def two():
    with pytest.MonkeyPatch.context() as patch:  # workers load what pieces name
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        joined = workers.start("2")
        yield joined
        ray.shutdown()


def session(**more):
    module, examples = toy_code.classifier()
    model = load_model(module, examples=examples, task="classify")
    recipe = Recipe(model=model.name, task="classify", size="8kB", **more)
    return open_session(recipe, model, Silent(), {"inputs": toy_code.samples(240)})


def hashes(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.*")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    pipeline.compress_session(session(), out)
    return hashes(out)


@dataclass(frozen=True)
class Watched(workers.Workers):
    """Workers that do each piece by way of another function, and are counted."""

    through: object = None
    done: list = field(default_factory=list)
    told: list = field(default_factory=list)

    def do(self, work, what, tell):
        self.done.append(what)
        return super().do(self.through(work), what, self.told.append)


def test_two_workers_write_the_same_bytes_and_do_all_pieces(two, alone, tmp_path):
    opened = session(workers="2")
    assert opened.workers == two
    watched = Watched(two.count, lambda work: work)
    pipeline.compress_session(replace(opened, workers=watched), tmp_path / "out")
    assert hashes(tmp_path / "out") == alone
    assert set(watched.done) == {f"unit {u.name}" for u in opened.units}
    # What feedback saves, two changes for coherence, prices, and the units that are written.
    assert len(watched.done) >= 5 * len(opened.units.units)


def test_a_piece_of_a_killed_worker_is_done_again_with_the_same_bytes(two, alone, tmp_path):
    marker = str(tmp_path / "died")
    watched = Watched(two.count, lambda work: partial(toy_code.die_once, marker, work))
    pipeline.compress_session(replace(session(), workers=watched), tmp_path / "out")
    assert Path(marker).exists()
    assert hashes(tmp_path / "out") == alone
    lost = [line for line in watched.told if "is done again" in line]
    assert lost and all(line.startswith("a worker was lost; the unit ") for line in lost)


def test_a_piece_that_kills_every_worker_is_given_up(two, monkeypatch):
    monkeypatch.setattr(workers, "MOST_LOST", 2)
    told = []
    with pytest.raises(WorkerError, match="2 workers were lost over the unit x") as error:
        two.do(partial(toy_code.die, None), "unit x", told.append)
    assert len(told) == 2 and "memory" in error.value.hint
    assert two.do(partial(max, 3, 4), "unit y", told.append) == 4  # others go on


@pytest.mark.parametrize(
    "error",
    [ModelError("it is broken.", hint="mend it."), ValueError("a bug"), MemoryError("full")],
)
def test_an_error_of_a_piece_comes_through_and_is_not_tried_again(two, tmp_path, error):
    marker = tmp_path / "tried"
    with pytest.raises(type(error), match=str(error.args[0]).splitlines()[0]) as found:
        two.do(partial(toy_code.fail_as, error, str(marker)), "unit x", pytest.fail)
    assert marker.read_text() == "x"
    if isinstance(error, ModelError):
        assert (found.value.problem, found.value.hint) == ("it is broken.", "mend it.")
        assert type(found.value) is ModelError


def test_a_worker_does_one_piece_on_one_thread(two):
    assert two.count == 2
    assert two.do(torch.get_num_threads, "unit x", pytest.fail) == 1


def test_a_treated_unit_comes_back_as_it_was_made(two):
    opened = session()
    unit = opened.units.units[0]
    from attar.transform.apply import build_transform

    transform = build_transform("quantize_rtn", {"bits": 3, "group_size": 8})
    made = transform.apply(opened.weight(unit), None)
    sent = Treated(unit, transform, made.tensors)
    back = two.do(partial(replace, sent), "unit x", pytest.fail)
    assert back.unit == unit and back.transform == transform
    assert torch.equal(back.weight(), sent.weight())


# --- without Ray


def test_a_worker_that_computes_with_other_versions_is_refused():
    expected = {**workers.environment(), "torch": "1.0"}
    result, error = workers._answer(lambda: 1, expected)
    assert result is None and "torch" in error.problem and "1.0" in error.problem
    assert workers._answer(lambda: 1, workers.environment()) == (1, None)


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ("0", "no work without workers"),
        ("many", "neither a number"),
        ("ray://127.0.0.1:1", "nobody answers at ray://127.0.0.1:1"),
        ("127.0.0.1:1", "nobody answers"),
        ("127.0.0.1:port", "nobody answers"),
    ],
)
def test_what_cannot_be_joined_is_refused_with_what_can(wanted, problem):
    with pytest.raises(WorkerError, match=problem) as error:
        workers.start(wanted)
    assert "--workers" in error.value.hint


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(WorkerError, match="not installed") as error:
        workers.start("2")
    assert "pip install 'attar[workers]'" in error.value.hint
    assert workers.start("") is None


def test_errors_go_from_one_process_to_another_whole():
    import pickle

    error = pickle.loads(pickle.dumps(PlanError("no such unit.", hint="name another.")))
    assert (type(error), error.problem, error.hint) == (
        PlanError,
        "no such unit.",
        "name another.",
    )
    assert str(error) == "no such unit.\nhint: name another."

"""`attar bench`: what is measured, what is said of it, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import LLAMA, random_model, write_gguf

from attar import bench_child, benching
from attar.measure import energy, engines
from attar.measure.spread import is_settled, is_wide, ratio, spread
from attar.records import Bench, BenchRow
from attar.report.bench_text import bench_to_text

TOY = "toy_code:classifier"


# --- what is said of figures


def quantile(values, share):
    """Linear between the two neighbours, written from the definition."""
    values = sorted(values)
    place = share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=9))
def test_median_and_quartiles(values):
    found = spread(values)
    for given_, share in ((found.low, 0.25), (found.median, 0.5), (found.high, 0.75)):
        assert given_ == pytest.approx(quantile(values, share))
    assert found.values == tuple(values)


def test_a_ratio_is_of_the_same_round_so_that_a_busy_round_cancels():
    busy = [1, 9, 1, 5, 2]
    found = ratio(spread([3 * x for x in busy]), spread([2 * x for x in busy]))
    assert found.values == pytest.approx((1.5,) * 5)
    assert is_settled(found)


@pytest.mark.parametrize(
    "values",
    [(1.5,) * 4, (1.5, 1.5, 1.5, 1.5, 0.9), (1.1, 1.2, 2.0, 3.0, 4.0), (1.0,) * 5],
    ids=["too few rounds", "one disagrees", "too wide", "the same"],
)
def test_what_may_not_be_called_faster(values):
    assert not is_settled(spread(values))


def test_a_wide_spread_is_seen():
    assert is_wide(spread([1, 1, 2, 3, 3]))
    assert not is_wide(spread([10, 10.5, 11, 11.5, 40]))  # one slow round leaves the quartiles


def row(role, engine, times):
    return BenchRow(role, role, engine, "1", 1000, {"sample_ms": spread(times)})


def shown(*rows, left_out=()):
    found = Bench("classify", rows, {"threads": 1}, {}, left_out)
    text = bench_to_text(found, benching.too_wide(found), benching.compared(found), 120)
    return " ".join(text.split())


def test_a_model_is_compared_with_the_fastest_engine_of_the_original():
    slow, fast = row("original", "pytorch", [8.0] * 5), row("original", "openvino", [3.0] * 5)
    assert "2.00x faster" in shown(row("given", "openvino", [1.5] * 5), slow, fast)
    assert "2.00x slower" in shown(row("given", "openvino", [6.0] * 5), slow, fast)


def test_nothing_is_claimed_where_rounds_disagree_or_the_spread_is_wide():
    original = row("original", "pytorch", [2.0] * 5)
    text = shown(row("given", "openvino", [1.9, 2.1, 2.0, 2.1, 1.9]), original)
    assert "no difference shown" in text
    assert "faster" not in text and "slower" not in text
    text = shown(row("given", "openvino", [0.1, 0.2, 0.4, 0.9, 1.0]), original)
    assert "spread too wide" in text and "faster" not in text
    assert "throughput of given" not in text and "throughput of original" in text


def test_energy_is_called_unmeasured_without_counters():
    assert "energy was not measured" in shown(row("given", "pytorch", [1.0]))


# --- energy


def counters(folder, **microjoules):
    for name, value in microjoules.items():
        place = folder / f"intel-rapl:{name[1:].replace('_', ':')}"
        place.mkdir(exist_ok=True)
        (place / "energy_uj").write_text(str(value))
        (place / "max_energy_range_uj").write_text("1000000")
    return energy.read_counters(folder)


def test_energy_of_all_packages_and_a_count_that_began_anew(tmp_path):
    before = counters(tmp_path, p0=5000, p1=999000, p0_0=7)  # cores are in their package
    after = counters(tmp_path, p0=9000, p1=3000, p0_0=999)
    assert energy.between(before, after) == pytest.approx((4000 + 4000) / 1000)


def test_no_energy_where_no_counter_may_be_read(tmp_path):
    assert energy.read_counters(tmp_path) == {}
    assert energy.between({}, {}) is None
    (tmp_path / "intel-rapl:0").mkdir()
    assert energy.read_counters(tmp_path) == {}


# --- engines


def test_an_engine_that_is_missing_is_named_with_what_to_type(monkeypatch):
    gone = {
        **engines.ENGINES,
        "openvino": engines.Engine("no_such_module", "pip install X", (".onnx",)),
    }
    monkeypatch.setattr(engines, "ENGINES", gone)
    found, missing = engines.engines_of(".onnx")
    assert found == ["onnxruntime"]
    assert missing == ["openvino is not installed: pip install X"]


def test_memory_of_a_process_is_its_own_and_not_that_of_the_one_that_started_it():
    held = np.ones(60_000_000)  # 480 MB, which getrusage of a child would begin with
    code = "from attar.bench_child import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < held.nbytes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", random_model(LLAMA), LLAMA)


def test_a_language_model_in_llama_cpp(typed, tiny, tmp_path):
    facts = tmp_path / "b.json"
    code, said = typed(
        "bench", tiny.parent, "--rounds", 1, "--prompt", 5, "--tokens", 3, "--json", facts
    )
    assert code == 0
    assert "llama.cpp" in said.out and "per token" in said.out
    found = json.loads(facts.read_text())
    (only,) = found["rows"]
    assert only["file_bytes"] == tiny.stat().st_size
    figures = {name: value["median"] for name, value in only["figures"].items()}
    assert set(figures) >= {"load_ms", "first_token_ms", "token_ms", "peak_bytes"}
    assert figures["peak_bytes"] >= figures["import_bytes"] > 0
    assert found["asked"] == {"threads": 2, "rounds": 1, "prompt_tokens": 5, "new_tokens": 3}


def subject(engine):
    recipe = benching.Recipe(model="m")
    return benching.Subject("given", engine, Path("m"), recipe, Path("x.npz"), 1)


def test_each_round_begins_with_another_subject(monkeypatch):
    order = []
    monkeypatch.setattr(benching, "_run", lambda one, numbers: order.append(one) or {"x": 1.0})
    figures = benching._alternate([subject(n) for n in "abc"], {}, 3, benching.Silent())
    assert "".join(one.engine for one in order) == "abcbcacab"
    assert [len(runs) for runs in figures] == [3, 3, 3]


def test_a_process_measures_a_module_of_pytorch(tmp_path):
    inputs = tmp_path / "x.npz"
    model = benching.open_model(benching.Recipe(model=TOY, task="classify"))
    np.savez(inputs, *benching._one_sample(model, 1))
    job = {
        "engine": "pytorch",
        "path": TOY,
        "recipe": {"model": TOY, "task": "classify"},
        "inputs": str(inputs),
        "threads": 1,
        "new_tokens": 2,
    }
    bench_child.SECONDS, kept = 0.0, bench_child.SECONDS
    try:
        found = bench_child.measure(job)
    finally:
        bench_child.SECONDS = kept
    assert found["sample_ms"] > 0 and found["load_ms"] > 0


# --- what is refused


@pytest.mark.parametrize(
    ("words", "problem", "hint"),
    [
        (("nonsense",), "nonsense", "attar models"),
        (("{tiny}", "--engine", "vllm"), "there is no engine vllm", "llama.cpp"),
        (("{tiny}", "--engine", "openvino"), "no engine that was asked for", "--engine llama.cpp"),
        (("{tiny}", TOY, "--task", "classify"), "answers language", "made from"),
        (("{broken}",), "GGUF", ""),
    ],
)
def test_bad_input_gives_two_lines_and_code_2(typed, tiny, tmp_path, words, problem, hint):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny.read_bytes()[:1000])
    words = [word.format(tiny=tiny, broken=broken) for word in words]
    code, said = typed("bench", *words)
    assert code == 2
    errors = [line for line in said.err.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(errors) == 2
    assert problem in errors[0] and hint in errors[1]


def test_an_engine_that_fails_says_so_in_one_line(monkeypatch):
    def answer(*args, **more):
        return subprocess.CompletedProcess(
            args, 1, stdout="", stderr="Traceback\nOutOfMemory: no\n"
        )

    monkeypatch.setattr(benching.subprocess, "run", answer)
    with pytest.raises(benching.ModelError, match=r"llama\.cpp cannot run m: OutOfMemory: no"):
        benching._run(subject("llama.cpp"), {})

"""Healing: what is learned of stored weights, how, and what compress, plans and killed runs do."""

import hashlib
import json
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import toy_code
import yaml
from test_resuming import KILLED
from torch import nn

from attar import healing, pipeline
from attar.cli import main
from attar.divergence import Divergence
from attar.errors import PlanError, SettingError
from attar.heal import Descent, Grid, OnGrid, Whole, Wish, parse_wish
from attar.heal.descend import BATCHES_PER_STEP, DECAYS, rate_at
from attar.load.data import DataSizes, load_data
from attar.load.model import load_model
from attar.plan.planfile import plan_to_yaml
from attar.records import Recipe, RowWeights, Silent, Unit
from attar.transform.apply import Treated, build_transform
from attar.transform.on_grid import fits, opened, with_levels

TOY = ["toy_code:classifier", "--task", "classify"]
CODE = ["--factory", "toy_code:classifier"]
SIZE = "3900B"


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- what is asked for


@pytest.mark.parametrize(
    ("text", "wish"),
    [
        ("none", None),
        ("distill=10min", Wish("distill", seconds=600.0)),
        ("distill=1.5h", Wish("distill", seconds=5400.0)),
        ("distill=300steps", Wish("distill", steps=300)),
    ],
)
def test_a_wish_is_a_time_or_a_number_of_steps(text, wish):
    assert parse_wish(text) == wish


@pytest.mark.parametrize(
    "text", ["", "distill", "distil=10min", "distill=0min", "distill=2.5steps"]
)
def test_another_wish_is_refused_with_one_to_type(text):
    with pytest.raises(SettingError, match="--heal cannot be") as refused:
        parse_wish(text)
    assert "--heal distill=10min" in refused.value.hint


# --- weights on a grid


def grid_of(start, wanted):
    ends = torch.full_like(start, -3.0), torch.full_like(start, 3.0)
    step = draws(*start.shape, seed=2).abs() + 0.1
    return Grid(start, wanted, step, *ends, shape=tuple(start.shape))


def test_a_weight_starts_at_its_levels_and_gradients_pass_the_rounding():
    start = torch.tensor([[0.0, -2.0, 3.0], [1.0, 0.0, -3.0]])
    grid = grid_of(start, start + draws(2, 3))
    part = OnGrid(grid)
    assert torch.equal(part.tensor(), start * grid.step)
    assert not torch.equal(part.learned, start)  # not all in the middle
    (part.tensor() * draws(2, 3, seed=5)).sum().backward()
    torch.testing.assert_close(part.learned.grad, draws(2, 3, seed=5) * grid.step)


@pytest.mark.parametrize("zone", [0.0, 0.2, 0.45])
def test_a_dead_zone_keeps_what_has_not_passed_it(zone):
    start = torch.zeros(5, 7)
    part = OnGrid(grid_of(start, start))
    with torch.no_grad():
        part.learned.copy_(2.5 * draws(5, 7, seed=3))
    for behind, level in zip(
        part.learned.flatten().tolist(), part.levels(zone).flatten().tolist(), strict=True
    ):
        size, sign = abs(behind), 1 if behind > 0 else -1
        whole = int(size)
        expected = sign * min(3, whole + (size - whole >= 0.5 + zone))
        assert level == expected


def treated(treatment, settings, rows=48, columns=512, seed=0):
    unit = Unit("u", "linear", (rows, columns), ("linear",))
    weight = draws(rows, columns, seed=seed) * draws(rows, 1, seed=seed + 1).exp()
    transform = build_transform(treatment, settings)
    moment = torch.eye(columns)[None] + 0.1
    made = transform.apply(weight, moment, RowWeights(torch.ones(rows), torch.ones(rows)))
    return Treated(unit, transform, made.tensors, made.unpacked), weight


ON_GRID = [
    ("quantize_entropy", {"bits": 2.5}),
    ("quantize_entropy", {"bits": 3.1, "by_worth": True}),
    ("quantize_feedback", {"bits": 3, "group_size": 64}),
    ("quantize_feedback", {"bits": 8, "group_size": 0, "symmetric": True}),
    ("quantize_rtn", {"bits": 4, "group_size": 0}),
]


@pytest.mark.parametrize(("treatment", "settings"), ON_GRID)
def test_levels_are_stored_as_they_were_read(treatment, settings):
    one, _ = treated(treatment, settings)
    grid = opened(one)
    torch.testing.assert_close(grid.levels * grid.step, one.weight(), rtol=1e-6, atol=1e-7)
    again = with_levels(one, grid.levels)
    assert torch.equal(again.weight(), one.weight())
    assert sum(t.nbytes for t in again.tensors.values()) == sum(
        t.nbytes for t in one.tensors.values()
    )


def part_of(one):
    grid = opened(one)
    within = (lambda levels: fits(one, levels)) if grid.is_coded else None
    ends, shape = (grid.lowest, grid.highest), one.unit.shape
    return OnGrid(Grid(grid.levels, grid.levels, grid.step, *ends, shape, within)), grid


@pytest.mark.parametrize(("treatment", "settings"), ON_GRID)
def test_other_levels_are_read_back_and_take_no_more_bytes(treatment, settings):
    one, _ = treated(treatment, settings)
    part, grid = part_of(one)
    with torch.no_grad():
        part.learned += 0.8 * draws(*grid.levels.shape, seed=7)
    part.fit()
    assert (part.levels() != grid.levels).float().mean() > 0.1
    again = with_levels(one, part.levels())
    torch.testing.assert_close(again.weight(), part.levels() * grid.step, rtol=1e-6, atol=1e-7)
    assert {n: t.nbytes for n, t in again.tensors.items()} == {
        n: t.nbytes for n, t in one.tensors.items()
    }


def test_the_dead_zone_is_the_least_that_fits():
    one, _ = treated("quantize_entropy", {"bits": 2.5})
    part, grid = part_of(one)
    with torch.no_grad():
        part.learned += 0.3 * draws(*grid.levels.shape, seed=7)
    assert not fits(one, part.levels())
    part.fit()
    assert fits(one, part.levels())
    assert not fits(one, part.levels(part._dead_zone - 0.003))


def test_levels_that_fit_with_no_dead_zone_begin_anew():
    one, _ = treated("quantize_entropy", {"bits": 2.5})
    part, grid = part_of(one)
    with torch.no_grad():
        part.learned += 40 * draws(*grid.levels.shape, seed=7)
    part.fit()
    assert torch.equal(part.levels(), grid.levels)


def test_what_is_on_no_grid_stays():
    assert opened(treated("quantize_codebook", {})[0]) is None
    assert opened(treated("quantize_entropy", {"bits": 3, "trellis": True})[0]) is None


# --- going down


def descent(seed=0, rate=0.01):
    torch.manual_seed(seed)
    teacher, student = nn.Linear(6, 4), nn.Linear(6, 4)
    examples = {"inputs": draws(2, 6)}
    models = [load_model(m, examples=examples, task="classify") for m in (teacher, student)]
    batches = [{"inputs": draws(8, 6, seed=n)} for n in range(5)]
    parts = {n: Whole(p, 1.0) for n, p in student.named_parameters()}
    made = Descent(
        *models,
        parts,
        {},
        batches=batches,
        divergence=Divergence("categorical"),
        rate=rate,
        seed=seed,
    )
    return made, teacher, student, batches


def test_steps_are_those_of_adam():
    made, teacher, student, batches = descent()
    units = {n: float(p.detach().square().mean().sqrt()) for n, p in student.named_parameters()}
    free = {n: (p.detach() / units[n]).requires_grad_() for n, p in student.named_parameters()}
    adam = torch.optim.Adam(free.values(), lr=1.0, betas=DECAYS, eps=1e-12)
    steps = 7
    for number in range(steps):
        chosen = made._chosen(number)
        assert 1 <= len(chosen) <= BATCHES_PER_STEP
        loss = 0.0
        for batch in chosen:
            wanted = teacher(batch["inputs"]).log_softmax(-1).detach()
            weight, bias = (free[n] * units[n] for n in ("weight", "bias"))
            found = (batch["inputs"] @ weight.T + bias).log_softmax(-1)
            loss = loss + (wanted.exp() * (wanted - found)).sum(-1).mean() / len(chosen)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(free.values(), 1.0)
        adam.param_groups[0]["lr"] = 0.01 * rate_at(number, steps)
        adam.step()
    made.go(steps, steps, lambda _: None)
    for name, tensor in free.items():
        torch.testing.assert_close(made.state.learned[name], tensor, rtol=1e-4, atol=1e-5)
    assert {id(b) for n in range(3) for b in made._chosen(n)} == {id(b) for b in batches}


def test_the_rate_rises_and_falls():
    rates = [rate_at(n, 100) for n in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a >= b for a, b in pairwise(rates[5:]))
    assert rates[-1] < 0.01
    assert rate_at(0, 1) == 1.0


def test_a_student_that_learns_long_answers_as_the_teacher():
    made, *_, batches = descent(rate=0.05)
    before = made.lost(batches)
    made.go(200, 200, lambda _: None)
    assert made.lost(batches) < 0.01 * before


# --- compress, plan and apply


@pytest.fixture(scope="module")
def healed_folder(tmp_path_factory):
    """Data, the model made of it without healing in `plain`, and with it in `healed`."""
    folder = tmp_path_factory.mktemp("healing")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        toy_code.save_data(Path("d.npz"), count=400)
        pipeline.compress(recipe("none"), folder / "plain")
        assert main(compress("healed")) == 0
    return folder


@pytest.fixture
def here(healed_folder, monkeypatch):
    monkeypatch.chdir(healed_folder)
    return healed_folder


def compress(out="out", heal="distill=60steps"):
    return ["compress", *TOY, "--data", "d.npz", "--size", SIZE, "--out", out, "--heal", heal]


def hashes(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*.*")}


def recipe(heal):
    return Recipe("toy_code:classifier", size=SIZE, task="classify", data="d.npz", heal=heal)


def read_json(path):
    return json.loads(path.read_text())


def test_healing_returns_damage_within_the_same_bytes_and_a_plan_heals_again(here, capsys):
    plain = yaml.safe_load((here / "plain/report/plan.yaml").read_text())
    healed = yaml.safe_load((here / "healed/report/plan.yaml").read_text())["healed"]
    assert healed["damage_after"] < healed["damage_before"]
    before = plain["rounds"][-1]["measured_damage"]
    assert healed["damage_before"] == pytest.approx(before, rel=0.5)
    assert sum(f.stat().st_size for f in (here / "healed").glob("*.*")) <= 3900
    assert main(["apply", "healed/report/plan.yaml", "--out", "again", *CODE]) == 0
    assert "healed (distill" in capsys.readouterr().out
    weights = "model.safetensors"
    assert hashes(here / "again")[weights] == hashes(here / "healed")[weights]
    assert hashes(here / "plain")[weights] != hashes(here / "healed")[weights]


def test_where_no_step_measures_better_what_was_made_stays(here, monkeypatch):
    monkeypatch.setattr(healing, "RATE", 1e4)
    spoilt = pipeline.compress(recipe("distill=20steps"), here / "spoilt")
    assert spoilt.plan.healed.steps == 0
    assert any("healed (distill, 0 of 20 steps)" in note for note in spoilt.plan.notes)
    weights = "model.safetensors"
    assert hashes(here / "spoilt")[weights] == hashes(here / "plain")[weights]
    groups = [
        read_json(here / one / "report/report.json")["verdict"]["groups"]
        for one in ("plain", "spoilt")
    ]
    assert groups[0] == groups[1] != []


def test_a_run_that_is_killed_while_it_heals_goes_on_from_there(here):
    code = KILLED.format(tests=str(Path(__file__).parent), after=0)
    code = code.replace("count == 0", "len(parts) > 1 and b'step 40 of 60' in parts[1]")
    run = [sys.executable, "-c", code, *compress("killed")]
    killed = subprocess.run(run, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (here / "killed.unfinished").is_dir() and not (here / "killed").exists()
    assert main(compress("killed")) == 0
    assert hashes(here / "killed") == hashes(here / "healed")


def test_what_cannot_be_healed_is_refused_before_work(here, capsys):
    assert main(compress(heal="distill")) == 2
    said = capsys.readouterr().err
    assert "--heal cannot be 'distill'" in said and "--heal distill=10min" in said
    assert main([*compress(), "--to", "onnx", "--activations", "dynamic"]) == 2
    assert "activations are rounded to 8 bits" in capsys.readouterr().err
    assert not (here / "out").exists()


def test_a_plan_that_heals_in_no_known_way_is_refused(here):
    made, _ = pipeline.plan(recipe("none"))
    again = Recipe("", factory=CODE[1])
    for healed in ("{method: distill}", "{method: distill, steps: 9, of: 3}", "300", "{of: 3}"):
        Path("plan.yaml").write_text(plan_to_yaml(made) + f"healed: {healed}\n")
        with pytest.raises(PlanError, match="healed by"):
            pipeline.apply_plan_file(Path("plan.yaml"), here / "out", recipe=again)


def test_what_is_learned_from_is_in_no_split_and_moves_none():
    module, examples = toy_code.classifier()
    model = load_model(module, examples=examples, task="classify")
    arrays = {"inputs": toy_code.samples(300).numpy()}
    counts = {"calibration": 40, "recovery": 30, "audit": 50}
    few, many = (
        load_data(model, arrays, seed=3, sizes=DataSizes(**counts, more=m), progress=Silent())
        for m in (0, 100)
    )
    for split in counts:
        for one, other in zip(getattr(few, split), getattr(many, split), strict=True):
            assert torch.equal(one["inputs"], other["inputs"])
    assert few.more == []
    more = torch.cat([b["inputs"] for b in many.more])
    held = torch.cat([b["inputs"] for split in counts for b in getattr(many, split)])
    assert len(more) == 100
    assert not {tuple(x) for x in more.tolist()} & {tuple(x) for x in held.tolist()}

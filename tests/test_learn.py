"""Scales learned end to end: how things are rounded meanwhile, what it saves, plans with them."""

from dataclasses import replace

import pytest
import torch
import toy_code
from linked_models import PreNorm, randomised
from test_equalising import files, session_of

from attar import equalising, learning, pipeline
from attar.activations import activation_of, rounded
from attar.cli import main
from attar.equalise.learn import (
    Learned,
    Learner,
    rounded_between,
    rounded_to_own_range,
    rounded_weight,
    through,
)
from attar.errors import SettingError
from attar.records import Activation, Recipe, Silent


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- rounding


@pytest.mark.parametrize(("bits", "size"), [(2, 0), (4, 0), (4, 3), (8, 6), (4, 5)])
def test_a_weight_is_rounded_to_the_nearest_step_of_its_group(bits, size):
    weight = draws(3, 2, 3)  # rows of 6 numbers, as of a convolution
    found = rounded_weight(weight, bits, size)
    assert found.shape == weight.shape
    width = size if size in (3, 6) else 6  # what does not divide a row is the row
    for row, back in zip(weight.reshape(3, 6), found.reshape(3, 6), strict=True):
        for start in range(0, 6, width):
            group = row[start : start + width]
            step = float(group.abs().max()) / (2 ** (bits - 1) - 1)
            for value, got in zip(group, back[start : start + width], strict=True):
                assert float(got) == pytest.approx(round(float(value) / step) * step)


def test_a_row_of_zeros_stays_one():
    weight = torch.zeros(2, 4, requires_grad=True)
    rounded_weight(weight, 4, 0).sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_an_input_is_rounded_as_a_plan_rounds_it():
    x = draws(5, 3, 7).float()
    activation = activation_of(-0.9, 1.3)
    found = rounded_between(x, torch.tensor(-0.9), torch.tensor(1.3))
    torch.testing.assert_close(found, rounded(x, activation), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rounded_to_own_range(x), rounded(x, Activation()))
    flat = draws(6).float()
    torch.testing.assert_close(rounded_to_own_range(flat), rounded(flat, Activation()))
    for rows in (x, flat):
        found = rounded_to_own_range(rows, by_row=True)
        torch.testing.assert_close(found, rounded(rows, Activation(by_row=True)))


def test_the_gradient_of_a_step_is_that_of_lsq():
    """Esser et al., eq. 3: −x/step + round(x/step) inside the range, the last code outside."""
    x = torch.tensor([0.3, 1.7, 90.0], dtype=torch.float64)
    step = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    for value in x:
        out = through(value / step).clamp(-8, 7) * step
        (found,) = torch.autograd.grad(out, step)
        inside = float(value) / 0.5 <= 7
        by_hand = round(float(value) / 0.5) - float(value) / 0.5 if inside else 7.0
        assert float(found) == pytest.approx(by_hand)


# --- learning


def uneven():
    """Channels of very different size, before and after a norm."""
    module = randomised(PreNorm()).float()
    with torch.no_grad():
        module.norm.weight[3] *= 30
        module.fc1.weight[5] *= 10
    return module


def opened(activations="none"):
    more = {"calibration": 200, "recovery": 60, "audit": 20}
    session = session_of(uneven(), draws(300, 9, seed=2).float(), **more)
    work = equalising.open_work(session, session.gather())
    how = Learned(4, activations=activations, passes=20)
    learner = Learner(session.model, work.found.links, work.units, session.divergence, how)
    learner.see_ranges(session.data.calibration)
    return session, work, learner


@pytest.mark.parametrize("activations", ["none", "static", "dynamic"])
def test_what_was_learned_loses_less_on_other_data_and_changes_no_answer(activations):
    session, work, learner = opened(activations)
    batch = session.data.audit[0]
    answer = session.model.task.forward(session.model.module, batch)
    before = learner.lost(session.data.recovery)
    learner.learn(session.data.calibration, Silent())
    assert learner.lost(session.data.recovery) < 0.5 * before
    for link in work.found.links:
        work.fold(link, learner.changes()[link.name])
    after = session.model.task.forward(session.model.module, batch)
    torch.testing.assert_close(after, answer, rtol=1e-4, atol=1e-4)


def test_what_is_lost_is_the_divergence_of_the_rounded_model():
    """By hand: every weight rounded, every input of one rounded, run, compared."""
    session, _, learner = opened("dynamic")
    module = session.model.module

    def run(x):
        def step(one, h):
            return torch.nn.functional.linear(
                rounded(h, Activation(by_row=True)), rounded_weight(one.weight, 4, 0), one.bias
            )

        return step(module.fc2, torch.relu(step(module.fc1, module.norm(x))))

    with torch.no_grad():
        batches = [b["inputs"] for b in session.data.recovery]
        losses = [session.divergence.between(module(x), run(x)).mean() for x in batches]
    assert learner.lost(session.data.recovery) == pytest.approx(float(sum(losses) / len(losses)))


def test_learning_is_the_same_on_any_number_of_threads():
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            session, work, learner = opened("static")
            learner.learn(session.data.calibration, Silent())
            found.append([learner.changes()[link.name].read.by for link in work.found.links])
        finally:
            torch.set_num_threads(2)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_bits_are_those_of_the_reference_and_within_what_is_allowed():
    from attar.transform.apply import build_transform

    session, _, _ = opened()
    units = list(session.units)
    for bits, whole in ((2, 2), (4, 4), (8, 8)):
        kept = [
            (u, build_transform("quantize_rtn", {"bits": bits, "group_size": 0})) for u in units
        ]
        least = sum(t.cost(u).weight_bytes for u, t in kept) * 8 / sum(u.n_weights for u in units)
        assert learning.whole_bits(kept) == min(8, max(2, round(least)))
        assert learning.whole_bits(kept) >= whole
    assert (
        learning.whole_bits([(u, build_transform("keep_float", {"bits": 16})) for u in units]) == 8
    )


# --- end to end


def recipe(tmp_path, **more):
    data = tmp_path / "data.npz"
    if not data.exists():
        toy_code.save_data(data)
    few = {"calibration": 40, "recovery": 30, "audit": 30, "rounds": 1}
    few |= {"equalise": "learned", "to": "onnx", "activations": "static"}
    return Recipe(
        "toy_code:uneven", data=str(data), task="classify", **{"size": "7kB", **few, **more}
    )


def test_an_integer_model_with_learned_scales_answers_nearly_as_the_original(tmp_path):
    """MobileQuant (412): weights of 4 and 8 bits, activations of 8, near the original."""
    asked = recipe(tmp_path)
    learned = pipeline.compress(asked, tmp_path / "learned")
    plain = pipeline.compress(replace(asked, equalise="none"), tmp_path / "plain")
    line = learned.plan.equalised[-1]
    assert (line.link, line.method) == ("all", "learned")
    assert line.damage_after < line.damage_before
    assert any("learned" in note for note in learned.plan.notes)
    rounded_inputs = [c.input for c in learned.plan.choices.values()]
    fixed = [one for one in rounded_inputs if one is not None and one.scale is not None]
    assert len(fixed) >= len(rounded_inputs) - 1  # a tensor that is dear stays a float
    assert {c.settings["bits"] for c in learned.plan.choices.values()} <= {4, 8, 16}
    assert learned.verdict.divergence.value < 0.7 * plain.verdict.divergence.value


def test_a_plan_with_learned_scales_makes_the_same_bytes_again(tmp_path):
    asked = recipe(tmp_path, to="attar", activations="none", size="4.5kB")
    pipeline.compress(asked, tmp_path / "small")
    plan = tmp_path / "small/report/plan.yaml"
    assert "method: learned" in plan.read_text()
    again = Recipe("", factory="toy_code:uneven", threads=1)
    pipeline.apply_plan_file(plan, tmp_path / "again", recipe=again)
    assert files(tmp_path / "small") == files(tmp_path / "again")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 9}, "bits is 9"),
        ({"bits": 4, "activations": "int8"}, "none of none, static, dynamic"),
        ({"bits": 4, "passes": 0}, "passes is 0"),
        ({"bits": 4, "rate": 0.0}, "rate is 0"),
        ({"bits": 4, "group_size": -1}, "group_size is -1"),
    ],
)
def test_settings_that_are_none_are_refused(settings, said):
    with pytest.raises(SettingError, match=said) as error:
        Learned(**settings)
    assert error.value.hint


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{link: all, method: fold_scale}", "no method to equalise 'fold_scale'"),
        ("{link: all, method: learned, momentum: 1}", "no such setting"),
        ("{link: '3', method: learned}", "no method to equalise 'learned'"),
    ],
)
def test_an_edited_line_is_refused_by_what_is_wrong(tmp_path, capsys, line, said):
    asked = recipe(tmp_path, to="attar", activations="none", equalise="none")
    pipeline.compress(asked, tmp_path / "small")
    plan = tmp_path / "small/report/plan.yaml"
    text = plan.read_text().replace("equalised: []", f"equalised:\n- {line}")
    (tmp_path / "plan.yaml").write_text(text)
    typed = ["apply", str(tmp_path / "plan.yaml"), "--factory", "toy_code:uneven"]
    assert main([*typed, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

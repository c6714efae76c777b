"""Pricing given changes without A and G: loops over samples and positions, and `price` itself."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys
from test_statistics import FIXED, TOKENS, Picture, Tied, by_hand, classifier, random

from attar.divergence import Divergence
from attar.explain.price import damage
from attar.explain.probe import probe
from attar.explain.statistics import gather_statistics
from attar.load.units import list_units
from attar.records import Silent
from attar.sites import substituted


def probed(module, batches, changes, task="classify", divergence=FIXED, draws=1, weights=None):
    model = toys.toy(task, module, examples=batches[0])
    made = {
        name if name.endswith("bias") else f"{name}.weight": (lambda change=change: change)
        for name, change in changes.items()
    }
    given = {"seed": 0, "draws": draws, "progress": Silent(), "weights": weights}
    return probe(model, [made], batches, divergence, **given)[0]


def test_independent_and_coherent_are_what_loops_sum_over_positions():
    module, x = Picture(), random(6, 4, 7, 6)
    change = 0.1 * random(6, 2, 3, 2, seed=1)
    found = probed(module, [{"pixels": x[:4]}, {"pixels": x[4:]}], {"grouped": change})["grouped"]
    layer, alone, joint = module.grouped, 0.0, 0.0
    for part in by_hand(module, x):
        moved = F.conv2d(
            torch.from_numpy(part["grouped"][0])[None],
            change.double(),
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )[0].numpy()
        slopes = (moved * part["grouped"][2]).sum(0)
        alone += sum(slopes[i, j] ** 2 for i, j in np.ndindex(slopes.shape))
        joint += slopes.sum() ** 2
    assert found.independent == pytest.approx(0.5 * alone / 6, rel=1e-4)
    assert found.coherent == pytest.approx(0.5 * joint / 6, rel=1e-4)


def test_an_embeddings_change_meets_the_gradient_where_it_is_looked_up():
    module, change = Tied(), 0.1 * random(9, 4, seed=1)
    found = probed(module, [{"tokens": TOKENS}], {"table": change}, "language")["table"]
    alone, joint = 0.0, 0.0
    for part in by_hand(module, TOKENS):
        for place, layer in (("table", "embedding"), ("head", "linear")):
            entering, _, g = part[place]
            w = change.double().numpy()
            moved = w[entering.astype(int)] if layer == "embedding" else entering @ w.T
            slopes = (moved * g).sum(1)
            alone, joint = alone + (slopes**2).sum(), joint + slopes.sum() ** 2
    assert found.independent == pytest.approx(0.5 * alone / 15, rel=1e-4)
    assert found.coherent == pytest.approx(0.5 * joint / 15, rel=1e-4)


def test_with_one_position_and_one_input_the_two_are_one_and_the_price():
    """Inputs that never change are independent of the gradients, which are not drawn here."""
    module, x = classifier(), random(1, 3).expand(40, 3).clone()
    module[0].bias = module[2].bias = None  # it would take all of the change away
    batches = [{"inputs": x}]
    model = toys.toy("classify", module, examples={"inputs": x[:2]})
    statistics = gather_statistics(
        model, list_units(model), batches, FIXED, seed=0, progress=Silent()
    )
    for name, shape in (("0", (5, 3)), ("2", (4, 5))):
        change = 0.1 * random(*shape, seed=2)
        found = probed(module, batches, {name: change})[name]
        assert found.independent == pytest.approx(found.coherent, rel=1e-6)
        assert found.independent == pytest.approx(
            damage(change, statistics.curvatures[name]), rel=1e-4
        )


def test_the_probe_needs_no_independence_of_inputs_and_gradients():
    """Closer than the price: it is the second order of the divergence itself."""
    module, x, divergence = classifier(), random(200, 3), Divergence("categorical")
    change = 0.02 * random(4, 5, seed=3)
    found = probed(module, [{"inputs": x}], {"2": change}, divergence=divergence, draws=32)["2"]
    with torch.no_grad():
        before = module(x)
        with substituted(module, {"2.weight": lambda: module[2].weight + change}):
            after = module(x)
    measured = float(divergence.between(before.double(), after.double()).mean())
    # 6,400 squares, each about as large as their mean: 2%; the third order as much again.
    assert found.independent == pytest.approx(measured, rel=0.06)


def test_changes_are_priced_one_by_one_and_in_any_company():
    module, x = classifier(), random(9, 3)
    one, two = 0.1 * random(5, 3), 0.1 * random(4, 5)
    both = probed(module, [{"inputs": x}], {"0": one, "2": two})
    assert both["0"] == probed(module, [{"inputs": x}], {"0": one})["0"]
    assert both["2"] == probed(module, [{"inputs": x}], {"2": two})["2"]


def test_a_change_of_nothing_costs_nothing_and_twice_the_change_costs_four_times():
    module, x, change = classifier(), random(9, 3), 0.1 * random(5, 3)
    costs = [
        probed(module, [{"inputs": x}], {"0": factor * change})["0"].coherent
        for factor in (0, 1, 2)
    ]
    assert costs[0] == 0.0 and costs[2] == pytest.approx(4 * costs[1], rel=1e-5)


def test_draws_are_averaged_and_padding_does_not_count():
    module, change = Tied(), 0.1 * random(9, 4, seed=1)
    mask = torch.tensor([[True, True, False, False, False]])
    padded = [{"tokens": TOKENS[:1], "mask": mask}]
    one, three = (
        probed(module, padded, {"table": change}, "language", draws=n)["table"] for n in (1, 3)
    )
    assert one.coherent == pytest.approx(three.coherent, rel=1e-5)
    # Later tokens change nothing that counts.
    cut = [{"tokens": TOKENS[:1, :2]}]
    assert probed(module, cut, {"table": change}, "language")["table"].independent == pytest.approx(
        one.independent, rel=1e-4
    )


def test_with_other_weights_the_price_is_that_at_the_other_point():
    module, x, change = classifier(), random(9, 3), 0.1 * random(4, 5)
    other = classifier()
    with torch.no_grad():
        other[0].weight.mul_(2)
    expected = probed(other, [{"inputs": x}], {"2": change})["2"]
    twice = {"0.weight": lambda: 2 * module[0].weight}
    found = probed(module, [{"inputs": x}], {"2": change}, weights=twice)["2"]
    assert found.independent == pytest.approx(expected.independent, rel=1e-5)
    assert found != probed(module, [{"inputs": x}], {"2": change})["2"]


def test_a_bias_that_moves_along_is_part_of_the_change():
    module, x, change, move = classifier(), random(9, 3), random(5, 3), random(5, seed=3)
    found = probed(module, [{"inputs": x}], {"0": change, "0.bias": move})["0"]
    total = 0.0
    for part in by_hand(module, x):
        entering, _, g = part["0"]
        dy = change.double().numpy() @ entering + move.double().numpy()
        total += (dy @ g) ** 2
    assert found.independent == pytest.approx(0.5 * total / 9, rel=1e-4)


def test_several_changes_of_a_weight_are_priced_on_one_way_back_as_each_alone():
    module, x = Picture(), random(6, 4, 7, 6)
    model = toys.toy("classify", module, examples={"pixels": x})
    sets = [
        {"grouped.weight": lambda: 0.1 * random(6, 2, 3, 2, seed=1)},
        {"grouped.weight": lambda: 0.2 * random(6, 2, 3, 2, seed=2)},
        {},
    ]
    given = {"seed": 3, "draws": 2, "progress": Silent()}
    together = probe(model, sets, [{"pixels": x}], FIXED, **given)
    assert together == [probe(model, [one], [{"pixels": x}], FIXED, **given)[0] for one in sets]
    assert set(together[0]) == {"grouped"} and not together[2]
    assert together[0]["grouped"] != together[1]["grouped"]

"""Prices of many widths from a few, and row gains of many layers from a few."""

from types import SimpleNamespace

import pytest
import torch
from test_price import curvature, random

from attar import pricing
from attar.explain import price
from attar.plan.candidates import AVERAGE_BITS
from attar.records import Unit, Units
from attar.transform.factorize_low_rank import FactorizeLowRank
from attar.transform.quantize_entropy import QuantizeEntropy
from attar.transform.quantize_feedback import QuantizeFeedback

UNIT = Unit("layers.3.up", "linear", (192, 128), ("linear",))


@pytest.mark.parametrize("by_worth", [False, True])
def test_prices_of_widths_that_are_not_tried_are_those_of_trying_them(by_worth):
    weight, curvatures = random(192, 128), [curvature(1, 192, 128)]
    widths = [QuantizeEntropy(bits, by_worth) for bits in AVERAGE_BITS]
    transforms = [QuantizeFeedback(4, 64), *reversed(widths), QuantizeEntropy(3, not by_worth)]
    found = list(pricing.price_weight(UNIT, weight, curvatures, transforms))
    assert len(pricing._tried(transforms)) == 2 + pricing.WIDTHS_TRIED
    for transform, nats in zip(transforms, found, strict=True):
        (alone,) = pricing.price_weight(UNIT, weight, curvatures, [transform])
        assert nats == pytest.approx(alone, rel=0.05)


def test_a_width_that_is_listed_twice_is_priced_twice():
    weight, curvatures = random(192, 128), [curvature(1, 192, 128)]
    widths = [QuantizeEntropy(bits) for bits in (2, 3, 3, 4, 5, 6, 7)]
    found = list(pricing.price_weight(UNIT, weight, curvatures, widths))
    assert found[1] == found[2] and sorted(found, reverse=True) == found


def test_factors_are_priced_by_all_rows_where_others_are_by_a_sample(monkeypatch):
    """Of few rows, a rank would hold more than it does of all."""
    monkeypatch.setattr(price, "SAMPLED_WEIGHTS", 1 << 14)
    tall = Unit("up", "linear", (800, 64), ("linear",))
    weight, known = random(800, 64), curvature(1, 800, 64)
    assert price.sample_rows(weight, [known]) is not None
    factors = FactorizeLowRank(16, 3)
    found = list(pricing.price_weight(tall, weight, [known], [QuantizeFeedback(4, 64), factors]))
    moment = price.rounding_moment([known], held_out=True)
    rows = price.row_weights([known], held_out=True)
    change = factors.apply(weight, moment, rows).dense - weight
    assert found[1] == price.damage(change, [known], held_out=True)


def test_a_weight_of_zeros_costs_nothing_at_any_width():
    widths = [QuantizeEntropy(bits) for bits in AVERAGE_BITS]
    prices = pricing.price_weight(UNIT, torch.zeros(192, 128), [curvature(1, 192, 128)], widths)
    assert list(prices) == [0.0] * len(widths)


def test_layers_alike_take_the_median_of_those_that_are_measured(monkeypatch):
    names = [f"layers.{number}.{role}" for number in range(12) for role in ("up", "down")]
    units = Units(tuple(Unit(name, "linear", (64, 64), ("linear",)) for name in names), ())
    asked = []

    def for_each_unit(work, some, step):
        asked.extend(unit.name for unit in some)
        return [0.8 if "up" in unit.name else None for unit in some[:-1]] + [None]

    session = SimpleNamespace(units=units, for_each_unit=for_each_unit)
    found = pricing.row_gain.__wrapped__(session, None)
    assert asked == [f"layers.{n}.{role}" for role in ("up", "down") for n in (0, 3, 6, 9)]
    assert found == {f"layers.{number}.up": 0.8 for number in range(12)}

"""Bytes left over by the menu are spent where each saves most."""

import pytest

from attar.plan.refine import refine
from attar.records import Candidate, Unit, Units
from attar.transform.apply import build_transform

WIDE = Unit("wide", "linear", (200, 320), ("linear",), macs=64_000)
DEAR = Unit("dear", "linear", (100, 320), ("linear",), macs=32_000)
FIXED = Unit("fixed", "linear", (8, 8), ("linear",), macs=64)
UNITS = Units((WIDE, DEAR, FIXED), ())


def choice(unit, treatment, settings, damage):
    cost = build_transform(treatment, settings).cost(unit)
    return Candidate(unit.name, treatment, settings, cost, damage)


def chosen(wide=3, dear=3.5):
    return {
        "wide": choice(WIDE, "quantize_entropy", {"bits": wide}, 0.01),
        "dear": choice(DEAR, "quantize_entropy", {"bits": dear}, 0.02),
        "fixed": choice(FIXED, "quantize_rtn", {"bits": 4, "group_size": 0}, 0.5),
    }


def spent(before, after):
    return sum(after[n].cost.weight_bytes - before[n].cost.weight_bytes for n in before)


@pytest.mark.parametrize("left", [0, 3, 50, 1000, 1999])
def test_what_is_left_goes_to_the_unit_where_a_byte_saves_most(left):
    before = chosen()
    after = refine(before, UNITS, left, build_transform)
    assert after["wide"] == before["wide"] and after["fixed"] == before["fixed"]
    # Bits are kept to ten-thousandths: 0.4 bytes of this unit, and bytes are whole.
    assert max(0, left - 2) <= spent(before, after) <= left
    bits = after["dear"].settings["bits"]
    assert after["dear"].predicted_damage == pytest.approx(0.02 * 4 ** (3.5 - bits))
    assert after["dear"].cost == build_transform("quantize_entropy", {"bits": bits}).cost(DEAR)


def test_a_unit_gets_half_a_bit_more_and_the_rest_goes_to_the_next():
    before = chosen()
    after = refine(before, UNITS, 5000, build_transform)
    assert after["dear"].settings["bits"] == 4
    assert after["wide"].settings["bits"] == pytest.approx(3 + 8 * 3000 / 64_000, abs=2e-4)


def test_no_unit_gets_more_bits_than_the_treatment_allows_and_nothing_is_overspent():
    before = chosen(wide=7, dear=6.9)
    after = refine(before, UNITS, 10**6, build_transform)
    assert [after[n].settings["bits"] for n in ("wide", "dear")] == [7, 7]

"""Lists of values as they are published, and rounding to them."""

import math

import numpy as np
import pytest
import torch

from attar.errors import ModelError, SettingError
from attar.records import RowWeights, Unit
from attar.transform.quantize_levels import LEVELS, QuantizeLevels
from attar.transform.quantize_rtn import QuantizeRtn


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(side, seed=0):
    x = random(4 * side, side, seed=seed) @ random(side, side, seed=seed + 1)
    return (x.T @ x / (4 * side))[None]


def variant(name):
    return QuantizeLevels(name, 32 if name == "mxfp4" else 16)


def test_fp8_is_what_torch_means_by_it():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    expected = sorted(set(every[every.isfinite()].tolist()))
    assert list(LEVELS["fp8"]) == expected


def test_nf4_is_as_published():
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert LEVELS["nf4"] == pytest.approx(published, abs=1e-5)


def test_fp4_has_one_bit_of_fraction():
    positive = {(1 + m / 2) * 2.0 ** (e - 1) for e in (1, 2, 3) for m in (0, 1)} | {0.0, 0.5}
    assert list(LEVELS["fp4"]) == sorted(positive | {-v for v in positive})


@pytest.mark.parametrize("name", LEVELS)
def test_every_value_is_a_level_times_the_scale_of_its_group(name):
    weight, transform = random(7, 64), variant(name)
    made = transform.apply(weight, None)
    unit = Unit("x", "linear", (7, 64), ("linear",))
    assert sum(t.nbytes for t in made.tensors.values()) == transform.cost(unit).weight_bytes
    assert torch.equal(transform.decode(made.tensors, 7, 64), made.dense)
    stored = made.tensors["scale"].double()
    scale = 2.0 ** (stored - 127) if name == "mxfp4" else stored
    level = made.dense.double() / scale.repeat_interleave(transform.group_size, 1)
    distance = (level[..., None] - torch.tensor(LEVELS[name]).double()).abs().amin(-1)
    assert float(distance.max()) < 1e-5


@pytest.mark.parametrize("name", LEVELS)
def test_the_search_loses_no_more_than_the_scale_that_covers_the_group(name):
    weight, transform = random(20, 64, seed=3), variant(name)
    levels = torch.tensor(LEVELS[name])
    parts = weight.view(20, -1, transform.group_size)
    scale = parts.abs().amax(-1, keepdim=True) / levels[-1]
    scale = 2.0 ** scale.log2().ceil() if name == "mxfp4" else scale.half().float()
    exact = parts / scale
    plain = levels[(exact[..., None] - levels).abs().argmin(-1)] * scale
    expected = float((plain - parts).square().sum())
    found = float((transform.apply(weight, None).dense - weight).square().sum())
    assert found <= 1.001 * expected


@pytest.mark.parametrize("name", ["fp4", "mxfp4", "nf4", "ternary"])
def test_feedback_loses_less_on_both_sides(name):
    weight, c, r = random(40, 64), moment(64), moment(40, seed=5)
    told = RowWeights(r[0].diagonal(), torch.ones(40), r[0])
    losses = []
    for known in ((c[0].diagonal().clone(), None), (c, None), (c, told)):
        change = (variant(name).apply(weight, *known).dense - weight).double()
        losses.append(float((r[0].double() @ change @ c[0].double() * change).sum()))
    nearest, columns, both = losses
    assert both < 0.95 * columns < 0.8 * nearest


@pytest.mark.parametrize("name, exponent_bits", [("fp4_e1m2", 1), ("fp4", 2), ("fp4_e3m0", 3)])
def test_small_floats_are_all_codes_of_their_format(name, exponent_bits):
    """LLM-FP4, eq. 3: sign, exponent e and fraction m, with e = 0 for the numbers next to 0."""
    found, fraction_bits = set(), 3 - exponent_bits
    for e in range(2**exponent_bits):
        for m in range(2**fraction_bits):
            part = m / 2**fraction_bits
            found.add(part * 2.0 if e == 0 else (1 + part) * 2.0**e)
    listed = np.array([v for v in LEVELS[name] if v >= 0])
    exact = np.array(sorted(found))
    # Up to one factor, which is in the scale of a group.
    assert np.allclose(listed / listed[-1], exact / exact[-1])


def test_the_best_four_bit_float_of_each_weight_beats_rounding_to_even_steps():
    """LLM-FP4's `works_when`: a searched format loses less than INT4, rounded to nearest."""
    for seed, tail in enumerate((0.0, 0.3, 0.8)):
        weight = random(64, 128, seed=seed) * torch.exp(tail * random(64, 128, seed=seed + 9))
        floats = ("fp4", "fp4_e1m2", "fp4_e3m0")
        lost = [
            float((QuantizeLevels(name, 64).apply(weight, None).dense - weight).square().sum())
            for name in floats
        ]
        even = QuantizeRtn(4, 64, True, False).apply(weight, None).dense - weight
        assert min(lost) < float(even.square().sum())


@pytest.mark.parametrize("n", [1, 4, 5, 6, 33])
def test_ternary_codes_take_a_fifth_of_a_byte(n):
    transform, weight = QuantizeLevels("ternary", 0), random(1, n)
    made = transform.apply(weight, None)
    assert made.tensors["codes"].nbytes == math.ceil(n / 5)
    assert torch.equal(transform.decode(made.tensors, 1, n), made.dense)
    assert set(np.unique(made.dense / made.tensors["scale"].float())) <= {-1.0, 0.0, 1.0}


def test_refusals_say_what_is_wrong():
    for bad in ({"levels": "nf3"}, {"levels": "mxfp4"}, {"group_size": -1}):
        with pytest.raises(SettingError):
            QuantizeLevels(**bad)
    damaged = {"codes": torch.full((2,), 255, dtype=torch.uint8), "scale": torch.ones(1, 1).half()}
    with pytest.raises(ModelError):
        QuantizeLevels("ternary", 0).decode({**damaged, "codes": damaged["codes"][:1]}, 1, 10)
    with pytest.raises(ModelError, match="scale"):
        QuantizeLevels("fp8", 0).decode({**damaged, "scale": torch.zeros(1, 1).half()}, 1, 2)

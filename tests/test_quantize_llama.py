"""llama.cpp's types: bytes that the `gguf` package reads as the same numbers, and the rounding."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from attar.errors import ModelError, SettingError
from attar.records import RowWeights, Unit
from attar.transform.llama_blocks import TYPES
from attar.transform.quantize_llama import QuantizeLlama


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moment(side, seed=0):
    x = random(4 * side, side, seed=seed) @ random(side, side, seed=seed + 1)
    return (x.T @ x / (4 * side))[None]


@pytest.mark.parametrize("name", TYPES)
def test_random_bytes_mean_what_the_gguf_package_reads(name):
    form = TYPES[name]
    raw, number = random_bytes(form, 21), gguf.GGMLQuantizationType(form.number)
    raw = raw.reshape(7, 3 * form.block_bytes)
    expected = gguf.quants.dequantize(raw, number)
    found = QuantizeLlama(name).decode({"blocks": torch.from_numpy(raw)}, 7, 3 * form.columns)
    assert np.array_equal(found.numpy(), expected)


def random_bytes(form, n):
    """Blocks of random bytes but for their float16 numbers, which must be finite."""
    rng = np.random.default_rng(0)
    blocks = form.unpack(rng.integers(0, 256, (n, form.block_bytes), np.uint8))
    d, dmin = rng.normal(size=(2, n)).astype(np.float16)
    return form.pack(replace(blocks, d=d, dmin=dmin if form.has_minimum else 0 * dmin))


def test_a_scale_that_is_no_number_is_damage():
    raw = torch.full((1, 34), 255, dtype=torch.uint8)
    with pytest.raises(ModelError, match="not a number"):
        QuantizeLlama("Q8_0").decode({"blocks": raw}, 1, 32)


@pytest.mark.parametrize("name", TYPES)
def test_packing_undoes_unpacking(name):
    form = TYPES[name]
    raw = random_bytes(form, 50)
    assert np.array_equal(form.pack(form.unpack(raw)), raw)


@pytest.mark.parametrize("name", TYPES)
def test_what_is_written_is_near_the_weight_and_decodes_to_what_was_said(name):
    form = TYPES[name]
    weight = 0.1 * random(9, 2 * form.columns)
    made = QuantizeLlama(name).apply(weight, None)
    unit = Unit("x", "linear", tuple(weight.shape), ("linear",))
    assert made.tensors["blocks"].nbytes == QuantizeLlama(name).cost(unit).weight_bytes
    read = gguf.quants.dequantize(
        made.tensors["blocks"].numpy(), gguf.GGMLQuantizationType(form.number)
    )
    assert np.array_equal(made.dense.numpy(), read)
    error = float((made.dense - weight).square().mean() / weight.square().mean())
    # A uniform step over ±3 standard deviations has about this error.
    assert error < 1.3 * (6 / 2**form.bits) ** 2 / 12


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K"])
def test_scales_fitted_here_lose_no_more_than_those_of_the_gguf_package_or_plain_ranges(name):
    """The package has no encoder of these types; the plain way is one exact range for each part."""
    form = TYPES[name]
    weight = random(64, 512) * random(64, 1, seed=1).exp()
    found = float((QuantizeLlama(name).apply(weight, None).dense - weight).square().sum())
    parts = weight.reshape(-1, form.columns // form.parts)
    low, high = parts.amin(1, keepdim=True), parts.amax(1, keepdim=True)
    if not form.has_minimum:
        high = parts.abs().amax(1, keepdim=True)
        low = -high
    step = (high - low) / (2**form.bits - 1)
    plain = float((((parts - low) / step).round() * step + low - parts).square().sum())
    assert found < plain


@pytest.mark.parametrize("small, large", [("IQ3_S", "Q3_K"), ("IQ2_S", "Q2_K")])
def test_lists_of_vectors_lose_no_more_than_larger_or_equal_plain_types(small, large):
    assert TYPES[small].block_bytes <= TYPES[large].block_bytes
    weight = random(48, 256)
    lost = [
        float((QuantizeLlama(name).apply(weight, None).dense - weight).square().sum())
        for name in (small, large)
    ]
    assert lost[0] < 0.95 * lost[1]


@pytest.mark.parametrize("small, large", [("IQ3_S", "Q3_K"), ("IQ2_S", "Q2_K")])
@pytest.mark.parametrize("far, times", [(20.0, 1.1), (80.0, 4.0)])
def test_lists_of_vectors_reach_a_dear_weight_far_from_the_others(small, large, far, times):
    """As in MiniLM, where one input of a feed-forward network is 300 times the mean square.

    At 80 times the others, neighbours of a far weight can only be a thirtieth of it, or nothing
    in plain types: that is the lists' own limit. Scales that do not reach it lose 800 times.
    """
    weight, c = random(24, 512), moment(512)
    weight[:, 358] *= far / 3
    weight[5, 358] = -far
    c[:, 358] *= 17.0
    c[:, :, 358] *= 17.0
    lost = []
    for name in (small, large):
        change = (QuantizeLlama(name).apply(weight, c).dense - weight).double()
        lost.append(float((change @ c[0].double() * change).sum()))
    assert lost[0] < times * lost[1]


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q4_1", "Q5_1", "Q8_0"])
def test_old_types_lose_no_more_than_the_gguf_packages_own_rounding(name):
    weight, number = random(32, 256), gguf.GGMLQuantizationType(TYPES[name].number)
    plain = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), number), number)
    expected = float((torch.from_numpy(plain) - weight).square().sum())
    found = float((QuantizeLlama(name).apply(weight, None).dense - weight).square().sum())
    assert found <= expected


@pytest.mark.parametrize(
    "name", ["Q2_K", "Q3_K", "Q4_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ2_S", "Q4_0"]
)
def test_feedback_loses_less_on_both_sides(name):
    weight, c, r = random(40, 256), moment(256), moment(40, seed=5)
    told = RowWeights(r[0].diagonal(), torch.ones(40), r[0])
    losses = []
    for known in ((c[0].diagonal().clone(), None), (c, None), (c, told)):
        change = (QuantizeLlama(name).apply(weight, *known).dense - weight).double()
        losses.append(float((r[0].double() @ change @ c[0].double() * change).sum()))
    nearest, columns, both = losses
    assert both < 0.9 * columns < 0.7 * nearest


def test_zeros_stay_zeros_and_large_weights_are_refused():
    weight = torch.zeros(4, 512)
    for name in TYPES:
        assert not QuantizeLlama(name).apply(weight, None).dense.any()
    with pytest.raises(SettingError, match="float16"):
        QuantizeLlama("Q4_0").apply(torch.full((2, 32), 1e7), None)


def test_refusals_say_what_is_wrong():
    assert "not a multiple" in QuantizeLlama("Q4_K").rejects(
        Unit("x", "linear", (4, 576), ("linear",))
    )
    assert QuantizeLlama("Q5_0").rejects(Unit("x", "linear", (4, 576), ("linear",))) is None
    convolution = Unit("x", "convolution", (4, 32, 3, 3), ("convolution",))
    assert "convolution" in QuantizeLlama("Q8_0").rejects(convolution)
    with pytest.raises(SettingError, match="Q7_K"):
        QuantizeLlama("Q7_K")
    with pytest.raises(ModelError, match="blocks"):
        QuantizeLlama("Q8_0").decode({}, 4, 32)

"""Corruptions do what their definitions say, and both models are compared on the same ones."""

import colorsys
import io
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import toys
from scipy import fft
from torch import nn

from attar.audit import corruptions
from attar.audit.paired import holm, sign_flip
from attar.corrupting import check_asked, with_corruptions
from attar.errors import DataError
from attar.judging import judge_models
from attar.records import Recipe, Silent
from attar.session import open_session


def pictures(n=2, rows=17, columns=11, seed=0):
    return torch.rand(n, 3, rows, columns, generator=torch.Generator().manual_seed(seed))


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


# --- pictures


def test_noise_has_the_spread_it_says_and_stays_between_black_and_white():
    grey = torch.full((4, 3, 65, 63), 0.5)
    noisy = corruptions.add_noise(grey, 0.08, draws())
    # 48,000 numbers: the spread is known to 0.3%.
    assert float((noisy - grey).std()) == pytest.approx(0.08, rel=0.02)
    far = corruptions.add_noise(grey, 2.0, draws())
    assert float(far.min()) == 0.0 and float(far.max()) == 1.0
    assert torch.equal(noisy, corruptions.add_noise(grey, 0.08, draws()))


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_blur_is_a_sum_over_neighbours_mirrored_at_the_border(spread):
    x = pictures(1, 13, 12)
    found = corruptions.blur(x, spread)
    reach = min(math.ceil(3 * spread), 11)
    weights = [math.exp(-(k**2) / (2 * spread**2)) for k in range(-reach, reach + 1)]

    def mirrored(at, size):
        at = abs(at)
        return at if at < size else 2 * (size - 1) - at

    for channel, row, column in [(0, 0, 0), (1, 6, 5), (2, 12, 11), (0, 3, 10)]:
        total = 0.0
        for i in range(-reach, reach + 1):
            for j in range(-reach, reach + 1):
                value = float(x[0, channel, mirrored(row + i, 13), mirrored(column + j, 12)])
                total += weights[i + reach] * weights[j + reach] * value
        expected = total / sum(weights) ** 2
        assert float(found[0, channel, row, column]) == pytest.approx(expected, abs=1e-5)


def test_brightness_is_the_value_of_hue_saturation_value():
    x = pictures(1, 3, 5)
    x[0, :, 0, 0] = 0.0
    found = corruptions.brighten(x, 0.3)
    for row in range(3):
        for column in range(5):
            hue, saturation, value = colorsys.rgb_to_hsv(*x[0, :, row, column].tolist())
            expected = colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + 0.3))
            assert found[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-5)


def test_contrast_keeps_the_mean_and_a_share_of_the_spread():
    x = 0.3 + 0.4 * pictures()
    found = corruptions.lower_contrast(x, 0.2)
    assert torch.allclose(found.mean((-2, -1)), x.mean((-2, -1)), atol=1e-6)
    assert torch.allclose(found.std((-2, -1)), 0.2 * x.std((-2, -1)), atol=1e-6)


def jpeg_by_hand(picture, quality):
    """One picture in float64, with scipy's transform, block by block."""
    red, green, blue = 255 * np.pad(picture, ((0, 0), (0, 7), (0, 5)), mode="edge")
    bright = 0.299 * red + 0.587 * green + 0.114 * blue
    channels = [bright - 128, (blue - bright) / 1.772, (red - bright) / 1.402]
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    for number, channel in enumerate(channels):
        table = corruptions.CHROMINANCE if number else corruptions.LUMINANCE
        steps = np.clip(np.floor((np.array(table) * scale + 50) / 100), 1, 255)
        for row in range(0, channel.shape[0], 8):
            for column in range(0, channel.shape[1], 8):
                block = channel[row : row + 8, column : column + 8]
                coded = np.round(fft.dctn(block, norm="ortho") / steps) * steps
                channel[row : row + 8, column : column + 8] = fft.idctn(coded, norm="ortho")
    y, cb, cr = channels[0] + 128, channels[1], channels[2]
    back = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb])
    return np.clip(back[:, :17, :11] / 255, 0, 1)


@pytest.mark.parametrize("quality", [15, 25, 80])
def test_jpeg_rounds_each_block_as_the_standard_says(quality):
    x = pictures(2)
    found = corruptions.jpeg(x, quality)
    assert found.shape == x.shape
    for one, expected in zip(found, (jpeg_by_hand(p.double().numpy(), quality) for p in x),
                             strict=True):  # fmt: skip
        # a coefficient at the very middle of two steps may fall either way
        close = np.isclose(one.numpy(), expected, atol=2e-3)
        assert close.mean() > 0.95


@pytest.mark.parametrize("quality", [15, 25, 80])
def test_jpeg_takes_the_steps_that_pillow_takes(quality):
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    tables = image.open(io.BytesIO(file.getvalue())).quantization
    for number, own in enumerate((corruptions.LUMINANCE, corruptions.CHROMINANCE)):
        found = corruptions._table(own, quality).flatten().int().tolist()
        assert sorted(found) == sorted(tables[number])


def test_one_channel_is_all_brightness():
    x = pictures()[:, :1]
    found = corruptions.jpeg(x, 25)
    assert found.shape == x.shape and 0 < float((found - x).abs().mean()) < 0.2
    whole = corruptions.jpeg(x.expand(-1, 3, -1, -1), 25)
    assert torch.allclose(whole, found.expand(-1, 3, -1, -1), atol=2e-3)


# --- texts


def test_typing_errors_exchange_two_letters_inside_long_words():
    text = "The quick brown fox, that jumped over 1234 lazy dogs; naïveté über alles."
    wrong = corruptions.mistype(text, 1.0, random.Random(3))
    assert wrong != text and len(wrong) == len(text)
    for before, after in zip(text.split(), wrong.split(), strict=True):
        assert sorted(before) == sorted(after) and before[0] == after[0]
    assert corruptions.mistype(text, 0.0, random.Random(3)) == text
    words = " ".join(["abcdefgh"] * 2000)
    changed = corruptions.mistype(words, 0.2, random.Random(0)).split()
    share = sum(word != "abcdefgh" for word in changed) / 2000
    assert share == pytest.approx(0.2, abs=0.04)  # four standard errors


def test_punctuation_goes_and_letters_stay():
    assert corruptions.without_punctuation("Don't stop, 3.5 é!") == "Dont stop 35 é"


# --- both models


def opened(model, arrays, **settings):
    recipe = Recipe("m", calibration=8, recovery=8, audit=40, **settings)
    return open_session(recipe, model, Silent(), arrays)


def seen(n=80):
    x = {"pixels": torch.randn(n, 3, 33, 33, generator=draws(3))}
    return {name: tensor.numpy() for name, tensor in x.items()}


def rounded(model, bits=4):
    from copy import deepcopy

    module = deepcopy(model.module)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            step = parameter.abs().max() / 2 ** (bits - 1)
            parameter.data = (parameter / step).round() * step
    return replace(model, module=module, name="rounded")


def test_every_corruption_of_pictures_is_measured_against_the_clean():
    model = toys.picture_model()
    session = opened(model, seen())
    other = rounded(model)
    verdict = judge_models(session, other)
    found = with_corruptions(session, other, verdict).corruptions
    assert [(one.name, one.strength) for one in found] == list(corruptions.PICTURES)
    for one in found:
        assert one.n_samples == 40 and one.divergence.value > 0
        # added is what is there less what was there
        expected = one.divergence.value - verdict.divergence.value
        assert one.added.value == pytest.approx(expected, abs=1e-6)
        assert one.added.low <= one.added.value <= one.added.high
        assert one.flips is not None and one.truth is None
    again = with_corruptions(session, other, verdict).corruptions
    assert again == found
    same = with_corruptions(session, model, judge_models(session, model)).corruptions
    assert all(one.divergence.value == pytest.approx(0, abs=1e-6) for one in same)
    assert all(one.flips.value == 0 for one in same)


class Ridge(nn.Module):
    """Two numbers of which the second moves the answer only far from what the data hold."""

    def __init__(self, steep):
        super().__init__()
        self.line = nn.Linear(2, 2)
        self.line.weight.data = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
        self.line.bias.data.zero_()
        self.steep = steep

    def forward(self, inputs):
        extra = self.steep * inputs[:, 1:].square()
        return self.line(inputs) + torch.cat([extra, -extra], 1)


def test_a_model_that_breaks_under_noise_alone_is_found():
    from attar.load.model import load_model

    x = torch.randn(300, 2, generator=draws(1))
    x[:, 1] = 0.02 * x[:, 1].sign()
    examples = {"inputs": x[:2]}
    model = load_model(Ridge(0.0).eval(), examples=examples, task="classify")
    other = load_model(Ridge(4e5).eval(), examples=examples, task="classify")
    other_clean = x[:, 1].square() * 4e5
    other.module.line.bias.data = torch.tensor([-1.0, 1.0]) * float(other_clean.mean())
    answers = (x[:, 0] < 0).long()
    session = opened(model, {"inputs": x.numpy(), "answers": answers.numpy()})
    verdict = judge_models(session, other)
    assert verdict.flips.value == 0
    found = with_corruptions(session, other, verdict).corruptions
    assert [one.strength for one in found] == [
        "5% of each number's spread", "20% of each number's spread",
    ]  # fmt: skip
    strong = found[-1]
    assert strong.flips.value > 0.3 and strong.p_added < 0.01
    assert strong.truth.negative_flips.value > 0.3


def test_texts_are_read_again_and_what_is_short_is_no_prediction(tmp_path):
    model = toys.language_model()
    text = tmp_path / "t.txt"
    text.write_text(toys.numbered_text(900))
    recipe = Recipe("m", data=str(text), calibration=512, recovery=512, audit=512)
    session = open_session(recipe, model, Silent())
    other = rounded(model, 3)
    verdict = judge_models(session, other)
    found = with_corruptions(session, other, verdict).corruptions
    assert [(one.name, one.strength) for one in found] == list(corruptions.TEXTS)
    by_name = {one.name: one for one in found}
    clean, bare = verdict.truth.n_predictions, by_name["no punctuation"].truth.n_predictions
    assert 0 < bare < clean
    assert by_name["lower case"].divergence.value > 0


def test_p_values_are_corrected_together():
    model = toys.picture_model()
    session = opened(model, seen())
    other = rounded(model, 3)
    verdict = judge_models(session, other)
    found = with_corruptions(session, other, verdict).corruptions
    assert all(0 < one.p_added <= 1 for one in found)
    smallest = min(one.p_added for one in found)
    assert smallest >= len(found) / 5000  # the smallest that 4,999 signs can give, times ten
    assert holm([sign_flip(np.zeros(3), 0)]) == [1.0]


def test_sound_and_whole_numbers_are_refused():
    with pytest.raises(DataError, match=r"reads .*features.*cannot be corrupted"):
        check_asked(toys.speech_model())
    bare = replace(toys.language_model(), files={})
    with pytest.raises(DataError, match="reads tokens, which cannot be corrupted"):
        check_asked(bare)
    check_asked(toys.regression_model())


def test_the_command_tells_and_stores_them(text_here, typed):
    from tiny_models import LLAMA, random_model, write_gguf
    from writing_models import FEW

    write_gguf(text_here / "a.gguf", random_model(LLAMA), LLAMA)
    words = ("audit", "a.gguf", "a.gguf", *FEW, "--corruptions", "--json", "x.json")
    code, shown = typed(*words, "--report", "page")
    assert code == 0 and "no punctuation, all" in shown.out and "errors, 5% of" in shown.out
    facts = json.loads((text_here / "x.json").read_text())
    assert [one["name"] for one in facts["corruptions"]] == [name for name, _ in corruptions.TEXTS]
    assert "On corrupted inputs" in next((text_here / "page").rglob("*.html")).read_text()

"""Small corruptions of inputs: pictures, texts, and arrays of numbers.

Source: Hendrycks and Dietterich 2019, Benchmarking neural network robustness to common corruptions
and perturbations, https://arxiv.org/abs/1903.12261, section 4.1 and its code: noise, blur,
brightness, contrast and JPEG at its severities 1 and 3 for 224 pixels. We differ: no library of
pictures is called; blur mirrors at the border and ends at three standard deviations; JPEG keeps
colours at full resolution and does not round decoded numbers. Of texts: letters inside words
exchanged as in Pruthi et al. 2019, https://arxiv.org/abs/1905.11268, section 3; case; punctuation.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Pictures = Float[Tensor, "samples channels rows columns"]

# ITU T.81, tables K.1 and K.2: what IJG's quality scales.
LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)
SIDE = 8  # of JPEG's blocks
# ITU T.871: RGB to brightness and two colours.
COLOURS = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def add_noise(pictures: Pictures, spread: float, draws: torch.Generator) -> Pictures:
    """Add Gaussian noise of a spread, in units where white is 1."""
    return (pictures + spread * torch.randn(pictures.shape, generator=draws)).clamp(0, 1)


def blur(pictures: Pictures, spread: float) -> Pictures:
    """Blur by a Gaussian of a spread in pixels."""
    reach = min(math.ceil(3 * spread), min(pictures.shape[-2:]) - 1)
    places = torch.arange(-reach, reach + 1).float()
    kernel = torch.exp(-places.square() / (2 * spread**2))
    kernel = kernel / kernel.sum()
    n, channels = pictures.shape[:2]
    flat = pictures.reshape(n * channels, 1, *pictures.shape[2:])
    padded = F.pad(flat, (reach,) * 4, mode="reflect")
    mixed = F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])
    return mixed.reshape(pictures.shape)


def brighten(pictures: Pictures, by: float) -> Pictures:
    """Raise the value of hue, saturation and value: the largest of the channels."""
    value = pictures.amax(1, keepdim=True)
    raised = (value + by).clamp(max=1)
    return torch.where(value > 0, pictures * raised / value.clamp(min=1e-12), raised)


def lower_contrast(pictures: Pictures, kept: float) -> Pictures:
    """Keep a share of the distance from each channel's mean."""
    mean = pictures.mean((-2, -1), keepdim=True)
    return ((pictures - mean) * kept + mean).clamp(0, 1)


def jpeg(pictures: Pictures, quality: int) -> Pictures:
    """Round as JPEG does; channels that are not three are all taken for brightness."""
    rows, columns = pictures.shape[-2:]
    whole = 255 * F.pad(pictures, (0, -columns % SIDE, 0, -rows % SIDE), mode="replicate")
    colours = torch.tensor(COLOURS) if pictures.shape[1] == 3 else torch.eye(pictures.shape[1])
    tables = [LUMINANCE, *([CHROMINANCE] * 2 if len(colours) == 3 else [])]
    mixed = torch.einsum("ij,njrc->nirc", colours, whole)
    # Brightness is shifted so that it lies around 0, as both colours do.
    shift = torch.zeros(len(colours), 1, 1)
    shift[: 1 if len(tables) > 1 else None] = 128
    rounded = torch.stack(
        [
            _round_blocks(channel, _table(tables[min(at, len(tables) - 1)], quality))
            for at, channel in enumerate((mixed - shift).unbind(1))
        ],
        1,
    )
    back = torch.einsum("ij,njrc->nirc", colours.inverse(), rounded + shift)
    return (back[..., :rows, :columns] / 255).clamp(0, 1)


def _table(table: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """Steps of a quality from 1 to 100, as IJG's code scales them."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(table) * scale + 50) / 100).floor().clamp(1, 255)


def _round_blocks(
    channel: Float[Tensor, "samples rows columns"], steps: Float[Tensor, "8 8"]
) -> Float[Tensor, "samples rows columns"]:
    n, rows, columns = channel.shape
    angles = (2 * torch.arange(SIDE) + 1) * torch.arange(SIDE)[:, None] * math.pi / (2 * SIDE)
    cosines = angles.cos() * math.sqrt(2 / SIDE)
    cosines[0] = 1 / math.sqrt(SIDE)
    blocks = channel.reshape(n, rows // SIDE, SIDE, columns // SIDE, SIDE).transpose(2, 3)
    coded = (cosines @ blocks @ cosines.T / steps).round() * steps
    return (cosines.T @ coded @ cosines).transpose(2, 3).reshape(n, rows, columns)


def shift_numbers(inputs: Tensor, spreads: Tensor, share: float, draws: torch.Generator) -> Tensor:
    """Add noise of a share of each column's spread.

    Args:
        inputs: Samples first.
        spreads: Of each number of a sample, over samples.
    """
    return inputs + share * spreads * torch.randn(inputs.shape, generator=draws)


def mistype(text: str, share: float, draws: random.Random) -> str:
    """Exchange two letters inside a share of the words of four letters and more."""

    def word(found: re.Match[str]) -> str:
        letters = found.group()
        if draws.random() >= share:
            return letters
        at = draws.randrange(1, len(letters) - 2)
        return letters[:at] + letters[at + 1] + letters[at] + letters[at + 2 :]

    return re.sub(r"[^\W\d_]{4,}", word, text)


def without_punctuation(text: str) -> str:
    """Leave out what is neither a word, a number nor a space."""
    return re.sub(r"[^\w\s]", "", text)


PICTURES: Mapping[tuple[str, str], Callable[[Pictures, torch.Generator], Pictures]] = {
    **{
        ("noise", f"{spread:g} of white"): partial(
            lambda x, draws, spread: add_noise(x, spread, draws), spread=spread
        )
        for spread in (0.08, 0.18)
    },
    **{
        ("blur", f"{spread:g} of 224 pixels"): partial(
            # of a smaller picture as much of what is seen
            lambda x, _, spread: blur(x, spread * x.shape[-1] / 224),
            spread=spread,
        )
        for spread in (1.0, 3.0)
    },
    **{
        ("brightness", f"+{by:g}"): partial(lambda x, _, by: brighten(x, by), by=by)
        for by in (0.1, 0.3)
    },
    **{
        ("contrast", f"{kept:.0%} kept"): partial(
            lambda x, _, kept: lower_contrast(x, kept), kept=kept
        )
        for kept in (0.4, 0.2)
    },
    **{
        ("JPEG", f"quality {quality}"): partial(
            lambda x, _, quality: jpeg(x, quality), quality=quality
        )
        for quality in (25, 15)
    },
}
"""Name and strength to the corruption of pictures in which white is 1."""

TEXTS: Mapping[tuple[str, str], Callable[[str, random.Random], str]] = {
    ("typing errors", "5% of words"): partial(
        lambda text, draws, share: mistype(text, share, draws), share=0.05
    ),
    ("typing errors", "20% of words"): partial(
        lambda text, draws, share: mistype(text, share, draws), share=0.2
    ),
    ("lower case", "all"): lambda text, _: text.lower(),
    ("upper case", "all"): lambda text, _: text.upper(),
    ("no punctuation", "all"): lambda text, _: without_punctuation(text),
}
"""Name and strength to the corruption of a text."""

SHARES = (0.05, 0.2)  # of each number's spread, for arrays

"""Turn a picture, a sound or a text into the tensors a model reads: pure preprocessing.

Used where data is gathered (`load`) and where a written model is run (`export`), so that both see
exactly the same pixels, samples and tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from attar.errors import DataError, ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
SOUND_SUFFIXES = frozenset({".wav", ".flac"})
SAMPLE_RATE = 16_000  # Hz, what Whisper hears
WINDOW_SAMPLES = 30 * SAMPLE_RATE  # Whisper's encoder reads 30 seconds at once

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


# ---------------------------------------------------------------------------------------------
# pictures


@dataclass(frozen=True)
class PictureSettings:
    """How a vision model wants its pictures.

    Attributes:
        size: Side of the square the model reads, in pixels.
        mean: Per channel, in units where white is 1.
        std: Per channel, in the same units, > 0.
        interpolation: A name in `RESAMPLING`.
        crop_fraction: Share of the shorter side that the central square keeps, > 0 and <= 1.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_fraction: float = 0.875


def picture_settings(config: Mapping[str, Any]) -> PictureSettings:
    """Read the picture settings of an architecture's config.

    Raises:
        ModelError: The model reads no pictures, or a setting is missing or outside its range.
    """
    found = config.get("picture")
    if not isinstance(found, Mapping):
        raise ModelError(
            "the model has no picture settings, so it is not known how it reads pictures.",
            hint="use a built-in vision model, or give tensors with --data FILE.npz",
        )
    try:
        settings = PictureSettings(
            size=int(found["size"]),
            mean=_three(found["mean"]),
            std=_three(found["std"]),
            interpolation=str(found.get("interpolation", "bicubic")),
            crop_fraction=float(found.get("crop_fraction", 0.875)),
        )
    except (KeyError, TypeError, ValueError) as fault:
        raise ModelError(
            f"the picture settings {dict(found)} cannot be read: {fault!r}.",
            hint="they need size, mean and std, as in {size: 224, mean: [0.5, ...], std: [...]}",
        ) from fault
    sound = settings.size > 0 and min(settings.std) > 0 and 0 < settings.crop_fraction <= 1
    if not sound or settings.interpolation not in RESAMPLING:
        raise ModelError(
            f"the picture settings {dict(found)} are outside their range.",
            hint="size and std must be > 0, crop_fraction 0 to 1, interpolation one of "
            + ", ".join(RESAMPLING),
        )
    return settings


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def open_picture(path: Path) -> Image.Image:
    """Read a picture file as RGB, turned upright; transparent parts become white.

    Raises:
        DataError: The file is missing, truncated, too large or no picture.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                colours = picture.convert("RGBA")
                white = Image.new("RGBA", colours.size, "white")
                return Image.alpha_composite(white, colours).convert("RGB")
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as fault:
        raise DataError(
            f"{path} cannot be read as a picture: {fault}.",
            hint="remove it from the folder, or save it again as .png or .jpg",
        ) from fault


def picture_to_pixels(
    picture: Image.Image, settings: PictureSettings
) -> Float[Tensor, "3 size size"]:
    """Cut the central square, scale it to the model's size, and normalise it."""
    side = min(picture.size) * settings.crop_fraction
    left, upper = (picture.width - side) / 2, (picture.height - side) / 2
    return box_to_pixels(picture, (left, upper, left + side, upper + side), settings)


def box_to_pixels(
    picture: Image.Image,
    box: tuple[float, float, float, float],
    settings: PictureSettings,
    *,
    mirrored: bool = False,
) -> Float[Tensor, "3 size size"]:
    """Scale one box of an RGB picture to the model's size, and normalise it.

    Args:
        picture: RGB.
        box: Left, upper, right, lower in pixels; fractions are allowed; inside the picture.
        settings: Of the model.
        mirrored: Whether left and right change places.
    """
    side = (settings.size, settings.size)
    scaled = picture.resize(side, RESAMPLING[settings.interpolation], box=box)
    values = torch.from_numpy(np.array(scaled, dtype=np.float32)).permute(2, 0, 1) / 255
    mean, std = torch.tensor(settings.mean), torch.tensor(settings.std)
    pixels = (values - mean[:, None, None]) / std[:, None, None]
    return pixels.flip(-1) if mirrored else pixels.contiguous()


# ---------------------------------------------------------------------------------------------
# sound


def sound_to_windows(path: Path) -> Float[Tensor, "windows samples"]:
    """Read a sound file as mono at 16 kHz in windows of 30 seconds; the last is filled with zeros.

    A remainder shorter than half a second is dropped when a window lies before it.

    Raises:
        DataError: The file is missing, empty or no sound, or soundfile is not installed.
    """
    from scipy.signal import resample_poly

    try:
        import soundfile
    except ImportError as fault:
        raise DataError(
            "reading sound files needs the package soundfile, which is not installed.",
            hint="pip install 'attar[speech]'",
        ) from fault
    try:
        channels, rate = soundfile.read(str(path), dtype="float64", always_2d=True)
    except (OSError, RuntimeError, ValueError) as fault:
        raise DataError(
            f"{path} cannot be read as sound: {fault}.",
            hint="remove it, or save it again as .wav or .flac",
        ) from fault
    mono = channels.mean(axis=1)
    if mono.size == 0 or not np.isfinite(mono).all():
        raise DataError(f"{path} holds no sound.", hint="remove it, or record it again")
    shared = math.gcd(SAMPLE_RATE, rate)
    heard = resample_poly(mono, SAMPLE_RATE // shared, rate // shared)
    if heard.size > WINDOW_SAMPLES and heard.size % WINDOW_SAMPLES < SAMPLE_RATE // 2:
        heard = heard[: heard.size - heard.size % WINDOW_SAMPLES]
    n_windows = math.ceil(heard.size / WINDOW_SAMPLES)
    filled = np.zeros(n_windows * WINDOW_SAMPLES, dtype=np.float32)
    filled[: heard.size] = heard
    return torch.from_numpy(filled.reshape(n_windows, WINDOW_SAMPLES))


# ---------------------------------------------------------------------------------------------
# text


def read_tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    """Build the tokenizer that travels with a model.

    Text that happens to spell a special token ("<unk>" in a file) is read as text.

    Raises:
        ModelError: The model has none, it is broken, or `tokenizers` is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as fault:
        raise ModelError(
            "reading text needs the package tokenizers, which is not installed.",
            hint="pip install 'attar[language]'",
        ) from fault
    content = files.get("tokenizer.json")
    if content is None:
        raise ModelError(
            "the model has no tokenizer.json, so it cannot read text.",
            hint="use a model with a tokenizer, or give token numbers with --data FILE.npz",
        )
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as fault:  # the Rust side raises bare Exception
        raise ModelError(
            f"tokenizer.json cannot be read: {fault}.",
            hint="fetch the model again, or copy tokenizer.json from where it came from",
        ) from fault
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def leading_tokens(tokenizer: Tokenizer) -> list[int]:
    """Special tokens that the tokenizer's own rule puts before a text (a BOS, or nothing)."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return list(framed[:start])
    return []


def special_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the tokens that stand for no text."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(number for number, token in added.items() if token.special)

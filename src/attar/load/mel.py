"""Turn sound into Whisper's input: the log of mel power.

Source: Radford et al. 2022, https://arxiv.org/abs/2212.04356, section 2.2; mel scale and filters
of Slaney's Auditory Toolbox, as Whisper's own filter file.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from attar.errors import DataError

SAMPLE_RATE = 16_000
_WINDOW, _HOP = 400, 160  # samples: 25 ms every 10 ms
_FRAMES = 3000  # 30 seconds


def log_mel(
    samples: Float[Tensor, " samples"], mel_bins: int = 80
) -> Float[Tensor, "mel_bins frames"]:
    """Whisper's input: log of mel power, 100 frames a second, cut or padded to 30 seconds.

    Args:
        samples: Sound at 16 kHz, -1 to 1, one channel.
        mel_bins: 80, or 128 for the large-v3 models.

    Returns:
        `mel_bins 3000`, about -1 to 1.5.

    Raises:
        DataError: No samples at all.
    """
    if samples.numel() == 0:
        raise DataError("a sound has no samples", hint="give sounds of a tenth of a second or more")
    sound = torch.zeros(_FRAMES * _HOP, dtype=torch.float32)
    kept = samples[: _FRAMES * _HOP].float()
    sound[: kept.numel()] = kept
    window = torch.hann_window(_WINDOW)
    spectrum = torch.stft(sound, _WINDOW, _HOP, window=window, return_complex=True)
    power = spectrum[:, :-1].abs() ** 2  # the last frame looks beyond the 30 seconds
    mel = mel_filters(mel_bins).float() @ power
    log = mel.clamp(min=1e-10).log10()
    log = torch.maximum(log, log.max() - 8.0)  # 80 dB below the loudest
    return (log + 4.0) / 4.0


def mel_filters(mel_bins: int) -> Float[Tensor, "mel_bins frequencies"]:
    """Triangles that are evenly spaced in Slaney's mel and have the same area each."""
    frequencies = torch.linspace(0, SAMPLE_RATE / 2, _WINDOW // 2 + 1, dtype=torch.float64)
    top = _mel_of(SAMPLE_RATE / 2)
    corners = _hertz_of(torch.linspace(0, top, mel_bins + 2, dtype=torch.float64))
    width = corners.diff()
    distance = corners[:, None] - frequencies[None, :]
    rising = -distance[:-2] / width[:-1, None]
    falling = distance[2:] / width[1:, None]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return triangles * (2 / (corners[2:] - corners[:-2]))[:, None]


# Slaney's mel: 200/3 Hz a mel up to 1000 Hz (15 mel), then 27 mel for each factor of 6.4.
_LINEAR_HERTZ, _KNEE_HERTZ, _KNEE_MEL, _LOG_STEP = 200 / 3, 1000.0, 15.0, math.log(6.4) / 27


def _mel_of(hertz: float) -> float:
    return _KNEE_MEL + math.log(hertz / _KNEE_HERTZ) / _LOG_STEP


def _hertz_of(mel: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    curved = _KNEE_HERTZ * torch.exp((mel - _KNEE_MEL) * _LOG_STEP)
    return torch.where(mel < _KNEE_MEL, mel * _LINEAR_HERTZ, curved)

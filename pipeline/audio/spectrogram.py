"""Log-mel spectrograms of windows around moments of a sound, with the numbers of Radevski et al. (public code).

Sound at 16 kHz; a window of 1.116 s around each sampled frame, silence outside the clip; a power spectrum of 1,024
samples under a Hann window of 10 ms every 5 ms, so 224 columns; 128 triangular mel filters (HTK's scale, height 1,
as torchaudio's) from 0 to 8 kHz; decibels with a floor of -100. By torch.stft alone.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mmkd.cache_tools.frames.records import Float32Array, Float64Array

HTK_FACTOR, HTK_BREAK_HZ = 2595.0, 700.0
"""mel = 2595 log10(1 + f / 700)."""
FLOOR_POWER = 1e-10


@dataclass(frozen=True)
class MelParams:
    """How sound becomes a spectrogram; the defaults are the authors'."""

    rate_hz: int = 16_000
    """Samples a second."""
    window_seconds: float = 1.116
    """Length of the sound around each sampled frame; larger sees more, and makes more columns."""
    fft_samples: int = 1024
    """Length of the transform; larger resolves lower tones."""
    frame_samples: int = 160
    """Length of the Hann window, in samples (10 ms)."""
    hop_samples: int = 80
    """Between two columns, in samples (5 ms)."""
    mels: int = 128
    """Mel filters, the rows."""

    @property
    def window_samples(self) -> int:
        """Samples around each sampled frame."""
        return int(self.window_seconds * self.rate_hz)

    @property
    def columns(self) -> int:
        """Columns of a window's spectrogram."""
        return self.window_samples // self.hop_samples + 1

    def identity(self) -> dict[str, Any]:
        """Return all that could change a value, for fingerprints."""
        return asdict(self)


AUTHORS = MelParams()


def windows_at(sound: Float32Array, moments_seconds: Float64Array, params: MelParams) -> Float32Array:
    """Return (T, W) the windows of a clip's sound (N,) around moments (T,) counted from its first sample.

    A window has half its samples before its moment; outside the clip there is silence.
    """
    width = params.window_samples
    padded = np.pad(sound, (width, width))
    centres = (moments_seconds * params.rate_hz).astype(np.int64).clip(0, len(sound))
    starts = centres - width // 2 + width
    return np.stack([padded[start : start + width] for start in starts.tolist()])


def log_mel(windows: Float32Array, params: MelParams) -> Float32Array:
    """Return the spectrograms (T, mels, columns) of windows (T, W), in decibels of power."""
    sound = torch.from_numpy(windows)
    spectrum = torch.stft(
        sound,
        params.fft_samples,
        hop_length=params.hop_samples,
        win_length=params.frame_samples,
        window=torch.hann_window(params.frame_samples),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    power = spectrum.abs() ** 2
    mel = torch.einsum("mf,tfc->tmc", mel_filters(params), power)
    decibels = 10 * mel.clamp(min=FLOOR_POWER).log10()
    return cast(Float32Array, decibels.numpy())


@lru_cache(maxsize=4)
def mel_filters(params: MelParams) -> Tensor:
    """Return the filters (mels, bins): triangles whose corners are equally far apart on HTK's mel scale."""
    highest = HTK_FACTOR * np.log10(1 + params.rate_hz / 2 / HTK_BREAK_HZ)
    corners_hz = HTK_BREAK_HZ * (10 ** (np.linspace(0, highest, params.mels + 2) / HTK_FACTOR) - 1)
    bins_hz = np.linspace(0, params.rate_hz / 2, params.fft_samples // 2 + 1)
    left, centre, right = corners_hz[:-2, None], corners_hz[1:-1, None], corners_hz[2:, None]
    rising, falling = (bins_hz - left) / (centre - left), (right - bins_hz) / (right - centre)
    return torch.from_numpy(np.maximum(0, np.minimum(rising, falling)).astype(np.float32))

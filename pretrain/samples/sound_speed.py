"""Sound played faster or slower, pitch and all or with its pitch kept, exact to the sample.

Source: systems/speed_coaug.md, section 3. Sound is float32 [N], one channel.
"""

import functools
import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

Sound = npt.NDArray[np.float32]

#: Largest denominator of a speed: the resampler holds a filter for each phase that it brings.
DENOMINATOR = 20
#: Half length of the low-pass filter, zero crossings of its sinc, and beta of its Kaiser window: aliases at -80 dB.
CROSSINGS, BETA = 16, 8.0
#: Window and hop of the phase vocoder, samples: 43 ms at 24 kHz, which tells two partials of speech apart.
VOCODER_WINDOW, VOCODER_HOP = 1024, 256


def speed_fraction(speed: float) -> Fraction:
    """Give the speed that is played for one that is asked for: the nearest fraction with a denominator up to 20."""
    return Fraction(speed).limit_denominator(DENOMINATOR)


def reach(speed: Fraction) -> int:
    """Tell how many stored samples before and behind a window `resampled` looks at."""
    return math.ceil(CROSSINGS * max(speed, Fraction(1))) + speed.numerator


def resampled(sound: Sound, first: int, speed: Fraction, count: int) -> Sound:
    """Play a part of a sound at another speed: pitch and speed change together.

    Args:
        sound: More than the part: `reach` samples before and behind it enter too; zeros where there are none.
        first: Sample at which the part begins, which stays where it is.
        speed: Above 0.
        count: Samples of the result; sample n of it is what lay at first + n * speed.

    Returns:
        float32 [count], low-passed at min(1, 1 / speed) of the band.
    """
    if speed == 1:
        return _cut(sound, first, first + count)
    step, phases = speed.numerator, speed.denominator
    kernels, before = _kernels(step, phases)
    groups = math.ceil(count / phases)
    behind = kernels.shape[1] - before
    part = torch.from_numpy(_cut(sound, first - before, first + (groups - 1) * step + behind))
    # A filter for each of `phases` samples of the result, moved on by `step` stored ones: no zeros are ever multiplied.
    played = F.conv1d(part[None, None], kernels[:, None], stride=step)[0]
    return np.ascontiguousarray(played.t().reshape(-1)[:count].numpy())


@functools.lru_cache(maxsize=128)
def _kernels(step: int, phases: int) -> tuple[Tensor, int]:
    """Compute the filter of each phase, float32 [phases, K], and how many samples before a group's first they begin."""
    slower = max(step, phases)
    before = math.ceil(CROSSINGS * slower / phases)
    stored = np.arange(-before, before + step + 1)
    distance = (np.arange(phases)[:, None] * step / phases - stored) * phases / slower
    inside = np.sqrt(np.clip(1 - (distance / CROSSINGS) ** 2, 0, None))
    window = np.where(np.abs(distance) <= CROSSINGS, np.i0(BETA * inside) / np.i0(BETA), 0.0)
    kernels = np.sinc(distance) * window
    # Each phase by itself: else the loudness of the result would beat with their period.
    return torch.from_numpy((kernels / kernels.sum(1, keepdims=True)).astype(np.float32)), before


def time_stretched(sound: Sound, first: int, speed: Fraction, count: int) -> Sound:
    """Play a part of a sound at another speed with its pitch kept (phase vocoder); arguments as for `resampled`."""
    part = torch.from_numpy(_cut(sound, first, first + math.ceil(speed * count)))
    if speed == 1:
        return part.numpy()
    window = torch.hann_window(VOCODER_WINDOW)
    spectrum = torch.stft(part, VOCODER_WINDOW, VOCODER_HOP, window=window, pad_mode="constant", return_complex=True)
    played = _vocoded(spectrum, float(speed), math.ceil(count / VOCODER_HOP) + 1)
    return torch.istft(played, VOCODER_WINDOW, VOCODER_HOP, window=window, length=count).numpy()


def _vocoded(spectrum: Tensor, speed: float, frames: int) -> Tensor:
    """Read a spectrogram [bins, T] at `frames` times, `speed` frames apart; phases go on as the partials turn."""
    # Two frames more: the last times lie between the last frame and nothing.
    spectrum = F.pad(spectrum, (0, 2))
    last = spectrum.shape[1] - 2
    times = (torch.arange(frames, dtype=torch.float64) * speed).clamp(max=last)
    left = times.long().clamp(max=last)
    share = (times - left).float()
    size = spectrum.abs()
    size = (1 - share) * size[:, left] + share * size[:, left + 1]
    phase = spectrum.angle().double()
    bins = torch.arange(spectrum.shape[0], dtype=torch.float64)[:, None]
    expected = 2 * math.pi * bins * VOCODER_HOP / VOCODER_WINDOW
    # What a bin turns in a hop beyond its centre frequency, brought to (-pi, pi]: the partial's own frequency.
    beyond = phase[:, left + 1] - phase[:, left] - expected
    turned = expected + beyond - 2 * math.pi * torch.round(beyond / (2 * math.pi))
    sums = phase[:, :1] + F.pad(turned.cumsum(1), (1, 0))[:, :-1]
    return torch.polar(size, sums.float())


def _cut(sound: Sound, begin: int, end: int) -> Sound:
    """Cut samples [begin, end) out, zeros where there are none."""
    found = sound[max(begin, 0) : max(end, 0)]
    before = max(min(-begin, end - begin), 0)
    return np.pad(found, (before, max(end - begin - before - len(found), 0)))

"""Logarithmic spectrograms of sound, and the statistics by which they are normalised.

Source: systems/speed_coaug.md, section 3, from AVID's preprocessing (facebookresearch/AVID-CMA @ 4538e40).
"""

import io
import math
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pretrain.errors import DataError
from pretrain.runtime import storage
from pretrain.samples.sound_speed import Sound

Spectrogram = npt.NDArray[np.float32]
#: Smallest power that is told from silence, and what keeps a bin that never changes from being divided by nothing.
LEAST_POWER, LEAST_DEVIATION = 1e-10, 1e-5


@dataclass
class SpectrogramOptions:
    """Spectrogram of a window of sound."""

    window: int = 1024
    """samples of each Fourier transform; bin 0 is kept, the others are averaged in pairs, so that 1024 give 257 bins"""
    rate: int = 100
    """columns a second; divides sound.rate"""
    range_db: float = 100.0
    """dynamic range: what lies further below the loudest bin of a window counts as that much below, dB"""
    statistics: str | None = None
    """file of mean and deviation of each bin (launch/sound_statistics.py, or AVID's .npz), any fsspec URL; null: each
    window by its own mean and deviation"""

    @property
    def bins(self) -> int:
        """Bins of a column."""
        return self.window // 4 + 1

    def columns(self, seconds: float) -> int:
        """Count the columns of a window of so many seconds."""
        return round(seconds * self.rate)

    def problems(self, key: str, sound_rate: int) -> list[str]:
        """Say what can't work.

        Args:
            key: of this section.
            sound_rate: samples of sound a second.
        """
        found = []
        if self.window < 8 or self.window % 4:
            found.append(f"{key}.window: found {self.window}, allowed: 8, 12, 16 ...; bins are averaged in pairs")
        if self.rate < 1 or sound_rate % self.rate:
            found.append(f"{key}.rate: found {self.rate}, allowed: a divisor of input.sound.rate={sound_rate}")
        if not 0 < self.range_db < math.inf:
            found.append(f"{key}.range_db: found {self.range_db:g}, allowed: more than 0")
        return found


def log_spectrogram(sound: Sound, rate: int, options: SpectrogramOptions) -> Spectrogram:
    """Compute decibels float32 [columns, bins] of a window [N], time first.

    Columns are centred on every rate / options.rate-th sample, the first on sample 0, for which the sound is mirrored
    at both ends. Silence is the same everywhere, -100 dB.
    """
    hop, window = rate // options.rate, options.window
    # As in AVID's librosa: periodic Hann window, power.
    spectrum = torch.stft(
        torch.from_numpy(sound), window, hop, window=torch.hann_window(window), pad_mode="reflect", return_complex=True
    )
    power = (spectrum.real.square() + spectrum.imag.square()).numpy()[:, : len(sound) // hop]
    power = np.concatenate([power[:1], power[1:].reshape(options.bins - 1, 2, -1).mean(1)])
    decibels = 10 * np.log10(np.maximum(power, LEAST_POWER))
    return np.ascontiguousarray(np.maximum(decibels, decibels.max() - options.range_db).T, dtype=np.float32)


@dataclass(frozen=True)
class SpectrogramStatistics:
    """Mean and deviation of each bin over a data set, dB, float32 [bins]."""

    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]

    def normalized(self, decibels: Spectrogram) -> Spectrogram:
        """Normalise [columns, bins]."""
        return (decibels - self.mean) / (self.std + np.float32(LEAST_DEVIATION))


def standardized(decibels: Spectrogram) -> Spectrogram:
    """Normalise a window by its own mean and deviation; silence becomes zeros."""
    return (decibels - decibels.mean()) / (decibels.std() + np.float32(LEAST_DEVIATION))


class StatisticsSum:
    """Mean and deviation of each bin, gathered from spectrogram after spectrogram.

    Args:
        bins: of a column.
    """

    def __init__(self, bins: int) -> None:
        self.windows = 0
        self._columns = 0
        self._sums = np.zeros((2, bins))

    def add(self, decibels: Spectrogram) -> None:
        """Take a spectrogram [columns, bins] in."""
        wide = decibels.astype(np.float64)
        self._sums += np.stack([wide.sum(0), np.square(wide).sum(0)])
        self._columns += len(decibels)
        self.windows += 1

    def write(self, path: str, rate: int, options: SpectrogramOptions) -> SpectrogramStatistics:
        """Write the file that `statistics` names; the settings that it is for stand in it.

        Raises:
            DataError: no spectrogram has been taken in.
        """
        if not self._columns:
            raise DataError(f"{path}: no window of sound was found, so there are no statistics to write")
        mean, square = self._sums / self._columns
        deviation = np.sqrt(np.maximum(square - mean**2, 0))
        found = SpectrogramStatistics(mean.astype(np.float32), deviation.astype(np.float32))
        settings: dict[str, Any] = {"windows": self.windows, **_settings(rate, options)}
        target = io.BytesIO()
        np.savez(target, mean=found.mean, std=found.std, **settings)
        storage.write_bytes(path, target.getvalue())
        return found


def load_statistics(path: str, rate: int, options: SpectrogramOptions) -> SpectrogramStatistics:
    """Read a file of `StatisticsSum.write`, or AVID's, which does not say what it is for.

    Raises:
        DataError: it can't be read, or is of other spectrograms.
    """
    key = "input.spectrogram.statistics"
    try:
        with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as file:
            content: dict[str, Any] = {name: file[name] for name in file.files}
        mean, std = (np.asarray(content[name], dtype=np.float32).reshape(-1) for name in ("mean", "std"))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{key}={path}: no statistics ({type(error).__name__}: {error}); launch/sound_statistics.py writes them"
        ) from error
    wrong = [
        f"{name} {content[name].item()}, the recipe has {value}"
        for name, value in _settings(rate, options).items()
        if name in content and content[name].item() != value
    ]
    if len(mean) != options.bins or len(std) != options.bins:
        wrong.append(f"{len(mean)} means and {len(std)} deviations, the recipe has {options.bins} bins")
    elif not np.isfinite([mean, std]).all() or (std < 0).any():
        wrong.append("numbers that are not finite, or deviations below 0")
    if wrong:
        told = "; ".join(wrong)
        raise DataError(f"{key}={path}: of other spectrograms: {told}; run launch/sound_statistics.py again")
    return SpectrogramStatistics(mean, std)


def _settings(rate: int, options: SpectrogramOptions) -> dict[str, float]:
    return {"sound_rate": rate, "window": options.window, "rate": options.rate, "range_db": options.range_db}

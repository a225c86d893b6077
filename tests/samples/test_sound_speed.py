"""Sound at other speeds, to the sample; spectrograms and their statistics."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pretrain.errors import DataError
from pretrain.samples.sound_speed import reach, resampled, speed_fraction, time_stretched
from pretrain.samples.spectrogram import (
    SpectrogramOptions,
    StatisticsSum,
    load_statistics,
    log_spectrogram,
    standardized,
)
from tests.talking_films import RATE, sine

SPEEDS = [Fraction(1), Fraction(3, 2), Fraction(2), Fraction(3, 4), Fraction(21, 20)]


def loudest(sound: np.ndarray) -> float:
    """Frequency of the highest peak, Hz."""
    power = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
    return float(power.argmax()) * RATE / len(sound)


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_sine_at_another_speed(speed: Fraction) -> None:
    """Pitch goes with the speed, or stays; either way exactly so many samples."""
    tone, count = sine(700), 2 * RATE + 7
    played = resampled(tone, 1000, speed, count)
    expected = 0.5 * np.sin(2 * np.pi * 700 * (1000 + np.arange(count) * float(speed)) / RATE)
    assert played.dtype == np.float32 and played.shape == (count,) and np.abs(played - expected).max() < 1e-4
    kept = time_stretched(tone, 1000, speed, count)
    assert kept.dtype == np.float32 and kept.shape == (count,) and loudest(kept) == pytest.approx(700, abs=1)
    assert 0.4 < np.abs(kept[3000:-4000]).max() < 0.6


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_click_stays_where_it_is(speed: Fraction) -> None:
    clicks = np.zeros(3 * RATE, dtype=np.float32)
    place = 4321 + 600 * speed.numerator
    clicks[place] = 1
    played = resampled(clicks, 4321, speed, RATE)
    assert int(np.abs(played).argmax()) == 600 * speed.denominator
    part = resampled(clicks[4321 - reach(speed) :], reach(speed), speed, RATE)
    assert np.array_equal(part, played), "what lies within reach is all that enters"


def test_no_aliases_tell_the_speed() -> None:
    high = sine(9000)
    assert np.abs(resampled(high, 1000, Fraction(2), RATE)).max() < 1e-4
    assert np.abs(high[::2]).max() > 0.4, "which would be a tone of 6 kHz without the low-pass"


def test_ends_of_the_sound_are_followed_by_silence() -> None:
    for player in (resampled, time_stretched):
        played = player(sine(700, 1.0), 0, Fraction(2), RATE)
        assert np.abs(played[: RATE // 2 - 600]).max() > 0.4 and np.abs(played[RATE // 2 + 600 :]).max() < 0.01


def test_speeds_are_fractions() -> None:
    found = [speed_fraction(one) for one in (1.5, 2.0, 0.3333, 1.31)]
    assert found == [Fraction(3, 2), 2, Fraction(1, 3), Fraction(17, 13)]


def test_a_spectrogram_is_as_defined() -> None:
    """A column of the transform, written out; a hundredth of a second apart; bins in pairs."""
    sound = (sine(3000, 2.0) + np.random.default_rng(0).normal(0, 0.01, 2 * RATE)).astype(np.float32)
    found = log_spectrogram(sound, RATE, SpectrogramOptions())
    assert found.shape == (200, 257) and found.dtype == np.float32
    part = sound[50 * 240 - 512 : 50 * 240 + 512].astype(np.float64)
    power = np.abs(np.fft.rfft(part * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)))) ** 2
    expected = 10 * np.log10(np.concatenate([power[:1], (power[1::2] + power[2::2]) / 2]))
    assert np.abs(found[50] - np.maximum(expected, found.max() - 100)).max() < 1e-3
    assert abs(int(found[50].argmax()) - 64) <= 1, "3 kHz is bin 128 of 23.4 Hz"


def test_silence_and_range() -> None:
    options = SpectrogramOptions()
    silence = log_spectrogram(np.zeros(2 * RATE, np.float32), RATE, options)
    assert np.abs(silence + 100).max() < 1e-4 and (standardized(silence) == 0).all()
    tone = log_spectrogram(sine(3000, 2.0), RATE, options)
    assert tone.max() - tone.min() == pytest.approx(100, abs=1e-3)
    louder = log_spectrogram(sine(3000, 2.0, 1.0), RATE, options)
    assert np.abs(louder - tone - 20 * np.log10(2)).max() < 1e-2, "loudness shifts it as a whole"


def test_statistics(tmp_path: Path) -> None:
    options, sums = SpectrogramOptions(window=64), StatisticsSum(17)
    windows = [np.random.default_rng(n).normal(3 * n, 2, (200, 17)).astype(np.float32) for n in range(3)]
    for window in windows:
        sums.add(window)
    path = str(tmp_path / "statistics.npz")
    sums.write(path, RATE, options)
    found, every = load_statistics(path, RATE, options), np.concatenate(windows)
    assert np.allclose(found.mean, every.mean(0), atol=1e-4) and np.allclose(found.std, every.std(0), atol=1e-4)
    normal = found.normalized(every)
    assert np.abs(normal.mean(0)).max() < 1e-4 and np.abs(normal.std(0) - 1).max() < 1e-4
    np.savez(tmp_path / "avid.npz", mean=found.mean[:, None], std=found.std[:, None])
    assert np.array_equal(load_statistics(str(tmp_path / "avid.npz"), RATE, options).mean, found.mean)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04 torn"), "no statistics"),
        (lambda path: path.write_text("{}"), "no statistics"),
        (lambda path: np.savez(path, mean=np.zeros(17)), "std"),
        (lambda path: np.savez(path, mean=np.zeros(9), std=np.ones(9)), "9 means and 9 deviations, the recipe has 17"),
        (lambda path: np.savez(path, mean=np.full(17, np.nan), std=np.ones(17)), "not finite"),
        (lambda path: np.savez(path, mean=np.zeros(17), std=np.ones(17), rate=50), "rate 50, the recipe has 100"),
    ],
)  # fmt: skip
def test_statistics_of_something_else(change: Callable[[Path], object], told: str, tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    change(path)
    with pytest.raises(DataError, match=told):
        load_statistics(str(path), RATE, SpectrogramOptions(window=64))

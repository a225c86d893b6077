"""Windows of sound from sound files and videos."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.decoders.sound import decode_sound, probe_sound
from pretrain.errors import DataError, SampleError
from tests.pack.media_files import image_bytes, picture, sound_bytes, video_with_sound, wave

WAVE = wave(2.0)
FILES = {"wav": ("wav", "pcm_s16le"), "flac": ("flac", "flac"), "mp3": ("mp3", "libmp3lame")}


@pytest.mark.parametrize("name", ["wav", "flac"])
def test_lossless_files_give_the_samples_themselves(name: str) -> None:
    data = sound_bytes(WAVE, *FILES[name])
    found = decode_sound(data, 44100, channels=2)
    assert found.dtype == np.float32 and found.shape == WAVE.shape and np.abs(found - WAVE).max() < 1e-4
    assert np.abs(decode_sound(data, 44100)[0] - WAVE.mean(0)).max() < 1e-4
    facts = probe_sound(data)
    assert (facts.rate, facts.channels, facts.duration) == (44100, 2, 2.0)


def test_resampling_keeps_tone_and_time() -> None:
    """A tone at 44.1 kHz is the same tone at 16 kHz, no sample early or late."""
    tone = np.sin(2 * np.pi * 440 * np.arange(2 * 44100) / 44100)
    data = sound_bytes(tone.astype(np.float32)[None])
    found = decode_sound(data, 16000)[0]
    expected = np.sin(2 * np.pi * 440 * np.arange(2 * 16000) / 16000)
    assert found.shape == expected.shape and np.abs(found - expected)[200:-200].max() < 2e-3


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("rate", [44100, 16000, 22050])
def test_a_window_is_the_same_part_of_the_whole(name: str, rate: int) -> None:
    data = sound_bytes(wave(4.0), *FILES[name])
    whole = decode_sound(data, rate, channels=2)
    for start, duration in ((0.0, 0.5), (0.7301, 1.0), (2.2, 0.33), (3.4, 0.6)):
        found = decode_sound(data, rate, 2, start, duration)
        first = round(start * rate)
        assert found.shape == (2, round(duration * rate))
        assert np.abs(found - whole[:, first : first + found.shape[1]]).max() < 1e-5


def test_sound_of_a_video(tmp_path: Path) -> None:
    data = video_with_sound(tmp_path / "a.mp4", WAVE).read_bytes()
    whole = decode_sound(data, 44100, channels=2)
    errors = [np.abs(whole[:, 22050 + lag : 80000 + lag] - WAVE[:, 22050:80000]).mean() for lag in (-1, 0, 1)]
    assert errors[1] < 0.01 and errors[1] < min(errors[0], errors[2]) / 2, "AAC's delay is undone"
    found = decode_sound(data, 44100, 2, 0.9, 0.4)
    assert np.abs(found - whole[:, 39690 : 39690 + 17640]).max() < 1e-5


def test_outside_of_the_sound_is_silence(tmp_path: Path) -> None:
    data = sound_bytes(WAVE)
    found = decode_sound(data, 44100, 2, -0.5, 1.0)
    assert (found[:, :22050] == 0).all() and np.abs(found[:, 22050:] - WAVE[:, :22050]).max() < 1e-4
    found = decode_sound(data, 44100, 2, 1.5, 1.0)
    assert (found[:, 22050:] == 0).all() and np.abs(found[:, :22050] - WAVE[:, 66150:]).max() < 1e-4
    for start in (2.5, 100.0, -3.0):
        with pytest.raises(SampleError, match="too_short"):
            decode_sound(data, 16000, 1, start, 0.25)


def test_a_window_of_a_long_file_is_not_the_cost_of_the_file() -> None:
    """In frames that the decoder delivers, not in seconds of a busy machine."""
    import av

    data = sound_bytes(wave(60.0, channels=1), "flac", "flac")
    delivered: list[int] = []

    def counting(frame: av.AudioFrame) -> None:
        delivered.append(frame.samples)

    from pretrain.data.decoders import sound

    frames = sound._frames
    try:
        sound._frames = lambda *args: (counting(frame) or frame for frame in frames(*args))  # type: ignore[func-returns-value]
        decode_sound(data, 16000, 1, 40.0, 1.0)
    finally:
        sound._frames = frames
    assert sum(delivered) < 3 * 44100


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b"text" * 99, "open")])
def test_what_is_no_sound(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError) as error:
        decode_sound(data, 16000)
    assert error.value.reason == reason


def test_a_video_without_sound(encode: Callable[..., bytes]) -> None:
    for data in (encode(), image_bytes(picture(), "JPEG")):
        with pytest.raises(SampleError) as error:
            decode_sound(data, 16000)
        assert error.value.reason == "no_sound" and "video" in str(error.value)


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(DataError, match="1 or 2 channels"):
        decode_sound(sound_bytes(WAVE), 16000, channels=3)

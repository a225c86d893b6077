"""Pictures and sound of the same seconds: one clock, both speeds, one pass; what can't be used is said."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from pretrain.data.randomness import generator
from pretrain.data.samples import Place, SourceInfo
from pretrain.errors import SampleError
from pretrain.recipe.schema import Source
from pretrain.samples import audio_video
from pretrain.samples.audio_video import AudioVideo, Config, SoundOptions, drawn_playings, nearest_frames
from pretrain.samples.clip_jitter import jittered_clip
from pretrain.samples.sound_speed import reach, resampled, time_stretched
from pretrain.samples.spectrogram import SpectrogramOptions, log_spectrogram, standardized
from tests.films import HEIGHT, WIDTH, numbers_of
from tests.pack.media_files import sound_bytes
from tests.talking_films import RATE, members_of_film, sine, talking_film

SOURCE = SourceInfo("toy", [], Source(shards=""))
#: A sound that is another one at each moment, of 16 bits: what a film holds.
SWEEP = 0.4 * np.sin(2 * np.pi * np.cumsum(np.linspace(200, 4000, 6 * RATE)) / RATE)
CHIRP = (np.round(SWEEP * 32768) / 32768).astype(np.float32)


def config(**others: Any) -> Config:
    plain: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "crop": "center", "jitter": (0, 0, 0, 0)}
    return Config(**plain | others)


def make(options: Config, film: bytes, position: int = 0, **beside: bytes) -> dict[str, np.ndarray]:
    return AudioVideo(options, 5)(Place(0, position, 0, 0, 0), SOURCE, members_of_film(film, "film", **beside))


def start_of(options: Config, position: int, shown: float, heard: tuple[float, float]) -> float:
    """When the pictures begin, as drawn."""
    margin, fastest = reach(options.fastest) / RATE, float(options.fastest)
    first = max(0.0, heard[0] + margin)
    last = min(shown - fastest * options.frames / 16, heard[1] - margin - fastest * options.sound.seconds)
    return first + float(generator(5, 0, position, 0, "clip").random()) * (last - first)


@pytest.mark.parametrize(
    ("film", "shown", "heard"),
    [
        ({}, 6.0, (0.0, 6.0)),
        ({"sound_at": 0.4}, 6.0, (0.4, 6.4)),
        ({"pictures_at": 0.5}, 6.0, (-0.5, 5.5)),
        ({"container": "matroska"}, 6.0, (0.0, 6.0)),
    ],
    ids=["together", "sound later", "pictures later", "no durations in the header"],
)
@pytest.mark.parametrize("method", ["resample", "time_stretch"])
def test_pictures_and_sound_on_one_clock(
    film: dict[str, Any], shown: float, heard: tuple[float, float], method: Any
) -> None:
    """Frames by their time stamps, sound to the sample, whichever stream begins first."""
    options = config(sound=SoundOptions(method=method, gain=0))
    data = talking_film(CHIRP, **film)
    for position in range(2):
        found, start = make(options, data, position), start_of(options, position, shown, heard)
        begin = round(start * RATE) - round(heard[0] * RATE)
        for row, speed in enumerate(found["speed"][:, 0].tolist()):
            frames = np.floor((start + np.arange(8) * speed / 16) * 30 + 0.5)
            assert numbers_of(found["video"][row]) == frames.tolist()
            player = resampled if method == "resample" else time_stretched
            played = player(CHIRP, begin, Fraction(speed), 2 * RATE)
            expected = standardized(log_spectrogram(played, RATE, SpectrogramOptions()))
            assert np.abs(found["sound"][row] - expected).max() < 1e-3
        assert found["speed"][0].tolist() == [1, 1] and found["speed"][1, 0] in (1.5, 2)


def test_both_speeds_are_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counting(name: str, whole: Any) -> Any:
        def counted(*words: Any, **options: Any) -> Any:
            calls.append(name)
            return whole(*words, **options)

        return counted

    for name in ("open_video", "decode_sound"):
        monkeypatch.setattr(audio_video, name, counting(name, getattr(audio_video, name)))
    make(Config(height=24, width=24), talking_film(CHIRP))
    assert sorted(calls) == ["decode_sound", "open_video"]


def test_a_sound_file_beside_the_film_comes_first() -> None:
    quiet = talking_film(sine(300))
    options = config(views=1, sound=SoundOptions(gain=0))
    found = make(options, quiet, wav=sound_bytes(sine(3000)[None], "wav", "pcm_s16le", RATE))
    assert int(found["sound"][0].mean(0).argmax()) == 64, "3 kHz, and not 300 Hz"


def test_frames_nearest_in_time() -> None:
    times = np.arange(100) / 30
    wanted = np.arange(8) * 2 / 16
    expected = [0, 4, 8, 11, 15, 19, 23, 26]
    assert nearest_frames(times, wanted).tolist() == np.floor(wanted * 30 + 0.5).tolist() == expected
    assert nearest_frames(times, np.array([-1.0, 3.29, 9.0])).tolist() == [0, 99, 99]
    assert nearest_frames(np.array([0.0, 0.1, 1.0]), np.array([0.5, 0.6])).tolist() == [1, 2], "uneven"


def test_one_speed_is_the_vanilla_pipeline() -> None:
    """With S = {1} a sample is the first view of a sample at two speeds, drawn alike, where both fit alike."""
    film = talking_film(CHIRP)
    two = make(Config(height=24, width=24, speeds=[1.0, 0.5]), film)
    one = make(Config(height=24, width=24, speeds=[1.0], views=1), film)
    for name, rows in one.items():
        assert np.array_equal(rows, two[name][:1]), name


def test_what_is_drawn() -> None:
    rng = np.random.default_rng(0)
    drawn = [drawn_playings(Config(speeds=[1.0, 1.5, 2.0]), rng) for _ in range(40)]
    assert {(one.video, one.sound) for pair in drawn for one in pair} == {(1, 1), (1.5, 1.5), (2, 2)}
    assert all(pair[0].video == 1 != pair[1].video for pair in drawn)
    for plays, sound, video in (("video", {1}, {1.5, 2}), ("sound", {1.5, 2}, {1})):
        drawn = [drawn_playings(Config(plays=plays), rng) for _ in range(40)]  # type: ignore[arg-type]
        assert {pair[1].sound for pair in drawn} == sound and {pair[1].video for pair in drawn} == video
    drawn = [drawn_playings(Config(plays="independent"), rng) for _ in range(40)]
    assert {pair[1].sound == pair[1].video for pair in drawn} == {True, False}
    drawn = [drawn_playings(Config(pairing="two_random", speed_range=(0.5, 1.5)), rng) for _ in range(40)]
    assert len({pair[0].video for pair in drawn}) > 20 and all(pair[0].video != pair[1].video for pair in drawn)
    assert all(one.video.denominator <= 20 for pair in drawn for one in pair)


def test_views_differ_and_frames_of_a_view_do_not() -> None:
    film = talking_film(CHIRP, frames=180)
    found = make(Config(height=24, width=24, speeds=[1.0, 2.0]), film)
    assert found["video"].shape == (2, 8, 24, 24, 3) and found["sound"].shape == (2, 200, 257)
    other = AudioVideo(Config(height=24, width=24), 5)(Place(0, 0, 0, 0, 0), SOURCE, members_of_film(film, "other"))
    assert found["file"][0] == found["file"][1] and found["file"][0] not in other["file"]
    grey = np.full((3, 8, 8, 3), (200, 100, 50), dtype=np.uint8)
    turned = jittered_clip(grey, (0.4, 0.4, 0.4, 0.2), np.random.default_rng(1))
    assert (turned == turned[:1, :1, :1]).all() and not np.array_equal(turned, grey)
    assert np.array_equal(jittered_clip(grey, (0, 0, 0, 0), np.random.default_rng(1)), grey)
    hues = {tuple(jittered_clip(grey, (0, 0, 0, 0.5), np.random.default_rng(n))[0, 0, 0].argsort()) for n in range(9)}
    assert len(hues) > 2, "a half turn of hue changes which channel is brightest"


@pytest.mark.parametrize(
    ("film", "reason"),
    [
        (lambda: talking_film(None), "no_sound"),
        (lambda: talking_film(sine(500, 3.0)), "too_short"),
        (lambda: talking_film(CHIRP, frames=20), "too_short"),
        (lambda: talking_film(CHIRP, sound_at=5.5), "too_short"),
        (lambda: talking_film(np.zeros(6 * RATE)), "silent"),
    ],
    ids=["no sound", "sound shorter than the window", "pictures shorter", "sound begins too late", "silence"],
)
def test_what_cannot_be_used_is_counted(film: Any, reason: str) -> None:
    with pytest.raises(SampleError) as error:
        make(config(), film())
    assert error.value.reason == reason


def test_padding_on_demand() -> None:
    options = config(sound=SoundOptions(short="pad", gain=0), speeds=[1.0, 2.0])
    found = make(options, talking_film(sine(500, 1.5), frames=30))
    heard = [(one.max(1) > one.max() - 1).nonzero()[0].max() for one in found["sound"]]
    assert abs(heard[0] - 150) < 6 and abs(heard[1] - 75) < 6
    assert numbers_of(found["video"][1]) == [0, 4, 8, 11, 15, 19, 23, 26]


def test_the_middle_and_even_clips() -> None:
    film = members_of_film(talking_film(CHIRP))
    one = AudioVideo(config(), 5).without_chance(SOURCE, film)
    assert one["video"].shape == (1, 8, HEIGHT, WIDTH, 3) and one["sound"].shape == (1, 200, 257)
    silent = AudioVideo(config(), 5, clips=3, silent=True)
    found = silent.without_chance(SOURCE, members_of_film(talking_film(None)))
    assert list(found) == ["video"]
    firsts = [numbers_of(clip)[0] for clip in found["video"]]
    assert firsts[0] == 0 and firsts[2] == 165 and firsts[1] in (82, 83)


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({"speeds": [1.0]}, "another one than 1"),
        ({"speeds": []}, "from 0.25 to 4"),
        ({"speeds": [1.0, 8.0]}, "from 0.25 to 4"),
        ({"speeds": [2.0, 2.01], "pairing": "two_random"}, "two different ones"),
        ({"speed_range": (1.0, 1.05)}, "apart"),
        ({"fps": None}, "share a clock"),
        ({"views": 3}, "1 or 2"),
        ({"sound": SoundOptions(seconds=0)}, "input.sound"),
        ({"sound": SoundOptions(rate=16000)}, None),
        ({"spectrogram": SpectrogramOptions(rate=7)}, "divisor"),
        ({"jitter": (0.4, 0.4, 0.4, 0.9)}, "hue to 0.5"),
    ],
)
def test_what_is_refused(others: dict[str, Any], told: str | None) -> None:
    found = Config(**others).problems()
    assert found == [] if told is None else told in found[0]

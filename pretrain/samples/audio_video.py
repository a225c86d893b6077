"""What is seen and what is heard of the same seconds of a video, at one speed or at two (speed co-augmentation).

Source: systems/speed_coaug.md, section 3. Frames are chosen by time stamp and sound by sample on one clock, whose time
0 is the video's first picture. Both speeds share a start and one pass of each decoder.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from pretrain.data.decoders import VideoReader, open_video
from pretrain.data.decoders.crops import Box
from pretrain.data.decoders.sound import decode_sound, sound_span
from pretrain.data.members import Members
from pretrain.data.randomness import generator, key_of
from pretrain.data.samples import Arrays, Batch, Draw, Place, Samples, SourceInfo, draws, made_up_samples, stacked
from pretrain.errors import SampleError
from pretrain.samples import clip, transforms
from pretrain.samples.augment import resized_crop_box
from pretrain.samples.clip_jitter import Strengths, jittered_clip
from pretrain.samples.sound_speed import Sound, reach, resampled, speed_fraction, time_stretched
from pretrain.samples.spectrogram import (
    LEAST_POWER,
    Spectrogram,
    SpectrogramOptions,
    SpectrogramStatistics,
    load_statistics,
    log_spectrogram,
    standardized,
)

#: Slowest and fastest speed: beyond them the vocoder smears, and windows outgrow ten seconds of Kinetics.
SLOWEST, FASTEST = 0.25, 4.0
LEAST_RANGE = 0.2
#: Largest value of sound that counts as silence, the quietest that a spectrogram tells from it.
SILENT = LEAST_POWER**0.5
PLAYERS = {"resample": resampled, "time_stretch": time_stretched}


@dataclass
class SoundOptions:
    """The window of sound."""

    rate: int = 24000
    """samples a second"""
    seconds: float = 2.0
    """length as it is heard; at speed s it takes s times as many seconds of the video"""
    method: Literal["resample", "time_stretch"] = "resample"
    """resample: pitch and speed change together; time_stretch: pitch is kept (phase vocoder)"""
    gain: float = 0.1
    """loudness is multiplied by a factor drawn from 1 - gain to 1 + gain"""
    align: Literal["start", "centre"] = "start"
    """what the windows of sound and pictures share: their start or their middle"""
    short: Literal["refuse", "pad"] = "refuse"
    """videos in which the widest window does not fit: refuse: unusable, counted as too_short; pad: sound is followed by
    silence, whose length tells the speed, and the last picture is repeated"""


@dataclass
class Config(clip.Config):
    """Clips with sound, the same seconds at one speed or at two."""

    name: str = "audio_video"
    """kind of sample: pretrain/samples/<name>.py"""
    frames: int = 8
    """frames of a clip, T"""
    fps: float | None = 16.0
    """frames of the clip a second, by time stamp, at speed 1"""
    views: int = 2
    """2: the same seconds at two speeds; 1: at one, without speed augmentation unless speeds say so"""
    crop: Literal["resized", "center"] = "resized"  # type: ignore[assignment]
    """resized: random area and aspect, mirrored at random; center: short side resized, centre cut"""
    speeds: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0])
    """speeds of playing that are drawn from; each is rounded to a fraction with a denominator up to 20"""
    speed_range: tuple[float, float] | None = None
    """draw from all speeds between these two instead; null: from speeds"""
    pairing: Literal["anchor_plus_random", "two_random"] = "anchor_plus_random"
    """two views: speed 1 and another one, or two different ones; a single view has the first of the two"""
    plays: Literal["both", "video", "sound", "independent"] = "both"
    """what is played at the speed: both streams; one of them, the other at 1; or each at a speed of its own"""
    area: tuple[float, float] = (0.08, 1.0)
    """share of the frame that the random crop takes"""
    aspect: tuple[float, float] = (0.75, 4 / 3)
    """width / height of the random crop, drawn log-uniformly"""
    flip: bool = True
    """mirror half of the views"""
    jitter: Strengths = (0.4, 0.4, 0.4, 0.2)
    """strengths of brightness, contrast, saturation and hue jitter, the same for all frames of a view; 0: none"""
    sound: SoundOptions = field(default_factory=SoundOptions)
    """the window of sound"""
    spectrogram: SpectrogramOptions = field(default_factory=SpectrogramOptions)
    """what becomes of it"""

    @property
    def fractions(self) -> list[Fraction]:
        """The speeds that are played for `speeds`."""
        return [speed_fraction(speed) for speed in self.speeds]

    @property
    def fastest(self) -> Fraction:
        """The fastest speed that may be drawn."""
        several = self.fractions if self.speed_range is None else [speed_fraction(self.speed_range[1])]
        return max(*several, Fraction(1)) if self.anchored or self.plays in ("video", "sound") else max(several)

    @property
    def anchored(self) -> bool:
        """Whether the first view is at speed 1."""
        return self.pairing == "anchor_plus_random"

    @property
    def sound_size(self) -> tuple[int, int]:
        """Columns and bins of a spectrogram."""
        return self.spectrogram.columns(self.sound.seconds), self.spectrogram.bins

    def problems(self) -> list[str]:
        """Say what in this section can't work."""
        found = [*super().problems(), *self._speed_problems()]
        if self.fps is None:
            found.append("input.fps: found null, allowed: a number; frames and sound share a clock")
        if self.views > 2:
            found.append(f"input.views: found {self.views}, allowed: 1 or 2 speeds")
        sound = self.sound
        if sound.rate < 1 or not 0 < sound.seconds < math.inf or not 0 <= sound.gain < 1:
            found.append(
                f"input.sound: found rate={sound.rate}, seconds={sound.seconds:g}, gain={sound.gain:g}; allowed: both "
                "above 0, and a gain from 0 to below 1"
            )
            return found
        found += self.spectrogram.problems("input.spectrogram", sound.rate)
        if sound.rate * sound.seconds <= self.spectrogram.window:
            found.append(f"input.sound.seconds={sound.seconds:g}: shorter than input.spectrogram.window")
        if not 0 < self.area[0] <= self.area[1] <= 1 or not 0 < self.aspect[0] <= self.aspect[1] < math.inf:
            found.append(f"input.area={list(self.area)}, input.aspect={list(self.aspect)}: allowed: shares up to 1, "
                         "ratios above 0, each in order")  # fmt: skip
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            found.append(f"input.jitter: found {list(self.jitter)}, allowed: from 0, and hue to 0.5")
        return found

    def _speed_problems(self) -> list[str]:
        asked = self.speeds if self.speed_range is None else list(self.speed_range)
        key = "input.speeds" if self.speed_range is None else "input.speed_range"
        if not asked or not all(SLOWEST <= speed <= FASTEST for speed in asked):
            return [f"{key}: found {asked}, allowed: speeds from {SLOWEST:g} to {FASTEST:g}"]
        if self.speed_range is not None:
            low, high = self.speed_range
            # Closer ones might both be rounded to one fraction, and a second speed be drawn for ever.
            told = f"{key}: found {asked}, allowed: two speeds at least {LEAST_RANGE} apart, in order"
            return [] if high - low >= LEAST_RANGE else [told]
        others = set(self.fractions) - ({Fraction(1)} if self.anchored else set())
        if self.views == 2 and len(others) < (1 if self.anchored else 2):
            wanted = "another one than 1" if self.anchored else "two different ones"
            return [f"{key}: found {asked}, allowed with input.views=2: {wanted}; input.views=1 plays each video once"]
        return []

    def describe(self) -> list[tuple[str, str, str]]:
        """Say what a row is."""
        columns, bins = self.sound_size
        speeds = self.speeds if self.speed_range is None else f"{self.speed_range[0]:g} to {self.speed_range[1]:g}"
        played = f"speeds {speeds}, {self.pairing}, {self.plays}" if self.views == 2 or not self.anchored else "speed 1"
        heard = f"{self.sound.seconds:g} s at {self.sound.rate} Hz, {self.sound.method}"
        return [*super().describe(), ("sound", f"{columns} x {bins}", heard), ("speeds", str(self.views), played)]


@dataclass(frozen=True)
class Playing:
    """Speeds of the two streams of a view."""

    video: Fraction
    sound: Fraction


def drawn_playings(options: Config, rng: np.random.Generator) -> list[Playing]:
    """Draw the speeds of all views of a sample."""
    video = _drawn_speeds(options, rng)
    sound = _drawn_speeds(options, rng) if options.plays == "independent" else video
    still = [Fraction(1)] * len(video)
    video, sound = still if options.plays == "sound" else video, still if options.plays == "video" else sound
    return [Playing(*pair) for pair in zip(video, sound, strict=True)]


def _drawn_speeds(options: Config, rng: np.random.Generator) -> list[Fraction]:
    found = [Fraction(1)] if options.anchored else []
    while len(found) < options.views:
        if options.speed_range is None:
            speed = options.fractions[int(rng.integers(len(options.speeds)))]
        else:
            speed = speed_fraction(float(rng.uniform(*options.speed_range)))
        if speed not in found:
            found.append(speed)
    return found


def nearest_frames(times: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Number the frames nearest to some times, of two equally near ones the later; beyond the ends the first and last.

    Args:
        times: of all frames, seconds, ascending.
        wanted: seconds.
    """
    # A tie must not fall to either side by the rounding of two floats.
    return np.searchsorted((times[1:] + times[:-1]) / 2, wanted + 1e-9, side="left").astype(np.int64)


class AudioVideo(Samples):
    """The same seconds of a video, seen and heard, at each view's speed.

    A batch holds `video` uint8 [B, T, H, W, 3], `sound` float32 [B, columns, bins], `speed` float32 [B, 2] (of the
    pictures, of the sound) and `file` int64 [B], equal for rows of one file; the views of a sample are neighbours.

    Args:
        options: the recipe's input section.
        seed: the recipe's run.seed.
        clips: that `without_chance` cuts out of a video, spread evenly, so many rows.
        silent: `without_chance` leaves sound alone, which labelled videos may lack: no `sound`.
    """

    def __init__(self, options: Config, seed: int, clips: int = 1, silent: bool = False) -> None:
        self._options, self._seed, self._clips, self._silent = options, seed, clips, silent

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        rng = generator(self._seed, place.epoch, place.position, 0, "speed")
        playings, each = drawn_playings(self._options, rng), draws(self._seed, place, self._options.views)
        with open_video(members.video(), self._options.decoder, members.stamps) as reader:
            first, last = self._starts(reader.duration, sound_span(members.sound()), self._options.fastest)
            share = float(generator(self._seed, place.epoch, place.position, 0, "clip").random())
            start = first + share * (last - first)
            videos = self._videos(reader, start, playings, each)
        sounds = self._sounds(members, start, [one.sound for one in playings])
        gain = self._options.sound.gain
        louder = [np.float32(draw("gain").uniform(1 - gain, 1 + gain)) for draw in each]
        return {
            "video": stacked(videos),
            "sound": stacked([self._spectrogram(one * factor) for one, factor in zip(sounds, louder, strict=True)]),
            "speed": np.array([[one.video, one.sound] for one in playings], dtype=np.float32),
            "file": np.full(len(each), _file_number(members), dtype=np.int64),
        }

    def example(self, count: int) -> Batch:
        options = self._options

        def arrays(place: Place) -> Arrays:
            rng = generator(place.position, "made-up sound")
            return {
                "video": clip.made_up_videos(options, options.views),
                "sound": rng.standard_normal((options.views, *options.sound_size), dtype=np.float32),
                "speed": np.ones((options.views, 2), dtype=np.float32),
                "file": np.full(options.views, place.position, dtype=np.int64),
            }

        return self.collate(made_up_samples(count, arrays))

    def without_chance(self, source: SourceInfo, members: Members) -> Arrays:
        """Cut centre crops at speed 1 with their sound, `video` uint8 [clips, T, H, W, 3] and so on: of one the middle,
        of several those that are spread evenly over the video."""
        options = self._options
        with open_video(members.footage(), options.decoder, members.stamps) as reader:
            assert options.fps is not None  # told by problems()
            free = max(reader.duration - options.frames / options.fps, 0.0)
            first, last = (0.0, free) if self._silent else self._starts(
                reader.duration, sound_span(members.sound()), Fraction(1)
            )  # fmt: skip
            starts = np.linspace(first, last, self._clips) if self._clips > 1 else np.array([(first + last) / 2])
            frames = np.stack([self._frames(reader, float(start), Fraction(1)) for start in starts])
            wanted, inverse = np.unique(frames, return_inverse=True)
            video = transforms.centre_crop(reader.frames(wanted), options.width, options.height)
        found: Arrays = {"video": video[inverse.reshape(frames.shape)]}
        if not self._silent:
            heard = [self._sounds(members, float(start), [Fraction(1)])[0] for start in starts]
            found["sound"] = np.stack([self._spectrogram(one) for one in heard])
        return found

    def window(self, members: Members) -> Spectrogram:
        """Compute the spectrogram of the middle of a sample's sound, as it is before normalisation, [columns, bins]."""
        first, last = sound_span(members.sound())
        spare = max(last - first - self._options.sound.seconds, 0.0) / 2
        (sound,) = self._sounds(members, first + spare - self._offset(Fraction(1)), [Fraction(1)])
        return log_spectrogram(sound, self._options.sound.rate, self._options.spectrogram)

    @functools.cached_property
    def _statistics(self) -> SpectrogramStatistics | None:
        options = self._options
        path = options.spectrogram.statistics
        return None if path is None else load_statistics(path, options.sound.rate, options.spectrogram)

    def _spectrogram(self, sound: Sound) -> Spectrogram:
        decibels = log_spectrogram(sound, self._options.sound.rate, self._options.spectrogram)
        return standardized(decibels) if self._statistics is None else self._statistics.normalized(decibels)

    def _offset(self, speed: Fraction) -> float:
        """Tell how long after the pictures the sound begins, seconds of the video."""
        options = self._options
        assert options.fps is not None
        return 0.0 if options.sound.align == "start" else (
            float(speed) * (options.frames / options.fps - options.sound.seconds) / 2
        )  # fmt: skip

    def _starts(self, shown: float, heard: tuple[float, float], fastest: Fraction) -> tuple[float, float]:
        """Give the earliest and the latest start of pictures at which the widest window lies inside of both streams.

        The fastest speed's, whichever is drawn: else a start near the end would tell that the speed is low.
        """
        options, fast = self._options, float(fastest)
        assert options.fps is not None
        margin, offset = reach(fastest) / options.sound.rate, self._offset(fastest)
        first = max(0.0, heard[0] + margin - min(offset, 0.0))
        last = min(shown - fast * options.frames / options.fps,
                   heard[1] - margin - max(offset + fast * options.sound.seconds, 0.0))  # fmt: skip
        if last >= first:
            return first, last
        if options.sound.short == "refuse":
            there = f"pictures last {shown:.2f} s, and there is sound from second {heard[0]:.2f} to {heard[1]:.2f}"
            wanted = f"{fast * options.frames / options.fps:.2f} s and {fast * options.sound.seconds:.2f} s are needed"
            raise SampleError("too_short", f"{there}; together {wanted} at speed {fast:g}")
        return first, first

    def _frames(self, reader: VideoReader, start: float, speed: Fraction) -> npt.NDArray[np.int64]:
        assert self._options.fps is not None
        wanted = start + np.arange(self._options.frames, dtype=np.float64) * (float(speed) / self._options.fps)
        return nearest_frames(reader.times(), wanted)

    def _videos(
        self, reader: VideoReader, start: float, playings: Sequence[Playing], each: Sequence[Draw]
    ) -> list[transforms.Clip]:
        """Make each view's clip; the frames of all are decoded together."""
        options = self._options
        frames = [self._frames(reader, start, one.video) for one in playings]
        wanted, inverse = np.unique(np.stack(frames), return_inverse=True)
        places = inverse.reshape(len(frames), -1)
        if options.crop == "center":
            decoded = transforms.centre_crop(reader.frames(wanted), options.width, options.height)
            clips = [decoded[place] for place in places]
        else:
            crops = reader.crops(wanted, functools.partial(self._boxes, each))
            clips = [
                transforms.resize(one[place], options.width, options.height)
                for one, place in zip(crops, places, strict=True)
            ]
        return [self._augmented(one, draw) for one, draw in zip(clips, each, strict=True)]

    def _boxes(self, each: Sequence[Draw], width: int, height: int) -> list[Box]:
        area, aspect = self._options.area, self._options.aspect
        return [resized_crop_box(width, height, area, aspect, draw("crop")) for draw in each]

    def _augmented(self, video: transforms.Clip, draw: Draw) -> transforms.Clip:
        if self._options.crop != "center" and self._options.flip and draw("flip").random() < 0.5:
            video = video[:, :, ::-1]
        if any(self._options.jitter):
            video = jittered_clip(video, self._options.jitter, draw("jitter"))
        # A copy: torch takes no array with negative strides.
        return np.ascontiguousarray(video)

    def _sounds(self, members: Members, start: float, speeds: Sequence[Fraction]) -> list[Sound]:
        """Make each view's window of sound, [N]; what all of them need is decoded once."""
        options = self._options.sound
        count = round(options.seconds * options.rate)
        firsts = [round((start + self._offset(speed)) * options.rate) for speed in speeds]
        first = min(firsts) - max(reach(speed) for speed in speeds)
        last = max(begin + math.ceil(speed * count) + reach(speed) for begin, speed in zip(firsts, speeds, strict=True))
        whole = decode_sound(
            members.sound(), options.rate, 1, first / options.rate, (last - first) / options.rate,
            filled=options.short == "refuse",
        )[0]  # fmt: skip
        if np.abs(whole).max() <= SILENT:
            raise SampleError("silent", f"nothing but silence from second {start:.2f} on")
        player = PLAYERS[options.method]
        return [player(whole, begin - first, speed, count) for begin, speed in zip(firsts, speeds, strict=True)]


def _file_number(members: Members) -> int:
    """Number a file, the same wherever and whenever it is read."""
    return key_of(members.url, members.key) & (1 << 62) - 1

"""Clips of segments: a few consecutive frames at each of T places of a video (TSN, TSM, TDN).

Rules: systems/tdn.md section 4, from ops/dataset.py of MCG-NJU/TDN @ a7c7e9b. There numbers begin at 1, here at 0.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from pretrain.recipe.schema import Source
from pretrain.samples import augmented_clip
from pretrain.samples.frame_choice import FrameChoice, VideoFacts
from pretrain.samples.sampling import Indices
from pretrain.samples.transforms import Geometry

#: How a test's clips differ in time.
TestClips = Literal["random", "spread"]
#: Frames that the segments of a dense clip lie in.
DENSE_SPAN = 64


@dataclass
class Config(augmented_clip.Config):
    """Clips of segments, augmented: size, sampling, decoding."""

    #: Frames are made smaller, and cut for tests, as the code of TSN and its heirs does.
    GEOMETRY: ClassVar[Geometry] = "tsn"

    name: str = "segments"
    """kind of sample: pretrain/samples/<name>.py"""
    segments: int = 8
    """segments of a clip, T; data.sources.<name>.sampling says where they lie: sparse: one in each of T equal parts of
    the video (TSN, TSM, TDN); dense: 64 / T frames apart, from a random place; motion: at equal shares of the motion"""
    window: int = 5
    """consecutive frames of a segment: 5 for TDN, 1 for TSM"""
    frames: int = 0
    """frames of a clip, segments x window; 0: computed"""
    stride: int = 1
    """frames of the video between two of a window"""
    views: int = 1
    """augmented views of each decoded clip"""
    crop: Literal["resized", "multiscale", "center"] = "multiscale"  # type: ignore[assignment]
    """multiscale: one of four sizes at one of 13 places; resized: random area and aspect; center: short side resized,
    centre cut"""
    test_clips: TestClips = "random"
    """test with several clips: random: drawn as in training, from the video's own generator (Kinetics as published);
    spread: evenly spread inside each segment, the same in every test; one clip is always the middle one"""

    def __post_init__(self) -> None:
        self.frames = self.frames or self.segments * self.window

    @property
    def motion_window(self) -> int:
        return self.window

    def frame_choice(self, sampling: str, stride: int | None) -> FrameChoice:
        if sampling == "motion":
            return super().frame_choice(sampling, stride)
        rule = DenseSegmentChoice if sampling == "dense" else SegmentChoice
        return rule(self.segments, self.window, self.test_clips)

    def problems(self) -> list[str]:
        found = super().problems()
        found += [
            f"input.{name}: found {getattr(self, name)}, allowed: more than 0"
            for name in ("segments", "window")
            if getattr(self, name) < 1
        ]
        if not found and self.frames != self.segments * self.window:
            found.append(
                f"input.frames: found {self.frames}, allowed: {self.segments * self.window}, input.segments x "
                "input.window; leave it out"
            )
        if self.stride != 1:
            found.append(f"input.stride: found {self.stride}, allowed: 1, the frames of a window are neighbours")
        return found

    def source_problems(self, name: str, source: Source) -> list[str]:
        found = f"data.sources.{name}.stride: found {source.stride}, allowed: null"
        return [] if source.stride is None else [f"{found}, the frames of a window are neighbours"]

    def sampling_problems(self, name: str, sampling: str) -> list[str]:
        allowed = ("sparse", "dense", "motion")
        if sampling in allowed:
            return []
        found = f"data.sources.{name}.sampling: found {sampling}"
        return [f"{found}, allowed with input.name=segments: {', '.join(allowed)}"]

    def describe(self) -> list[tuple[str, str, str]]:
        size = f"{self.frames} x {self.height} x {self.width}"
        return [("pixels", size, f"{self.segments} segments of {self.window} frames")]

    def describe_source(self, source: Source) -> str:
        return f"{self.segments} segments"


@dataclass(frozen=True)
class SegmentChoice(FrameChoice):
    """A window in each of T equal parts of the video: anywhere in training, in the middle else."""

    name = "segments"

    segments: int
    window: int
    test_clips: TestClips

    def training(self, video: VideoFacts, rng: np.random.Generator) -> Indices:
        """Draw a start in each part; in a video too short for parts any T starts in order, or its beginning."""
        room = video.num_frames - self.window + 1
        length = room // self.segments
        if length > 0:
            offsets = rng.integers(length, size=self.segments)
            return self._windows(np.arange(self.segments) * length + offsets, video)
        if video.num_frames > self.segments:
            return self._windows(np.sort(rng.integers(max(room, 1), size=self.segments)), video)
        return self._windows(np.zeros(self.segments), video)

    def validation(self, video: VideoFacts) -> Indices:
        """Take the middle of each part."""
        return self._at(video, 0.5)

    def clips(self, video: VideoFacts, clips: int, rng: np.random.Generator) -> Indices:
        """Draw the clips as in training or spread them inside the parts; one is that of the validation."""
        if clips == 1:
            return self.validation(video)[None]
        if self.test_clips == "random":
            return np.stack([self.training(video, rng) for _ in range(clips)])
        return np.stack([self._at(video, (clip + 0.5) / clips) for clip in range(clips)])

    def _at(self, video: VideoFacts, share: float) -> Indices:
        room = video.num_frames - self.window + 1
        # The released code compares with T + 4: a video of exactly so many frames shows its first five T times.
        if video.num_frames <= self.segments + self.window - 1:
            return self._windows(np.zeros(self.segments), video)
        tick = room / self.segments
        return self._windows(np.array([int(tick * share + tick * part) for part in range(self.segments)]), video)

    def _windows(self, starts: npt.NDArray[np.generic], video: VideoFacts) -> Indices:
        return windows(starts, self.window, video.num_frames)


@dataclass(frozen=True)
class DenseSegmentChoice(FrameChoice):
    """Windows 64 / T frames apart, from a start that leaves room for all 64; a shorter video begins again."""

    name = "dense_segments"

    segments: int
    window: int
    test_clips: TestClips

    def training(self, video: VideoFacts, rng: np.random.Generator) -> Indices:
        """Draw the start."""
        return self._from(int(rng.integers(self._free(video) + 1)), video)

    def validation(self, video: VideoFacts) -> Indices:
        """Take the 64 frames in the middle; the released code draws here too."""
        return self._from(self._free(video) // 2, video)

    def clips(self, video: VideoFacts, clips: int, rng: np.random.Generator) -> Indices:
        """Draw the starts or spread them evenly; one is that of the validation."""
        if clips == 1:
            return self.validation(video)[None]
        if self.test_clips == "random":
            return np.stack([self.training(video, rng) for _ in range(clips)])
        starts = np.linspace(0, self._free(video), clips, dtype=np.int64)
        return np.stack([self._from(int(start), video) for start in starts])

    def _free(self, video: VideoFacts) -> int:
        return max(video.num_frames - DENSE_SPAN, 0)

    def _from(self, start: int, video: VideoFacts) -> Indices:
        starts = (start + np.arange(self.segments) * (DENSE_SPAN // self.segments)) % video.num_frames
        return windows(starts, self.window, video.num_frames)


def windows(starts: npt.NDArray[np.generic], window: int, num_frames: int) -> Indices:
    """List the frames [T * window] of windows from their starts [T]; where the video ends its last one is repeated."""
    frames = starts.astype(np.int64)[:, None] + np.arange(window, dtype=np.int64)
    return np.minimum(frames, num_frames - 1).reshape(-1)

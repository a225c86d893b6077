"""Choice of a labelled clip's frames: one class a rule, for training, validation and the clips of a test.

A rule is chosen for a source by its `sampling`, and made by the input section (`Config.frame_choice`).
"""

import abc
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pretrain.samples import sampling
from pretrain.samples.sampling import Indices


@dataclass(frozen=True)
class VideoFacts:
    """What a choice may depend on, of an opened video.

    Attributes:
        num_frames: frames of the video, M.
        motion: raw motion between neighbouring frames, float32 [M - 1]; None where it is not known.
    """

    num_frames: int
    motion: npt.NDArray[np.float32] | None = None


class FrameChoice(abc.ABC):
    """A rule by which the frames of a clip are chosen: zero-based numbers, int64.

    Subclasses are frozen dataclasses of plain values: data workers are sent them, and exported graphs write them down.

    Attributes:
        name: of the rule.
        needs_motion: whether the rule looks at `VideoFacts.motion`.
    """

    name: ClassVar[str]
    needs_motion: ClassVar[bool] = False

    @abc.abstractmethod
    def training(self, video: VideoFacts, rng: np.random.Generator) -> Indices:
        """Draw the frames [T] of a training clip from the sample's generator."""

    @abc.abstractmethod
    def validation(self, video: VideoFacts) -> Indices:
        """Choose the frames [T] of the one clip by which a video is judged while training."""

    @abc.abstractmethod
    def clips(self, video: VideoFacts, clips: int, rng: np.random.Generator) -> Indices:
        """Choose the frames [clips, T] of a test; `rng` is the video's own, for rules whose clips are random."""


@dataclass(frozen=True)
class DenseChoice(FrameChoice):
    """Frames at about the stride, as VideoMAE is officially fine-tuned (Kinetics)."""

    name = "dense"

    frames: int
    stride: int

    def training(self, video: VideoFacts, rng: np.random.Generator) -> Indices:
        """Draw the clip's exclusive end uniformly from {span, ..., n - 1}."""
        span = self.frames * self.stride
        end = int(rng.integers(span, video.num_frames)) if video.num_frames > span else None
        return sampling.dense_frames(video.num_frames, self.frames, self.stride, end)

    def validation(self, video: VideoFacts) -> Indices:
        """Choose the clip in the middle (V2)."""
        end = sampling.dense_end(video.num_frames, self.frames, self.stride)
        return sampling.dense_frames(video.num_frames, self.frames, self.stride, end)

    def clips(self, video: VideoFacts, clips: int, rng: np.random.Generator) -> Indices:
        """Spread the clips evenly."""
        return sampling.dense_views(video.num_frames, self.frames, self.stride, clips)


@dataclass(frozen=True)
class StridedChoice(FrameChoice):
    """Frames at exactly the stride, as in pre-training (AdaptFormer)."""

    name = "strided"

    frames: int
    stride: int

    def training(self, video: VideoFacts, rng: np.random.Generator) -> Indices:
        """Draw the clip's start uniformly."""
        start = int(rng.integers(sampling.clip_starts(video.num_frames, self.frames, self.stride)))
        return sampling.clip_frames(video.num_frames, self.frames, self.stride, start)

    def validation(self, video: VideoFacts) -> Indices:
        """Choose the clip in the middle."""
        start = (sampling.clip_starts(video.num_frames, self.frames, self.stride) - 1) // 2
        return sampling.clip_frames(video.num_frames, self.frames, self.stride, start)

    def clips(self, video: VideoFacts, clips: int, rng: np.random.Generator) -> Indices:
        """Spread the clips evenly."""
        return sampling.dense_views(video.num_frames, self.frames, self.stride, clips)


@dataclass(frozen=True)
class SparseChoice(FrameChoice):
    """One frame of each of T equal segments of the video (Something-Something)."""

    name = "sparse"

    frames: int

    def training(self, video: VideoFacts, rng: np.random.Generator) -> Indices:
        """Draw an offset inside each segment."""
        length = sampling.sparse_segment(video.num_frames, self.frames)
        offsets = rng.integers(length, size=self.frames) if length else np.zeros(self.frames, dtype=np.int64)
        return sampling.sparse_frames(video.num_frames, self.frames, offsets)

    def validation(self, video: VideoFacts) -> Indices:
        """Choose the middle of each segment."""
        offsets = sampling.sparse_segment(video.num_frames, self.frames) // 2
        return sampling.sparse_frames(video.num_frames, self.frames, offsets)

    def clips(self, video: VideoFacts, clips: int, rng: np.random.Generator) -> Indices:
        """Interleave the clips."""
        return sampling.sparse_views(video.num_frames, self.frames, clips)

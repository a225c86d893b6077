"""The rule `sampling: motion`: frames by equal shares of a video's motion, in training, validation and test."""

from dataclasses import asdict, dataclass

import numpy as np

from pretrain.errors import SampleError
from pretrain.samples import motion
from pretrain.samples.frame_choice import FrameChoice, VideoFacts
from pretrain.samples.sampling import Indices


@dataclass(frozen=True)
class MotionChoice(FrameChoice):
    """Frames that carry equal shares of the motion (MGSampler).

    Attributes:
        frames: of a clip, T.
        window: neighbouring frames that are taken around each chosen one (5 for TDN); 1: that frame alone.
        kind: measure of the curves, for whoever has to make one.
        mu: exponent on the curve.
        rule: nearest or inverse.
        pairs: take both frames between which the motion is.
        strict: refuse a video without a usable curve; else choose its frames uniformly in time.
    """

    name = "motion"
    needs_motion = True

    frames: int
    window: int
    kind: motion.Kind
    mu: float
    rule: motion.Rule
    pairs: bool
    strict: bool

    def training(self, video: VideoFacts, rng: np.random.Generator) -> Indices:
        """Draw a share in each of equal parts of the motion, officially one for each frame."""
        return self._frames(video, motion.training_targets(self._count, rng))

    def validation(self, video: VideoFacts) -> Indices:
        """Choose the middles of equal parts, which is the official test."""
        return self.clips(video, 1, np.random.default_rng(0))[0]

    def clips(self, video: VideoFacts, clips: int, rng: np.random.Generator) -> Indices:
        """Spread the shares of the clips evenly in each part; one clip has the middles."""
        return self._frames(video, motion.test_targets(self._count, clips))

    @property
    def _count(self) -> int:
        """Positions that are chosen."""
        return self.frames // (self.window * (2 if self.pairs else 1))

    def _frames(self, video: VideoFacts, targets: motion.Shares) -> Indices:
        """Choose frames, [..., T], by shares of the motion, [..., positions]."""
        found, last = self._positions(video, targets)[..., None], video.num_frames - 1
        around = np.arange(2) if self.pairs else np.arange(self.window) - self.window // 2
        return np.clip(found + around, 0, last).reshape(*targets.shape[:-1], self.frames)

    def _positions(self, video: VideoFacts, targets: motion.Shares) -> Indices:
        """Choose one frame for each target."""
        curve, frames = video.motion, video.num_frames
        if frames == 1:
            return np.zeros(targets.shape, dtype=np.int64)
        if curve is None or not motion.usable(curve):
            if self.strict:
                found = "no motion curve" if curve is None else "a motion curve that is empty or holds no numbers"
                raise SampleError("motion", f"{found}: run launch/motion_index.py, or set input.motion.strict=false")
            return motion.uniform_frames(frames, targets)
        if not motion.fitted(len(curve), frames):
            raise SampleError(
                "motion", f"its curve is of {len(curve) + 1} frames and the video has {frames}: make its curve again "
                "with launch/motion_index.py"
            )  # fmt: skip
        shares = motion.distribution(curve, self.mu)
        if shares is None:  # nothing moves
            return motion.uniform_frames(frames, targets)
        return motion.rescaled(motion.positions(shares, targets, self.rule), len(curve), frames)


def motion_choice(frames: int, window: int, options: motion.MotionOptions) -> MotionChoice:
    """Make the rule of an input section.

    Args:
        frames: of a clip; a multiple of window, and of 2 with pairs.
        window: neighbouring frames around each chosen one.
        options: the section's `motion`.
    """
    return MotionChoice(frames, window, **asdict(options))


def motion_problems(key: str, frames: int, window: int, options: motion.MotionOptions) -> list[str]:
    """Say what of the options can't work beside a clip of so many frames; `key` is where they stand."""
    problems = options.problems(key)
    if options.pairs and window > 1:
        problems.append(f"{key}.pairs: found true, allowed: false where windows of {window} frames show motion already")
    elif options.pairs and frames % 2:
        problems.append(f"{key}.pairs: {frames} frames can't be halved; make input.frames even, or pairs false")
    return problems

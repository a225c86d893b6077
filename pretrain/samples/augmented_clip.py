"""Clips as supervised training takes them: several augmented views of one decoded clip (`augment:` says how)."""

from dataclasses import dataclass
from typing import Literal

from pretrain.samples import clip
from pretrain.samples.frame_choice import DenseChoice, FrameChoice, SparseChoice, StridedChoice


@dataclass
class Config(clip.Config):
    """Clips of videos, augmented: size, sampling, decoding."""

    name: str = "augmented_clip"
    """kind of sample: pretrain/samples/<name>.py"""
    views: int = 2
    """augmented views of each decoded clip (repeated augmentation, officially num_sample)"""
    crop: Literal["resized", "multiscale", "center"] = "resized"  # type: ignore[assignment]
    """resized: random area and aspect; multiscale: as in pre-training (AdaptFormer); center: short side resized, centre
    cut"""

    def frame_choice(self, sampling: str, stride: int | None) -> FrameChoice:
        """Make a source's rule.

        Args:
            sampling: of the source: dense, sparse or strided.
            stride: of the source; None: this section's.
        """
        if sampling == "sparse":
            return SparseChoice(self.frames)
        return (StridedChoice if sampling == "strided" else DenseChoice)(self.frames, stride or self.stride)

    def problems(self) -> list[str]:
        """Say what in this section can't work."""
        if self.fps is None:
            return super().problems()
        advice = "frames are chosen by data.sources.<name>.sampling and stride here; leave input.fps out"
        return [*super().problems(), f"input.fps: found {self.fps:g}, allowed: null; {advice}"]

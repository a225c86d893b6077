"""A clip of a video with the sound of its first second."""

from dataclasses import dataclass

import numpy as np

from pretrain.data.decoders.sound import decode_sound
from pretrain.data.members import Members
from pretrain.data.randomness import generator
from pretrain.data.samples import Arrays, Batch, Place, SourceInfo, made_up_samples
from pretrain.samples import clip
from pretrain.samples.clip import ClipSamples, made_up_videos


@dataclass
class Config(clip.Config):
    """Clips with sound."""

    name: str = "video_sound"
    """kind of sample: pretrain/samples/<name>.py"""
    rate: int = 2000
    """samples of sound a second"""


class VideoSound(ClipSamples):
    """`video` uint8 [B, T, H, W, 3] and `sound` float32 [B, rate]."""

    _options: Config

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        sound = decode_sound(members.sound(), self._options.rate, duration=1.0)[0]
        return super().__call__(place, source, members) | {"sound": np.stack([sound] * self._options.views)}

    def example(self, count: int) -> Batch:
        views = self._options.views

        def arrays(place: Place) -> Arrays:
            sound = generator(place.position, "sound").standard_normal((views, self._options.rate), dtype=np.float32)
            return {"video": made_up_videos(self._options, views), "sound": sound}

        return self.collate(made_up_samples(count, arrays))

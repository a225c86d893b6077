"""A clip of a video with the sound of the second that begins with it."""

from dataclasses import dataclass

import numpy as np

from pretrain.data.decoders import open_video
from pretrain.data.decoders.sound import decode_sound
from pretrain.data.members import Members
from pretrain.data.randomness import generator
from pretrain.data.samples import Arrays, Batch, Place, SourceInfo, made_up_samples, stacked
from pretrain.samples import clip
from pretrain.samples.clip import ClipSamples, made_up_videos, random_frames
from pretrain.samples.transforms import centre_crop


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
        options, rng = self._options, generator(self._seed, place.epoch, place.position, 0, "clip")
        with open_video(members.footage(), options.decoder, members.stamps) as reader:
            frames = random_frames(reader, options, options.stride, members.grid, rng)
            clip, start = centre_crop(reader.frames(frames), options.width, options.height), reader.times()[frames[0]]
        sound = decode_sound(members.sound(), options.rate, start=float(start), duration=1.0)
        return {"video": stacked([clip] * options.views), "sound": np.repeat(sound, options.views, axis=0)}

    def example(self, count: int) -> Batch:
        views = self._options.views

        def arrays(place: Place) -> Arrays:
            sound = generator(place.position, "sound").standard_normal((views, self._options.rate), dtype=np.float32)
            return {"video": made_up_videos(self._options, views), "sound": sound}

        return self.collate(made_up_samples(count, arrays))

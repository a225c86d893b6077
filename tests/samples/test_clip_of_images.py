"""An image is a clip of one frame: the same sample code on images, alone and repeated, beside a video of one frame."""

import io

import numpy as np
import pytest
from PIL import Image

from pretrain.data.decoders import open_video
from pretrain.data.members import Members
from pretrain.data.samples import Place, SourceInfo
from pretrain.errors import SampleError
from pretrain.recipe.schema import Source
from pretrain.samples.clip import ClipSamples, Config

PIXELS = np.random.default_rng(4).integers(0, 256, (37, 53, 3), dtype=np.uint8)
PLACE = Place(epoch=1, position=5, source=0, shard=0, row=0)


def members(**more: bytes) -> Members:
    stored = io.BytesIO()
    Image.fromarray(PIXELS).save(stored, "png")
    return Members({"png": stored.getvalue(), **more})


def info() -> SourceInfo:
    return SourceInfo("pictures", "nowhere", Source(shards="nowhere"))


def test_pixels_are_those_of_the_image() -> None:
    with open_video(members().footage()) as reader:
        assert reader.num_frames == 1
        assert np.array_equal(reader.frames(np.array([0, 0, 0])), np.repeat(PIXELS[None], 3, axis=0))


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("fps", [None, 12.5])
def test_clips(frames: int, fps: float | None) -> None:
    samples = ClipSamples(Config(frames=frames, height=24, width=32, views=2, fps=fps), seed=7)
    video = samples(PLACE, info(), members())["video"]
    assert video.shape == (2, frames, 24, 32, 3) and video.std() > 20
    assert all(np.array_equal(view[0], frame) for view in video for frame in view), "every frame is the image"
    assert not np.array_equal(video[0], video[1]), "views are cropped each for itself"
    assert np.array_equal(video, samples(PLACE, info(), members())["video"]), "and drawn again the same"
    assert samples.without_chance(info(), members()).keys() == {"video"}


def test_a_video_goes_first_and_a_text_is_none() -> None:
    assert members(mp4=b"film").footage() == b"film"
    with pytest.raises(SampleError, match="no video"):
        Members({"txt": b"a dog"}).footage()

"""Cutting before the conversion to RGB gives what cutting afterwards gives, bit for bit."""

import io
import json
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import pytest

from pretrain.data.decoders import open_video
from pretrain.data.decoders.crops import Box, cut, hull, whole
from pretrain.data.decoders.rgb import RGBConverter
from pretrain.data.members import Members
from pretrain.data.randomness import generator
from pretrain.data.samples import Place, SourceInfo
from pretrain.recipe.schema import Source
from pretrain.samples import transforms
from pretrain.samples.clip import ClipSamples, Config
from pretrain.samples.sampling import clip_frames, clip_starts, grid_starts


def noise(width: int, height: int, pixels: str, colour: tuple[int, int]) -> av.VideoFrame:
    """A frame of random bytes; colour is its space and range in FFmpeg's numbers."""
    frame = av.VideoFrame(width, height, pixels)
    rng = np.random.default_rng(width * height)
    for plane in frame.planes:
        plane.update(rng.integers(0, 256, plane.buffer_size, dtype=np.uint8).tobytes())
    frame.colorspace, frame.color_range = colour
    return frame


def random_boxes(width: int, height: int, count: int) -> list[Box]:
    """Boxes of all sizes, those at the four edges among them."""
    rng = np.random.default_rng(width)
    sizes = rng.integers(1, (width + 1, height + 1), (count, 2))
    corners = rng.integers(0, (width, height) - sizes + 1)
    corners[: count // 4] = 0
    corners[-(count // 4) :] = ((width, height) - sizes)[-(count // 4) :]
    return [Box(int(x), int(y), int(w), int(h)) for (x, y), (w, h) in zip(corners, sizes, strict=True)]


# 5: BT.601, 1: BT.709; 1: limited, 2: full range.
@pytest.mark.parametrize("colour", [(5, 1), (1, 1), (1, 2), (2, 0)])
@pytest.mark.parametrize(
    ("size", "pixels"),
    [
        *[((width, height), "yuv420p") for width, height in [(426, 320), (568, 320), (322, 182), (64, 48), (321, 34)]],
        *[((width, height), "yuv420p") for width, height in [(426, 321), (65, 49), (2, 2), (1, 1)]],
        ((322, 182), "yuvj420p"), ((321, 181), "yuv444p"), ((322, 182), "yuv420p10le"), ((322, 182), "gray"),
    ],
)  # fmt: skip
def test_random_boxes_of_noise(size: tuple[int, int], pixels: str, colour: tuple[int, int]) -> None:
    frame = noise(*size, pixels, colour)
    expected = frame.to_ndarray(format="rgb24")
    converter = RGBConverter(None)
    for box in random_boxes(*size, 40):
        (found,) = converter.crops([frame, frame], 2, lambda *_, box=box: [box])
        assert (found == cut(expected, box)).all(), box
    boxes = random_boxes(*size, 8)
    together = converter.crops([frame], 1, lambda *_: boxes[2:6])
    assert all((clip[0] == cut(expected, box)).all() for clip, box in zip(together, boxes[2:6], strict=True))


VIDEOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {"width": 322, "height": 182},
    "odd": {"width": 65, "height": 49, "pixel_format": "yuv444p"},
    "short": {"frames": 5},
}


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
@pytest.mark.parametrize("video", VIDEOS)
def test_crops_are_frames_cut(decoder: str, video: str, encode: Callable[..., bytes]) -> None:
    with open_video(encode(**VIDEOS[video]), decoder) as reader:
        for indices in ([0, 1, 4], [4, 0, 0, 2]):
            frames = reader.frames(indices)
            boxes = random_boxes(frames.shape[2], frames.shape[1], 8)
            clips = reader.crops(indices, lambda *_, boxes=boxes: boxes)
            assert all((clip == cut(frames, box)).all() for clip, box in zip(clips, boxes, strict=True))


@pytest.mark.parametrize("options", ["tff=1", "chromaloc=2", "colormatrix=bt709:transfer=bt709:range=pc"])
def test_real_frames_with_a_past(options: str) -> None:
    """Interlaced, of another place of chroma, of full range: what a decoder notes on its frames."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=24, options={"x264-params": options, "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 322, 192, "yuv420p"
        for number in range(3):
            picture = np.random.default_rng(number).integers(0, 256, (192, 322, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        file.mux(stream.encode())
    with av.open(io.BytesIO(out.getvalue())) as file:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    boxes = random_boxes(322, 192, 40)
    with open_video(out.getvalue(), "pyav") as reader:
        clips = reader.crops(range(3), lambda *_: boxes)
        single = [reader.crops([1], lambda *_, box=box: [box])[0] for box in boxes[:8]]
    assert all((clip == cut(expected, box)).all() for clip, box in zip(clips, boxes, strict=True))
    assert all((clip[0] == cut(expected[1], box)).all() for clip, box in zip(single, boxes[:8], strict=True))


def test_hull() -> None:
    assert hull([Box(3, 4, 5, 6), Box(1, 6, 2, 10)]) == Box(1, 4, 7, 12)
    assert hull(whole(7, 9)) == Box(0, 0, 7, 9)


@pytest.mark.parametrize("crop", ["multiscale", "center"])
@pytest.mark.parametrize("views", [1, 3])
def test_samples_are_those_of_whole_frames(views: int, crop: str, encode: Callable[..., bytes]) -> None:
    """The sample as it was defined before anything was cut early: whole frames, then each view's crop."""
    options = Config(views=views, frames=4, stride=2, width=32, height=24, decoder="pyav", crop=crop)  # type: ignore
    video = encode(width=130, height=98)
    members = Members({"mp4": video, "json": json.dumps({"grid": {"step": 4, "phase": 1}}).encode()})

    def masks(draw: Callable[[str], np.random.Generator]) -> dict[str, np.ndarray]:
        return {"visible": draw("encoder_mask").permutation(9)}

    for position in range(6):
        found = ClipSamples(options, 5, masks)(Place(2, position, 0, 0, 0), SourceInfo("a", (), Source()), members)
        starts = grid_starts(clip_starts(24, 4, 2), 2, *members.grid)
        start = starts[int(generator(5, 2, position, 0, "clip").integers(len(starts)))]
        with open_video(video, "pyav") as reader:
            clip = reader.frames(clip_frames(24, 4, 2, start))
        for view in range(views):
            rng = generator(5, 2, position, view, "crop")
            box = transforms.multiscale_box(130, 98, 32, 24, rng)
            expected = (
                transforms.centre_crop(clip, 32, 24) if crop == "center" else transforms.crop_resize(clip, box, 32, 24)
            )
            assert (found["video"][view] == expected).all()
            assert (found["visible"][view] == generator(5, 2, position, view, "encoder_mask").permutation(9)).all()
        assert found["video"].shape == (views, 4, 24, 32, 3) and found["visible"].shape == (views, 9)

"""Crops and resizing against Pillow, and edge cases of frame choice that the golden files leave open."""

import numpy as np
import pytest
from PIL import Image

from pretrain.data.decoders.crops import Box
from pretrain.samples import sampling, transforms


def noise(frames: int, height: int, width: int) -> np.ndarray:
    smooth = np.random.default_rng(0).integers(0, 256, (frames, height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    fine = np.random.default_rng(1).integers(-20, 20, (frames, height, width, 3))
    large = smooth.repeat(8, 1).repeat(8, 2)[:, :height, :width].astype(int)
    return np.clip(large + fine, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "box", "out"),
    [
        (240, 320, (0, 0, 240, 240), (224, 224)),
        (240, 320, (57, 31, 158, 180), (224, 224)),
        (101, 77, (1, 2, 75, 98), (32, 32)),
        (64, 64, (0, 0, 64, 64), (64, 64)),
        (90, 160, (3, 4, 100, 80), (48, 32)),
        (720, 1280, (200, 0, 720, 720), (112, 112)),
    ],
)
def test_crop_and_resize_is_pillows_within_one_level(
    height: int, width: int, box: tuple[int, int, int, int], out: tuple[int, int]
) -> None:
    clip = noise(2, height, width)
    x, y, w, h = box
    found = transforms.crop_resize(clip, Box(*box), *out)
    expected = [
        np.asarray(Image.fromarray(frame).crop((x, y, x + w, y + h)).resize(out, Image.Resampling.BILINEAR))
        for frame in clip
    ]
    assert found.dtype == np.uint8 and found.shape == (2, out[1], out[0], 3)
    assert np.abs(found.astype(int) - np.stack(expected)).max() <= 1


def test_multiscale_boxes_stay_inside_and_reach_every_kind() -> None:
    rng = np.random.default_rng(0)
    boxes = {transforms.multiscale_box(320, 240, 224, 224, rng) for _ in range(3000)}
    kinds = {
        (w, h, *offset)
        for w, h in transforms.crop_sizes(320, 240, 224, 224)
        for offset in transforms.crop_offsets(320, 240, w, h)
    }
    assert {(box.width, box.height, box.x, box.y) for box in boxes} == kinds
    for width, height in [(223, 301), (222, 222), (1, 5), (225, 223)]:
        for _ in range(100):
            box = transforms.multiscale_box(width, height, 224, 224, rng)
            assert 0 <= box.x and box.x + box.width <= width and 0 <= box.y and box.y + box.height <= height


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (33, 77), (32, 32), (20, 300), (300, 20)])
def test_centre_crop_covers_the_middle(height: int, width: int) -> None:
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    clip = np.broadcast_to(ramp[None, None, :, None], (1, height, width, 3)).copy()
    found = transforms.centre_crop(clip, 32, 32)
    assert found.shape == (1, 32, 32, 3)
    assert abs(found.mean() - clip.mean()) < 4, "cut from the middle"


def test_resize_short_and_spatial_views() -> None:
    clip = noise(1, 120, 213)
    small = transforms.resize_short(clip, 60)
    assert small.shape == (1, 60, 106, 3)
    views = transforms.spatial_views(small, 60, 3)
    assert [view.shape for view in views] == [(1, 60, 60, 3)] * 3
    assert (views[2] == small[:, :, 46:]).all()
    assert (transforms.spatial_views(small, 60, 1)[0] == small[:, :, 23:83]).all()


def test_short_videos_repeat_their_last_frame() -> None:
    assert sampling.clip_frames(33, 16, 4, 0).tolist() == [0, 4, 8, 12, 16, 20, 24, *[28] * 9]
    assert sampling.clip_frames(1, 4, 4, 0).tolist() == [0, 0, 0, 0]
    for n in range(1, 80):
        for start in range(sampling.clip_starts(n, 8, 3)):
            frames = sampling.clip_frames(n, 8, 3, start)
            assert 0 <= frames.min() and frames.max() < n


def test_one_test_clip_is_the_middle() -> None:
    assert sampling.dense_views(100, 4, 4, 1).tolist() == [[40, 44, 48, 52]]
    with pytest.raises(ValueError, match="where the clip ends"):
        sampling.dense_frames(100, 16, 4, None)


@pytest.mark.parametrize(("margin", "cut"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4)])
def test_centre_crops_round_halves_to_even(margin: int, cut: int) -> None:
    clip = noise(1, 20, 20 + margin)
    assert (transforms.centre_crop(clip, 20, 20) == clip[:, :, cut : cut + 20]).all()
    assert (transforms.centre_crop(clip.swapaxes(1, 2), 20, 20) == clip.swapaxes(1, 2)[:, cut : cut + 20]).all()


def test_multiscale_sizes_snap_within_two_pixels_only() -> None:
    # Short sides whose four scales are 2 and 3 pixels off the output, from both sides.
    for short, snaps in [(226, True), (227, False), (222, True), (221, False)]:
        sizes = {width for width, _ in transforms.crop_sizes(400, short, 224, 224)}
        assert (224 in sizes, short in sizes) == (snaps, not snaps), short

"""Geometry and colour of clips with boxes: pixel conventions, by hand and against pixels that move along."""

import numpy as np
import pytest

from pretrain.data.decoders.crops import Box
from pretrain.samples.box_transforms import (
    CONVENTIONS,
    clip_boxes,
    crop_boxes,
    draw_hsv_shift,
    hsv_from_rgb,
    jitter_boxes_inclusive,
    mirror_boxes,
    pixels_from_shares,
    resized_size,
    rgb_from_hsv,
    scale_boxes,
    shares_from_pixels,
    shift_hsv,
)

ALPHACTION, SLOWFAST, CONTINUOUS = (CONVENTIONS[name] for name in ("alphaction", "slowfast", "continuous"))


@pytest.mark.parametrize(
    ("frame", "short", "long", "nearest", "wanted"),
    [
        ((640, 360), 256, None, False, (455, 256)),
        ((640, 360), 288, 1333, True, (512, 288)),
        ((360, 640), 256, None, False, (256, 455)),
        ((640, 361), 256, None, False, (453, 256)),
        ((640, 361), 256, None, True, (454, 256)),  # 453.85
        ((2000, 360), 256, 464, False, (466, 84)),  # the short side is rounded first, 83.52
        ((2000, 360), 288, 1333, True, (1333, 240)),
        ((456, 256), 256, None, False, (456, 256)),  # of the asked size: not turned on its side
        ((256, 256), 224, None, False, (224, 224)),
        ((333, 111), 37, None, False, (111, 37)),
    ],
)
def test_sizes(frame: tuple[int, int], short: int, long: int | None, nearest: bool, wanted: tuple[int, int]) -> None:
    assert resized_size(*frame, short, long, nearest) == wanted


def test_loaded_boxes() -> None:
    whole, small = [0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.252, 0.502]
    found = {name: pixels_from_shares([whole, small], 100, 50, rules) for name, rules in CONVENTIONS.items()}
    np.testing.assert_allclose(found["alphaction"], [[0, 0, 99, 49], [25, 25, 25, 25]])
    np.testing.assert_allclose(found["slowfast"], [[0, 0, 99, 49], [25, 25, 25.2, 25.1]], rtol=1e-6)
    np.testing.assert_allclose(found["continuous"], [[0, 0, 100, 50], [25, 25, 25.2, 25.1]], rtol=1e-6)


@pytest.mark.parametrize("name", ["alphaction", "continuous"])
def test_answers_are_the_loaded_boxes(name: str) -> None:
    """Down to another size and back: the boxes that were loaded, also at the border."""
    rules, shares = CONVENTIONS[name], np.array([[0, 0, 1, 1], [0.1, 0.2, 0.5, 0.9]], np.float32)
    pixels = scale_boxes(pixels_from_shares(shares, 640, 360, rules), (640, 360), (455, 256))
    np.testing.assert_allclose(shares_from_pixels(pixels, (455, 256), (640, 360), rules), shares, atol=1e-6)


def test_boxes_follow_the_mirrored_pixels() -> None:
    picture = np.zeros((10, 30), np.uint8)
    picture[2:5, 4:11] = 1
    mirrored = np.argwhere(picture[:, ::-1])
    (y1, x1), (y2, x2) = mirrored.min(0), mirrored.max(0)
    assert mirror_boxes(np.float32([[4, 2, 10, 4]]), 30, ALPHACTION).tolist() == [[x1, y1, x2, y2]]
    assert mirror_boxes(np.float32([[4, 2, 11, 5]]), 30, CONTINUOUS).tolist() == [[x1, y1, x2 + 1, y2 + 1]]
    assert mirror_boxes(np.float32([[4, 2, 11, 5]]), 30, SLOWFAST).tolist() == [[x1 - 1, y1, x2, y2 + 1]]


def test_crops_and_borders() -> None:
    boxes = np.float32([[5, 5, 40, 40], [50, 50, 60, 60], [-3, -3, 4, 4]])
    crop = Box(10, 8, 20, 16)
    assert crop_boxes(boxes, crop, ALPHACTION).tolist() == [[0, 0, 19, 15], [19, 15, 19, 15], [0, 0, 0, 0]]
    assert crop_boxes(boxes, crop, CONTINUOUS).tolist() == [[0, 0, 20, 16], [20, 16, 20, 16], [0, 0, 0, 0]]
    assert clip_boxes(boxes, 30, 20, SLOWFAST).tolist() == [[5, 5, 29, 19], [29, 19, 29, 19], [0, 0, 4, 4]]


def test_jitter_moves_sides_within_their_limits() -> None:
    box = np.tile(np.float32([[100, 100, 149, 299]]), (4000, 1))  # 50 x 200 by the inclusive rule
    moved = jitter_boxes_inclusive(box, 1000, 1000, np.random.default_rng(0)) - box
    for side, (least, most) in enumerate([(-10, 5), (-20, 10), (-5, 10), (-10, 20)]):
        found = moved[:, side].min(), moved[:, side].max()
        np.testing.assert_allclose(found, (least, most), rtol=0.02)
    assert abs(np.corrcoef(moved[:, 0], moved[:, 2])[0, 1]) < 0.1, "sides are drawn one by one"
    corner = np.float32([[39, 29, 39, 29], [0, 0, 0, 0]])
    found = jitter_boxes_inclusive(corner, 40, 30, np.random.default_rng(1))
    assert ((found[:, 2:] - found[:, :2]) > 0.999).all() and (found >= 0).all() and (found <= [39, 29, 39, 29]).all()


def test_colours_are_opencvs() -> None:
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)
    assert (np.stack(hsv_from_rgb(pixels), -1) == cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)).all()
    hsv = np.stack([rng.integers(0, most, (200, 300)) for most in (180, 256, 256)], -1).astype(np.uint8)
    found = rgb_from_hsv(*(hsv[..., channel].astype(np.int32) for channel in range(3)))
    away = np.abs(found.astype(int) - cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))
    assert away.max() <= 1 and (away > 0).mean() < 0.1


def test_hue_turns_around_and_levels_end() -> None:
    red = np.full((1, 1, 1, 3), (200, 0, 0), np.uint8)
    assert shift_hsv(red, 60, 0, 0).flatten().tolist() == [0, 200, 0]
    assert shift_hsv(red, -60, 0, 0).flatten().tolist() == [0, 0, 200]
    assert shift_hsv(red, 0, 26, 255).flatten().tolist() == [255, 0, 0]
    grey = np.full((2, 3, 4, 3), 77, np.uint8)
    assert (shift_hsv(grey, 10, 0, -77) == 0).all() and (shift_hsv(grey, 10, 0, 0) == 77).all()
    drawn = np.array([draw_hsv_shift(np.random.default_rng(seed)) for seed in range(2000)])
    assert drawn.min(0).tolist() == [-10, -26, -26] and drawn.max(0).tolist() == [10, 26, 26]

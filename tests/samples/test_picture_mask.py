"""Pictures with masks: both are cut alike, values become classes, and what is no mask is named."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.data.members import Members
from pretrain.data.samples import Place, Sample, SourceInfo
from pretrain.errors import SampleError
from pretrain.metrics.segmentation import NO_CLASS
from pretrain.recipe.schema import Source
from pretrain.samples.picture_mask import Config, MaskedPictures, resize_labels

INFO = SourceInfo("pictures", "nowhere", Source(shards="nowhere"))
#: Grey of each class in the pictures of these tests.
STEP = 20


def stored(values: np.ndarray, mode: str | None = None) -> bytes:
    image = Image.fromarray(values)
    if mode == "P":
        image = image.convert("L").copy()
        image.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def regions(height: int = 60, width: int = 90) -> np.ndarray:
    """A mask of six large regions, classes 0 to 5."""
    return (np.arange(height)[:, None] * 2 // height * 3 + np.arange(width)[None] * 3 // width).astype(np.uint8)


def members(mask: np.ndarray, mode: str | None = None) -> Members:
    picture = np.repeat((regions() * STEP)[..., None], 3, axis=2)
    return Members({"png": stored(picture), "mask.png": stored(mask, mode)})


def place(position: int) -> Place:
    return Place(epoch=1, position=position, source=0, shard=0, row=0)


def samples(classes: int = 6, **options: Any) -> MaskedPictures:
    given = {"short_side": 60, "crop_size": 32, "colour": "none", **options}
    return MaskedPictures(Config(**given), 7, classes)


def test_picture_and_mask_are_cut_alike() -> None:
    """At any size, crop and mirror: a pixel's grey tells its class, except beside edges, where pixels are mixed."""
    made, mirrored, filled = samples(), 0, 0
    for position in range(40):
        arrays = made(place(position), INFO, members(regions()))
        video, mask = arrays["video"][0, 0, :, :, 0].astype(int), arrays["mask"][0]
        assert video.shape == mask.shape == (32, 32) and mask.dtype == np.int16
        assert (video == mask * STEP)[mask != NO_CLASS].mean() > 0.75
        assert (video[mask == NO_CLASS] == 114).all()
        row = mask[0][mask[0] != NO_CLASS]
        mirrored += row[0] > row[-1]
        filled += (mask == NO_CLASS).any()
    assert 5 < mirrored < 35 and 0 < filled < 40


def test_the_same_place_gives_the_same_bytes() -> None:
    one, same, other = (samples(colour="hsv")(place(at), INFO, members(regions())) for at in (3, 3, 4))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    assert not np.array_equal(one["video"], other["video"])


def test_crops_of_one_class_are_drawn_again() -> None:
    """One corner of another class: without the rule crops hardly ever see it."""
    mask = np.zeros((60, 90), np.uint8)
    mask[:20, :30] = 1

    def seen(**options: Any) -> int:
        made = samples(scale=(1.0, 1.0), **options)
        return sum((made(place(at), INFO, members(mask))["mask"] == 1).mean() >= 0.2 for at in range(30))

    assert seen(max_class_share=0.8) > seen(max_class_share=1.0) + 5


def test_values_become_classes() -> None:
    """ADE20K's masks begin at 1, and 0 is nothing; palettes are read by index."""
    mask = regions()
    mask[0, 0] = 255
    made = samples(5, first_class=1)
    for mode in (None, "P"):
        labels = made.without_chance(INFO, members(mask, mode))["mask"][0]
        assert labels[0, 0] == NO_CLASS and labels[1, 0] == NO_CLASS
        assert np.array_equal(labels[1:], regions()[1:].astype(int) - 1)
    deep = regions().astype(np.uint16) * 100
    assert samples(501).without_chance(INFO, members(deep))["mask"].max() == 500


def test_judged_pictures_are_whole_and_masks_as_they_are() -> None:
    arrays = samples(short_side=30).without_chance(INFO, members(regions()))
    assert arrays["video"].shape == (1, 1, 30, 45, 3) and arrays["mask"].shape == (1, 60, 90)
    limited = samples(short_side=30, long_side=30).without_chance(INFO, members(regions()))
    assert limited["video"].shape == (1, 1, 20, 30, 3)


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (regions()[:-1], "a picture of 60 x 90 with a mask of 59 x 90 pixels"),
        (regions() + 3, r"value 8 in a mask; allowed: 0 to 5 for 6 classes .* and 255"),
        (np.zeros((60, 90, 3), np.uint8), r"a mask of mode RGB \(R, G, B\); allowed: one number for each pixel"),
    ],
)
def test_what_is_no_mask_is_named(mask: np.ndarray, told: str) -> None:
    with pytest.raises(SampleError, match=told) as caught:
        samples()(place(0), INFO, members(mask))
    assert caught.value.reason == "mask"


def test_a_picture_without_a_mask_is_named() -> None:
    alone = Members({"png": stored(np.zeros((9, 9, 3), np.uint8))})
    with pytest.raises(SampleError, match="named 'mask'"):
        samples()(place(0), INFO, alone)


def test_labels_are_the_nearest_ones() -> None:
    labels = np.array([[0, 1], [2, 3]], np.int16)
    assert np.array_equal(resize_labels(labels, 4, 2), [[0, 0, 1, 1], [2, 2, 3, 3]])
    assert np.array_equal(resize_labels(np.arange(9, dtype=np.int16)[None], 3, 1), [[1, 4, 7]])


def test_a_batch_and_its_example() -> None:
    made = samples()
    rows = [Sample(place(at), str(at), made(place(at), INFO, members(regions()))) for at in range(3)]
    found, example = made.collate(rows), made.example(3)
    for name in ("video", "mask"):
        assert found[name].shape == example[name].shape and found[name].dtype == example[name].dtype
    assert int(example["mask"].max()) == 5


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"crop_size": 0}, "input.crop_size: found 0, allowed: more than 0"),
        ({"flip": 2.0}, "input.flip: found 2.0, allowed: a share from 0 to 1"),
        ({"scale": (2.0, 0.5)}, "input.scale: found [2.0, 0.5], allowed: two factors above 0, the smaller one first"),
        ({"views": 2}, "input.views: found 2, allowed: 1"),
        ({"first_class": -1}, "input.first_class: found -1, allowed: 0 or more"),
    ],
)
def test_options_that_can_not_be_are_named(wrong: dict[str, Any], told: str) -> None:
    assert Config(**wrong).problems() == [told]

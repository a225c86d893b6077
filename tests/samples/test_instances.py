"""Pictures with objects: boxes follow their masks through every size, crop and mirror; annotations that are none."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.commands.pack import main as pack
from pretrain.data.instance_masks import mask_of, packed_runs, runs_of
from pretrain.data.members import Members
from pretrain.data.pack.manifests import read_rows
from pretrain.data.samples import Place, SourceInfo
from pretrain.errors import RecipeError, SampleError
from pretrain.recipe.schema import Source
from pretrain.samples.instance_geometry import unpacked_masks
from pretrain.samples.instances import Config, InstancePictures

NAMES = ["disc", "box"]
SOURCE = SourceInfo("toy", (), Source(shards=""))
HEIGHT, WIDTH = 60, 90
#: Polygons of a box, of a triangle that lies half outside, and of two parts.
POLYGONS: list[list[list[float]]] = [
    [[10, 10, 40, 10, 40, 30, 10, 30]],
    [[70, 40, 110, 40, 90, 80]],
    [[50, 5, 60, 5, 60, 15, 50, 15], [70, 20, 80, 20, 80, 30, 70, 30]],
]


def annotated(segmentation: Any, label: str = "box", **more: Any) -> dict[str, Any]:
    mask = mask_of(segmentation, HEIGHT, WIDTH)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    empty = not len(rows)
    box = [0, 0, 0, 0] if empty else [int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
    return {"id": 1, "category": label, "bbox": box, "area": float(mask.sum()), "iscrowd": 0,
            "segmentation": segmentation, **more}  # fmt: skip


def members(objects: list[dict[str, Any]], **facts: Any) -> Members:
    """A white picture whose objects are black."""
    pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    for one in objects:
        if one.get("segmentation"):
            pixels[mask_of(one["segmentation"], HEIGHT, WIDTH)] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    content = {"image_id": 5, "height": HEIGHT, "width": WIDTH, "objects": objects, **facts}
    return Members({"png": file.getvalue(), "objects.json": json.dumps(content).encode()})


def made(objects: list[dict[str, Any]], epoch: int = 0, **options: Any) -> dict[str, Any]:
    config = Config(**{"short_side": 60, "long_side": None, **options})
    return dict(InstancePictures(config, 0, NAMES)(Place(epoch, 0, 0, 0, 0), SOURCE, members(objects)))


@pytest.mark.parametrize(
    "options",
    [{"flip": 0}, {"flip": 1}, {"train_sides": [40, 97]}, {"crop_size": 48, "scale": (0.5, 2.5), "flip": 0.5},
     {"crop_size": 64, "scale": (0.2, 0.4)}],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_boxes_and_masks_lie_on_what_they_are_of(options: dict[str, Any], packed: bool) -> None:
    """Objects are black on white: dark pixels are the masks', and each box is as large as its mask, within a pixel."""
    objects = []
    for polygons in POLYGONS:
        runs = packed_runs(runs_of(mask_of(polygons, HEIGHT, WIDTH)))
        objects.append(annotated({"size": [HEIGHT, WIDTH], "counts": runs} if packed else polygons))
    seen = 0
    for epoch in range(6):
        found = made(objects, epoch, **options)
        video, (height, width) = found["video"][0, 0], found["sizes"][0]
        assert video.shape == (height, width, 3)
        masks = unpacked_masks(found["masks"], width)
        dark = video[:, :, 0] < 128
        assert (masks.any(0) != dark).mean() < 0.08 and len(masks) == found["counts"][0] == len(found["labels"])
        for mask, (x1, y1, x2, y2) in zip(masks, found["boxes"], strict=True):
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            extent = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            slack = 1.5 * max(1, max(height / HEIGHT, width / WIDTH)) if "crop_size" not in options else 3
            assert np.abs(extent - (x1, y1, x2, y2)).max() <= slack
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        seen += len(masks)
    assert seen >= 6, "of objects that are all cut away nothing is shown"


def test_a_mirrored_picture_is_that_of_its_mirror() -> None:
    plain, turned = (made([annotated(one) for one in POLYGONS], flip=flip) for flip in (0, 1))
    assert np.array_equal(turned["video"], plain["video"][:, :, :, ::-1])
    masks = [unpacked_masks(one["masks"], WIDTH) for one in (plain, turned)]
    assert np.array_equal(masks[1], masks[0][:, :, ::-1])
    boxes = plain["boxes"].copy()
    boxes[:, [0, 2]] = WIDTH - boxes[:, [2, 0]]
    np.testing.assert_allclose(turned["boxes"], boxes, atol=1e-4)


def test_what_can_not_be_learned_is_left_out_and_judged() -> None:
    """A crowd, a box without width, a mask outside of the picture: no objects to learn, but the truth has them all."""
    objects = [
        annotated(POLYGONS[0], iscrowd=1),
        annotated(POLYGONS[1], bbox=[70.5, 40, 0, 20]),
        annotated([[300, 300, 320, 300, 320, 320]], bbox=[300, 300, 20, 20]),
        annotated(POLYGONS[2], "disc"),
    ]
    found = made(objects, flip=0)
    assert found["labels"].tolist() == [0] and found["counts"].tolist() == [1] and found["masks"].shape[0] == 1
    samples = InstancePictures(Config(short_side=30), 0, NAMES)
    judged = samples.without_chance(SOURCE, members(objects))
    assert judged["truth_labels"].tolist() == [1, 1, 1, 0]
    assert judged["truth_crowd"].tolist() == [True, False, False, False]
    assert judged["truth_boxes"][2].tolist() == [300, 300, 320, 320] and judged["video"].shape == (1, 1, 30, 45, 3)
    assert judged["truth_masks"].shape == (4, HEIGHT, 12) and not judged["truth_masks"][2].any()
    nothing = made([], flip=0)
    assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, HEIGHT, 12)


@pytest.mark.parametrize(
    ("objects", "facts", "told"),
    [
        ([annotated(POLYGONS[0], "cat")], {}, r"categories \['cat'\], which are none of the 2 classes"),
        ([{**annotated(POLYGONS[0]), "segmentation": None}], {}, r"annotations \[1\] have no segmentation"),
        ([annotated(POLYGONS[0])], {"height": 30}, "of a picture of 90 x 30 pixels beside one of 90 x 60"),
        ([{**annotated(POLYGONS[0]), "bbox": [1, 2, 3]}], {}, "not what pack.py --with objects writes"),
        ([{"category": "box"}], {}, "annotations|not what pack.py"),
    ],
)
def test_objects_that_are_none_are_told(objects: list[dict[str, Any]], facts: dict[str, Any], told: str) -> None:
    samples = InstancePictures(Config(), 0, NAMES)
    with pytest.raises(SampleError, match=told) as caught:
        samples(Place(0, 0, 0, 0, 0), SOURCE, members(objects, **facts))
    assert caught.value.reason == "objects"
    with pytest.raises(SampleError, match="no objects"):
        samples(Place(0, 0, 0, 0, 0), SOURCE, Members({"png": members([]).files["png"]}))


def content(**changes: Any) -> dict[str, Any]:
    one = {"id": 4, "image_id": 1, "category_id": 30, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0,
           "segmentation": POLYGONS[0]}  # fmt: skip
    found = {"images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
             "categories": [{"id": 30, "name": "box"}, {"id": 2, "name": "disc"}]}  # fmt: skip
    return {**found, "annotations": [{**one, **changes}]}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (content(bbox=[1, 2, -3, 4]), r"a.png: annotation 4: bbox \[1, 2, -3, 4\], allowed: x, y, width and height"),
        (content(bbox=[1, 2, 3]), "annotation 4: bbox"),
        (content(segmentation=[[1, 2, 3, 4]]), "annotation 4: a polygon of 4 numbers"),
        (content(segmentation={"size": [HEIGHT, WIDTH], "counts": [3]}), "annotation 4: run lengths of 3 pixels"),
        (content(area=float("nan")), "annotation 4: area"),
    ],
)
def test_wrong_annotations_are_told_with_their_picture(wrong: dict[str, Any], told: str, tmp_path: Path) -> None:
    (tmp_path / "all.json").write_text(json.dumps(wrong))
    rows = read_rows("all.json", (tmp_path / "all.json").read_text())
    assert rows is not None and isinstance(rows[0][1], str)
    assert re.search(told, rows[0][1]), rows[0][1]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (content(image_id=9), "annotation 4: of a picture that `images` does not name"),
        (content(category_id=31), r"annotations \[4\] \(1 in all\): category_id 31, which `categories` does not name"),
        ({**content(), "categories": 2 * content()["categories"][:1]}, "2 categories of the name 'box'"),
        ({**content(), "images": [{"id": 1}]}, "not COCO's json of objects"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        read_rows("all.json", json.dumps(wrong))


def test_packing_ends_with_the_wrong_annotations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "all.json").write_text(json.dumps(content(bbox=[1, 2, 3])))
    words = [str(tmp_path / "all.json"), str(tmp_path / "out"), "--with", "objects", "--workers", "0"]
    assert pack(words) == 2
    assert "all.json:1: a.png: annotation 4: bbox [1, 2, 3]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

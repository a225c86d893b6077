"""COCO's annotation files of single objects, `instances_*.json`: a row for each picture, with its objects.

A row's column `objects` is what `pack.py --with objects` makes the member `objects.json` of:

    {"image_id": 139, "height": 426, "width": 640, "objects": [{"id": 26547, "category": "tv", "iscrowd": 0,
     "bbox": [x, y, width, height], "area": 3511.2, "segmentation": [[x1, y1, x2, y2, ...], ...]}, ...]}

Categories have their names, so that neither gaps in their ids nor their order matter to a reader.
"""

import math
from collections import Counter, defaultdict
from typing import Any

from pretrain.data.instance_masks import check_segmentation
from pretrain.data.pack.annotations import Row
from pretrain.errors import RecipeError
from pretrain.runtime.untrusted import parse_json

#: Keys by which such a file is known.
PARTS = ("images", "annotations", "categories")


def holds_instances(text: str) -> bool:
    """Tell whether a json looks like an annotation file of COCO's kind."""
    return all(f'"{part}"' in text for part in PARTS)


def instance_rows(source: str, text: str) -> list[Row]:
    """Read the pictures and their objects, in the order of the file; a picture without objects has none.

    Returns:
        rows as of a manifest: `path`, the picture's `file_name`, and `objects`; what is wrong with a picture's objects
        stands in the place of its row.

    Raises:
        RecipeError: another kind of json, or annotations of a picture or category that the file does not name.
    """
    try:
        content = parse_json(text)
        pictures, annotations, categories = ([*content[part]] for part in PARTS)
        names = {one["id"]: str(one["name"]) for one in categories}
        by_picture: dict[Any, list[dict[str, Any]]] = {one["id"]: [] for one in pictures}
        rows = [(one["id"], one["file_name"], one["height"], one["width"]) for one in pictures]
        strangers = [one["id"] for one in annotations if one["image_id"] not in by_picture]
        unnamed = defaultdict(list)
        for one in annotations:
            if one["category_id"] not in names:
                unnamed[one["category_id"]].append(one["id"])
            by_picture.setdefault(one["image_id"], []).append(one)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"{source}: not COCO's json of objects, images: [{{id, file_name, height, width}}], categories: [{{id, "
            "name}], annotations: [{id, image_id, category_id, bbox, segmentation}] "
            f"({type(error).__name__}: {error})"
        ) from error
    problems = [f"{source}: annotation {one}: of a picture that `images` does not name" for one in strangers]
    problems += [
        f"{source}: annotations {ids[:3]} ({len(ids)} in all): category_id {number!r}, which `categories` does not name"
        for number, ids in unnamed.items()
    ]
    problems += _twice(source, "categories of the name", [str(one["name"]) for one in categories])
    problems += _twice(source, "pictures of the id", [one[0] for one in rows])
    if problems:
        raise RecipeError(problems)
    return [(number, _row(by_picture[row[0]], *row, names)) for number, row in enumerate(rows, 1)]


def _twice(source: str, what: str, values: list[Any]) -> list[str]:
    counts = Counter(values).items()
    return [f"{source}: {count} {what} {value!r}; allowed: one" for value, count in counts if count > 1]


def _row(
    annotations: list[dict[str, Any]], image_id: Any, name: str, height: int, width: int, names: dict[Any, str]
) -> dict[str, Any] | str:
    if not (type(height) is type(width) is int and min(height, width) > 0):
        return f"{name}: height {height!r} and width {width!r}, allowed: pixels of the picture"
    try:
        objects = [_object(one, names[one["category_id"]], height, width) for one in annotations]
    except ValueError as error:
        return f"{name}: {error}; correct the annotation, or leave it out"
    facts = {"image_id": image_id, "height": height, "width": width, "objects": objects}
    return {"path": name, "objects": facts}


def _object(annotation: dict[str, Any], category: str, height: int, width: int) -> dict[str, Any]:
    """Bring an annotation to the fields that are packed.

    Raises:
        ValueError: numbers or a mask that are none.
    """
    try:
        box = [float(one) for one in annotation["bbox"]]
        # A box of no width or height is published in COCO itself; what it means is the reader's affair.
        if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
            raise ValueError(f"bbox {annotation['bbox']}, allowed: x, y, width and height, finite, the last two from 0")
        found = {
            "id": annotation["id"],
            "category": category,
            "bbox": annotation["bbox"],
            "iscrowd": int(bool(annotation.get("iscrowd", 0))),
            "area": float(annotation.get("area", box[2] * box[3])),
        }
        if not math.isfinite(found["area"]) or found["area"] < 0:
            raise ValueError(f"area {annotation['area']!r}, allowed: pixels from 0")
        if annotation.get("segmentation"):
            check_segmentation(annotation["segmentation"], height, width)
            found["segmentation"] = annotation["segmentation"]
    except (ValueError, KeyError, TypeError) as error:
        told = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"annotation {annotation.get('id')!r}: {told}") from error
    return found

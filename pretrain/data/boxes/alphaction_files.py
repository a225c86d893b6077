"""AlphAction's json files, which the VideoMAE detector and CycleACR use as well: boxes in pixels of shrunk frames.

| file | form |
|---|---|
| annotations | `images: [{id, movie, timestamp, width, height, …}]`, `annotations: [{image_id, action_ids, bbox, …}]` |
| detections | `[{image_id, bbox, score, …}]`; the images are those of an annotation file |

`bbox` is x, y, width, height; here it becomes shares of the frame, x2 = x + width. Source: specification, 2.4 and 2.5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.data.boxes.records import NONE, BoxRecords, read_text
from pretrain.errors import RecipeError
from pretrain.runtime.untrusted import parse_json


@dataclass(frozen=True)
class Image:
    """A keyframe as the file knows it; width and height in pixels."""

    movie: str
    time: float
    width: float
    height: float


def read_alphaction(source: str) -> tuple[BoxRecords, dict[int, Image]]:
    """Read annotations.

    Returns:
        Rows, one a box and label; keyframes without a box are `empty`. And the images by id, for detections.

    Raises:
        RecipeError: another json, or records that lack something: all of them, by name.
    """
    content = _parsed(source)
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise RecipeError(f"{source}: not AlphAction's annotations; expected is an object with images and annotations")
    problems: list[str] = []
    images: dict[int, Image] = {}
    for number, one in enumerate(content["images"]):
        try:
            image = Image(str(one["movie"]), float(one["timestamp"]), float(one["width"]), float(one["height"]))
            if image.width <= 0 or image.height <= 0:
                raise ValueError(f"{image.width:g}x{image.height:g} pixels")
            images[int(one["id"])] = image
        except (KeyError, TypeError, ValueError) as error:
            problems.append(_wrong(source, "images", number, "id, movie, timestamp, width and height", error))
    rows = _Rows(source, images)
    for number, one in enumerate(content["annotations"]):
        rows.add("annotations", number, one, labelled=True)
    if problems or rows.problems:
        raise RecipeError(problems + rows.problems)
    return rows.records([key for key in images if key not in rows.seen]), images


def read_alphaction_detections(source: str, images: Mapping[int, Image], min_score: float = 0.0) -> BoxRecords:
    """Read boxes of a person detector.

    Args:
        source: path or URL.
        images: of the annotation file.
        min_score: boxes with a lower score are left out; 0.8 in the official code.

    Raises:
        RecipeError: another json, records that lack something, or of images that the annotations don't have.
    """
    content = _parsed(source)
    if not isinstance(content, list):
        raise RecipeError(f"{source}: not AlphAction's detections; expected is a list of {{image_id, bbox, score}}")
    rows = _Rows(source, images)
    for number, one in enumerate(content):
        rows.add("detections", number, one, labelled=False, min_score=min_score)
    if rows.problems:
        raise RecipeError(rows.problems)
    return rows.records([])


def is_alphaction(content: Any) -> bool:
    """Tell whether a parsed json is a file of AlphAction's."""
    if isinstance(content, dict):
        return {"images", "annotations"} <= set(content)
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict) and "image_id" in content[0]


def _parsed(source: str) -> Any:
    try:
        return parse_json(read_text(source))
    except ValueError as error:
        raise RecipeError(f"{source}: not JSON ({error})") from error


def _wrong(source: str, what: str, number: int, expected: str, error: Exception) -> str:
    said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
    return f"{source}: {what}[{number}]: {said}; expected are {expected}"


class _Rows:
    """Rows in the making."""

    def __init__(self, source: str, images: Mapping[int, Image]) -> None:
        self.source, self.images = source, images
        self.problems: list[str] = []
        self.seen: set[int] = set()
        self.keys: list[int] = []
        self.boxes: list[tuple[float, float, float, float]] = []
        self.labels: list[int] = []
        self.scores: list[float] = []
        self.persons: list[int] = []
        self.places: list[str] = []

    def add(self, what: str, number: int, one: Any, labelled: bool, min_score: float = 0.0) -> None:
        """Add the rows of one record."""
        try:
            key = int(one["image_id"])
            image = self.images[key] if key in self.images else None
            if image is None:
                raise ValueError(f"image_id {key} is none of the annotations' images")
            x, y, width, height = (float(value) for value in one["bbox"])
            labels = [int(label) for label in one["action_ids"]] if labelled else []
            score = np.nan if labelled else float(one["score"])
            # A missing number is a fault of the person alone, and the box stands without.
            person = int(one.get("person_id", NONE)) if labelled else NONE
        except (KeyError, TypeError, ValueError) as error:
            expected = "image_id, bbox [x, y, width, height] and " + ("action_ids" if labelled else "score")
            self.problems.append(_wrong(self.source, what, number, expected, error))
            return
        if score < min_score:
            return
        self.seen.add(key)
        box = (x / image.width, y / image.height, (x + width) / image.width, (y + height) / image.height)
        for label in labels or [NONE]:
            self.keys.append(key)
            self.boxes.append(box)
            self.labels.append(label)
            self.scores.append(score)
            self.persons.append(person)
            self.places.append(f"{what}[{number}]")

    def records(self, empty: list[int]) -> BoxRecords:
        """Build what was added."""
        found = [self.images[key] for key in self.keys]
        return BoxRecords(
            self.source, [one.movie for one in found], np.array([one.time for one in found], dtype=np.float64),
            np.array(self.boxes, dtype=np.float64).reshape(-1, 4), np.array(self.labels, dtype=np.int64),
            np.array(self.scores, dtype=np.float64), np.array(self.persons, dtype=np.int64), self.places,
            [(self.images[key].movie, self.images[key].time, f"images {key}") for key in empty],
        )  # fmt: skip

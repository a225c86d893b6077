"""Objects of one picture, as `pack.py --with objects` writes them of COCO's json, and as a class list counts them."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.members import Members
from pretrain.errors import SampleError

#: Name under which a sample's objects are found, and the reason of what is wrong with them.
OBJECTS = "objects"


@dataclass(frozen=True)
class Instances:
    """Objects of a picture.

    Attributes:
        image_id: number or name of the picture in its annotation file.
        height, width: of the picture, pixels.
        boxes: x1, y1, x2, y2 in pixels, as annotated [n, 4].
        labels: classes, int64 [n].
        areas: pixels, as annotated [n].
        crowd: several objects as one, bool [n].
        segmentations: polygons or run lengths, see `mask_of`.
    """

    image_id: Any
    height: int
    width: int
    boxes: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    areas: npt.NDArray[np.float64]
    crowd: npt.NDArray[np.bool_]
    segmentations: list[Any]

    def take(self, rows: npt.NDArray[np.int64]) -> "Instances":
        """Select some of the objects."""
        kept = {name: getattr(self, name)[rows] for name in ("boxes", "labels", "areas", "crowd")}
        return replace(self, **kept, segmentations=[self.segmentations[row] for row in rows.tolist()])


def read_instances(members: Members, names: list[str]) -> Instances:
    """Read a sample's objects.

    Args:
        members: of the sample.
        names: of the classes, in their order.

    Raises:
        SampleError: "index" where there are none, "objects" for something else than what packing writes.
    """
    content = members.stated(OBJECTS, OBJECTS)
    if content is None:
        raise SampleError("index", "no objects (objects.json, or `objects` in its json); pack with --with objects")
    try:
        objects = content["objects"]
        unknown = sorted({str(one["category"]) for one in objects} - {*names})
        if unknown:
            raise SampleError(OBJECTS, f"categories {unknown[:5]}, which are none of the {len(names)} classes that "
                              "data.sources.<name>.labels names")  # fmt: skip
        bare = [one["id"] for one in objects if not one.get("segmentation")]
        if bare:
            raise SampleError(OBJECTS, f"annotations {bare[:5]} have no segmentation; masks are learned from them")
        numbers = {name: number for number, name in enumerate(names)}
        boxes = np.array([one["bbox"] for one in objects], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        if not np.isfinite(boxes).all():
            raise ValueError("a box that is not finite")
        return Instances(
            content["image_id"], int(content["height"]), int(content["width"]), boxes,
            np.array([numbers[one["category"]] for one in objects], np.int64),
            np.array([one["area"] for one in objects], np.float64),
            np.array([one["iscrowd"] for one in objects], bool),
            [one["segmentation"] for one in objects],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise SampleError(OBJECTS, f"not what pack.py --with objects writes of COCO's json ({what})") from error

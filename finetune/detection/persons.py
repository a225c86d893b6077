"""Persons in pictures: detectors that a two-stage model is given its boxes by.

A detector is any function from a picture to `FoundPersons`; `person_detector` finds one by what the user typed.
OpenCV's needs no weights, torchvision's those of a file, and one of one's own is named `module:function`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.errors import DataError, RecipeError, WeightsError
from pretrain.metrics.overlap import iou_continuous, suppress
from pretrain.runtime.vision_ops import ensure_torchvision

Picture = npt.NDArray[np.uint8]

#: Sides of HOG's window that are background, as shares of it: its training pictures have a margin of 16 of 64 x 128
#: pixels around the person (Dalal and Triggs 2005, section 5), of which OpenCV's own sample takes these off.
MARGIN_X, MARGIN_Y = 0.1, 0.07
#: A person must be about 100 pixels high for HOG's window; smaller pictures are enlarged to this height.
HOG_HEIGHT = 864
#: Boxes that overlap more are one person.
SAME_PERSON = 0.5
#: Boxes of a detector of one's own may reach so far out of the picture, as a share of it, and are cut.
BORDER = 0.01
#: COCO's number of the class person.
PERSON = 1


@dataclass(frozen=True)
class FoundPersons:
    """Persons of one picture.

    Attributes:
        boxes: x1, y1, x2, y2 as shares of width and height, float32 [n, 4].
        scores: from 0 to 1, float32 [n].
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]


PersonDetector = Callable[[Picture], FoundPersons]


def person_detector(name: str) -> PersonDetector:
    """Find a detector.

    Args:
        name: `hog`; `torchvision:MODEL:FILE`, a builder of torchvision.models.detection and a file of its weights; or
            `MODULE:FUNCTION`, of one's own, which takes a picture uint8 [H, W, 3] in RGB and returns `FoundPersons`.

    Raises:
        RecipeError: no such detector.
        DataError: a library that it needs is missing. One of one's own raises it as well where it answers with
            something else than boxes in shares.
        WeightsError: weights that can't be read or don't fit.
    """
    if name == "hog":
        return HogDetector()
    if name.startswith("torchvision:"):
        _, model, file = (name.split(":", 2) + ["", ""])[:3]
        return TorchvisionDetector(model, file)
    module, _, function = name.partition(":")
    if not module or not function:
        raise RecipeError(
            f"person detector: found {name!r}, allowed: hog, torchvision:MODEL:WEIGHTS_FILE, or MODULE:FUNCTION, one "
            "of your own"
        )
    try:
        found: PersonDetector = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"person detector {name!r}: {error}") from error
    return partial(_checked, found, name)


def _checked(detector: PersonDetector, name: str, picture: Picture) -> FoundPersons:
    """Ask a detector of one's own. Pixels in the place of shares would be cut to boxes at the picture's corner.

    Raises:
        DataError: something else than boxes in shares with a score each.
    """
    found = detector(picture)
    try:
        boxes, scores = (np.asarray(one, np.float32) for one in (found.boxes, found.scores))
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"person detector {name!r}: FoundPersons is expected, got {type(found).__name__}") from error
    if scores.ndim != 1 or boxes.shape != (len(scores), 4):
        told = f"boxes {boxes.shape} and scores {scores.shape}, allowed: [n, 4] and [n]"
        raise DataError(f"person detector {name!r}: {told}")
    inside = ((boxes >= -BORDER) & (boxes <= 1 + BORDER)).all(1) & (boxes[:, :2] < boxes[:, 2:]).all(1)
    right = inside & (scores >= 0) & (scores <= 1)
    if not right.all():  # NaN is not right either
        row, (height, width) = int(np.argmin(right)), picture.shape[:2]
        raise DataError(
            f"person detector {name!r}: box {boxes[row].tolist()} with score {scores[row]:g}, allowed: x1 < x2, y1 < "
            f"y2, shares of the picture and scores from 0 to 1; the picture has {width} x {height} pixels: divide by "
            "them"
        )
    return FoundPersons(boxes.clip(0, 1), scores)


class HogDetector:
    """Histograms of oriented gradients under a linear SVM (Dalal and Triggs, CVPR 2005), as OpenCV ships them.

    It finds people who stand or walk, from about 50 pixels of height; scores are the SVM's margins on a logistic curve.
    """

    def __init__(self) -> None:
        try:
            import cv2
        except ImportError as error:
            raise DataError(
                "person detector hog needs OpenCV, which is not installed; pip install 'tubelet[detection]'"
            ) from error
        if not hasattr(cv2, "HOGDescriptor"):
            raise DataError(
                f"person detector hog: OpenCV {cv2.__version__} has no HOG detector any more; "
                "pip install 'opencv-python-headless<5'"
            )
        self._resize, self._grey = cv2.resize, lambda picture: cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        self._hog = cv2.HOGDescriptor()
        self._hog.setSVMDetector(np.array(cv2.HOGDescriptor.getDefaultPeopleDetector(), np.float32))

    def __call__(self, picture: Picture) -> FoundPersons:
        height, width = picture.shape[:2]
        scale = max(1.0, HOG_HEIGHT / height)
        enlarged = self._resize(self._grey(picture), None, fx=scale, fy=scale)
        found, margins = self._hog.detectMultiScale(enlarged, winStride=(8, 8), padding=(16, 16), scale=1.05)
        corners = np.array(found, np.float32).reshape(-1, 4) / scale
        x, y, w, h = corners.T
        inner = (x + MARGIN_X * w, y + MARGIN_Y * h, x + (1 - MARGIN_X) * w, y + (1 - MARGIN_Y) * h)
        scores = (1 / (1 + np.exp(-np.array(margins).ravel()))).astype(np.float32)
        return distinct(FoundPersons(in_shares(np.stack(inner, axis=1), width, height), scores))


class TorchvisionDetector:
    """A detector of torchvision.models.detection with weights of a file; nothing is downloaded.

    Args:
        model: name of its builder, fasterrcnn_resnet50_fpn_v2 for example.
        file: its state dict, trained on COCO's 91 classes.
    """

    def __init__(self, model: str, file: str) -> None:
        import torch

        if not model or not Path(file).is_file():
            raise RecipeError(
                f"person detector torchvision: found model {model!r} and file {file!r}, allowed: "
                "torchvision:fasterrcnn_resnet50_fpn_v2:FILE, FILE with weights as torchvision publishes them"
            )
        ensure_torchvision()
        from torchvision.models import detection

        build = getattr(detection, model, None)
        if build is None:
            raise RecipeError(f"person detector torchvision: there is no torchvision.models.detection.{model}")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = build(weights=None, weights_backbone=None, num_classes=91)
        try:
            self._model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # whatever a file that is none, or of another model, does
            raise WeightsError(f"{file}: no weights of torchvision's {model} ({error})") from error
        self._model.to(self._device).eval()

    def __call__(self, picture: Picture) -> FoundPersons:
        import torch

        height, width = picture.shape[:2]
        pixels = torch.from_numpy(picture.copy()).to(self._device).permute(2, 0, 1).float() / 255
        with torch.no_grad():
            try:
                (found,) = self._model([pixels])
            except (NotImplementedError, RuntimeError) as error:
                raise DataError(
                    f"person detector torchvision: its operators do not run here ({str(error).splitlines()[0]}); "
                    "torch and torchvision must be builds for the same platform"
                ) from error
        of_persons = found["labels"] == PERSON
        boxes = found["boxes"][of_persons].cpu().numpy()
        return FoundPersons(in_shares(boxes, width, height), found["scores"][of_persons].cpu().numpy())


def in_shares(boxes: npt.NDArray[np.floating[Any]], width: int, height: int) -> npt.NDArray[np.float32]:
    """Turn boxes in pixels [n, 4] into shares of the picture's sides, cut at its border."""
    shares = boxes / np.array([width, height, width, height])
    return shares.clip(0, 1).astype(np.float32)


def distinct(persons: FoundPersons) -> FoundPersons:
    """Leave of boxes that overlap by more than `SAME_PERSON` the one with the highest score, best first."""
    one_picture = np.zeros(len(persons.scores), np.int64)
    boxes, scores = persons.boxes.astype(np.float64), persons.scores.astype(np.float64)
    kept = suppress(one_picture, boxes, scores, SAME_PERSON, iou_continuous)
    return FoundPersons(persons.boxes[kept], persons.scores[kept])

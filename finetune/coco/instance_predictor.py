"""What is in a picture: answers of launch/predict.py, as lines, a picture with boxes and masks, and a table."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.classification.labels import read_names
from finetune.coco.instance_drawing import drawn_objects
from finetune.coco.instance_objective import FoundObjects
from finetune.coco.judged_instances import DRAWN
from finetune.prediction import Answer, Question, default_out
from pretrain.data.decoders.image import decode_image
from pretrain.engine.transfers import to_device
from pretrain.errors import DataError, SampleError
from pretrain.runtime import storage
from pretrain.samples.instances import InstancePictures

#: Objects that are told.
TOLD = 10


@dataclass(frozen=True)
class InstancePredictor:
    """A trained detector.

    Attributes:
        objective: on `device`, in evaluation mode.
        device: of the model.
        samples: brings pictures to the size that is judged.
        names: of the classes.
    """

    objective: Any
    device: torch.device
    samples: InstancePictures
    names: Sequence[str]

    @property
    def understood(self) -> frozenset[str]:
        """Options of the command that it reads."""
        return frozenset({"labels", "top", "csv"})

    def answer(self, video: str, question: Question) -> Answer:
        """Find the objects of a picture, and draw those of a score of a half or more.

        Raises:
            DataError: no picture, or a file of other classes.
        """
        from PIL import Image

        names = list(read_names(question.labels)) if question.labels else list(self.names)
        if len(names) != len(self.names):
            raise DataError(f"{question.labels}: {len(names)} class names, the model has {len(self.names)} classes")
        picture = self._read(video)
        (found,) = self.objective.detect(to_device(self.samples.of_picture(picture), self.device))
        out = question.out or default_out(video, "_objects.png")
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn_objects(picture[0], found, names, DRAWN)).save(out)
        files = {"picture": out}
        if question.csv is not None:
            write_objects(found, names, question.csv)
            files["table"] = question.csv
        return Answer(_lines(found, names, question.top or TOLD), files)

    def _read(self, path: str) -> Any:
        try:
            return decode_image(storage.read_bytes(path))
        except SampleError as error:
            raise DataError(f"{path}: {error}; this model looks at pictures") from error


def write_objects(found: FoundObjects, names: Sequence[str], path: Path) -> None:
    """Write all that was found, best first: class, score, box and area of the mask in pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "score", "x1", "y1", "x2", "y2", "mask_pixels"])
        for row in np.argsort(-found.scores, kind="stable").tolist():
            box = [f"{value:.2f}" for value in found.boxes[row].tolist()]
            pixels = int(found.masks[row].sum())
            writer.writerow([names[found.labels[row]], f"{found.scores[row]:.4f}", *box, pixels])


def _lines(found: FoundObjects, names: Sequence[str], top: int) -> list[str]:
    """Tell the surest objects; a word where there is none."""
    order = np.argsort(-found.scores, kind="stable")[:top].tolist()
    if not order:
        return ["no object found"]
    return [
        f"{100 * found.scores[row]:5.1f} %  {names[found.labels[row]]} at "
        f"{', '.join(f'{value:.0f}' for value in found.boxes[row].tolist())}"
        for row in order
    ]

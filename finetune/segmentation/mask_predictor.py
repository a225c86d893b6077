"""What is where in a picture: answers of launch/predict.py, as shares of classes, a picture and a mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetune.classification.labels import read_names
from finetune.prediction import Answer, Question, default_out
from finetune.segmentation.mask_classes import painted
from pretrain.data.decoders.image import decode_image
from pretrain.errors import DataError, SampleError
from pretrain.metrics.segmentation import NO_CLASS
from pretrain.runtime import storage
from pretrain.samples.picture_mask import MaskedPictures

#: Classes that are told.
TOLD = 5


@dataclass(frozen=True)
class MaskPredictor:
    """A trained segmenter.

    Attributes:
        objective: on `device`, in evaluation mode.
        device: of the model.
        samples: brings pictures to the size that is judged.
        names: of the classes.
    """

    objective: Any
    device: torch.device
    samples: MaskedPictures
    names: Sequence[str]

    @property
    def understood(self) -> frozenset[str]:
        """Options of the command that it reads."""
        return frozenset({"labels", "top"})

    def answer(self, video: str, question: Question) -> Answer:
        """Segment a picture; write it with its classes laid over, and the mask of their numbers beside it.

        Raises:
            DataError: no picture, or a file of other classes.
        """
        from PIL import Image

        names = list(read_names(question.labels)) if question.labels else list(self.names)
        if len(names) != len(self.names):
            raise DataError(f"{question.labels}: {len(names)} class names, the model has {len(self.names)} classes")
        picture = self._read(video)
        labels = self._segmented(picture)
        out = question.out or default_out(video, "_segmentation.png")
        mask = out.with_name(f"{out.stem}_mask.png")
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(painted(picture[0], labels, len(names))).save(out)
        # 16 bits where classes don't fit into 8; the largest value is of pixels of which nothing is known.
        kind = np.uint8 if len(names) <= 255 else np.uint16
        Image.fromarray(np.where(labels == NO_CLASS, np.iinfo(kind).max, labels).astype(kind)).save(mask)
        return Answer(_lines(labels, names, question.top or TOLD), {"picture": out, "mask": mask})

    def _read(self, path: str) -> Any:
        try:
            return decode_image(storage.read_bytes(path))
        except SampleError as error:
            raise DataError(f"{path}: {error}; segmentation looks at pictures") from error

    def _segmented(self, picture: Any) -> Any:
        video = torch.from_numpy(self.samples.judged(picture))[None].to(self.device)
        return self.objective.segment(video, *picture.shape[1:3])[0].cpu().numpy()


def _lines(labels: Any, names: Sequence[str], top: int) -> list[str]:
    """Tell the classes that have most of the picture."""
    counts = np.bincount(labels[labels != NO_CLASS], minlength=len(names))
    order = [number for number in np.argsort(-counts, kind="stable")[:top] if counts[number]]
    return [f"{100 * counts[number] / labels.size:5.1f} %  {names[number]}" for number in order]

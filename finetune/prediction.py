"""What a fine-tuned model makes of one video file."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from finetune.classification.labels import read_names
from finetune.classification.predictions import Predictions
from finetune.classification.views import EvaluationViews, SourceRules
from finetune.trained import FineTuned, label_map
from pretrain.data.transforms import Clip
from pretrain.errors import DataError, SampleError
from pretrain.runtime import storage
from pretrain.runtime.pictures import SHEET_FRAMES, contact_sheet

#: Views in one forward pass.
MICRO = 4


@dataclass(frozen=True)
class Prediction:
    """One video's result.

    Attributes:
        values: probability of each class, float [K]; values of a regression.
        views: what the model was given, uint8 [V, T, H, W, 3].
    """

    values: npt.NDArray[Any]
    views: Clip

    def top(self, count: int) -> list[int]:
        """Classes with the highest values, best first."""
        return np.argsort(-self.values, kind="stable")[:count].tolist()


def with_names(tuned: FineTuned, path: str) -> FineTuned:
    """The same model with the class names of a file.

    Raises:
        DataError: not as many names as classes, or no such file.
    """
    names = list(read_names(path))
    if len(names) != tuned.recipe.model.classes:
        raise DataError(f"{path}: {len(names)} names, but the model has {tuned.recipe.model.classes} classes")
    return replace(tuned, names=names)


def predict_video(
    tuned: FineTuned, video: str, clips: int = 1, crops: int = 1, decoder: str | None = None
) -> Prediction:
    """Judge a video as the run's validation does, or with more views as its test does.

    Frames are chosen by the rules of the recipe's first source.

    Args:
        tuned: the model.
        video: file, any fsspec URL.
        clips: clips in time.
        crops: crops along the long side.
        decoder: library that decodes; None: the recipe's.

    Raises:
        DataError: the file is no video that can be read, or the decoder is not installed.
        StorageError: there is no such file.
    """
    data = tuned.recipe.data
    source = next(iter(data.sources.values()))
    rules = SourceRules(
        label_map(tuned), source.sampling, source.stride or data.stride, False, source.short_side or data.height
    )
    make = EvaluationViews(
        data.frames, data.height, data.width, decoder or data.decoder, clips, crops, validation=clips * crops == 1
    )
    content = storage.read_bytes(video)
    try:
        views = make(content, rules)
    except SampleError as error:
        raise DataError(f"{video}: can't be read as a video ({error})") from error
    logits = _logits(tuned, views)
    task = tuned.recipe.objective.task
    average = tuned.recipe.evaluate.average
    merged = Predictions(task, tuned.names, [video], np.zeros(1), logits[None], average=average).merged[0]
    return Prediction(merged, views)


def _logits(tuned: FineTuned, views: Clip) -> npt.NDArray[np.float32]:
    """Logits float32 [V, K]."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = tuned.objective.to(device)
    parts = [objective.predict(part.to(device)).cpu() for part in torch.from_numpy(views).split(MICRO)]
    return torch.cat(parts).numpy()


def save_frames(prediction: Prediction, caption: str, path: Path) -> None:
    """Draw all frames that the model was given, a view below the other, `caption` above the first.

    Raises:
        DataError: the picture can't be written there.
    """
    from PIL import Image

    frames = prediction.views.shape[1]
    width = max(size for size in range(1, SHEET_FRAMES + 1) if frames % size == 0)
    rows = {
        f"view {number + 1}, frames {first + 1}-{first + width}": view[None, first : first + width]
        for number, view in enumerate(prediction.views)
        for first in range(0, frames, width)
    }
    titled = {(f"{caption}: {name}" if row == 0 else name): video for row, (name, video) in enumerate(rows.items())}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(contact_sheet(titled)).save(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the picture can't be written ({error})") from error

"""Names and colours of the classes of masks."""

import colorsys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.classification.labels import read_names
from finetune.recipe import TuneRecipe
from pretrain.errors import DataError

#: Class names beside exported weights, one a line.
CLASSES = "classes.txt"
#: Values of a source's `labels` that name no file.
UNNAMED = ("auto", "integer")
#: Turn of the hue from each class to the next: no two neighbours are alike, however many there are.
GOLDEN = 0.618034


def class_names_of(recipe: TuneRecipe, source: Path | None = None) -> list[str]:
    """Read the names of the classes: from beside exported weights, else from the file that the first source names in
    `labels`; numbers where there is neither.

    Raises:
        DataError: as many names as there are classes are needed.
    """
    stated = next((one.labels for one in recipe.data.sources.values() if one.labels not in UNNAMED), None)
    beside = source / CLASSES if source is not None else None
    path = str(beside) if beside is not None and beside.is_file() else stated
    classes = recipe.model.classes
    if path is None:
        return [str(number) for number in range(classes)]
    names = list(read_names(path))
    if len(names) != classes:
        raise DataError(f"{path}: {len(names)} class names, model.classes={classes}; give a name for each class")
    return names


def class_colours(classes: int) -> npt.NDArray[np.uint8]:
    """Give each class a colour, uint8 [K, 3]."""
    colours = [colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.85, 1 - 0.35 * (number % 3) / 2) for number in range(classes)]
    return (np.array(colours) * 255).astype(np.uint8)


def painted(picture: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer], classes: int) -> npt.NDArray[np.uint8]:
    """Lay the colours of classes over a picture [H, W, 3], half and half; pixels of no class stay, darker."""
    mixed = picture // 2
    known = labels >= 0
    mixed[known] += class_colours(classes)[labels[known]] // 2
    return mixed

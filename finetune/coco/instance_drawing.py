"""Pictures with the objects in them drawn: a mask in the class' colour, its outline's box, name and score."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from finetune.coco.instance_objective import FoundObjects
from finetune.segmentation.mask_classes import class_colours
from pretrain.samples.picture_mask import resize_labels


def drawn_objects(
    picture: npt.NDArray[np.uint8], found: FoundObjects, names: Sequence[str], least_score: float
) -> npt.NDArray[np.uint8]:
    """Draw objects into a copy of a picture [H, W, 3], whose size may be another than that of the masks.

    Args:
        picture: uint8 [H, W, 3].
        found: the objects.
        names: of the classes.
        least_score: objects below it are not drawn.
    """
    from PIL import Image, ImageDraw

    height, width = picture.shape[:2]
    colours, painted = class_colours(max(len(names), 1)), picture.astype(np.uint16)
    shown = [row for row in np.argsort(found.scores, kind="stable").tolist() if found.scores[row] >= least_score]
    for row in shown:
        mask = resize_labels(found.masks[row].astype(np.int16), width, height) > 0
        painted[mask] = (painted[mask] + colours[found.labels[row]]) // 2
    image = Image.fromarray(painted.astype(np.uint8))
    brush = ImageDraw.Draw(image)
    for row in shown:
        scale = width / found.masks.shape[2], height / found.masks.shape[1]
        x1, y1, x2, y2 = (float(value) * scale[at % 2] for at, value in enumerate(found.boxes[row]))
        colour = tuple(colours[found.labels[row]].tolist())
        # Rounding may put a thin box' sides in the wrong order, which Pillow refuses.
        brush.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=colour)
        brush.text((x1 + 2, y1 + 1), f"{names[found.labels[row]]} {100 * found.scores[row]:.0f}", fill=(255, 255, 255))
    return np.asarray(image)

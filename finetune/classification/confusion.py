"""Picture of a confusion matrix."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

#: Side of the picture's matrix, pixels, for few and for many classes.
MATRIX_PIXELS = 640
#: Classes up to which rows and columns carry their names.
NAMED_CLASSES = 60
TEXT_HEIGHT = 11
CHARACTER_WIDTH = 6
LONGEST_NAME = 24


def save_confusion(table: npt.NDArray[np.int64], names: list[str], path: Path) -> None:
    """Write a PNG: true classes as rows, predicted ones as columns, each row's shares from white to dark blue.

    Args:
        table: videos by (true, predicted) class, [K, K].
        names: of the classes.
        path: of the PNG.
    """
    from PIL import Image, ImageDraw

    classes = len(table)
    cell = max(MATRIX_PIXELS // classes, TEXT_HEIGHT + 1 if classes <= NAMED_CLASSES else 1)
    # A class without videos is a row of zeros, not of NaN, which has no colour.
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    dark = np.array([8, 48, 107])
    pixels = (255 - shares[..., None] * (255 - dark)).round().astype(np.uint8)
    # NEAREST: anything smoother would blur a cell into its neighbours.
    matrix = Image.fromarray(pixels).resize((cell * classes, cell * classes), Image.Resampling.NEAREST)
    labels = [name[:LONGEST_NAME] for name in names] if classes <= NAMED_CLASSES else []
    margin = CHARACTER_WIDTH * max(map(len, labels), default=0) + 8
    sheet = Image.new("RGB", (matrix.width + margin, matrix.height + margin + TEXT_HEIGHT), "white")
    sheet.paste(matrix, (margin, margin))
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels):
        middle = margin + row * cell + (cell - TEXT_HEIGHT) // 2
        draw.text((2, middle), label, fill="black")
        upright = Image.new("RGB", (margin, TEXT_HEIGHT), "white")
        ImageDraw.Draw(upright).text((2, -1), label, fill="black")
        sheet.paste(upright.rotate(90, expand=True), (middle, 0))
    caption = "rows: true class, columns: predicted; a row's shares, white 0 to dark 1"
    draw.text((2, sheet.height - TEXT_HEIGHT), caption, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)

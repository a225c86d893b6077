"""Toy pictures with objects as COCO annotates them: shapes of three colours, an empty picture, crowds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from pretrain.data.instance_masks import mask_of, runs_of

#: Ids with gaps, not in the order of names.
CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 2, "name": "box"}, {"id": 31, "name": "wedge"}]
COLOURS = {7: (220, 40, 40), 2: (40, 200, 60), 31: (50, 70, 230)}
#: Corners within a unit square.
SHAPES = {
    7: [(0.5 + 0.5 * np.cos(turn), 0.5 + 0.5 * np.sin(turn)) for turn in np.linspace(0, 2 * np.pi, 17)[:-1]],
    2: [(0, 0), (1, 0), (1, 1), (0, 1)],
    31: [(0, 1), (0.5, 0), (1, 1)],
}


def scene(number: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A picture and its annotations; number 3 is empty, of 5, 15, 25 the first object is a crowd, in run lengths."""
    rng = np.random.default_rng(number)
    height, width = int(rng.integers(56, 72)), int(rng.integers(60, 80))
    image = Image.fromarray(rng.integers(90, 110, (height, width, 3)).astype(np.uint8))
    brush, found = ImageDraw.Draw(image), []
    for _ in range(0 if number == 3 else int(rng.integers(1, 4))):
        category, side = int(rng.choice([*SHAPES])), int(rng.integers(14, 30))
        # Some reach over the border, their polygons as well.
        x, y = int(rng.integers(-4, width - side + 4)), int(rng.integers(-4, height - side + 4))
        corners = [(x + side * across, y + side * down) for across, down in SHAPES[category]]
        brush.polygon(corners, fill=COLOURS[category])
        polygon = np.round(np.array(corners).reshape(-1), 2).tolist()
        seen = mask_of([polygon], height, width)
        crowd = number % 10 == 5 and not found
        box = np.clip([x, y, x + side, y + side], 0, [width, height, width, height]).tolist()
        one = {"category_id": category, "iscrowd": int(crowd), "area": float(seen.sum()),
               "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
               "segmentation": {"size": [height, width], "counts": runs_of(seen)} if crowd else [polygon]}  # fmt: skip
        found.append(one)
    return np.asarray(image), found


def write_scenes(folder: Path, split: str, numbers: range, further: dict[int, list[dict[str, Any]]] | None = None):
    """Write pictures and `instances_<split>.json`, whose path is returned; `further` annotations by scene's number."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / split).mkdir(parents=True)
    for number in numbers:
        pixels, found = scene(number)
        Image.fromarray(pixels).save(folder / split / f"{number:06d}.png")
        height, width = pixels.shape[:2]
        images.append({"id": number, "file_name": f"{number:06d}.png", "height": height, "width": width})
        for one in [*found, *(further or {}).get(number, [])]:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **one})
    path = folder / f"instances_{split}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return path

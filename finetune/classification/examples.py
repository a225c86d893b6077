"""Picture of what a model says of some videos: the frames that it was given, the true class, the top classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.classification.predictions import Predictions
from finetune.classification.views import EvaluationViews, VideoSet, held_out_videos
from pretrain.samples.transforms import Clip

#: Frames of a clip that are shown, and the side that small ones are enlarged to, pixels.
FRAMES = 6
TILE = 96
GAP = 4
TOP = 3
PANEL = 320
LINE = 18
BAR = 90
NAME = 24
RIGHT, WRONG, GREY = (34, 139, 74), (196, 60, 50), (150, 150, 150)


@dataclass(frozen=True)
class Example:
    """One video: a view of it, uint8 [T, H, W, 3], its class, and the probability of each, [K]."""

    clip: Clip
    target: int
    probabilities: npt.NDArray[Any]


def pick_examples(
    predictions: Predictions, sets: list[VideoSet], views: EvaluationViews, count: int, deadline_s: float
) -> list[Example]:
    """Pick videos at even distances in the order of the shards, so that nobody chooses the good ones.

    Args:
        predictions: of the videos of all ranks, one class each.
        sets: what was tested.
        views: makes the view that is shown, the first one of each video.
        count: of examples.
        deadline_s: longest time of one read, seconds.
    """
    place = {key: number for number, key in enumerate(predictions.keys)}
    videos = sum(one.index.samples for one in sets)
    merged = predictions.merged
    found = []
    for position in np.unique(np.linspace(0, videos - 1, min(count, videos)).round().astype(int)):
        # "Rank n of as many ranks as there are videos" has the n-th video and no other.
        video = next(iter(held_out_videos(sets, views, int(position), videos, deadline_s))).batch
        if video is not None and video["key"] in place:  # unreadable ones are not
            row = place[video["key"]]
            found.append(Example(video["views"][0].numpy(), int(predictions.targets[row]), merged[row]))
    return found


def save_examples(examples: Sequence[Example], names: Sequence[str], path: Path) -> None:
    """Write a PNG, one example a row: frames, the true class, and the top classes with their probabilities as bars."""
    from PIL import Image

    rows = [_row(example, names) for example in examples]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def _row(example: Example, names: Sequence[str]) -> Any:
    from PIL import Image, ImageDraw

    tiles = _tiles(example.clip)
    width = sum(tile.width + GAP for tile in tiles) + PANEL
    row = Image.new("RGB", (width, max(tiles[0].height, (TOP + 1) * LINE) + 2 * GAP), "white")
    for number, tile in enumerate(tiles):
        row.paste(tile, (number * (tile.width + GAP), GAP))
    draw, left = ImageDraw.Draw(row), width - PANEL + 2 * GAP
    # Stable: classes of equal probability would else change places from one machine to another.
    best = np.argsort(-example.probabilities, kind="stable")[:TOP].tolist()
    draw.text((left, GAP), f"true: {names[example.target]}", fill="black", font_size=13)
    for line, number in enumerate(best, start=1):
        share, top = float(example.probabilities[number]), GAP + 4 + line * LINE
        colour = RIGHT if number == example.target else (WRONG if line == 1 else GREY)
        draw.rectangle((left, top + 2, left + max(round(BAR * share), 1), top + LINE - 5), fill=colour)
        draw.text((left + BAR + GAP, top), f"{100 * share:4.1f} %  {names[number][:NAME]}", fill=colour, font_size=12)
    return row


def _tiles(clip: Clip) -> list[Any]:
    """Cut out frames at even distances; those of small clips are enlarged."""
    from PIL import Image

    chosen = np.unique(np.linspace(0, len(clip) - 1, min(len(clip), FRAMES)).round().astype(int))
    height, width = clip.shape[1:3]
    factor = max(TILE / min(height, width), 1.0)
    size = (round(width * factor), round(height * factor))
    return [Image.fromarray(clip[index]).resize(size, Image.Resampling.BICUBIC) for index in chosen]

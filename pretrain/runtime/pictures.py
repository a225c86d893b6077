"""Reconstruction pictures: a contact sheet (PNG) and the same moving (GIF)."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Pixels = npt.NDArray[np.uint8]

GAP = 2
CAPTION = 12
SHEET_FRAMES = 8
FRAME_MS = 120


def save_pictures(videos: dict[str, Tensor], stem: Path, clips: int) -> list[Path]:
    """Write `stem`.png and `stem`.gif: for each clip one row a name, in the order of `videos`.

    Args:
        videos: uint8 [B, T, H, W, 3] by name, original, masked and reconstructed for example.
        stem: Path without suffix.
        clips: Most clips that are shown.
    """
    from PIL import Image

    stem.parent.mkdir(parents=True, exist_ok=True)
    shown = {name: video[:clips].detach().to("cpu", torch.uint8).numpy() for name, video in videos.items()}
    paths = [stem.with_suffix(".png"), stem.with_suffix(".gif")]
    Image.fromarray(contact_sheet(shown)).save(paths[0], optimize=True)
    frames = [Image.fromarray(frame) for frame in moving_sheet(shown)]
    frames[0].save(paths[1], save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    return paths


def contact_sheet(videos: dict[str, Pixels]) -> Pixels:
    """Lay out time from left to right (at most 8 frames), for each clip one row a name."""
    length = next(iter(videos.values())).shape[1]
    chosen = np.unique(np.linspace(0, length - 1, min(length, SHEET_FRAMES)).round().astype(int))
    clips = len(next(iter(videos.values())))
    rows = [_row(name, [video[clip, t] for t in chosen]) for clip in range(clips) for name, video in videos.items()]
    return np.concatenate(rows, axis=0)


def moving_sheet(videos: dict[str, Pixels]) -> list[Pixels]:
    """Lay out one picture a frame: names from top to bottom, clips from left to right."""
    length, clips = next(iter(videos.values())).shape[1], len(next(iter(videos.values())))
    return [
        np.concatenate(
            [_row(name, [video[clip, t] for clip in range(clips)]) for name, video in videos.items()], axis=0
        )
        for t in range(length)
    ]


def _row(name: str, tiles: list[Pixels]) -> Pixels:
    """Place tiles beside each other with gaps, and the name above them."""
    from PIL import Image, ImageDraw

    height, width = tiles[0].shape[:2]
    row = Image.new("RGB", (len(tiles) * (width + GAP) + GAP, height + CAPTION + GAP), "white")
    ImageDraw.Draw(row).text((GAP, 0), name, fill="black")
    for index, tile in enumerate(tiles):
        row.paste(Image.fromarray(tile), (GAP + index * (width + GAP), CAPTION))
    return np.asarray(row)

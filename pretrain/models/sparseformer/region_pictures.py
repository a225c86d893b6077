"""Pictures of where a SparseFormer looks: regions and points of each look, drawn into the image or the clip."""

import colorsys
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pretrain.models.sparseformer.sparseformer_model import SparseFormer
from pretrain.models.sparseformer.units import Looks
from pretrain.runtime.pictures import contact_sheet

Pixels = npt.NDArray[np.uint8]
#: Tokens whose regions are outlined; of the others only points are drawn.
OUTLINED = 6
#: Least side that pictures are enlarged to, pixels: thin lines would hide a small one.
LEAST_SIDE = 192
OTHERS = (190, 190, 190)


@torch.no_grad()
def looks_of(model: SparseFormer, pixels: Tensor) -> Looks:
    """Let a model look at normalised pixels [B, T, H, W, 3], and tell where; no random numbers are drawn."""
    looks, trained = Looks(), model.training
    model.eval()
    model.encode(pixels, looks)
    model.train(trained)
    return looks


def region_videos(frames: Pixels, looks: Looks, row: int = 0) -> list[Pixels]:
    """Draw each look of a row of the batch into a copy of its clip.

    Some tokens have a colour: the outline of the region, and its points. Points of all others are grey. In a clip a
    point is drawn on the frame that is nearest in time, a region on the frames that it covers.

    Args:
        frames: the clip, uint8 [T, H, W, 3].
        looks: of the batch.
        row: which of the batch the clip is.

    Returns:
        one clip like it for each look.
    """
    return [
        np.stack([_drawn(frame, time, len(frames), regions[row].cpu().numpy(), points[row].cpu().numpy())
                  for time, frame in enumerate(frames)])
        for regions, points in zip(looks.regions, looks.points, strict=True)
    ]  # fmt: skip


def region_sheet(video: Tensor, looks: Looks, row: int = 0) -> Pixels:
    """Lay the looks at a clip uint8 [T, H, W, 3] out in one picture: an image's side by side, a clip's in rows."""
    drawn = region_videos(_enlarged(video.cpu().numpy()), looks, row)
    if len(video) == 1:
        return contact_sheet({f"looks 1 to {len(drawn)}": np.concatenate(drawn)[None]})
    return contact_sheet({f"look {number}": clip[None] for number, clip in enumerate(drawn, start=1)})


def region_rows(video: Tensor, looks: Looks) -> dict[str, Tensor]:
    """Draw the first and the last look of each row of a batch uint8 [B, T, H, W, 3], by name."""
    drawn = [region_videos(clip, looks, row) for row, clip in enumerate(video.cpu().numpy())]
    rows = {"first look": 0, "last look": -1}
    return {name: torch.from_numpy(np.stack([clips[which] for clips in drawn])) for name, which in rows.items()}


def _drawn(frame: Pixels, time: int, frames: int, regions: npt.NDArray[Any], points: npt.NDArray[Any]) -> Pixels:
    from PIL import Image, ImageDraw

    picture = Image.fromarray(frame)
    draw = ImageDraw.Draw(picture)
    axes = points.shape[-1]
    size = np.array([picture.width, picture.height])
    chosen = np.unique(np.linspace(0, len(regions) - 1, min(OUTLINED, len(regions))).round().astype(int))
    colours = {int(token): _colour(index, len(chosen)) for index, token in enumerate(chosen)}
    for token in sorted(range(len(regions)), key=lambda one: one in colours):  # colours above grey
        colour = colours.get(token, OTHERS)
        shown = points[token]
        if axes == 3:
            nearest = np.clip(np.floor(shown[:, 2] * frames), 0, frames - 1)
            shown = shown[nearest == time]
        radius = 1 if token not in colours else 2
        for x, y in shown[:, :2] * size:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        low, high = regions[token][:axes], regions[token][axes:]
        low, high = np.minimum(low, high), np.maximum(low, high)
        if token in colours and (axes == 2 or low[2] <= (time + 0.5) / frames <= high[2]):
            draw.rectangle((*(low[:2] * size), *(high[:2] * size)), outline=colour, width=2)
    return np.asarray(picture)


def _colour(index: int, count: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(index / count, 0.9, 1.0)
    return int(255 * red), int(255 * green), int(255 * blue)


def _enlarged(frames: Pixels) -> Pixels:
    """Repeat pixels of small frames a whole number of times."""
    times = -(-LEAST_SIDE // min(frames.shape[1:3]))
    return frames.repeat(times, axis=1).repeat(times, axis=2)

"""Picture of a video's motion: its curve, the distribution, the wanted shares, and the frames that they choose."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.samples import motion
from pretrain.samples.motion_curves import Curve, Frame
from pretrain.samples.sampling import Indices

#: Sizes in pixels.
WIDTH, PLOT, MARGIN, TILE, LINE = 1000, 220, 50, 110, 14
CURVE, SHARES, CHOSEN, GRID = (90, 90, 90), (30, 90, 180), (200, 60, 40), (225, 225, 225)


def motion_picture(
    title: str, curve: Curve, shares: motion.Shares, targets: motion.Shares, chosen: Indices, frames: Sequence[Frame]
) -> Any:
    """Draw, from top to bottom, the curve, the distribution with targets and chosen frames, and these frames.

    Args:
        title: in the first line.
        curve: raw motion [M - 1].
        shares: S [M - 1].
        targets: wanted shares [N].
        chosen: frame numbers [N].
        frames: the chosen frames, uint8 [H, W, 3] each, in that order.

    Returns:
        a picture of Pillow.
    """
    from PIL import Image, ImageDraw

    rows = _tiles(frames, chosen)
    height = 2 * (PLOT + MARGIN) + MARGIN + sum(row.height + 4 for row in rows)
    sheet = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 6), title, fill="black", font_size=13)
    _plot_curve(draw, 26, curve, chosen)
    _plot_shares(draw, PLOT + MARGIN + 26, shares, targets, chosen)
    top = 2 * (PLOT + MARGIN) + 30
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + 4
    return sheet


def _across(position: float, count: int) -> float:
    """Place a position of `count` from left to right."""
    return MARGIN + (WIDTH - 2 * MARGIN) * position / max(count - 1, 1)


def _line(draw: Any, top: int, values: npt.NDArray[np.floating], colour: tuple[int, int, int]) -> None:
    """Draw values in [0, 1] as a line; many more than pixels are thinned to their maxima."""
    each = -(-len(values) // (WIDTH - 2 * MARGIN))
    points = [
        (_across(first, len(values)), top + PLOT * (1 - float(values[first : first + each].max())))
        for first in range(0, len(values), each)
    ]
    draw.line(points if len(points) > 1 else points * 2, fill=colour, width=2)


def _axes(draw: Any, top: int, name: str, count: int) -> None:
    draw.rectangle((MARGIN, top, WIDTH - MARGIN, top + PLOT), outline=GRID)
    draw.text((MARGIN + 4, top + 2), name, fill="black", font_size=12)
    for position in np.unique(np.linspace(0, count - 1, 9).astype(int)).tolist():
        draw.text((_across(position, count) - 6, top + PLOT + 2), str(position), fill="black", font_size=11)


def _plot_curve(draw: Any, top: int, curve: Curve, chosen: Indices) -> None:
    _axes(draw, top, f"motion from frame i to i + 1 (largest {float(curve.max()):.4g})", len(curve))
    for frame in chosen.tolist():
        x = _across(min(frame, len(curve) - 1), len(curve))
        draw.line((x, top + PLOT - 8, x, top + PLOT), fill=CHOSEN, width=2)
    _line(draw, top, curve / max(float(curve.max()), 1e-12), CURVE)


def _plot_shares(draw: Any, top: int, shares: motion.Shares, targets: motion.Shares, chosen: Indices) -> None:
    _axes(draw, top, "share of all motion; wanted shares and the frames that have them", len(shares))
    for target, frame in zip(targets.tolist(), chosen.tolist(), strict=False):
        x, y = _across(min(frame, len(shares) - 1), len(shares)), top + PLOT * (1 - target)
        draw.line((MARGIN, y, x, y), fill=GRID)
        draw.line((x, y, x, top + PLOT), fill=CHOSEN)
    _line(draw, top, shares, SHARES)


def _tiles(frames: Sequence[Frame], chosen: Indices) -> list[Any]:
    """Lay the chosen frames out in rows, each with its number."""
    from PIL import Image, ImageDraw

    height, width = frames[0].shape[:2]
    size = (max(round(TILE * width / height), 1), TILE)
    columns = max((WIDTH - 2 * MARGIN) // (size[0] + 4), 1)
    rows = []
    for first in range(0, len(frames), columns):
        row = Image.new("RGB", (WIDTH, TILE + LINE), "white")
        for column, (frame, number) in enumerate(
            zip(frames[first : first + columns], chosen[first : first + columns].tolist(), strict=True)
        ):
            left = MARGIN + column * (size[0] + 4)
            row.paste(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR), (left, LINE))
            ImageDraw.Draw(row).text((left, 0), str(number), fill=CHOSEN, font_size=11)
        rows.append(row)
    return rows

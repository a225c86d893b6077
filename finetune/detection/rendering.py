"""Videos with what was detected drawn into them: boxes, labels, and the track that a box belongs to."""

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pretrain.errors import DataError

Picture = npt.NDArray[np.uint8]

#: Colours of tracks, told apart on any background.
COLOURS = ((230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180),
           (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212))  # fmt: skip
#: A box is shown so long before and behind the only keyframe that it was seen in, in distances between keyframes.
SHOWN = 0.5
#: Lower videos are enlarged by a whole number to at least this height, pixels: words would cover them otherwise.
LEGIBLE = 360


@dataclass(frozen=True)
class Sighting:
    """A person at a keyframe.

    Attributes:
        time_s: of the keyframe.
        track: number of the person.
        box: x1, y1, x2, y2 in shares of width and height.
        lines: what is written at the box, actions with their scores for example.
    """

    time_s: float
    track: int
    box: tuple[float, float, float, float]
    lines: tuple[str, ...]


def render(video: str | BinaryIO, sightings: Sequence[Sighting], every_s: float, out: Path) -> int:
    """Write a video with boxes, labels and tracks drawn in; between two keyframes a person's box moves evenly.

    Args:
        video: file that was looked at, its path or itself.
        sightings: persons of all keyframes.
        every_s: seconds between two keyframes.
        out: .mp4 to write, H.264 without sound; small videos are enlarged, so that words can be read.

    Returns:
        frames that were written.

    Raises:
        DataError: the video can't be read, or the file can't be written.
    """
    import av

    tracks: dict[int, list[Sighting]] = {}
    for one in sorted(sightings, key=lambda one: one.time_s):
        tracks.setdefault(one.track, []).append(one)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with av.open(video) as source, av.open(str(out), "w", format="mp4") as target:
            return _copy(source, target, tracks, every_s)
    except (OSError, av.error.FFmpegError) as error:
        raise DataError(f"{video} -> {out}: the video with boxes can't be written ({error})") from error


def _copy(source: Any, target: Any, tracks: dict[int, list[Sighting]], every_s: float) -> int:
    import av

    stream = source.streams.video[0]
    stream.thread_type = "AUTO"
    larger = math.ceil(LEGIBLE / stream.height)
    # H.264 needs even sides, and frames of unknown rate a rate.
    width, height = stream.width * larger // 2 * 2, stream.height * larger // 2 * 2
    written = target.add_stream("libx264", rate=stream.average_rate or Fraction(25))
    written.width, written.height, written.pix_fmt = width, height, "yuv420p"
    written.options = {"crf": "20", "preset": "veryfast"}
    frames, first = 0, None
    for frame in source.decode(stream):
        picture = frame.to_ndarray(format="rgb24").repeat(larger, axis=0).repeat(larger, axis=1)
        time = frame.time if frame.time is not None else frames / float(stream.average_rate or 25)
        first = time if first is None else first
        drawn = draw_persons(picture, at_time(tracks, time - first, every_s))
        target.mux(written.encode(av.VideoFrame.from_ndarray(drawn[:height, :width], format="rgb24")))
        frames += 1
    target.mux(written.encode())
    return frames


def at_time(tracks: dict[int, list[Sighting]], time_s: float, every_s: float) -> Iterator[Sighting]:
    """Give the persons that are shown at a time, their boxes between those of the keyframes around it."""
    for sightings in tracks.values():
        later = bisect.bisect_right(sightings, time_s, key=lambda one: one.time_s)
        if 0 < later < len(sightings):
            yield _between(sightings[later - 1], sightings[later], time_s)
        else:
            nearest = sightings[later - 1] if later else sightings[0]
            if abs(nearest.time_s - time_s) <= SHOWN * every_s:
                yield nearest


def _between(earlier: Sighting, later: Sighting, time_s: float) -> Sighting:
    share = (time_s - earlier.time_s) / (later.time_s - earlier.time_s)
    x1, y1, x2, y2 = np.array(earlier.box) * (1 - share) + np.array(later.box) * share
    return Sighting(time_s, earlier.track, (x1, y1, x2, y2), (earlier if share < 0.5 else later).lines)


def draw_persons(picture: Picture, persons: Iterator[Sighting] | Sequence[Sighting]) -> Picture:
    """Draw boxes with their labels into a copy of a picture, uint8 [H, W, 3]."""
    from PIL import Image, ImageDraw

    height, width = picture.shape[:2]
    image = Image.fromarray(picture)
    pen, line = ImageDraw.Draw(image), max(2, height // 200)
    for person in persons:
        colour = COLOURS[person.track % len(COLOURS)]
        x1, y1, x2, y2 = (share * side for share, side in zip(person.box, (width, height, width, height), strict=True))
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=line)
        _write(pen, (f"person {person.track + 1}", *person.lines), (x1, y1), colour, height)
    return np.asarray(image)


def _write(pen: Any, lines: Sequence[str], corner: tuple[float, float], colour: Any, height: int) -> None:
    """Write lines above a box, or inside it where there is no room above."""
    from PIL import ImageFont

    size = max(14, height // 36)
    font = ImageFont.load_default(size)
    text = "\n".join(lines)
    left, top, right, bottom = pen.multiline_textbbox((0, 0), text, font=font, spacing=1)
    x, y = corner[0], corner[1] - (bottom - top) - 4
    y = y if y >= 0 else corner[1]
    pen.rectangle((x, y, x + right - left + 4, y + bottom - top + 4), fill=colour)
    dark = sum(colour) < 400
    pen.multiline_text((x + 2 - left, y + 2 - top), text, fill="white" if dark else "black", font=font, spacing=1)

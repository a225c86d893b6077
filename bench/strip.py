"""A strip of frames of videos, for documents: python bench/strip.py VIDEO@SECOND[,SECOND...] [...] --out PICTURE

A row a video; frames of a row have one height. PICTURE is .jpg or .png.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Pixels between two frames.
GAP = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="VIDEO@SECONDS", help="street.mp4@0.5,2,3.5 for example")
    parser.add_argument("--width", type=int, default=1000, help="of the picture, pixels (default 1000)")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    rows = [_row(frames_of(*_parsed(row)), arguments.width) for row in arguments.rows]
    strip = _joined(rows, arguments.width)
    strip.save(arguments.out, quality=82, optimize=True)
    print(f"{arguments.out}: {strip.width} x {strip.height}, {arguments.out.stat().st_size / 1000:.0f} kB")
    return 0


def _parsed(row: str) -> tuple[str, list[float]]:
    video, _, seconds = row.rpartition("@")
    return video, [float(second) for second in seconds.split(",")]


def frames_of(video: str, seconds: list[float]) -> list[Any]:
    """Decode the frames that are shown at some seconds, as pictures of PIL."""
    from PIL import Image

    from pretrain.data.decoders import open_video

    with open_video(Path(video).read_bytes(), "pyav") as reader:
        return [Image.fromarray(frame) for frame in reader.frames(reader.indices_at(seconds))]


def _row(frames: list[Any], width: int) -> list[Any]:
    room = width - GAP * (len(frames) - 1)
    height = round(room / sum(frame.width / frame.height for frame in frames))
    return [frame.resize((round(height * frame.width / frame.height), height)) for frame in frames]


def _joined(rows: list[list[Any]], width: int) -> Any:
    from PIL import Image

    height = sum(row[0].height for row in rows) + GAP * (len(rows) - 1)
    strip = Image.new("RGB", (width, height), "white")
    y = 0
    for row in rows:
        x = 0
        for frame in row:
            strip.paste(frame, (x, y))
            x += frame.width + GAP
        y += row[0].height + GAP
    return strip


if __name__ == "__main__":
    if not __package__:
        sys.path[0] = str(Path(__file__).parents[1])
    sys.exit(main())

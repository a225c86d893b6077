"""The videos that box annotations name: where they lie, their size, rate and length. Films, or folders of pictures."""

import math
import posixpath
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pretrain.data.boxes.keyframes import Film
from pretrain.data.boxes.slowfast_files import Pictures
from pretrain.data.decoders.image import open_picture
from pretrain.data.media import VIDEO_ENDINGS, extension_of
from pretrain.data.pack.discover import Item
from pretrain.data.pack.film_index import FilmIndex, open_file, read_index
from pretrain.data.pack.frame_folders import IMAGE_EXTENSIONS, select_frames
from pretrain.data.pack.media_probe import video_stream
from pretrain.data.pack.originals import fetch
from pretrain.data.time_segment import Segment
from pretrain.errors import RecipeError, SampleError
from pretrain.runtime import storage

#: Videos looked into at once.
THREADS = 16
#: Frames that a clip of 16 frames, every fourth, reaches to either side of its keyframe, and two to spare.
REACH = 34
#: Least that a segment holds to either side of its keyframe, seconds.
LEAST_SPAN_S = 1.5
_LAST_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class DetectionFilm:
    """A video that annotations name.

    Attributes:
        path: of the file, or of the folder of its pictures.
        width, height: upright, pixels.
        fps: mean frames a second.
        frames: how many.
        index: of a file; None for a folder.
        first: number of a folder's first picture.
        size: bytes of a file.
    """

    path: str
    width: int
    height: int
    fps: Fraction
    frames: int
    index: FilmIndex | None = None
    first: int = 1

    def seconds(self, time: float, unit: str, begins: float) -> float:
        """Turn a keyframe's time into seconds since the first frame.

        Args:
            time: in the annotations.
            unit: what it counts; frames from 1.
            begins: time in the annotations of the video's first frame, seconds.
        """
        return float((time - 1) / self.fps) if unit == "frame" else time - begins

    def facts(self, unit: str, begins: float) -> Film:
        """Give what annotations are held against."""
        if unit == "frame":
            return Film(self.width, self.height, self.frames, 1)
        ends = self.index.duration if self.index is not None else float((self.frames - 1) / self.fps)
        return Film(self.width, self.height, begins + ends, begins)

    def around(self, seconds: float, span: float | None) -> tuple[dict[str, Any], float]:
        """Choose what is packed of a keyframe.

        Args:
            seconds: of the keyframe, since the first frame.
            span: to either side of it, seconds; None: what a clip of 16 frames, every fourth, needs.

        Returns:
            Fields of an item, and the keyframe's seconds since the first frame of what is packed.
        """
        span = max(LEAST_SPAN_S, float(REACH / self.fps)) if span is None else span
        if self.index is None:
            key, reach = min(round(seconds * self.fps), self.frames - 1), math.ceil(span * self.fps)
            begin, end = max(key - reach, 0), min(key + reach, self.frames - 1)
            fields = {"frames": (self.first + begin, end - begin + 1), "is_folder": True}
            return fields, float((key - begin) / self.fps)
        start = _on_a_frame(self.index, seconds - span)
        end_s = seconds + span
        # In micro-seconds, since bounds are part of the plan's fingerprint.
        segment = Segment(start, None if end_s >= self.index.duration else round(end_s, 6))
        return {"segment": segment, "size": self.index.bytes}, round(seconds - start, 6)


def _on_a_frame(index: FilmIndex, seconds: float) -> float:
    """Find the last frame at or before a time that the index knows: between two, keyframes would be told from a start
    at which no frame is shown."""
    if seconds <= 0:
        return 0.0
    if index.stamps is not None:
        step = index.stamps.step * index.time_base
        return round(float(math.floor(Fraction(seconds) / step) * step), 6)
    keys = [float((stamp - index.first) * index.time_base) for stamp, _ in index.keys]
    return round(max([one for one in keys if one <= seconds], default=0.0), 6)


def find_films(
    names: Iterable[str], root: str, pictures: Mapping[str, Pictures], image_fps: Fraction, template: str | None
) -> tuple[dict[str, DetectionFilm], list[str]]:
    """Look up the videos that annotations name, below a folder: a file of that path or name with any ending, or a
    folder of pictures.

    Args:
        names: in the annotations.
        root: folder or URL.
        pictures: of those that a frame list names.
        image_fps: frame rate of folders.
        template: names of pictures in folders.

    Returns:
        Films by name, without those that are not there; and what is wrong with those that can't be read.
    """
    files, folders = _listing(root)
    problems: list[str] = []

    def look(name: str) -> DetectionFilm | None:
        try:
            if name in pictures:
                return _listed(storage.join(root, pictures[name].folder), pictures[name], image_fps)
            stem = posixpath.splitext(name)[0] if extension_of(name) in VIDEO_ENDINGS else name
            where = files.get(name) or files.get(stem) or files.get(posixpath.basename(stem))
            if where is not None:
                return _film(storage.join(root, where))
            return _folder(storage.join(root, name), image_fps, template) if name in folders else None
        except SampleError as error:
            problems.append(f"{name}: {error}")
            return None

    wanted = sorted(set(names))
    with ThreadPoolExecutor(THREADS) as pool:
        found = zip(wanted, pool.map(look, wanted), strict=True)
        return {name: film for name, film in found if film is not None}, sorted(problems)


def _listing(root: str) -> tuple[dict[str, str], set[str]]:
    """List the videos below a folder by path and by name without ending, and the folders that hold pictures."""
    if not storage.is_folder(root or "."):
        raise RecipeError(f"--data-root {root}: no such folder; it is where the annotated videos lie")
    files: dict[str, str] = {}
    folders: set[str] = set()
    for path in sorted(storage.find(root or ".")):
        if extension_of(path) in VIDEO_ENDINGS:
            stem = posixpath.splitext(path)[0]
            files[stem] = files[path] = path
            files.setdefault(posixpath.basename(stem), path)
        elif extension_of(path) in IMAGE_EXTENSIONS:
            folders.add(posixpath.dirname(path))
    return files, folders


def _film(path: str) -> DetectionFilm:
    import av

    index = read_index(path)
    file = open_file(path)
    try:
        with av.open(file, mode="r", metadata_errors="ignore") as container:
            video = video_stream(container)
            frame = next(container.decode(video), None)
            rate = video.average_rate or video.guessed_rate or Fraction(25)
            count = video.frames
    except (av.error.FFmpegError, UnicodeDecodeError, ValueError) as error:
        raise SampleError("unreadable", str(error)) from error
    if frame is None:
        raise SampleError("no-frames", f"{path}: its video decodes to nothing")
    if index.stamps is not None:
        rate, count = 1 / (index.stamps.step * index.time_base), len(index.stamps)
    width, height = (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)
    return DetectionFilm(path, width, height, Fraction(rate), count or math.ceil(index.duration * rate), index)


def _folder(path: str, fps: Fraction, template: str | None) -> DetectionFilm:
    names, _ = select_frames(Item(path, path, is_folder=True), template)
    numbers = [int(_LAST_NUMBER.findall(posixpath.splitext(name)[0])[-1]) for name in names]
    # One that is missing would show every later keyframe at another time.
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise SampleError("frames-missing", f"{path}: of {numbers[0]} to {numbers[-1]} not all have a picture")
    width, height = _picture_size(path, names[0])
    return DetectionFilm(path, width, height, fps, len(names), None, numbers[0])


def _listed(folder: str, pictures: Pictures, fps: Fraction) -> DetectionFilm:
    names = [name for name in storage.list_names(folder) if extension_of(name) in IMAGE_EXTENSIONS]
    if not names:
        raise SampleError("missing", f"{folder}: no pictures, which the frame list names in line {pictures.line}")
    width, height = _picture_size(folder, names[0])
    return DetectionFilm(folder, width, height, fps, pictures.count, None, pictures.first)


def _picture_size(folder: str, name: str) -> tuple[int, int]:
    with open_picture(fetch(storage.join(folder, posixpath.basename(name)))) as picture:
        width, height = picture.size
    return width, height

"""Verification of videos: each decodes, and random reads give the frames that a sequential decode gives.

Some files can't be read at random exactly: packed B frames in AVI, MPEG program streams, open GOPs cut out of longer
ones. A training clip from them silently holds other frames than it says.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.linked_video import VideoFile
from pretrain.data.pack.encode import Losses, decode
from pretrain.data.pack.media_probe import video_stream
from pretrain.data.randomness import generator
from pretrain.errors import SampleError

logger = logging.getLogger(__name__)

#: A frame is compared by the means of a GRID x GRID raster of its picture: 3 kB a frame instead of megabytes.
GRID = 16
#: Decoders convert colours a little differently; beyond this mean difference (of 255) it is another picture.
SAME_PICTURE = 10.0
#: A read frame may be this much (of 255) closer to another frame than to its own: stills differ by noise only.
TIE = 0.05

Signatures = npt.NDArray[np.float32]


def sequential_signatures(path: str, seen: Callable[[int, Any], None] = lambda number, frame: None) -> Signatures:
    """Decode the whole local file and sum up every frame, upright, in presentation order: [frames, GRID² x 3].

    Args:
        path: where.
        seen: called with number and frame of each.

    Raises:
        SampleError: "damaged" when a frame does not decode cleanly.
    """
    import av

    losses = Losses()
    signatures: list[npt.NDArray[np.float32]] = []
    try:
        with av.open(path) as container:
            video = video_stream(container)
            video.codec_context.thread_count = 1
            for frame in decode(container, [video], losses):
                seen(len(signatures), frame)
                # As the readers deliver it: PyAV turns no frame by itself.
                picture = np.rot90(frame.to_ndarray(format="rgb24"), k=frame.rotation // 90 % 4)
                signatures.append(signature(picture))
    except av.error.FFmpegError as error:
        raise SampleError("damaged", str(error)) from error
    if losses.failed or losses.corrupt or not signatures:
        raise SampleError(
            "damaged", f"{losses.failed} packets fail and {losses.corrupt} of {losses.delivered} frames are flawed"
        )
    return np.stack(signatures)


def signature(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Compute the means of a GRID x GRID raster of a picture [H, W, 3], flattened; small pictures stay as they are."""
    rows = np.linspace(0, picture.shape[0], min(GRID, picture.shape[0]), endpoint=False).astype(int)
    columns = np.linspace(0, picture.shape[1], min(GRID, picture.shape[1]), endpoint=False).astype(int)
    sums = np.add.reduceat(np.add.reduceat(picture, rows, axis=0, dtype=np.float32), columns, axis=1)
    heights = np.diff([*rows, picture.shape[0]])
    widths = np.diff([*columns, picture.shape[1]])
    return np.asarray(sums / (heights[:, None, None] * widths[:, None]), dtype=np.float32).ravel()


def check_random_reads(data: VideoFile, signatures: Signatures, decoder: str, reads: int, key: str) -> None:
    """Read frames at random with `decoder` and compare them with the sequential decode.

    Args:
        data: the video file.
        signatures: of all its frames, from `sequential_signatures`.
        decoder: name of a decoder in pretrain/data/decoders.
        reads: how many frames; which ones depends on `key` alone.

    Raises:
        SampleError: "inexact" when another number of frames or another frame comes back, or the decoder fails.
    """
    from pretrain.data.decoders import open_video

    count = len(signatures)
    # Drawn by the key: a restart and --check repeat the same reads.
    rng = generator(key, "pack-check")
    chosen = np.unique(np.append(rng.choice(count, min(reads, count), replace=False), count - 1))
    order = [chosen.tolist(), [int(chosen[0])]]  # a clip, then a seek backwards
    try:
        with open_video(data, decoder) as reader:
            if reader.num_frames != count:
                raise SampleError("inexact", f"{decoder} counts {reader.num_frames} frames, {count} decode")
            for indices in order:
                _compare(reader.frames(indices), indices, signatures, decoder)
    except SampleError as error:
        if error.reason == "inexact":
            raise
        raise SampleError("inexact", f"{decoder} fails on random reads: {error}") from error


def even_stamps(path: str) -> range | None:
    """Find the time stamps of a local file's frames, in its stream's time base, if they are evenly spaced and PyAV can
    read frames by them alone; None otherwise.

    What hides frames, as edit lists do, leaves them uneven, or other in number than the header says.
    """
    from pretrain.data.decoders.pyav_reader import PyAVReader

    with open(path, "rb") as file:
        data = file.read()
    try:
        with PyAVReader(data) as reader:
            found = list(reader.stamps or [])
        if len(found) < 2:
            return None
        even = range(found[0], found[0] + len(found) * (found[1] - found[0]), found[1] - found[0])
        if found != list(even):
            return None
        with PyAVReader(data, even) as reader:
            # Tried as training will read: a promise that fails here would cost every clip a second opening.
            reader.frames([0, len(even) // 2, len(even) - 1])
            return even if isinstance(reader.stamps, range) else None
    except SampleError:
        return None


def _compare(pictures: npt.NDArray[np.uint8], indices: list[int], signatures: Signatures, decoder: str) -> None:
    for index, picture in zip(indices, pictures, strict=True):
        found = signature(picture)
        if found.shape != signatures[index].shape:
            raise SampleError("inexact", f"{decoder} delivers pictures of {picture.shape[:2]}: not those of the stream")
        distances = np.abs(signatures - found).mean(axis=1)
        nearest = int(distances.argmin())
        # By the nearest frame, since a threshold alone misses reads that are off by one in slow scenes, or rejects
        # decoders that convert colours otherwise (10 bits: 7 levels).
        if distances[index] > SAME_PICTURE or distances[index] > distances[nearest] + TIE:
            raise SampleError(
                "inexact",
                f"frame {index} read by {decoder} is off by {distances[index]:.1f} levels; nearest is frame {nearest}",
            )

"""Pictures of masks: queries laid over a user's picture or video, and how sure each of them is where."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from finetune.open_vocabulary.text_masks import labels_of
from finetune.open_vocabulary.text_segmenter import TextSegmenter
from finetune.segmentation.mask_classes import painted
from pretrain.data.decoders import open_video
from pretrain.data.media import is_of_kind
from pretrain.errors import DataError, SampleError, StorageError
from pretrain.runtime import storage
from pretrain.runtime.pictures import contact_sheet

Picture = npt.NDArray[np.uint8]
#: Frames of a video in the sheet.
SHEET = 8


def draw_queries(
    segmenter: TextSegmenter, path: str, queries: Sequence[str], threshold: float | None, fps: float, out: Path
) -> tuple[list[str], list[Path]]:
    """Segment a picture or a video by queries; write OUT, a sheet of it with every query's mask, and of a video OUT's
    name with .mp4: all frames that were looked at, classes laid over.

    Args:
        segmenter: opened.
        path: picture or video, any fsspec URL.
        queries: texts.
        threshold: pixels whose masks are all below are none of them; None: each pixel is one.
        fps: of a video: frames a second that are looked at.
        out: .png to write.

    Returns:
        Shares of the queries, a line each, and the files.

    Raises:
        DataError: no picture and no video.
    """
    classes = segmenter.classes(queries)
    frames, film = _frames(path, fps)
    rows: dict[str, list[Picture]] = {name: [] for name in ("picture", "queries", *queries)}
    counts, pixels = np.zeros(len(queries), np.int64), 0
    shown = set(np.unique(np.linspace(0, len(frames) - 1, min(len(frames), SHEET)).round().astype(int)).tolist())
    laid_over = []
    for number, frame in enumerate(frames):
        masks = segmenter.masks(frame, classes)
        labels = _labels(masks, frame, threshold)
        counts += np.bincount(labels[labels >= 0], minlength=len(queries))
        pixels += labels.size
        laid_over.append(painted(frame, labels, len(queries)))
        if number in shown:
            rows["picture"].append(frame)
            rows["queries"].append(laid_over[-1])
            for query, mask in zip(queries, masks, strict=True):
                rows[query].append(_heat(frame, mask))
    files = [out]
    _save(contact_sheet({name: np.stack(row)[None] for name, row in rows.items()}), out)
    if film:
        files.append(_write_film(laid_over, fps, out.with_suffix(".mp4")))
    order = np.argsort(-counts, kind="stable")
    return [f"{100 * counts[number] / pixels:5.1f} %  {queries[number]}" for number in order], files


def _labels(masks: Tensor, frame: Picture, threshold: float | None) -> npt.NDArray[np.int64]:
    """Find the query of each pixel, -1 where there is none."""
    height, width = frame.shape[:2]
    found: Any = labels_of(masks, height, width, threshold).cpu().numpy()
    return found if threshold is None else found - 1


def _heat(frame: Picture, mask: Tensor) -> Picture:
    """Draw a mask from 0, dark, to 1, as bright as the picture."""
    height, width = frame.shape[:2]
    share = resized_mask(mask, height, width)
    return (frame * (0.15 + 0.85 * share[..., None])).astype(np.uint8)


def resized_mask(mask: Tensor, height: int, width: int) -> npt.NDArray[np.float32]:
    """Bring one mask [h, w] to a picture's size."""
    from torch.nn import functional as F

    found: Any = F.interpolate(mask[None, None], size=(height, width), mode="bilinear", align_corners=False)
    return np.asarray(found[0, 0].cpu().numpy(), dtype=np.float32)


def _frames(path: str, fps: float) -> tuple[list[Picture], bool]:
    """Read a picture, or frames of a video at a rate; tells whether it is a video."""
    try:
        with open_video(storage.read_bytes(path), "pyav") as reader:
            if is_of_kind(path, "image") or reader.num_frames == 1:
                return [reader.frames([0])[0]], False
            times = reader.times()
            length = float(times[-1] - times[0])
            wanted = times[0] + np.arange(max(1, int(length * fps) + 1)) / fps
            numbers = np.searchsorted(times, wanted, side="right") - 1
            return list(reader.frames(np.clip(numbers, 0, reader.num_frames - 1))), True
    except (SampleError, StorageError) as error:
        raise DataError(f"{path}: {error}; allowed: a picture or a video") from error


def _save(sheet: Picture, out: Path) -> None:
    from PIL import Image

    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(out, optimize=True)


def _write_film(frames: Sequence[Picture], fps: float, out: Path) -> Path:
    """Write frames as H.264, sides cut to even ones."""
    from fractions import Fraction

    import av

    height, width = (side // 2 * 2 for side in frames[0].shape[:2])
    with av.open(str(out), "w", format="mp4") as target:
        stream: Any = target.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for packet in _packets(stream, frames, height, width):
            target.mux(packet)
    return out


def _packets(stream: Any, frames: Sequence[Picture], height: int, width: int) -> Iterator[Any]:
    import av

    for frame in frames:
        kept = np.ascontiguousarray(frame[:height, :width])
        yield from stream.encode(av.VideoFrame.from_ndarray(kept, format="rgb24"))
    yield from stream.encode()

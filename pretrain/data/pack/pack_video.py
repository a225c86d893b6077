"""One video: fetch, hash, probe, copy or encode, verify. Runs in worker processes."""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from pretrain.data.decoders.image import open_picture, upright_rgb
from pretrain.data.pack import zip_source
from pretrain.data.pack.colour_check import ColourCheck
from pretrain.data.pack.cut_segments import cut_out
from pretrain.data.pack.discover import Item, extension_of
from pretrain.data.pack.encode import copy_stream, encode_images, encode_video
from pretrain.data.pack.frame_folders import select_frames
from pretrain.data.pack.media_probe import Facts, probe
from pretrain.data.pack.options import Options
from pretrain.data.pack.originals import check_local, fetch
from pretrain.data.pack.packed import Packed
from pretrain.data.pack.verify import check_random_reads, even_stamps, sequential_signatures
from pretrain.data.randomness import generator
from pretrain.data.time_segment import Segment
from pretrain.errors import SampleError
from pretrain.runtime import storage

logger = logging.getLogger(__name__)


def pack_item(item: Item, options: Options, folder: str) -> Packed:
    """Make the sample of one item; its video ends up as a file in the local `folder`.

    Raises:
        SampleError: it can't be used.
        DataError: the store does not answer.
    """
    handle, target = tempfile.mkstemp(suffix=".mp4", dir=folder)
    os.close(handle)
    try:
        return _from_frames(item, options, target) if item.is_folder else _from_video(item, options, target, folder)
    except SampleError:
        os.unlink(target)
        raise


def _from_video(item: Item, options: Options, target: str, folder: str) -> Packed:
    if item.segment is not None:
        return _from_segment(item, item.segment, options, target, folder)
    with _local(item.path, folder) as source:
        size = os.path.getsize(source)
        if not size:
            raise SampleError("empty", "the file has 0 bytes")
        with open(source, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        original = probe(source)
        _check_length(original.packets, options)
        reencoded = _produce(source, original, target, item.key, options)
    facts = _describe(item, target, sha256, options, reencoded)
    facts["original"] = _describe_original(original, original.container, size)
    return Packed({"mp4": target}, facts, size)


def _from_segment(item: Item, segment: Segment, options: Options, target: str, folder: str) -> Packed:
    with cut_out(item.path, segment, folder, options.audio) as piece:
        original = probe(piece.path, piece.shown)
        _check_length(original.packets, options)
        reencoded = _produce(piece.path, original, target, item.key, options, None if piece.whole else piece.shown)
    facts = _describe(item, target, piece.sha256, options, reencoded)
    facts["segment"] = segment._asdict()
    facts["original"] = _describe_original(original, piece.container, piece.size)
    return Packed({"mp4": target}, facts, piece.bytes_read)


def _check_length(frames: int, options: Options) -> None:
    if frames < options.min_frames:
        raise SampleError("too-short", f"{frames} frames, at least {options.min_frames} are wanted")


def _describe_original(facts: Facts, container: str, size: int) -> dict[str, Any]:
    return {
        "container": container, "codec": facts.codec, "pix_fmt": facts.pix_fmt,
        "width": facts.width, "height": facts.height, "rotation": facts.rotation,
        "fps": round(float(facts.fps), 6), "frames": facts.packets, "bytes": size,
    }  # fmt: skip


def _produce(
    source: str, original: Facts, target: str, key: str, options: Options, shown: range | None = None
) -> str | None:
    """Write the mp4, of the frames `shown` only; returns why the stream was encoded anew, None when it was kept."""
    why = "asked for" if shown is None or not options.copy else "the segment does not begin and end at key frames"
    if options.copy and shown is None:
        try:
            _copy(source, original, target, options)
            _verify(target, key, options)
            return None
        except SampleError as error:
            # AVI with packed B frames or MPEG program streams, say: random reads would silently give other frames.
            why = str(error)
            logger.info("%s: the stream can't be kept (%s); encoding it", source, why)
    frames = original.duration * float(options.fps) if options.fps else original.packets
    colours = ColourCheck(options, frames, original.rotation)
    encode_video(source, original, target, options, grid_phase(key, options), shown, colours.source)
    _verify(target, key, options, colours)
    return why


def _copy(source: str, original: Facts, target: str, options: Options) -> None:
    if "mp4" in original.container and (options.audio or original.audio is None):
        shutil.copyfile(source, target)
    else:
        copy_stream(source, target, options.audio)


def _verify(path: str, key: str, options: Options, colours: ColourCheck | None = None) -> None:
    """Decode the file at `path` in sequence, compare its colours if asked for, and read it at random by all decoders.

    Raises:
        SampleError: "damaged", "colours" or "inexact".
    """
    if colours is None:
        signatures = sequential_signatures(path)
    else:
        signatures = sequential_signatures(path, colours.written)
        colours.check()
    if options.decoders and options.reads:
        with open(path, "rb") as file:
            data = file.read()
        for decoder in options.decoders:
            check_random_reads(data, signatures, decoder, options.reads, key)


def _from_frames(item: Item, options: Options, target: str) -> Packed:
    names, missing = select_frames(item, options.frames)
    _check_length(len(names), options)
    digest = hashlib.sha256()
    sizes: list[int] = []

    def pictures() -> Iterator[Any]:
        for name in names:
            data = fetch(storage.join(item.path, name))
            # With its length: the same bytes divided into other pictures are another sample.
            digest.update(len(data).to_bytes(8, "big") + data)
            sizes.append(len(data))
            try:
                with open_picture(data) as picture:
                    yield upright_rgb(picture)
            except SampleError as error:
                raise SampleError(error.reason, f"{name}: {str(error).removeprefix(f'{error.reason}: ')}") from error

    colours = ColourCheck(options, len(names) * float((options.fps or options.image_fps) / options.image_fps))
    encode_images(pictures(), target, options, grid_phase(item.key, options), colours.source)
    _verify(target, item.key, options, colours)
    facts = _describe(item, target, digest.hexdigest(), options, "frame folder")
    facts["original"] = {"container": "images", "frames": len(names), "bytes": sum(sizes)}
    facts["original"] |= {"missing": missing} if missing else {}
    return Packed({"mp4": target}, facts, sum(sizes))


def _describe(item: Item, path: str, sha256: str, options: Options, reencoded: str | None) -> dict[str, Any]:
    """Build the sample's json: what training needs of the video as written."""
    # Of the file as written: the original's header may promise frames that it does not have.
    written = probe(path)
    turned = written.rotation in (90, 270)
    facts: dict[str, Any] = {
        "key": item.key,
        "label": item.label,
        "source": item.name,
        "sha256": sha256,
        "frames": written.packets,
        "fps": round(float(written.fps), 6),
        "duration": round(written.duration, 6),
        "width": written.height if turned else written.width,
        "height": written.width if turned else written.height,
        "codec": written.codec,
        "vfr": written.vfr,
        "audio": written.audio,
        "reencoded": reencoded,
    }
    if reencoded is not None and options.gridded:
        facts["grid"] = {"step": options.grid, "phase": grid_phase(item.key, options)}
    stamps = even_stamps(path)
    if stamps is not None and len(stamps) == written.packets:
        facts["stamps"] = {"first": stamps.start, "step": stamps.step}
    return facts | ({"meta": item.meta} if item.meta else {})


def grid_phase(key: str, options: Options) -> int:
    """Draw the first frame of the grid of reference frames for each video, or no clip would ever begin between them."""
    return int(generator(key, "pack-grid").integers(options.grid)) if options.gridded else 0


@contextlib.contextmanager
def _local(path: str, folder: str) -> Iterator[str]:
    """Provide a local file with the content of `path`, which may be a URL."""
    if "://" not in path and not zip_source.is_entry(path):
        check_local(path)
        yield path
        return
    with tempfile.NamedTemporaryFile(dir=folder, suffix="." + extension_of(path)) as copy:
        # A file and no stream: it is hashed, probed, encoded, and FFmpeg seeks in it.
        copy.write(fetch(path))
        copy.flush()
        yield copy.name

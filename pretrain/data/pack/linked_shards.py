"""Shards of links: videos stay where they lie, and small tar files name them, with their labels.

`<key>.json` is that of a packed sample as far as it is known without opening the video, `<key>.link` its path or URL.
Whatever reads shards reads these too: the fetch layer puts the video in the place of its link. Films and segments have
a `<key>.span` as well: where in the file the container's index and the segment's frames lie (linked_video.py).
"""

import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from pretrain.data.index import (
    INDEX_NAME,
    Shard,
    ShardIndex,
    ShardTable,
    write_index,
    write_members,
)
from pretrain.data.linked_video import Span
from pretrain.data.media import LINK_ENDING, SPAN_ENDING, kind_of
from pretrain.data.pack import zip_source
from pretrain.data.pack.companions import read_companion
from pretrain.data.pack.discover import Item
from pretrain.data.pack.film_index import FilmIndex, read_index
from pretrain.data.pack.scan import scan_shard
from pretrain.errors import DataError, RecipeError, SampleError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import name_bytes

logger = logging.getLogger(__name__)

#: Videos named by one shard.
SAMPLES = 10_000
#: Larger files are read by ranges; of smaller ones a clip needs so large a part that one read of all is cheaper.
FILM_BYTES = 8 << 20
#: Files looked into at once.
THREADS = 16


def write_links(items: list[Item], dest: str, known: Mapping[str, FilmIndex] | None = None) -> ShardIndex:
    """Index videos in place.

    Args:
        items: files with their keys, in order (`Plan.items`), sizes filled in.
        dest: folder for the shards of links and `index.json`, any fsspec URL; it must hold no index.
        known: indexes that were read already, by path (`cut_items`).

    Raises:
        RecipeError: frame folders, or files that are not there: all of them are listed.
        DataError: `dest` holds an index already, nothing is left to link, or a store does not answer.
    """
    problems = [f"{item.path}: a folder of frames; only video files can be used in place, pack these" for item in items
                if item.is_folder]  # fmt: skip
    files = [item for item in items if not item.is_folder]
    problems += [f"{item.path}: not found, or empty" for item in files if not item.size]
    problems += [f"{item.path}: not the ending of a video file" for item in files if kind_of(item.path) is None]
    problems += [f"{item.path}: in a zip archive, which can't be read in place; pack it" for item in files
                 if zip_source.is_entry(item.path)]  # fmt: skip
    if problems:
        raise RecipeError(problems)
    if storage.exists(storage.join(dest, INDEX_NAME)):
        raise DataError(f"{dest}: holds an index already; choose another DEST")
    indexes = _read_indexes(files, known or {})
    shards = []
    there = _there(items, indexes)
    if not there:
        raise DataError(f"{dest}: nothing to link: every segment begins behind the end of its file; correct the list")
    rest = iter(there)
    for number, some in enumerate(iter(lambda: list(itertools.islice(rest, SAMPLES)), [])):
        shards.append(_write_shard(f"links-{number:06d}.tar", some, indexes, dest))
    index = ShardIndex(dest, ShardTable(shards))
    write_index(index)
    return index


def _write_shard(name: str, items: list[Item], indexes: dict[str, FilmIndex], dest: str) -> Shard:
    from webdataset import TarWriter

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, name)
        # No times: the same list gives the same shards, and so the same fingerprint.
        with open(path, "wb") as file, TarWriter(file, mtime=0) as tar:
            for sample in _samples(items, indexes):
                tar.write(sample)
        shard, members, _ = scan_shard(folder, name)
        storage.upload(path, storage.join(dest, name))
    write_members(dest, name, members)
    return shard


def _samples(items: list[Item], indexes: dict[str, FilmIndex]) -> Iterator[dict[str, object]]:
    for item in items:
        # Absolute, since training may start in another folder.
        where = item.path if "://" in item.path else os.path.abspath(item.path)
        facts = {"key": item.key, "label": item.label, "source": item.name, "bytes": item.size, "meta": item.meta}
        if item.segment is not None:
            facts["segment"] = item.segment._asdict()
        content = json.dumps(facts, sort_keys=True).encode()
        sample: dict[str, object] = {"__key__": item.key, "json": content, LINK_ENDING: name_bytes(where)}
        # Values that were given; files beside the video are not copied in place (--with is refused).
        sample |= {one.ending: read_companion(one) for one in item.companions}
        if item.path in indexes:
            sample[SPAN_ENDING] = indexes[item.path].span(item.segment).to_json()
        elif item.segment is not None:
            sample[SPAN_ENDING] = Span(item.size, item.segment).to_json()
        yield sample


def _read_indexes(items: list[Item], known: Mapping[str, FilmIndex]) -> dict[str, FilmIndex]:
    """Read the index of each file of which a sample needs a part only, by path; without those that can't be read."""
    films = [item for item in items if item.kind == "video" and (item.segment is not None or item.size > FILM_BYTES)]
    paths = sorted({item.path for item in films})
    unknown = [path for path in paths if path not in known]
    with ThreadPoolExecutor(THREADS) as pool:
        found = zip(unknown, pool.map(_try_index, unknown), strict=True)
        read = {path: index for path, index in found if index is not None}
    return read | {path: known[path] for path in paths if path in known}


def _try_index(path: str) -> FilmIndex | None:
    try:
        return read_index(path)
    except SampleError as error:
        logger.warning("%s: %s; training will count its samples as bad", path, error)
        return None


def _there(items: list[Item], indexes: dict[str, FilmIndex]) -> list[Item]:
    """Leave out the segments that begin behind the end of their file, with a line about each."""
    kept = []
    for item in items:
        index = indexes.get(item.path)
        # A duration of 0 is one that the file does not state.
        if index and item.segment and 0 < index.duration <= item.segment.start:
            logger.warning("%s: left out, no frames from %s: it lasts %.3f s", item.path, item.segment, index.duration)
        else:
            kept.append(item)
    return kept

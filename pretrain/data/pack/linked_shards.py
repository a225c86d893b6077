"""Shards of links: videos stay where they lie, and small tar files name them, with their labels.

`<key>.json` is that of a packed sample as far as it is known without opening the video, `<key>.link` its path or URL.
Whatever reads shards reads these too: the fetch layer puts the video in the place of its link.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Iterator

from pretrain.data.index import (
    INDEX_NAME,
    Shard,
    ShardIndex,
    ShardTable,
    write_index,
    write_members,
)
from pretrain.data.media import LINK_ENDING, kind_of
from pretrain.data.pack import zip_source
from pretrain.data.pack.discover import Item
from pretrain.data.pack.scan import scan_shard
from pretrain.errors import DataError, RecipeError
from pretrain.runtime import storage

#: Videos named by one shard.
SAMPLES = 10_000


def write_links(items: list[Item], dest: str) -> ShardIndex:
    """Index videos in place.

    Args:
        items: files with their keys, in order (`Plan.items`), sizes filled in.
        dest: folder for the shards of links and `index.json`, any fsspec URL; it must hold no index.

    Raises:
        RecipeError: frame folders, or files that are not there: all of them are listed.
        DataError: `dest` holds an index already.
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
    shards = []
    rest = iter(items)
    for number, some in enumerate(iter(lambda: list(itertools.islice(rest, SAMPLES)), [])):
        shards.append(_write_shard(f"links-{number:06d}.tar", some, dest))
    index = ShardIndex(dest, ShardTable(shards))
    write_index(index)
    return index


def _write_shard(name: str, items: list[Item], dest: str) -> Shard:
    from webdataset import TarWriter

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, name)
        with open(path, "wb") as file, TarWriter(file, mtime=0) as tar:
            for sample in _samples(items):
                tar.write(sample)
        shard, members, _ = scan_shard(folder, name)
        storage.upload(path, storage.join(dest, name))
    write_members(dest, name, members)
    return shard


def _samples(items: list[Item]) -> Iterator[dict[str, object]]:
    for item in items:
        where = item.path if "://" in item.path else os.path.abspath(item.path)
        facts = {"key": item.key, "label": item.label, "source": item.name, "bytes": item.size, "meta": item.meta}
        yield {"__key__": item.key, "json": json.dumps(facts, sort_keys=True).encode(), LINK_ENDING: where.encode()}

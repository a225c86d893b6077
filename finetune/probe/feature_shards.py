"""Feature shards for WebDataset: `<key>.npy` and `<key>.json` for each video, and an index as packed videos have."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.index import ShardIndex, ShardTable, write_index, write_members
from pretrain.data.pack.scan import scan_shard
from pretrain.errors import DataError
from pretrain.runtime.process_group import Ranks, from_first, gather_objects

#: Videos in one shard.
SAMPLES = 1000


class Row(NamedTuple):
    """Features of one video, and what else is known of it; `facts` become its JSON."""

    key: str
    features: npt.NDArray[Any]
    facts: dict[str, Any]


def write_shards(folder: Path, ranks: Ranks, rows: Iterable[Row]) -> int:
    """Write this rank's videos as they come, so that no memory limits their number; all ranks call it.

    Args:
        folder: receives `features-<rank>-<number>.tar`, their member tables and `index.json`; what an earlier call
            wrote there is removed.
        ranks: this process among all.
        rows: this rank's videos.

    Returns:
        Videos written by all ranks.

    Raises:
        DataError: there are none.
    """
    if ranks.first:
        # An earlier call may have had more ranks or videos: what is left of it would be read as part of this one.
        for old in folder.glob("features-*"):
            old.unlink()
        folder.mkdir(parents=True, exist_ok=True)
    from_first(ranks, None)  # nobody writes before the old shards are gone
    own = _write(folder, ranks.rank, rows)
    names = sorted(name for part in gather_objects(ranks, own) for name in part)
    return from_first(ranks, _index(folder, names) if ranks.first else 0)


def _write(folder: Path, rank: int, rows: Iterable[Row]) -> list[str]:
    """Write the shards and return their names."""
    from webdataset import TarWriter

    names: list[str] = []
    rows = iter(rows)
    for number, some in enumerate(iter(lambda: list(itertools.islice(rows, SAMPLES)), [])):
        names.append(f"features-{rank:05d}-{number:06d}.tar")
        # No times: equal features make equal shards, and one fingerprint.
        with open(folder / names[-1], "wb") as file, TarWriter(file, mtime=0) as tar:
            for row in some:
                # webdataset takes what follows the first dot for the name of the member.
                key = row.key.replace(".", "_")
                facts = {"key": row.key} | row.facts
                tar.write({"__key__": key, "npy": np.ascontiguousarray(row.features), "json": facts})
    return names


def _index(folder: Path, names: list[str]) -> int:
    shards = []
    for name in names:
        shard, members, _ = scan_shard(str(folder), name, media_only=False)
        write_members(str(folder), name, members)
        shards.append(shard)
    index = ShardIndex(str(folder), ShardTable(shards))
    if not index.samples:
        raise DataError(f"{folder}: no features, none of the videos can be read; see the lines above")
    write_index(index)
    return index.samples

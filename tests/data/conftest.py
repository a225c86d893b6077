"""Shards of small real videos, and recipes over them."""

import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset

from pretrain.data.index import MemberTable, Shard, ShardIndex, ShardTable, write_index, write_members
from pretrain.models.videomae import Config as Model
from pretrain.objectives.videomae import Config as Objective
from pretrain.recipe.schema import Batch, Data, Recipe, Run, Source
from pretrain.samples.clip import Config
from tests.films import encode, encoded_video, frame_number  # noqa: F401  (fixtures)

os.environ.setdefault("OMP_NUM_THREADS", "1")


def _write_shard(url: str, name: str, samples: list[tuple[str, bytes]]) -> Shard:
    """One shard, written by webdataset, and its member table, read back by tarfile."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer) as writer:
        for key, video in samples:
            writer.write({"__key__": key, "mp4": video, "json": json.dumps({"label": 0})})
    content = buffer.getvalue()
    begins: dict[str, int] = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            begins.setdefault(member.name.split(".")[0], member.offset)
        end = tar.offset
    # TarWriter ends a tar with two zero blocks and padding; the last sample ends before them.
    offsets = np.array(list(begins.values()))
    sizes = np.diff([*offsets, end])
    fsspec.filesystem(url.split("://")[0] if "://" in url else "file").makedirs(url, exist_ok=True)
    with fsspec.open(f"{url}/{name}", "wb") as file:
        file.write(content)
    checksums = [zlib.crc32(content[begin : begin + size]) for begin, size in zip(offsets, sizes, strict=True)]
    write_members(url, name, MemberTable(tuple(begins), offsets, sizes, np.array(checksums, dtype=np.uint32)))
    return Shard(name, len(samples), len(content), f"hash of {url} {name}")


@pytest.fixture(scope="session")
def write_source() -> Callable[..., str]:
    """Writes a data set: url, then the samples of each shard as (key, video) pairs; returns the url."""

    def write(url: str, shards: list[list[tuple[str, bytes]]]) -> str:
        entries = [_write_shard(url, f"{i:05d}.tar", samples) for i, samples in enumerate(shards)]
        write_index(ShardIndex(url, ShardTable(entries)))
        return url

    return write


@pytest.fixture(scope="session")
def two_sources(tmp_path_factory: pytest.TempPathFactory, write_source: Callable[..., str]) -> dict[str, str]:
    """Sources a (23 samples in 5 shards) and b (13 samples in 3 shards) of 24-frame videos, on disk."""
    root = tmp_path_factory.mktemp("sources")
    sizes = {"a": [6, 5, 6, 5, 1], "b": [6, 5, 2]}
    return {
        name: write_source(
            str(root / name),
            [
                [(f"{name}{s}_{i}", encoded_video(colour=16 * s + i)) for i in range(size)]
                for s, size in enumerate(counts)
            ],
        )
        for name, counts in sizes.items()
    }


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """A small recipe over sources given as name -> url or Source; further arguments go to its input or data section."""

    def make(sources: dict[str, Any], samples: int = 8, micro: int = 2, seed: int = 0, **options: Any) -> Recipe:
        opened = {name: s if isinstance(s, Source) else Source(shards=s) for name, s in sources.items()}
        clip = {"frames": 8, "stride": 2, "height": 32, "width": 32}
        data = {"lanes": 4, "shuffle_window": 4, "workers": 0, "readahead": 3, "deadline_s": 5.0}
        for name, value in options.items():
            (data if hasattr(Data, name) else clip)[name] = value
        return Recipe(
            model=Model(size="small", patch_size=8),
            objective=Objective(mask_ratio=0.75),
            input=Config(**clip),
            data=Data(sources=opened, **data),
            batch=Batch(samples=samples, micro=micro),
            run=Run(name="test", dir="unused", seed=seed),
        )

    return make

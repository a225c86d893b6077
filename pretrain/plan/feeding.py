"""Needs of accelerators that are to be kept fed: cores that decode, and a store that delivers."""

from dataclasses import dataclass

from pretrain.data.index import ShardIndex
from pretrain.data.workers import data_workers
from pretrain.recipe.schema import Recipe

#: Milliseconds of one core to fetch, decode, crop and mask one clip; bench/loader.py measures it.
DECODE_MS, VIEW_MS = 14.0, 3.0
#: Bytes of a packed video where no shards are there to ask: ten seconds at a short side of 320 pixels.
VIDEO_BYTES = 1.4e6


@dataclass(frozen=True)
class Resources:
    """Means that a user has, per accelerator and in all.

    Attributes:
        decode_ms: one core's time for one video's clip.
        view_ms: and for each further view of it.
        cores: of a node, for each of its accelerators.
        store_gbs: what the object store delivers to the whole job, GB/s; None: not known.
    """

    decode_ms: float = DECODE_MS
    view_ms: float = VIEW_MS
    cores: float = 12.0
    store_gbs: float | None = None


@dataclass(frozen=True)
class Feeding:
    """Needs of the accelerators.

    Attributes:
        videos_per_s: decoded videos a second, whole job.
        cores: busy decoding cores for each accelerator.
        workers: data workers for each accelerator, as the recipe says or by the cores that are there.
        store_gbs: GB/s from the store, whole job.
        video_bytes: bytes of one packed video.
        measured_bytes: whether that comes from the data's index.
    """

    videos_per_s: float
    cores: float
    workers: int
    store_gbs: float
    video_bytes: float
    measured_bytes: bool


def feeding_of(
    recipe: Recipe, videos_per_s: float, ranks: int, resources: Resources, indices: list[ShardIndex]
) -> Feeding:
    """Compute the needs of a job that trains on `videos_per_s` decoded videos a second."""
    samples = sum(index.samples for index in indices)
    size = sum(shard.bytes for index in indices for shard in index.shards) / samples if samples else VIDEO_BYTES
    seconds = (resources.decode_ms + resources.view_ms * (recipe.input.views - 1)) / 1e3
    return Feeding(
        videos_per_s=videos_per_s,
        cores=videos_per_s * seconds / ranks,
        workers=data_workers(recipe.data, int(resources.cores)),
        store_gbs=videos_per_s * size / 1e9,
        video_bytes=size,
        measured_bytes=bool(samples),
    )


def shortages(recipe: Recipe, feeding: Feeding, resources: Resources) -> list[str]:
    """Say what can't keep up, and what to change."""
    found = []
    if feeding.cores > resources.cores:
        found.append(
            f"decoding needs {feeding.cores:.1f} cores for each accelerator, {resources.cores:g} are there: "
            f"accelerators would wait {1 - resources.cores / feeding.cores:.0%} of the time. Raise input.views (now "
            f"{recipe.input.views}; further views of a decoded clip are nearly free), pack with the default stream "
            "(docs/data.md), or take nodes with more cores"
        )
    elif recipe.data.workers is not None and feeding.cores > recipe.data.workers:
        enough = int(feeding.cores * 1.2) + 1
        found.append(
            f"decoding needs {feeding.cores:.1f} busy workers for each accelerator, data.workers="
            f"{recipe.data.workers}: set data.workers={enough if enough <= resources.cores else 'null'}"
        )
    if resources.store_gbs is not None and feeding.store_gbs > resources.store_gbs:
        found.append(
            f"the store must deliver {feeding.store_gbs:.2f} GB/s, {resources.store_gbs:g} are there: set "
            "data.cache_dir to local disks (after the first epoch nothing is read twice), raise input.views, or "
            "pack with a smaller --short-side"
        )
    return found

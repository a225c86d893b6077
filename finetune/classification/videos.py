"""Videos of some shards, each once, dealt out to ranks and workers, as views to evaluate."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from finetune.classification.views import EvaluationViews, SourceRules
from pretrain.data.fetch import RawSample, SampleReader, read_ahead
from pretrain.data.index import ShardIndex
from pretrain.data.members import parse_sample
from pretrain.data.stream import prepare_worker
from pretrain.errors import SampleError


@dataclass(frozen=True)
class VideoSet:
    """Shards to evaluate: name of the source, its index, its rules."""

    name: str
    index: ShardIndex
    rules: SourceRules


class Videos(IterableDataset[dict[str, Any]]):
    """Videos of a rank: of all videos in a row, number rank, rank + world_size, ...

    Yields `key`, `target`, `views` uint8 [V, T, H, W, 3]; or `key` and `reason` where a video can't be read.

    Args:
        sets: what to evaluate.
        views: makes a video's views.
        rank: this rank.
        world_size: number of ranks.
        deadline_s: longest time of one read, seconds.
        readahead: samples fetched ahead of decoding.
    """

    def __init__(
        self, sets: list[VideoSet], views: EvaluationViews, rank: int, world_size: int, deadline_s: float,
        readahead: int = 8,
    ) -> None:  # fmt: skip
        self._sets, self._views, self._rank, self._world_size = sets, views, rank, world_size
        self._deadline_s, self._readahead = deadline_s, max(readahead, 1)

    def __len__(self) -> int:
        """Count the videos of this rank."""
        return len(range(self._rank, sum(one.index.samples for one in self._sets), self._world_size))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        motion = [number for number, one in enumerate(self._sets) if one.rules.choice.needs_motion]
        reader = SampleReader([one.index for one in self._sets], None, self._deadline_s, motion=motion)

        def read(place: tuple[int, int, int]) -> RawSample:
            return reader.read(*place)

        for place, future in read_ahead(self._places(worker, workers), read, self._readahead):
            source, shard, row = place
            entry = self._sets[source]
            name = f"{entry.name}/{entry.index.shards[shard].name.removesuffix('.tar')}"
            own = reader.key(source, shard, row)
            key = f"{name}/{own}"
            try:
                members = parse_sample(future.result())
                target = entry.rules.labels.target(members.label)
                # By the sample's own key: shards may be packed anew, and the clips of a test stay.
                views = self._views(members.footage(), entry.rules, own, members.motion)
            except SampleError as error:
                # Training would replace it; a score must be of each video once, and say which are missing.
                yield {"key": key, "reason": str(error)}
                continue
            yield {"key": key, "target": torch.from_numpy(target), "views": torch.from_numpy(views)}

    def _places(self, worker: int, workers: int) -> Iterator[tuple[int, int, int]]:
        ends = np.cumsum([0, *(count for one in self._sets for count in one.index.shards.samples.tolist())])
        shards = [(s, number) for s, one in enumerate(self._sets) for number in range(len(one.index.shards))]
        # By rank first: how many workers a rank has changes nothing of what it judges.
        for position in range(self._rank + worker * self._world_size, int(ends[-1]), self._world_size * workers):
            unit = int(np.searchsorted(ends, position, side="right")) - 1
            yield (*shards[unit], position - int(ends[unit]))


def loader(videos: Videos, workers: int) -> "DataLoader[dict[str, Any]]":
    """Load the videos by worker processes."""
    return DataLoader(
        videos,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # A fork would copy locks that threads of CUDA and of the collectives hold at that moment.
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=prepare_worker if workers else None,
    )

"""Long-term memory: features of the persons of every keyframe seen so far (systems/cycleacr.md, 2.4 and 2.6).

Officially every rank holds all of it, and pickles are gathered at every step. Here a video belongs to one rank, and
what a step needs is exchanged: its keyframes' windows before, its persons' features after. Contents, and what a window
holds, are the same on any number of ranks. `put` and `windows` are collectives: all ranks call them in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pretrain.checkpoint.rank_state import RankState
from pretrain.data.randomness import key_of
from pretrain.errors import CheckpointError
from pretrain.runtime.collectives import exchange, gather_ragged
from pretrain.runtime.process_group import Ranks

#: Types in which features are kept.
STORED = {"float16": torch.float16, "float32": torch.float32}


@dataclass
class MemoryOptions:
    """Long-term memory: the persons of the seconds around a keyframe."""

    past: int = 30
    """seconds before the keyframe"""
    future: int = 30
    """seconds after it; 0: nothing that a live stream does not know yet"""
    rate: int = 1
    """seconds from one to the next"""
    max_per_second: int = 5
    """places for persons of a second; empty ones are not masked, so keep the number that weights were trained with"""
    choice: Literal["scores", "random"] = "scores"
    """of more persons than places: those of the highest detector scores (in training, where all are ground truth, the
    first), or a random subset as officially, drawn by the run's seed"""
    penalty: bool = True
    """training: scale remembered features by min(tag, now) / max(tag, now), tag = the loss when they were stored, now =
    that of the step before"""
    dtype: Literal["float16", "float32"] = "float16"
    """type in which features are kept, in host memory"""
    video_seconds: int | None = None
    """keyframes kept of a video, those stored last; null: all"""

    @property
    def seconds(self) -> int:
        """Seconds of a window, the keyframe's own included."""
        return self.past + 1 + self.future

    @property
    def places(self) -> int:
        """Rows of a window."""
        return self.seconds * self.max_per_second

    def problems(self) -> list[str]:
        """Say what can't be."""
        least = {"past": 0, "future": 0, "rate": 1, "max_per_second": 1, "video_seconds": 1}
        values = {name: getattr(self, name) for name in least}
        return [
            f"objective.memory.{name}={value}, allowed: {least[name]} or more"
            for name, value in values.items()
            if value is not None and value < least[name]
        ]


@dataclass(frozen=True)
class SeenKeyframes:
    """Persons of some keyframes, B keyframes with n persons in all; on the host.

    Attributes:
        videos: int64 [B], `video_number` of each.
        seconds: int64 [B].
        counts: persons of each, int64 [B].
        tags: loss of the step that they come from, float64 [B].
        features: [n, D].
        scores: of the detector, float32 [n].
    """

    videos: Tensor
    seconds: Tensor
    counts: Tensor
    tags: Tensor
    features: Tensor
    scores: Tensor

    @classmethod
    def join(cls, parts: Sequence["SeenKeyframes"]) -> "SeenKeyframes":
        """Put some together."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def rows(self) -> list["_Remembered"]:
        """Take each keyframe by itself."""
        sizes = self.counts.tolist()
        pieces = zip(self.tags.tolist(), self.features.split(sizes), self.scores.split(sizes), strict=True)
        # Copies: slices would keep the memory of the whole batch for as long as one of them is there.
        return [_Remembered(tag, features.clone(), scores.clone()) for tag, features, scores in pieces]


@dataclass(frozen=True)
class _Remembered:
    """Persons of one keyframe: features [m, D], scores [m]."""

    tag: float
    features: Tensor
    scores: Tensor


def video_number(name: str) -> int:
    """Give a video's number, the same everywhere: 63 bits of its name's hash."""
    return key_of(name) & (1 << 63) - 1


class MemoryBank:
    """The memory of this rank: the videos whose number leaves the rank when divided by their number.

    Args:
        dim: channels of features.
        options: its size.
        seed: of random subsets.
    """

    def __init__(self, dim: int, options: MemoryOptions, seed: int) -> None:
        self.dim, self.options, self.seed = dim, options, seed
        self.dtype = STORED[options.dtype]
        # Of each video its seconds, in the order in which they were stored.
        self._videos: dict[int, dict[int, _Remembered]] = {}

    def __len__(self) -> int:
        """Persons that this rank holds."""
        return sum(len(one.features) for seconds in self._videos.values() for one in seconds.values())

    def clear(self) -> None:
        """Forget everything."""
        self._videos.clear()

    def put(self, keyframes: SeenKeyframes, ranks: Ranks) -> None:
        """Store what all ranks bring, each keyframe at its owner, in the order of positions: the last one counts."""
        table = torch.stack(
            # A double's bits as a whole number: one gather serves all four.
            (keyframes.videos, keyframes.seconds, keyframes.counts, keyframes.tags.view(torch.int64)),
            dim=1,
        )
        tables = [found.cpu() for found in gather_ragged(table.to(ranks.device), ranks)]
        own = tables[ranks.rank]
        order = (own[:, 0] % ranks.world_size).argsort(stable=True)
        sends = [int(own[own[:, 0] % ranks.world_size == rank, 2].sum()) for rank in range(ranks.world_size)]
        mine = [found[found[:, 0] % ranks.world_size == ranks.rank] for found in tables]
        receives = [int(found[:, 2].sum()) for found in mine]
        sizes = keyframes.counts.tolist()

        def routed(rows: Tensor) -> Tensor:
            pieces = rows.split(sizes)
            # An empty tensor in front: there may be no keyframe, and nothing can't be joined.
            sent = torch.cat([rows[:0], *(pieces[index] for index in order.tolist())])
            return exchange(sent.to(ranks.device), sends, receives, ranks).cpu()

        features, scores = routed(keyframes.features.to(self.dtype)), routed(keyframes.scores)
        received = torch.cat(mine)
        videos, seconds, counts, bits = received.t().contiguous()
        arrived = SeenKeyframes(videos, seconds, counts, bits.view(torch.float64), features, scores)
        # Slot after slot, rank after rank in each: as samples are dealt to ranks (runtime/collectives.py).
        slots = [(slot, rank) for rank, found in enumerate(tables) for slot in _slots(found, ranks)]
        self._store(arrived, sorted(range(len(slots)), key=slots.__getitem__))

    def windows(
        self, videos: Tensor, seconds: Tensor, ranks: Ranks, loss: float | None = None, draw: int = 0
    ) -> Tensor:
        """Fetch the seconds around keyframes.

        Args:
            videos: numbers int64 [B] of the keyframes' videos; on the host.
            seconds: int64 [B].
            ranks: this process among all.
            loss: of the step before, for the penalty; None: without.
            draw: makes random subsets others, a step's number for example.

        Returns:
            [B, places, D] on the ranks' device, past before future; empty places, and the keyframe's own second, which
            is not looked up, are zero.
        """
        table = torch.stack((videos, seconds), dim=1)
        tables = [found.cpu() for found in gather_ragged(table.to(ranks.device), ranks)]
        asked = [found[found[:, 0] % ranks.world_size == ranks.rank] for found in tables]
        answers = [self._window(video, second, loss, draw) for found in asked for video, second in found.tolist()]
        sent = torch.stack(answers) if answers else torch.zeros(0, self.options.places, self.dim, dtype=self.dtype)
        owners = videos % ranks.world_size
        receives = [int((owners == rank).sum()) for rank in range(ranks.world_size)]
        got = exchange(sent.to(ranks.device), [len(found) for found in asked], receives, ranks)
        # They come by owner, and go back to the order in which they were asked for.
        return torch.empty_like(got).index_copy_(0, owners.argsort(stable=True).to(got.device), got)

    def state(self) -> RankState:
        """Give it to a checkpoint: a safetensors file as bytes, of which `take` keeps the videos of this rank."""
        kept = [(video, second, one) for video in sorted(self._videos) for second, one in self._videos[video].items()]
        columns = {
            "videos": torch.tensor([video for video, _, _ in kept], dtype=torch.int64),
            "seconds": torch.tensor([second for _, second, _ in kept], dtype=torch.int64),
            "counts": torch.tensor([len(one.features) for *_, one in kept], dtype=torch.int64),
            "tags": torch.tensor([one.tag for *_, one in kept], dtype=torch.float64),
            "features": torch.cat([torch.zeros(0, self.dim, dtype=self.dtype), *(one.features for *_, one in kept)]),
            "scores": torch.cat([torch.zeros(0), *(one.scores for *_, one in kept)]),
        }
        content = bytearray(safetensors.torch.save(columns))
        return RankState(torch.frombuffer(content, dtype=torch.uint8), "by_owner", self._take)

    def _take(self, written: Sequence[Tensor], rank: int, world_size: int) -> None:
        """Replace the contents by this rank's part of what was written."""
        self.clear()
        for content in written:
            found = self._read(content)
            own = (found.videos % world_size == rank).tolist()
            self._store(found, [index for index, mine in enumerate(own) if mine])

    def _read(self, content: Tensor) -> SeenKeyframes:
        try:
            found = SeenKeyframes(**safetensors.torch.load(content.contiguous().numpy().tobytes()))
        except (safetensors.SafetensorError, TypeError) as error:
            raise CheckpointError(f"memory bank in the checkpoint: not the file that a run writes ({error})") from error
        if found.features.dtype != self.dtype or found.features.shape[1:] != (self.dim,):
            raise CheckpointError(
                f"memory bank in the checkpoint: found features {found.features.dtype} of "
                f"{list(found.features.shape[1:])} channels, this run has {self.dtype} of [{self.dim}]: continue with "
                "the objective.dim and objective.memory.dtype that wrote it, or start a new run.dir by run.init_weights"
            )
        return found

    def _store(self, keyframes: SeenKeyframes, order: Sequence[int]) -> None:
        rows, most = keyframes.rows(), self.options.video_seconds
        for index in order:
            seconds = self._videos.setdefault(int(keyframes.videos[index]), {})
            second = int(keyframes.seconds[index])
            # Taken out first: a dictionary keeps the place of a key that is only given a new value.
            seconds.pop(second, None)
            seconds[second] = rows[index]
            if most is not None and len(seconds) > most:
                del seconds[next(iter(seconds))]

    def _window(self, video: int, second: int, loss: float | None, draw: int) -> Tensor:
        options, stored = self.options, self._videos.get(video, {})
        window = torch.zeros(options.places, self.dim, dtype=self.dtype)
        for place in range(options.seconds):
            at = second + (place - options.past) * options.rate
            if at == second or at not in stored:
                continue
            features = self._chosen(stored[at], (draw, video, second, at))
            if loss is not None:
                features = (features.float() * penalty(stored[at].tag, loss)).to(self.dtype)
            window[place * options.max_per_second :][: len(features)] = features
        return window

    def _chosen(self, one: _Remembered, key: Sequence[int]) -> Tensor:
        most = self.options.max_per_second
        if len(one.features) <= most:
            return one.features
        priority = one.scores
        if self.options.choice == "random":
            priority = torch.rand(len(priority), generator=torch.Generator().manual_seed(key_of(self.seed, *key) >> 65))
        return one.features[priority.argsort(descending=True, stable=True)[:most].sort().values]


def penalty(tag: float, loss: float) -> float:
    """Compute min/max of two losses: how near the weights of then are to those of now; 0 at a run's first step."""
    low, high = sorted((tag, loss))
    return low / high if high > 0 else 1.0


def _slots(table: Tensor, ranks: Ranks) -> list[int]:
    """List the places, in the batch of the rank that a table comes from, of keyframes that this rank owns."""
    return (table[:, 0] % ranks.world_size == ranks.rank).nonzero()[:, 0].tolist()

"""Queue of past keys, and the nearest of them to new keys (systems/snclr.md, section 3.3)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.checkpoint.rank_state import RankState
from pretrain.errors import CheckpointError
from pretrain.runtime.process_group import present_ranks

#: Number of a file that an entry which is still random is said to be of.
RANDOM = -1
#: Keys that are searched for at once: each has a similarity with every entry.
CHUNK = 256
#: Shortest length that a vector is divided by.
EPS = 1e-12


class Neighbours(NamedTuple):
    """The entries nearest to keys.

    Attributes:
        vectors: as they were put in, not normalised, float32 [B, K, D], the nearest first.
        random: of the queue's start, no past keys, bool [B, K].
        allowed: of another file than the key, bool [B, K].
    """

    vectors: Tensor
    random: Tensor
    allowed: Tensor


class KeyQueue(nn.Module):
    """The last keys, float32 [S, D], in a ring that starts with random directions.

    Entries, their files' numbers and the place of the next write are saved beside the weights (`rank_state`) and not
    in them: exports and files to start from hold no queue.

    Args:
        size: S.
        dim: D.
        seed: of the random entries.
        of_rank: each rank has a queue of its own (the released code); else all ranks have the same one.
    """

    entries: Tensor
    files: Tensor

    def __init__(self, size: int, dim: int, seed: int, of_rank: bool) -> None:
        super().__init__()
        self.size, self.dim, self._seed, self.of_rank = size, dim, seed, of_rank
        device = torch.get_default_device()
        self.register_buffer("entries", self._start(device), persistent=False)
        self.register_buffer("files", torch.full((size,), RANDOM, device=device), persistent=False)
        # On the host, where slices are made: no step waits for an accelerator.
        self._pointer = torch.zeros((), dtype=torch.int64, device="cpu")

    def _start(self, device: torch.device) -> Tensor:
        if device.type == "meta":
            return torch.empty(self.size, self.dim, device=device)
        rank = present_ranks(device).rank if self.of_rank else 0
        # In NumPy: deepspeed.zero.Init rounds what torch makes.
        drawn = np.random.default_rng((self._seed, rank)).standard_normal((self.size, self.dim), dtype=np.float32)
        return F.normalize(torch.from_numpy(drawn), dim=1).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move, but never round; what comes from the meta device starts anew."""
        was_meta, before = self.entries.is_meta, self.entries
        super()._apply(fn, recurse)
        if was_meta and not self.entries.is_meta:
            self.entries = self._start(self.entries.device)
            self.files.fill_(RANDOM)
        elif self.entries.dtype != before.dtype:
            self.entries = before.to(self.entries.device)
        return self

    @property
    def pointer(self) -> int:
        """Place of the next write."""
        return int(self._pointer)

    @property
    def past(self) -> Tensor:
        """Entries that are past keys, bool [S]."""
        return self.files != RANDOM

    @torch.no_grad()
    def neighbours(self, keys: Tensor, files: Tensor, count: int, exclude: bool) -> Neighbours:
        """Find the nearest entries by cosine similarity.

        Args:
            keys: [B, D].
            files: numbers of the keys' files, int64 [B].
            count: K, at most S.
            exclude: pass over entries of a key's own file; where too few others are there, they are not `allowed`.
        """
        lengths = self.entries.norm(dim=1).clamp_min(EPS)
        parts = [
            self._nearest(key, file, lengths, count, exclude)
            for key, file in zip(keys.split(CHUNK), files.split(CHUNK), strict=True)
        ]
        places = torch.cat([place for place, _ in parts])
        return Neighbours(
            self.entries[places], ~self.past[places], torch.cat([similarity for _, similarity in parts]) > -torch.inf
        )

    def _nearest(
        self, keys: Tensor, files: Tensor, lengths: Tensor, count: int, exclude: bool
    ) -> tuple[Tensor, Tensor]:
        similarity = F.normalize(keys.float(), dim=1) @ self.entries.t() / lengths
        if exclude:
            similarity.masked_fill_(files[:, None] == self.files, -torch.inf)
        nearest, places = similarity.topk(count, dim=1)
        return places, nearest

    @torch.no_grad()
    def enqueue(self, keys: Tensor, files: Tensor) -> None:
        """Write keys [B, D] of files [B] behind the last ones.

        Where they reach the end, those that find no place are dropped, and the next write begins at the front.
        """
        start = self.pointer
        room = min(len(keys), self.size - start)
        self.entries[start : start + room] = keys[:room].to(self.entries)
        self.files[start : start + room] = files[:room].to(self.files)
        self._pointer.fill_((start + room) % self.size)

    def rank_state(self) -> dict[str, RankState]:
        """Give what is saved; on another number of ranks the queue of rank r is that of rank r modulo their number."""
        tensors = {"queue": self.entries, "queue_files": self.files, "queue_pointer": self._pointer}
        if not self.of_rank:
            return {name: RankState(tensor, "same_on_all") for name, tensor in tensors.items()}
        return {name: RankState(tensor, "by_owner", _taking(name, tensor)) for name, tensor in tensors.items()}


def _taking(name: str, tensor: Tensor) -> Callable[[Sequence[Tensor], int, int], None]:
    def take(written: Sequence[Tensor], rank: int, world_size: int) -> None:
        values = written[rank % len(written)]
        if values.shape != tensor.shape:
            raise CheckpointError(
                f"rank state {name}: found {list(values.shape)}, this run has {list(tensor.shape)}; allowed: the same "
                "objective.queue and objective.dim. Set them as they were, or start a new run.dir with run.init_weights"
            )
        tensor.copy_(values)

    return take

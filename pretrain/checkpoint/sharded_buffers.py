"""Buffers that are cut into equal shares, one a rank, where ZeRO stage 3 cuts the weights.

DeepSpeed partitions parameters only, and writes each rank's buffers into that rank's file as they are. So a buffer that
holds a share travels with DeepSpeed's checkpoints by itself; its whole shape is noted beside it (`NOTE`), so that
another number of ranks, or none at all, can put it together again.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Key in DeepSpeed's files of the model under which whole shapes of sharded buffers are noted by name.
NOTE = "sharded_buffers"


def share_of(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return begin and length of a rank's share of `count` values; DeepSpeed's, without what pads the last ones."""
    share = -(-count // world_size)
    begin = min(rank * share, count)
    return begin, min(share, count - begin)


class ShardedBuffers(nn.Module):
    """A module some of whose buffers are this rank's shares under ZeRO stage 3, and whole otherwise.

    Attributes:
        shapes: Whole shape of each such buffer, by its name in this module.
        is_split: Whether the buffers hold shares, flat, without padding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, torch.Size] = {}
        self.is_split = False

    def split(self, rank: int, world_size: int) -> None:
        """Keep only this rank's share of each buffer; nothing happens where that was done."""
        if self.is_split:
            return
        for name, shape in self.shapes.items():
            begin, count = share_of(shape.numel(), rank, world_size)
            # A copy: a view would keep the whole buffer in memory.
            setattr(self, name, getattr(self, name).flatten()[begin : begin + count].clone())
        self.is_split = True


def split_buffers(engine: Any) -> None:
    """Cut buffers of an engine's module where its stage cuts weights; before its checkpoints are read or written.

    A model that was built whole has whole buffers until then, which the shares in a file would not fit.
    """
    if engine.zero_optimization_stage() < 3:
        return
    for part in engine.module.modules():
        if isinstance(part, ShardedBuffers):
            part.split(torch.distributed.get_rank(), torch.distributed.get_world_size())


def noted_shapes(module: nn.Module) -> dict[str, dict[str, torch.Size]]:
    """Collect what is to be noted in DeepSpeed's files: nothing where no buffer is cut."""
    shapes = {
        f"{prefix}.{name}" if prefix else name: shape
        for prefix, part in module.named_modules()
        if isinstance(part, ShardedBuffers) and part.is_split
        for name, shape in part.shapes.items()
    }
    return {NOTE: shapes} if shapes else {}


def stored_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor, torch.Size]]:
    """Yield name, value and whole shape of buffers that belong to a checkpoint, not of those that are computed anew."""
    for prefix, part in module.named_modules():
        whole: Mapping[str, torch.Size] = part.shapes if isinstance(part, ShardedBuffers) else {}
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer, whole.get(name, buffer.shape)

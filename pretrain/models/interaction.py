"""Interaction of persons with what is around them: CycleACR's only building block (systems/cycleacr.md, 2.2).

Rows of all tensors here are persons, not clips; `PersonPlaces` says which clip each belongs to. From MCG-NJU/CycleACR
(alphaction/modeling/roi_heads/action_head/cycleacr.py), whose 1x1 convolutions are linear layers here.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.dropout import Dropout, keep_mask
from pretrain.models.linear import Linear

#: Deviation of the first weights of all projections.
INIT_STD = 0.01
#: Odd, so that its products tell persons of a clip apart in all bits of a key.
_STEP = 0x9E3779B97F4A7C15 - 2**64


@dataclass(frozen=True)
class PersonPlaces:
    """Persons of a batch of clips.

    Attributes:
        clips: number of each person's clip, int64 [n], rising.
        places: number of each person within its clip, int64 [n].
        count: clips.
    """

    clips: Tensor
    places: Tensor
    count: int

    @classmethod
    def of(cls, counts: Tensor, total: int) -> "PersonPlaces":
        """Number the `total` persons of clips with `counts` int64 [B] persons each, without waiting for the device."""
        numbers = torch.arange(len(counts), device=counts.device)
        clips = numbers.repeat_interleave(counts, output_size=total)
        starts = counts.cumsum(0) - counts
        return cls(clips, torch.arange(total, device=counts.device) - starts[clips], len(counts))

    def table(self, values: Tensor, size: int, priority: Tensor) -> Tensor:
        """Lay the persons of each clip side by side.

        Args:
            values: a row a person [n, C].
            size: places of a clip. Places that stay empty are zero, and count in a softmax over them: officially
                nothing is masked.
            priority: float [n]; of more than `size` persons those of highest priority have a place, the first of
                equals, in the order of the batch.

        Returns:
            [B, size, C], with gradient to `values`.
        """
        # By clip, within it by falling priority: the place in that order is the rank within the clip.
        order = priority.argsort(descending=True, stable=True)
        order = order[self.clips[order].argsort(stable=True)]
        rank = torch.empty_like(self.places).scatter_(0, order, self.places)
        taken = (rank < size).long()
        before = taken.cumsum(0) - taken
        first = torch.zeros(self.count, dtype=torch.long, device=before.device)
        # Places taken in the clips before: what the clip's first person, and so the least of its persons, has.
        first = first.scatter_reduce(0, self.clips, before, "amin", include_self=False)
        place = torch.where(taken > 0, before - first[self.clips], size)
        # One place more, for all who have none: picking rows by a mask would wait for the device.
        table = values.new_zeros(self.count, size + 1, values.shape[-1])
        return table.index_put((self.clips, place), values)[:, :size]


class PersonDropout(Dropout):
    """Dropout of single elements of persons' rows, drawn by the clip's position and the person's place in it.

    `persons` are those of the forward pass under way, set by the head that holds the layer.
    """

    persons: PersonPlaces | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.rows is None or self.rows.keys is None or self.persons is None:
            return F.dropout(x, self.p)
        keys = self.rows.keys[self.persons.clips] ^ (self.persons.places + 1) * _STEP
        keep = keep_mask(keys, self.key, x[0].numel(), self.p) if len(x) else x.bool()
        return x * keep.view(x.shape) * (1 / (1 - self.p))


class InteractionBlock(nn.Module):
    """Attention of a person's tokens to others, with one head, and a residual.

    Args:
        dim: channels D of person and others.
        outputs: channels of the result; where they differ from `dim`, the shortcut is a projection.
        dropout: rate on the branch.
        seconds: seconds that the others come from; adds a learned code of each to keys and values. 0: none.
    """

    shortcut: Linear | None
    temporal_position_k: nn.Parameter | None
    temporal_position_v: nn.Parameter | None

    def __init__(self, dim: int, outputs: int, dropout: float, seconds: int = 0) -> None:
        super().__init__()
        self.query, self.key, self.value = (Linear(dim, dim, init=_normal) for _ in range(3))
        # Zero: a block begins as the identity.
        self.out = Linear(dim, outputs, init=nn.init.zeros_)
        self.shortcut = Linear(dim, outputs, init=_normal) if outputs != dim else None
        self.dropout = PersonDropout(dropout)
        self.scale = dim**-0.5
        for name in ("temporal_position_k", "temporal_position_v"):
            self.register_parameter(name, nn.Parameter(torch.zeros(seconds, dim)) if seconds else None)

    def forward(self, x: Tensor, others: Tensor, owners: Tensor | None = None) -> Tensor:
        """Transform persons.

        Args:
            x: [n, T, D].
            others: [n, M, D]; or one table a clip [B, M, D], and
            owners: int64 [n], which table each person looks at.

        Returns:
            [n, T, outputs].
        """
        keys = self._coded(self.key(others), self.temporal_position_k)
        values = self._coded(self.value(others), self.temporal_position_v)
        if owners is not None:
            # Projected once a clip, not once a person.
            keys, values = keys[owners], values[owners]
        weights = (self.query(x) @ keys.transpose(1, 2) * self.scale).softmax(dim=-1)
        y = weights @ values
        # Over channels and time jointly, as officially; over channels alone the scores move in the third decimal.
        y = F.relu(F.layer_norm(y, y.shape[1:]))
        return self.dropout(self.out(y)) + (x if self.shortcut is None else self.shortcut(x))

    def _coded(self, projected: Tensor, codes: Tensor | None) -> Tensor:
        """Add each second's code to its rows, those of empty places too."""
        if codes is None:
            return projected
        return (projected.unflatten(1, (len(codes), -1)) + codes[:, None].to(projected.dtype)).flatten(1, 2)


_normal = partial(nn.init.normal_, std=INIT_STD)


def block_macs(dim: int, outputs: int, queries: int, keys: int) -> int:
    """Count a block's multiply-accumulates for one person of `queries` tokens that looks at `keys` others."""
    shortcut = queries * dim * outputs if outputs != dim else 0
    return queries * dim * (dim + outputs) + 2 * keys * dim * dim + 2 * queries * keys * dim + shortcut

"""The place of every value of a checkpoint, whichever number of ranks and ZeRO stage wrote it.

DeepSpeed lays the float32 weights, and each state of the optimiser, out in one of three ways:

    stage 0      whole tensors, in the order of the optimiser's parameters
    stage 1, 2   each parameter group behind one another in a line, padded at the end, cut into equal pieces: one a rank
    stage 3      each parameter, padded, cut into equal pieces; a rank's pieces of all parameters behind one another

A `Piece` says for a stretch of a parameter where it is; files are memory-mapped, so only what is asked for is read.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.deepspeed_files import Groups, load_file, model_files, optimizer_files, sharded_shapes
from pretrain.errors import CheckpointError

#: Entries of a parameter group that are the program's own, and say nothing about the kind of optimiser.
OWN_KEYS = frozenset({"lr_scale", "decay_scale", "turn"})
#: Name of the float32 weights among what is kept for a parameter; the others are the optimiser's own names.
WEIGHT = "weight"


@dataclass(frozen=True)
class Piece:
    """Values `begin` to `begin + count` of a flattened parameter, which are those of `line` from `offset` on."""

    begin: int
    count: int
    line: Tensor
    offset: int


@dataclass(frozen=True)
class Sharded:
    """Shape and pieces of what is not trained: a frozen parameter, or a buffer such as an average of weights."""

    shape: torch.Size
    pieces: list[Piece]


@dataclass(frozen=True)
class Shards:
    """A checkpoint's content by name.

    Attributes:
        folder: The checkpoint's folder of DeepSpeed files, for messages.
        shapes: Shapes of the trained parameters.
        pieces: For WEIGHT and for each state of the optimiser: pieces of each trained parameter, in order.
        scalars: States of the optimiser that are one number a parameter (`step`), by state and parameter.
        whole: Buffers, and where they are stored whole, all parameters in the precision of the forward pass.
        sharded: Frozen parameters and buffers that are not whole, but cut as stage 3 cuts weights.
        options: Names of the optimiser's options (betas, eps, …), which tell one kind from another.
        counters: DeepSpeed's counts of steps.
        loss_scale: fp16's loss scale and its counters, empty in other formats.
    """

    folder: Path
    shapes: Mapping[str, torch.Size]
    pieces: Mapping[str, Mapping[str, list[Piece]]]
    scalars: Mapping[str, Mapping[str, Tensor]]
    whole: Mapping[str, Tensor]
    sharded: Mapping[str, Sharded]
    options: frozenset[str]
    counters: Mapping[str, int]
    loss_scale: Mapping[str, float]

    def read(self, kind: str, name: str, begin: int, count: int) -> Tensor:
        """Read values `begin` to `begin + count` of a flattened parameter's weights or of a state of it.

        Raises:
            CheckpointError: the checkpoint has no such values.
        """
        return gather(self.pieces[kind].get(name, []), begin, count, f"{self.folder}: {kind} of {name}")

    def read_untrained(self, name: str, begin: int, count: int) -> Tensor | None:
        """Read values of a flattened frozen parameter or buffer; None: the checkpoint has none of that name.

        Raises:
            CheckpointError: the checkpoint has not all of the values.
        """
        if name in self.sharded:
            return gather(self.sharded[name].pieces, begin, count, f"{self.folder}: {name}")
        return self.whole[name].flatten()[begin : begin + count] if name in self.whole else None

    def untrained_shape(self, name: str) -> torch.Size | None:
        """Return the shape of a frozen parameter or buffer; None: the checkpoint has none of that name."""
        found = self.sharded.get(name) or self.whole.get(name)
        return None if found is None else found.shape


def gather(pieces: Iterable[Piece], begin: int, count: int, what: str) -> Tensor:
    """Put values `begin` to `begin + count` together from `pieces`, which are in order."""
    found = []
    for piece in pieces:
        first, last = max(begin, piece.begin), min(begin + count, piece.begin + piece.count)
        if first < last:
            found.append(piece.line[piece.offset + first - piece.begin :][: last - first])
    values = torch.cat(found) if found else torch.empty(0)
    # A gap between pieces must not shift what follows: the sum of lengths is what tells.
    if len(values) != count:
        raise CheckpointError(f"{what}: {len(values)} of the {count} values from {begin} on are in the checkpoint")
    return values


def open_shards(folder: Path, world_size: int, stage: int, groups: Groups, shapes: Mapping[str, torch.Size]) -> Shards:
    """Find everything in DeepSpeed's files.

    Args:
        folder: DeepSpeed's folder inside the checkpoint.
        world_size: Ranks that wrote it.
        stage: ZeRO stage that wrote it.
        groups: The optimiser's parameters as the present run has them.
        shapes: Their shapes.

    Raises:
        CheckpointError: files are missing, or hold other parameters than the present run.
    """
    models = [load_file(path) for path in model_files(folder, world_size, stage)]
    _check_names(folder, models[0], groups, shapes)
    optimizers = [load_file(path)["optimizer_state_dict"] for path in optimizer_files(folder, world_size, stage)]
    # Without ZeRO DeepSpeed stores the optimiser in the model's file.
    if stage == 0:
        optimizers = [models[0]["optimizer"]]
    base = _base_state(optimizers[0])
    sharded = _sharded(models) if stage == 3 else {}
    return Shards(
        folder=folder,
        shapes=shapes,
        pieces={
            kind: _pieces(parts, stage, groups, shapes, optimizers[0].get("param_alignment_paddings"))
            for kind, parts in _lines(optimizers, models[0], stage, groups).items()
        },
        scalars=_scalars(base["state"], stage, groups),
        whole={
            name: value
            for name, value in models[0]["module"].items()
            # Stage 3 leaves an empty tensor where a parameter is sharded; below it an empty buffer is really empty.
            if name not in sharded and (value.numel() or stage < 3)
        },
        sharded=sharded,
        options=frozenset(key for group in base["param_groups"] for key in group) - {"params", *OWN_KEYS},
        counters={name: models[0][name] for name in ("global_steps", "global_samples", "skipped_steps")},
        loss_scale=_loss_scale(optimizers[0]),
    )


def _check_names(folder: Path, model: dict[str, Any], groups: Groups, shapes: Mapping[str, torch.Size]) -> None:
    """Compare the names, their order and shapes with the present run's, where DeepSpeed stored them."""
    if model["param_shapes"] is None:
        stored = {name: value.shape for name, value in model["module"].items() if name in shapes}
    else:
        stored = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
        ours = list(itertools.chain.from_iterable(groups))
        # The optimiser's states go by number: in another order each parameter would silently get another's moments.
        if sorted(stored) == sorted(ours) and list(stored) != ours:
            raise CheckpointError(
                f"{folder}: the optimiser's parameters are the present run's, but in another order. Continue with the "
                "release that wrote it, or take over the weights alone with run.init_weights in a new run.dir"
            )
    wrong = sorted(name for name in stored.keys() | shapes.keys() if stored.get(name) != shapes.get(name))
    if wrong:
        found = ", ".join(f"{name} {list(stored.get(name, []))} -> {list(shapes.get(name, []))}" for name in wrong[:5])
        raise CheckpointError(
            f"{folder}: {len(wrong)} trained parameters are not those of this run (checkpoint -> run): {found}. "
            "Continue with the recipe that wrote it, or start a new run.dir with run.init_weights"
        )


def _base_state(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Return the state_dict of the torch optimiser inside DeepSpeed's wrapper, if there is one."""
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        if key in optimizer:
            return dict(optimizer[key])
    return optimizer


#: For each rank that wrote, its tensors by their number in the optimiser.
Parts = list[dict[int, Tensor]]


def _lines(optimizers: list[dict[str, Any]], model: dict[str, Any], stage: int, groups: Groups) -> dict[str, Parts]:
    """Collect the float32 weights and the states of the optimiser; no states before the first step."""
    if stage == 0:
        masters = optimizers[0].get("fp32_groups")
        names = itertools.chain.from_iterable(groups)
        whole = itertools.chain.from_iterable(masters) if masters else (model["module"][name] for name in names)
        weights = [dict(enumerate(whole))]
    else:
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        weights = [dict(enumerate(optimizer[key])) for optimizer in optimizers]
    states = [_base_state(optimizer)["state"] for optimizer in optimizers]
    kinds = {key for state in states[0].values() for key, value in state.items() if _is_line(value)}
    return {WEIGHT: weights} | {
        kind: [{number: values[kind] for number, values in state.items() if kind in values} for state in states]
        for kind in sorted(kinds)
    }


def _is_line(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _scalars(state: dict[int, dict[str, Any]], stage: int, groups: Groups) -> dict[str, dict[str, Tensor]]:
    """Collect states of one number. A line has one for all its parameters, which then is each one's."""
    if stage == 0:
        names = [[name] for name in itertools.chain.from_iterable(groups)]
    elif len(state) == len(groups):
        names = groups
    else:  # stage 3 cuts large groups up; all counters are alike, as every step updates every parameter
        names = [list(itertools.chain.from_iterable(groups))]
    scalars: dict[str, dict[str, Tensor]] = {}
    for number, members in enumerate(names):
        for key, value in state.get(number, {}).items():
            if value is not None and not _is_line(value):
                scalars.setdefault(key, {}).update(dict.fromkeys(members, torch.as_tensor(value)))
    return scalars


def _pieces(
    parts: Parts, stage: int, groups: Groups, shapes: Mapping[str, torch.Size], gaps: list[list[int]] | None
) -> dict[str, list[Piece]]:
    """Locate each parameter in what the ranks wrote; `gaps` are values behind each parameter that mean nothing."""
    if stage == 0:
        return {
            name: [Piece(0, parts[0][number].numel(), parts[0][number].flatten(), 0)]
            for number, name in enumerate(itertools.chain.from_iterable(groups))
            if number in parts[0]
        }
    if stage == 3:
        return _cut_each(parts, [(name, shapes[name].numel()) for group in groups for name in group])
    found: dict[str, list[Piece]] = {}
    for number, group in enumerate(groups):
        behind = gaps[number] if gaps else [0] * len(group)
        sizes = [(name, shapes[name].numel(), gap) for name, gap in zip(group, behind, strict=True)]
        found |= _cut_line([part[number] for part in parts], sizes)
    return found


def _cut_line(line: list[Tensor], sizes: list[tuple[str, int, int]]) -> dict[str, list[Piece]]:
    """Locate parameters of stages 1 and 2, which lie behind one another; one may lie on several ranks."""
    edges = [0, *itertools.accumulate(len(part) for part in line)]
    found: dict[str, list[Piece]] = {}
    start = 0
    for name, size, gap in sizes:
        found[name] = [
            Piece(first - start, last - first, part, first - edge)
            for part, edge in zip(line, edges, strict=False)
            if (first := max(start, edge)) < (last := min(start + size, edge + len(part)))
        ]
        start += size + gap
    return found


def _cut_each(parts: Parts, sizes: list[tuple[str, int]]) -> dict[str, list[Piece]]:
    """Locate parameters of stage 3: an equal piece of each on every rank. DeepSpeed cuts none where a part ends."""
    found: dict[str, list[Piece]] = {}
    number = offset = 0
    for name, size in sizes:
        share = -(-size // len(parts))
        if offset + share > len(parts[0][number]):
            number, offset = number + 1, 0
        found[name] = [
            Piece(rank * share, min(share, size - rank * share), part[number], offset)
            for rank, part in enumerate(parts)
            if rank * share < size
        ]
        offset += share
    return found


def _sharded(models: list[dict[str, Any]]) -> dict[str, Sharded]:
    found = {}
    for name, shape in sharded_shapes(models[0]).items():
        frozen = models[0]["frozen_param_fragments"] or {}
        key = "frozen_param_fragments" if name in frozen else "module"
        parts: Parts = [{0: model[key][name].flatten()} for model in models]
        found[name] = Sharded(shape, _cut_each(parts, [(name, shape.numel())])[name])
    return found


#: What fp16's dynamic loss scale consists of. It is an object's attributes under ZeRO, and entries of a table without.
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _loss_scale(optimizer: dict[str, Any]) -> dict[str, float]:
    scaler = optimizer.get("loss_scaler")
    source = vars(scaler) if scaler is not None else optimizer
    return {name: source[name] for name in LOSS_SCALE if source.get(name) is not None}

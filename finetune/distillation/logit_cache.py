"""Teacher logits on disk, so that the teacher runs once for any number of students.

    identity.json                     what the logits depend on
    rank_00000/step_00000000.bin      records of one rank, SHARD_STEPS optimiser steps a file

Views are a function of (seed, epoch, position, view), mixing of (seed, epoch, position): a run with the same recipe,
data, teacher and number of ranks sees the same pixels in the same micro-batches again. A cache of anything else is
refused. One record holds the logits of a micro-batch in float16, behind a digest of its views and a checksum; a record
that is missing or was torn by a crash is computed again.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.classification.mixing import MIX_SEEDS
from pretrain.checkpoint.same_run import differences
from pretrain.errors import DataError, TrainingError
from pretrain.runtime.untrusted import parse_json

#: Optimiser steps in one file.
SHARD_STEPS = 1000
#: Digest of the views, checksum of the logits.
HEADER = struct.Struct("<16sI")
IDENTITY = "identity.json"


class LogitCache:
    """Records of one rank.

    Args:
        folder: of the cache, on a file system that all ranks see (or each its own).
        identity: what the logits depend on, JSON; written where the folder is new.
        rank: this rank.
        micro_batches: of this rank in one optimiser step.
        shape: of a record's logits, (clips of a micro-batch, classes).

    Raises:
        DataError: the folder holds logits of something else.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], rank: int, micro_batches: int, shape: tuple[int, int]
    ) -> None:
        self._folder, self._micro_batches, self._shape = folder / f"rank_{rank:05d}", micro_batches, shape
        self._payload = 2 * shape[0] * shape[1]
        self._folder.mkdir(parents=True, exist_ok=True)
        # As it will be read back: a tuple comes back as a list, and would differ at every start.
        _claim(folder, parse_json(json.dumps(identity)), rank)

    def read(self, step: int, micro: int, views: bytes) -> Tensor | None:
        """Read logits float32 of micro-batch `micro` of optimiser step `step`; None where there are none.

        Args:
            step, micro: counted from 0.
            views: `views_digest` of the micro-batch.

        Raises:
            DataError: the record belongs to other views.
        """
        path, offset = self._place(step, micro)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                record = file.read(HEADER.size + self._payload)
        except FileNotFoundError:
            return None
        # Not written yet, or the last one of a file that a crash cut.
        if len(record) < HEADER.size + self._payload:
            return None
        digest, checksum = HEADER.unpack_from(record)
        payload = record[HEADER.size :]
        if zlib.crc32(payload, zlib.crc32(digest)) != checksum:
            return None  # a hole of zeros, or torn by a crash
        if digest != views:
            raise DataError(
                f"{path}: the logits of step {step} are those of other clips than this run draws there; the recipe "
                "agrees, so the data were read differently (videos unreadable then or now?). Use another "
                "objective.cache, or null"
            )
        return torch.from_numpy(np.frombuffer(payload, np.float16).astype(np.float32).reshape(self._shape))

    def write(self, step: int, micro: int, views: bytes, logits: Tensor) -> Tensor:
        """Store logits [clips, classes]; return them as they will be read.

        Raises:
            TrainingError: some are not finite in float16.
        """
        values = logits.detach().cpu().half()
        if not bool(values.isfinite().all()):
            raise TrainingError(f"step {step}: the teacher's logits exceed float16; set objective.cache=null")
        payload = values.numpy().tobytes()
        path, offset = self._place(step, micro)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            # In one call and in place: what a crash leaves is a hole or a torn record, and the checksum tells both.
            os.pwrite(descriptor, HEADER.pack(views, zlib.crc32(payload, zlib.crc32(views))) + payload, offset)
        finally:
            os.close(descriptor)
        # Not the logits that came in: the first student must learn from the numbers that later ones read.
        return values.float()

    def _place(self, step: int, micro: int) -> tuple[Path, int]:
        first = step // SHARD_STEPS * SHARD_STEPS
        # By its place: no index is needed, and no two ranks write to one file.
        record = (step - first) * self._micro_batches + micro
        return self._folder / f"step_{first:08d}.bin", record * (HEADER.size + self._payload)


def views_digest(batch: Mapping[str, Any]) -> bytes:
    """Compute the 16 bytes that name the views of a micro-batch and how they are mixed: by seeds, else by torch's."""
    columns = [batch[name].tolist() for name in ("epoch", "position", "view")]
    content = [batch.get(MIX_SEEDS), torch.initial_seed(), *columns, batch["key"]]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).digest()


def _claim(folder: Path, identity: dict[str, Any], rank: int) -> None:
    """Write down what a new cache is of; refuse one of something else."""
    path = folder / IDENTITY
    if not path.exists():
        fresh = folder / f".{IDENTITY}.{rank}.{os.getpid()}"
        fresh.write_text(json.dumps(identity, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        fresh.replace(path)  # every rank would write the same
    found = parse_json(path.read_text(encoding="utf-8"))
    changed = [f"{key}: {old!r} there, {new!r} here" for key, (old, new) in differences(found, identity).items()]
    if changed:
        raise DataError(
            f"{folder}: teacher logits of other views or of another teacher:\n  - "
            + "\n  - ".join(changed)
            + "\nUse another objective.cache, or null"
        )

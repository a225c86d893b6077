"""Record of what a bad step was made of, so that it can be looked into: RUN/incidents/step_00000123.json.

In a good step this costs a few references: to the keys and positions of the micro-batches and to their losses on the
device. Norms are computed, and ranks talk to each other, only when there is something to record.
"""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint.manifest import write_durably
from pretrain.data.samples import Batch
from pretrain.guards.results import Decision
from pretrain.runtime.disk import advice
from pretrain.runtime.process_group import Ranks, gather_objects

logger = logging.getLogger(__name__)

#: Records in a run folder; of further incidents only the log tells.
MOST_RECORDS = 200

#: Why there may be no norms of gradients.
CLEARED = (
    "the gradient alone was not finite, which DeepSpeed's optimiser finds and clears in one go; launch/replay.py "
    "computes it again"
)


@dataclass
class Norms:
    """A tensor's Euclidean norm, over its finite values, and how many are not finite."""

    norm: float
    nonfinite: int


@dataclass
class Incidents:
    """Notes on what a step is made of, written to the run folder if the step turns out bad.

    Args:
        folder: RUN/incidents.
        ranks: This process among all.
        seed: The run's seed, which keys all that is random.
        sources: Names of the sources, in the recipe's order.
    """

    folder: Path
    ranks: Ranks
    seed: int
    sources: list[str]
    _step: int = 0
    _turn: str = ""
    _batches: dict[str, list[Batch]] = field(default_factory=dict)
    _losses: dict[str, list[Tensor]] = field(default_factory=dict)
    _gradients: dict[str, dict[str, Norms]] = field(default_factory=dict)

    def begin(self, step: int) -> None:
        """Begin step `step`, counted from 0."""
        self._step, self._batches, self._losses, self._gradients = step, {}, {}, {}

    def begin_turn(self, turn: str) -> None:
        """Begin one of the step's updates; empty where there is only one."""
        self._turn, self._batches[turn], self._losses[turn] = turn, [], []

    def note(self, batch: Batch, loss: Tensor) -> None:
        """Remember a micro-batch; what it is called, not its pixels."""
        names = ("key", "position", "epoch", "view", "source", "bad")
        self._batches[self._turn].append({name: batch[name] for name in names})
        # Left on the device: to read it here would wait for every micro-batch of every good step.
        self._losses[self._turn].append(loss.detach())

    def look_at_gradients(self, module: nn.Module) -> None:
        """Take norms of the gradients, as they are before the optimiser clears them; all ranks must call it."""
        if self._turn not in self._gradients:
            self._gradients[self._turn] = _by_module(module, _gradient)

    def write(self, decision: Decision, turn: str, numbers: dict[str, Any], module: nn.Module) -> Path | None:
        """Write the record of the present step, from rank 0; all ranks must call it.

        Args:
            decision: What was bad, and what is done.
            turn: Of several updates, the bad one.
            numbers: Further facts of the step.
            module: The objective.

        Returns:
            Where it is; None on other ranks, and where it could not be written, which the log then says.
        """
        # Before rank 0 goes on alone: all ranks put sharded weights together, and would wait for one that had left.
        weights = _by_module(module, _weight)
        ranks = gather_objects(self.ranks, self._describe())
        if not self.ranks.first:
            return None
        looked_at = self._gradients.get(turn)
        gradients = looked_at or {}
        content = {
            "step": self._step + 1,
            "turn": turn,
            **asdict(decision),
            **numbers,
            "randomness": {
                "samples": "Philox keyed by (seed, epoch, position, view, purpose)",
                "forward": "torch seeded by SeedSequence([seed, step - 1, micro-batch, rank])",
                "seed": self.seed,
            },
            "ranks": ranks,
            "modules": {name: _row(weights[name], gradients.get(name)) for name in weights},
            "gradients": _about(decision, looked_at),
        }
        try:
            return _write(self.folder, self._step + 1, content)
        except OSError as error:
            logger.warning("step %d: its record could not be written: %s", self._step + 1, advice(error))
            return None

    def _describe(self) -> dict[str, Any]:
        batches = [
            {
                "turn": turn,
                "micro_batch": number,
                "loss": float(loss),
                "samples": list(self._samples(batch)),
                "replaced": _bad(batch),
            }
            for turn, noted in self._batches.items()
            for number, (batch, loss) in enumerate(zip(noted, self._losses[turn], strict=True))
        ]
        return {"rank": self.ranks.rank, "micro_batches": batches}

    def _samples(self, batch: Batch) -> Iterator[dict[str, Any]]:
        columns = [batch[name].tolist() for name in ("epoch", "position", "view", "source")]
        for key, epoch, position, view, source in zip(batch["key"], *columns, strict=True):
            yield {
                "key": key,
                "source": self.sources[source],
                "epoch": epoch,
                "position": position,
                "view": view,
            }


def _bad(batch: Batch) -> list[dict[str, Any]]:
    return [asdict(bad) for bad in batch["bad"]]


def _about(decision: Decision, gradients: dict[str, Norms] | None) -> str:
    if gradients is None:
        return CLEARED
    if decision.kind == "spike" and decision.action != "record":
        return "poisoned to leave the update out, so none is finite; launch/replay.py computes them again"
    return "of the whole step, mean over ranks, before clipping"


def _row(weights: Norms, gradients: Norms | None) -> dict[str, Any]:
    row: dict[str, Any] = {"weights": weights.norm, "weights_nonfinite": weights.nonfinite}
    if gradients is not None:
        row |= {"gradients": gradients.norm, "gradients_nonfinite": gradients.nonfinite}
    return row


def _by_module(module: nn.Module, value_of: Any) -> dict[str, Norms]:
    """Compute norms by dotted name of the module that holds the parameters itself."""
    sums: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        value = value_of(parameter)
        if value is not None:
            sums.setdefault(name.rpartition(".")[0], []).append(_squares(value))
    # One wait for the device a module, not one a parameter.
    totals = {name: torch.stack(parts).sum(0).tolist() for name, parts in sums.items()}
    return {name: Norms(math.sqrt(squares), round(nonfinite)) for name, (squares, nonfinite) in totals.items()}


def _squares(value: Tensor) -> Tensor:
    """Sum the squares of finite values and count the others, float64 [2]."""
    finite = value.isfinite()
    # In float64, where no square of a finite float32 overflows: the norm of finite weights must be finite.
    squares = torch.where(finite, value, 0).double().square().sum()
    return torch.stack([squares, (~finite).sum().double()])


def _weight(parameter: nn.Parameter) -> Tensor | None:
    from deepspeed.utils import safe_get_full_fp32_param

    if hasattr(parameter, "ds_id"):  # sharded by ZeRO stage 3; all ranks put it together
        whole: Tensor | None = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        return whole
    return parameter.detach()


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    from deepspeed.utils import safe_get_full_grad

    gradient: Tensor | None = safe_get_full_grad(parameter) if parameter.requires_grad else None
    return gradient


def _write(folder: Path, step: int, content: dict[str, Any]) -> Path | None:
    folder.mkdir(exist_ok=True)
    count = len(list(folder.glob("step_*.json")))
    if count >= MOST_RECORDS:
        logger.warning("%s holds %d records, the bad step %d is not written down", folder, count, step)
        return None
    path, number = folder / f"step_{step:08d}.json", 1
    while path.exists():  # the same step once more, after a rewind or a resume
        number += 1
        path = folder / f"step_{step:08d}_{number}.json"
    write_durably(path, json.dumps(plain(content), indent=1, allow_nan=False) + "\n")
    return path


def plain(value: Any) -> Any:
    """Turn numbers that JSON can't express (nan, inf) into strings."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

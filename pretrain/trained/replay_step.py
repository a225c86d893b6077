"""One step of a run again, alone and without an update: which module turned non-finite, on which samples.

The batch is exactly the run's: samples, clips, crops, masks and the draws of the forward pass are functions of the
recipe and the step. The weights, queues and banks are those of the newest checkpoint before the step; where that is the
step before, and the run did not shard its sums, losses are the run's own to the bit. Of several updates of one batch
each is replayed with these weights, while in the run the later ones saw the result of the earlier ones.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint import folders
from pretrain.checkpoint.manifest import problems, write_durably
from pretrain.checkpoint.rank_state import BY_OWNER, load_rank_state
from pretrain.checkpoint.save import STATE
from pretrain.data.samples import Batch
from pretrain.data.stream_plan import open_plan
from pretrain.engine.assemble import open_stream
from pretrain.engine.schedules import build_schedule
from pretrain.engine.transfers import to_device
from pretrain.engine.turns import turns_of
from pretrain.errors import CheckpointError, RecipeError
from pretrain.guards.first_nonfinite import (
    ROOT,
    Activation,
    FirstNonFinite,
    NonFinite,
    bad_weights,
    function_without_gradient,
)
from pretrain.guards.incidents import plain
from pretrain.models.dropout import ROW_KEYS, Rows, draw_by_position, with_row_keys
from pretrain.models.frozen import check_frozen
from pretrain.models.gradient_limits import follow_loss_scale
from pretrain.models.initial_weights import read_weights
from pretrain.objectives.base import Method, Objective
from pretrain.recipe.schema import Recipe
from pretrain.runtime.determinism import compute_alike
from pretrain.runtime.dtypes import DTYPES
from pretrain.runtime.process_group import Ranks
from pretrain.runtime.run_folder import RunFolder
from pretrain.runtime.seeds import seed_everything, seed_forward
from pretrain.runtime.untrusted import parse_json
from pretrain.trained.load_run import load_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepPlace:
    """Step to replay: run folder, step (counted from 1), checkpoint with its state.json, ranks, the record."""

    run: RunFolder
    step: int
    checkpoint: Path | None
    state: dict[str, Any]
    world_size: int
    record: dict[str, Any]

    @property
    def weights_step(self) -> int:
        """Updates that the weights have seen."""
        return int(self.state.get("step", 0))

    @property
    def recipe_file(self) -> Path:
        """The recipe that the step was made with, as far as is known."""
        return (self.checkpoint or self.run.root) / "recipe.yaml"


@dataclass
class MicroBatch:
    """One micro-batch of one rank as replayed, in one turn; `clips` are kept of the most suspicious one alone."""

    rank: int
    micro: int
    turn: str
    loss: float
    recorded: float | None
    keys: list[str]
    positions: list[int]
    finding: NonFinite | None
    activations: dict[str, Activation]
    gradients: dict[str, float]
    clips: dict[str, Tensor] = field(repr=False)


def find_place(run: Path, step: int) -> StepPlace:
    """Find what there is of a step.

    Raises:
        CheckpointError: no run there.
        RecipeError: no such step.
    """
    folder = RunFolder(run)
    if not (run / "recipe.yaml").is_file():
        raise CheckpointError(f"{run}: not a run folder, which has recipe.yaml")
    if step < 1:
        raise RecipeError(f"step {step}: steps are counted from 1, as in metrics.jsonl")
    records = sorted(folder.incidents.glob(f"step_{step:08d}*.json"))
    # The last of several: a step that is run again after a rewind is recorded once more.
    record = parse_json(records[-1].read_text(encoding="utf-8")) if records else {}
    checkpoint = _newest_before(folder.checkpoints, step)
    state = parse_json((checkpoint / STATE).read_text(encoding="utf-8")) if checkpoint else {}
    if record:
        world_size = len(record["ranks"])
    else:
        world_size = state.get("world_size") or _launched(run)
    return StepPlace(folder, step, checkpoint, state, world_size, record)


def _newest_before(root: Path, step: int) -> Path | None:
    for folder in reversed(folders.published(root)):
        if folders.step_of(folder) < step:
            wrong = problems(folder)
            if not wrong:
                return folder
            logger.warning("%s is damaged and passed over: %s", folder, "; ".join(wrong))
    return None


def _launched(run: Path) -> int:
    """Read the number of ranks of the run's latest start."""
    report = parse_json((run / "environment.json").read_text(encoding="utf-8"))
    return int(report.get("variables", {}).get("WORLD_SIZE", 1))


def build_objective(place: StepPlace, method: Method, device: torch.device) -> Objective:
    """Build the objective as it was before the step, in the recipe's number format.

    Raises:
        CheckpointError: the weights do not verify, or were trained beside other frozen parts.
    """
    recipe = method.recipe
    # Without a checkpoint before the step, the weights are those that the run drew first.
    seed_everything(recipe.run.seed)
    objective = method.build()
    if place.checkpoint is not None:
        load_checkpoint(objective, place.checkpoint, finite=False)
        check_frozen(objective.frozen_parts(), place.state["frozen"], str(place.checkpoint))
    elif recipe.run.init_weights:
        path = recipe.run.init_weights
        objective.load_pretrained(path, read_weights(path, recipe.run.init_averaged))
    torch.set_float32_matmul_precision(recipe.compute.matmul)
    return objective.to(device, DTYPES[recipe.compute.dtype]).train()


def replay(place: StepPlace, method: Method, rank: int | None = None) -> Iterator[MicroBatch]:
    """Replay the step's micro-batches, of all ranks or one, each through a forward and a backward pass.

    Raises:
        RecipeError: the run has no such rank.
        CheckpointError: the weights do not verify.
    """
    if rank is not None and not 0 <= rank < place.world_size:
        raise RecipeError(f"--rank: found {rank}, allowed: 0 to {place.world_size - 1}, the step's ranks")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    recipe = method.recipe
    compute_alike(device, recipe.compute.deterministic)
    plan = open_plan(recipe.data, recipe.batch, recipe.run.seed)
    objective = build_objective(place, method, device)
    schedule = build_schedule(recipe, plan.steps_per_epoch)
    first = {name: state.tensor.clone() for name, state in objective.rank_state().items()}
    turns, rows, scale = turns_of(objective), draw_by_position(objective), follow_loss_scale(objective)
    warn_of_losses(objective, recipe, place.world_size)
    for number in range(place.world_size) if rank is None else [rank]:
        served = Ranks(number, place.world_size, 0, device)
        stream = open_stream(method, plan, served, place.step - 1, in_process=True)
        _restore_rank_state(objective, place, number, first)
        objective.before_step(place.step - 1, schedule.steps_per_epoch, schedule.total)
        for micro in range(stream.accumulation):
            batch = with_row_keys(recipe.run.seed, next(stream))
            for turn in turns:
                with turn.taken(objective):
                    recorded = _recorded(place.record, number, turn.name if len(turns) > 1 else "", micro)
                    # The loss of a micro-batch alone, without the factors of fp16 and of accumulation.
                    scale.rows = len(batch["key"])
                    found = _run(objective, rows, batch, recipe.run.seed, place, number, micro, recorded)
                yield found


def _restore_rank_state(objective: Objective, place: StepPlace, rank: int, first: dict[str, Tensor]) -> None:
    """Give the objective the queues and banks that a rank had, or those that every rank began with."""
    states = objective.rank_state()
    if place.checkpoint is not None:
        load_rank_state(place.checkpoint, states, place.state["world_size"], rank, place.world_size)
        return
    for name, state in states.items():
        state.restore(first[name], rank, place.world_size)


def warn_of_losses(objective: Objective, recipe: Recipe, world_size: int) -> None:
    """Say why losses differ from the run's where they depend on rows that another micro-batch has."""
    if objective.whole_batch and recipe.batch.samples > recipe.batch.micro:
        looks = "the loss looks across the whole batch"
    elif objective.cross_rank_batch_norm and world_size > 1:
        looks = "batch norms look across all ranks"
    elif world_size > 1 and any(state.reshape == BY_OWNER for state in objective.rank_state().values()):
        looks = "what the objective remembers lies on all ranks"
    else:
        return
    logger.warning("%s, and each micro-batch is replayed alone: losses and gradients differ from the run's", looks)


def _run(
    objective: Objective,
    rows: Rows,
    batch: Batch,
    seed: int,
    place: StepPlace,
    rank: int,
    micro: int,
    recorded: float | None,
) -> MicroBatch:
    on_device = to_device(batch, next(objective.parameters()).device)
    rows.keys = on_device.get(ROW_KEYS)

    def loss_of() -> Tensor:
        seed_forward(seed, place.step - 1, micro, rank)
        loss: Tensor = objective(on_device).loss
        return loss

    # Gradients would add up: a NaN of the micro-batch before would be found in this one too.
    objective.zero_grad(set_to_none=True)
    with FirstNonFinite(objective, len(batch["key"])) as probe:
        loss = loss_of()
        # A NaN loss makes every gradient NaN, which says nothing: the forward pass has the finding then.
        if loss.isfinite():
            loss.backward()  # type: ignore[no-untyped-call]
    # Weights first: one that is not finite is the cause of all that the passes show.
    finding = bad_weights(objective) or probe.finding
    if finding is None and not loss.isfinite():
        finding = NonFinite("forward", ROOT, "the loss is not finite, though every module's output is")
    if finding is not None and finding.phase == "backward":
        # Only now, and once more: anomaly mode raises at its first finding, and all other modules stay unseen.
        function = function_without_gradient(loss_of)
        if function:
            finding = NonFinite(finding.phase, finding.module, f"{finding.text} ({function})", finding.clips)
    return MicroBatch(
        rank,
        micro,
        objective.turn,
        float(loss.detach()),
        recorded,
        batch["key"],
        batch["position"].tolist(),
        finding,
        probe.activations,
        _gradient_norms(objective),
        clips_of(batch),
    )


def clips_of(batch: Batch) -> dict[str, Tensor]:
    """Pick what of a batch can be looked at: clips uint8 [B, T, H, W, 3] by name; none of sounds, rasters, features."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    return {
        name: value
        for name, value in tensors.items()
        if value.dtype == torch.uint8 and value.ndim == 5 and value.shape[-1] == 3
    }


def _recorded(record: dict[str, Any], rank: int, turn: str, micro: int) -> float | None:
    """Look a loss up; None where nothing was recorded, as of the turns behind one that was left out."""
    for entry in record.get("ranks", []):
        for one in entry["micro_batches"]:
            if (entry["rank"], one["turn"], one["micro_batch"]) == (rank, turn, micro):
                return float(one["loss"])
    return None


def _gradient_norms(objective: Objective) -> dict[str, float]:
    """Compute the norm of each parameter's gradient."""
    return {
        name: float(parameter.grad.float().norm())
        for name, parameter in objective.named_parameters()
        if parameter.grad is not None
    }


def most_suspicious(replayed: list[MicroBatch]) -> MicroBatch:
    """Choose the first micro-batch with a finding, else the one of highest loss; the others' clips are let go."""
    found = [one for one in replayed if one.finding is not None]
    chosen = found[0] if found else max(replayed, key=lambda one: one.loss)
    for one in replayed:
        if one is not chosen:
            one.clips = {}
    return chosen


def write_report(place: StepPlace, replayed: list[MicroBatch]) -> Path:
    """Write RUN/incidents/replay_step_00000123.json: all that was measured."""
    rows = []
    for one in replayed:
        # Not asdict, which would copy the clips only to have them dropped.
        row = {name: value for name, value in vars(one).items() if name != "clips"}
        row["finding"] = asdict(one.finding) if one.finding else None
        row["activations"] = {name: asdict(value) for name, value in one.activations.items()}
        rows.append(row)
    place.run.incidents.mkdir(exist_ok=True)
    path = place.run.incidents / f"replay_step_{place.step:08d}.json"
    content = {"step": place.step, "weights_of_step": place.weights_step, "micro_batches": rows}
    write_durably(path, json.dumps(plain(content), indent=1, allow_nan=False) + "\n")
    return path

"""All that a run is made of, built once: from recipe, data and checkpoint to engine, stream, guards and reports."""

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

from pretrain.checkpoint.reshape import Layout
from pretrain.checkpoint.resume import Resumable, layout_of, load
from pretrain.checkpoint.same_run import check_same_run
from pretrain.checkpoint.save import Saver, open_saver
from pretrain.data.bad_samples import BadSampleLedger
from pretrain.data.stream import TrainStream
from pretrain.data.stream_plan import OpenSource, StreamPlan
from pretrain.engine.batches import MicroBatches
from pretrain.engine.build import Built, build_engine
from pretrain.engine.deepspeed_config import describe, unwrapped
from pretrain.engine.evaluation import Best
from pretrain.engine.health import HealthSignal, open_health
from pretrain.engine.report import Reporter
from pretrain.engine.schedules import Schedule, describe_schedule
from pretrain.engine.step import StepInputs
from pretrain.errors import CheckpointError
from pretrain.guards.incidents import Incidents
from pretrain.guards.skipped_steps import state_at_start
from pretrain.guards.step_guard import StepGuard
from pretrain.models.frozen import check_frozen
from pretrain.objectives.base import Evaluation, Method, Objective
from pretrain.recipe.schema import Data, Recipe
from pretrain.runtime.metrics import keep_records
from pretrain.runtime.process_group import Ranks
from pretrain.runtime.run_folder import Hold, RunFolder
from pretrain.runtime.stopping import StopWatch
from pretrain.runtime.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """All that a run is made of, built once."""

    method: Method
    ranks: Ranks
    folder: RunFolder
    hold: Hold
    plan: StreamPlan
    schedule: Schedule
    built: Built
    inputs: StepInputs
    guard: StepGuard
    saver: Saver
    reporter: Reporter
    stop: StopWatch
    watchdog: Watchdog
    evaluation: Evaluation | None
    health: HealthSignal | None
    best: Best

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        recipe: Recipe = self.method.recipe
        return recipe


def check_continues(found: Resumable, recipe: Recipe, ranks: Ranks, sources: list[OpenSource]) -> None:
    """Refuse a checkpoint of another run or other data; name what differs without harm."""
    for line in check_same_run(found.state["recipe"], recipe, str(found.folder)):
        logger.info("continuing with another %s", line)
    written, here = layout_of(found), layout(recipe, ranks)
    if not written.fits(here):
        logger.info("continuing on another layout: %s -> %s; the checkpoint will be converted", written, here)
    before, now = found.state["sources"], fingerprints(sources)
    # A run that began before the index had hashes of the member tables, which --index-only has added since.
    known = {(source.name, source.index.fingerprint_of_shards) for source in sources} | set(now.items())
    changed = sorted((before.keys() ^ now.keys()) | {name for name, one in before.items() if (name, one) not in known})
    if changed:
        raise CheckpointError(
            f"{found.folder}: the data of {', '.join(changed)} is not what it was (fingerprints {before}, now {now}): "
            "the order of samples would be another. Restore the shards, or start a new run.dir"
        )
    logger.info("continuing from %s, step %d", found.folder, found.step)


def layout(recipe: Recipe, ranks: Ranks) -> Layout:
    """Describe how this run spreads weights and optimiser over its ranks."""
    return Layout.of(ranks.world_size, asdict(recipe.zero))


def fingerprints(sources: list[OpenSource]) -> dict[str, str]:
    return {source.name: source.fingerprint for source in sources}


def keep_every(recipe: Recipe, schedule: Schedule) -> int | None:
    """Compute the steps between two checkpoints that are kept for good; None: only the last ones are kept."""
    epochs = recipe.checkpoint.keep_every_epochs
    return schedule.steps_in(epochs) if epochs else None


def forget_after(folder: RunFolder, step: int, plan: StreamPlan) -> None:
    """Drop what the steps after the checkpoint had written: they are run again."""
    keep_records(folder.metrics, lambda record: record["step"] <= step, ("step",))

    def served_before(record: dict[str, Any]) -> bool:
        return plan.composition.step_of(record["epoch"], record["position"]) < step

    for records in folder.bad_samples.glob("rank_*.jsonl"):  # also of ranks that this start does not have
        keep_records(records, served_before, ("epoch", "position"))


def build_run(
    method: Method,
    ranks: Ranks,
    folder: RunFolder,
    hold: Hold,
    plan: StreamPlan,
    schedule: Schedule,
    found: Resumable | None,
    stop: StopWatch,
    watchdog: Watchdog,
) -> Run:
    """Build everything, and load the checkpoint that was found."""
    recipe, first_step = method.recipe, found.step if found else 0
    stream = open_stream(method, plan, ranks, first_step)
    built = build_engine(method, ranks, stream.accumulation, resumes=found is not None)
    for line in describe(recipe, built.config, ranks.world_size):
        logger.info(line)
    _log_schedule(recipe, schedule, built)
    if found is not None:
        objective: Objective = built.engine.module
        check_frozen(objective.frozen_parts(), found.state.get("frozen", {}), str(found.folder))
        load(built.engine, found, layout(recipe, ranks), built.groups, objective.rank_state())
    ledger = open_ledger(recipe.data, folder, ranks, found)
    guard = StepGuard(recipe.guard, state_at_start(folder.guard, ranks, found.state if found else None))
    best = Best(**found.state["best"]) if found else Best()
    return Run(
        method=method,
        ranks=ranks,
        folder=folder,
        hold=hold,
        plan=plan,
        schedule=schedule,
        built=built,
        inputs=StepInputs(
            engine=built.engine,
            turns=built.turns,
            cache=built.cache,
            batches=MicroBatches(stream, ranks.device),
            accumulation=stream.accumulation,
            own_clip=(recipe.optim.clip_grad or math.inf) if unwrapped(recipe) else None,
            ledger=ledger,
            ranks=ranks,
            seed=recipe.run.seed,
            asked_to_stop=stop.asked,
            guard=guard,
            incidents=Incidents(folder.incidents, ranks, recipe.run.seed, list(recipe.data.sources)),
            rows=built.rows,
            scale=built.scale,
        ),
        guard=guard,
        saver=open_saver(
            folder.checkpoints,
            ranks,
            recipe.checkpoint,
            keep_every(recipe, schedule),
            best.steps,
        ),
        reporter=Reporter(method, folder, schedule, ranks, first_step),
        stop=stop,
        watchdog=watchdog,
        evaluation=method.evaluation(ranks),
        health=open_health(method, ranks, built.engine.module),
        best=best,
    )


def open_ledger(data: Data, folder: RunFolder, ranks: Ranks, found: Resumable | None) -> BadSampleLedger:
    """Open the counts of unusable samples, with those of the checkpoint."""
    ledger = BadSampleLedger(folder.root, list(data.sources), data.bad_rate, data.bad_minimum, ranks.rank)
    if found is not None:
        # Counts are only ever added up, so those of more ranks than there are now go to the present ones in turn.
        for counts in found.state["bad_samples"][ranks.rank :: ranks.world_size]:
            ledger.load(counts)
    return ledger


def open_stream(
    method: Method, plan: StreamPlan, ranks: Ranks, first_step: int, in_process: bool = False
) -> TrainStream:
    """Open the rank's micro-batches from a step on, in data workers or, where one batch is all, in this process."""
    workers = 0 if in_process else None
    return TrainStream(plan, method.samples(), ranks.rank, ranks.world_size, first_step, workers)


def _log_schedule(recipe: Recipe, schedule: Schedule, built: Built) -> None:
    logger.info("model: %s parameters", f"{built.parameters:,}")
    logger.info("schedule: %s", describe_schedule(recipe, schedule))

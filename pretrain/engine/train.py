"""A pre-training run from its recipe to its last step, or to the step at which it was asked to stop.

The same command starts and continues a run: what is done next follows from what is in the run folder.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.distributed as dist

from pretrain.checkpoint.compare import check_same_run
from pretrain.checkpoint.resume import Resumable, check_layout, find_checkpoint, load
from pretrain.checkpoint.save import Content, Saver
from pretrain.data.bad_samples import BadSampleLedger
from pretrain.data.stream import OpenSource, StreamPlan, TrainStream, open_sources
from pretrain.engine.build import Built, build_engine
from pretrain.engine.ds_config import describe, unwrapped
from pretrain.engine.evaluate import Best, Evaluation, open_evaluation
from pretrain.engine.evaluate import every_steps as evaluate_every_steps
from pretrain.engine.folder import RunFolder, describe_start, open_folder
from pretrain.engine.guard import NonFiniteGuard
from pretrain.engine.health import HealthSignal, open_health
from pretrain.engine.report import Reporter
from pretrain.engine.schedule import Schedule, build_schedule, every_steps, pictures_every_steps
from pretrain.engine.step import StepInputs, to_device, train_step
from pretrain.errors import CheckpointError
from pretrain.objectives.base import Batch
from pretrain.recipe.components import objective_file
from pretrain.recipe.schema import Recipe
from pretrain.recipe.show import show_recipe
from pretrain.runtime.environment import versions
from pretrain.runtime.logging import set_up_logging
from pretrain.runtime.metrics import keep_records
from pretrain.runtime.process_group import Ranks, die_with_launcher, gather_objects, join, leave
from pretrain.runtime.stopping import EXIT_REQUEUE, StopWatch

logger = logging.getLogger(__name__)


def train(recipe: Recipe, resume: str = "auto") -> int:
    """Run a recipe on the ranks that were launched.

    Args:
        recipe: The resolved recipe.
        resume: auto: continue from the run folder's newest checkpoint that verifies, or start; never: start, and refuse
            a folder that holds checkpoints; otherwise the path of the checkpoint to continue from.

    Returns:
        Exit code: 0 the run is done, 75 stopped as asked with a checkpoint (start the same command again).

    Raises:
        TubeletError: the run can't start or go on; exit code 1.
    """
    ranks = join()
    die_with_launcher()
    folder, lock = open_folder(recipe, ranks)
    set_up_logging(ranks.rank, folder.logs)
    stop = StopWatch(folder.root, ranks.first, recipe.run.time_limit_minutes)
    try:
        return _train(recipe, resume, ranks, folder, stop)
    finally:
        stop.close()
        lock.release()
        leave(ranks)


@dataclass(frozen=True)
class Run:
    """All that a run is made of, built once."""

    recipe: Recipe
    ranks: Ranks
    folder: RunFolder
    sources: list[OpenSource]
    schedule: Schedule
    built: Built
    inputs: StepInputs
    guard: NonFiniteGuard
    saver: Saver
    reporter: Reporter
    stop: StopWatch
    evaluation: Evaluation | None
    health: HealthSignal | None
    best: Best


def _train(recipe: Recipe, resume: str, ranks: Ranks, folder: RunFolder, stop: StopWatch) -> int:
    sources = open_sources(recipe)
    plan = StreamPlan(recipe, sources)
    schedule = build_schedule(recipe, plan.steps_per_epoch)
    found = find_checkpoint(folder.checkpoints, ranks, resume)
    if found is not None:
        _check_continues(found, recipe, ranks, sources)
        if found.step >= schedule.last:
            logger.info("%s: finished, %d of %d steps are done", folder.root, found.step, schedule.last)
            return 0
    if ranks.first:
        describe_start(folder, recipe)
        _forget_after(folder, found.step if found else 0, plan)
    run = _build(recipe, ranks, folder, sources, schedule, found, stop)
    exit_code = 1
    try:
        exit_code = _loop(run, found.step if found else 0)
    finally:
        run.saver.wait()
        run.reporter.close(exit_code)
    # A launcher ends all ranks as soon as one leaves with 75: none may, before rank 0 has published and reported.
    dist.barrier()
    return exit_code


def _check_continues(found: Resumable, recipe: Recipe, ranks: Ranks, sources: list[OpenSource]) -> None:
    """Refuse a checkpoint of another run, other data or another layout; name what differs without harm."""
    for line in check_same_run(found.state["recipe"], recipe, str(found.folder)):
        logger.info("continuing with another %s", line)
    check_layout(found, ranks.world_size, recipe.zero.stage)
    before, now = found.state["sources"], _fingerprints(sources)
    if before != now:
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        raise CheckpointError(
            f"{found.folder}: the data of {', '.join(changed)} is not what it was (fingerprints {before}, now {now}): "
            "the order of samples would be another. Restore the shards, or start a new run.dir"
        )
    logger.info("continuing from %s, step %d", found.folder, found.step)


def _fingerprints(sources: list[OpenSource]) -> dict[str, str]:
    return {source.name: source.index.fingerprint for source in sources}


def _forget_after(folder: RunFolder, step: int, plan: StreamPlan) -> None:
    """Drop what the steps after the checkpoint had written: they are run again."""
    keep_records(folder.metrics, lambda record: record["step"] <= step)

    def served_before(record: dict[str, Any]) -> bool:
        return bool(record["epoch"] * plan.steps_per_epoch + record["position"] // plan.samples < step)

    keep_records(folder.bad_samples, served_before)


def _build(
    recipe: Recipe,
    ranks: Ranks,
    folder: RunFolder,
    sources: list[OpenSource],
    schedule: Schedule,
    found: Resumable | None,
    stop: StopWatch,
) -> Run:
    first_step = found.step if found else 0
    stream = _stream(recipe, sources, ranks, first_step)
    built = build_engine(recipe, ranks, stream.accumulation, resumes=found is not None)
    for line in describe(recipe, built.config, ranks.world_size):
        logger.info(line)
    _log_schedule(recipe, schedule, built)
    if found is not None:
        load(built.engine, found)
    ledger = BadSampleLedger(folder.root, [s.name for s in sources], recipe.data.bad_rate, recipe.data.bad_minimum)
    if found is not None:
        ledger.load(found.state["bad_samples"][ranks.rank])
    skips = found.state["skips"] if found else {}
    keep_every = recipe.checkpoint.keep_every_epochs
    return Run(
        recipe=recipe,
        ranks=ranks,
        folder=folder,
        sources=sources,
        schedule=schedule,
        built=built,
        inputs=StepInputs(
            engine=built.engine,
            batches=stream,
            accumulation=stream.accumulation,
            own_clip=(recipe.optim.clip_grad or math.inf) if unwrapped(recipe) else None,
            ledger=ledger,
            ranks=ranks,
            seed=recipe.run.seed,
            asked_to_stop=stop.asked,
        ),
        guard=NonFiniteGuard(recipe.guard, **skips),
        saver=Saver(
            folder.checkpoints,
            ranks,
            recipe.checkpoint.keep_last,
            max(1, round(keep_every * schedule.steps_per_epoch)) if keep_every else None,
        ),
        reporter=Reporter(recipe, folder, schedule, ranks, first_step),
        stop=stop,
        evaluation=open_evaluation(recipe, ranks),
        health=open_health(recipe, ranks, built.engine.module),
        best=Best(**found.state["best"]) if found else Best(),
    )


def _stream(recipe: Recipe, sources: list[OpenSource], ranks: Ranks, first_step: int) -> TrainStream:
    method = objective_file(recipe)
    views = method.sample_views(recipe) if hasattr(method, "sample_views") else method.view_tensors(recipe)
    return TrainStream(recipe, sources, views, ranks.rank, ranks.world_size, first_step)


def _log_schedule(recipe: Recipe, schedule: Schedule, built: Built) -> None:
    logger.info("model: %s parameters", f"{built.parameters:,}")
    logger.info(
        "schedule: %d steps an epoch, %d steps, warm-up %d; lr = %g x %d / %d = %.4g, down to %.4g",
        schedule.steps_per_epoch,
        schedule.total,
        schedule.warmup,
        recipe.optim.base_lr,
        recipe.batch.samples,
        recipe.optim.base_batch,
        schedule.peak,
        schedule.floor,
    )


def _loop(run: Run, steps_done: int) -> int:
    """Train from `steps_done` to the end; returns the exit code."""
    save_every = every_steps(run.recipe, run.schedule)
    pictures_every = pictures_every_steps(run.recipe, run.schedule)
    shown = _shown_clips(run) if pictures_every else {}
    evaluate_every = evaluate_every_steps(run.evaluation, run.schedule) if run.evaluation else 0
    health_every = evaluate_every_steps(run.health, run.schedule) if run.health else 0
    while steps_done < run.schedule.last:
        lr = run.schedule.lr(steps_done)
        run.built.engine.module.before_step(steps_done, run.schedule.steps_per_epoch)
        result = train_step(run.inputs, steps_done, lr)
        steps_done += 1
        run.reporter.step(steps_done, lr, result)
        run.guard.check(steps_done, result)
        if result.applied:
            run.built.engine.module.after_step()
        last = steps_done == run.schedule.last
        if pictures_every and (steps_done % pictures_every == 0 or last):
            _make_pictures(run, steps_done, shown)
        if health_every and (steps_done % health_every == 0 or last):
            _check_health(run, steps_done)
        is_best = bool(evaluate_every) and (steps_done % evaluate_every == 0 or last) and _evaluate(run, steps_done)
        if steps_done % save_every == 0 or is_best or last or result.stop:
            _save(run, steps_done)
        if result.stop and not last:
            return _finish(run, steps_done, EXIT_REQUEUE, run.stop.reason or "stopped as another rank was asked to")
    return _finish(run, steps_done, 0, "done")


def _evaluate(run: Run, steps_done: int) -> bool:
    """Measure on held-out data; whether this step is the best so far, whose checkpoint stays."""
    assert run.evaluation is not None
    started, module = time.monotonic(), run.built.engine.module
    module.eval()
    metrics = run.evaluation(module)
    module.train()
    is_best = run.best.consider(steps_done, run.evaluation.best_by, metrics[run.evaluation.best_by])
    if run.ranks.first:
        run.best.write(run.folder.root / "best.json")
    run.reporter.evaluation(steps_done, metrics, time.monotonic() - started)
    return is_best


def _check_health(run: Run, steps_done: int) -> None:
    """Report how well the features tell labelled videos apart; nothing of the training depends on it."""
    assert run.health is not None
    started, module = time.monotonic(), run.built.engine.module
    module.eval()
    metrics = run.health(module)
    module.train()
    run.reporter.health(steps_done, metrics, time.monotonic() - started)


def _finish(run: Run, steps_done: int, exit_code: int, reason: str) -> int:
    run.saver.wait()
    run.reporter.summary(steps_done, exit_code, reason)
    return exit_code


def _save(run: Run, steps_done: int) -> None:
    state = {
        "step": steps_done,
        "epoch": run.schedule.epoch(steps_done),
        "videos": steps_done * run.recipe.batch.samples,
        "world_size": run.ranks.world_size,
        "zero_stage": run.recipe.zero.stage,
        "seed": run.recipe.run.seed,
        "skips": {"in_a_row": run.guard.in_a_row, "total": run.guard.total},
        "sources": _fingerprints(run.sources),
        "bad_samples": gather_objects(run.ranks, run.inputs.ledger.state()),
        "best": asdict(run.best),
        "recipe": asdict(run.recipe),
        "versions": versions(),
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    seconds = run.saver.save(run.built.engine, Content(steps_done, state, show_recipe(run.recipe), keep=run.best.steps))
    run.stop.saved_in(seconds)


def _shown_clips(run: Run) -> Batch:
    """The clips of every picture: the first ones of the run, so that pictures of different steps compare."""
    recipe = replace(run.recipe, data=replace(run.recipe.data, workers=0))
    batches: Iterator[Batch] = iter(_stream(recipe, run.sources, run.ranks, first_step=0))
    count = run.recipe.log.pictures
    return {name: value[:count] for name, value in next(batches).items()}


def _make_pictures(run: Run, steps_done: int, shown: Batch) -> None:
    """Reconstruct on every rank (with sharded weights all must take part), write on rank 0."""
    module = run.built.engine.module
    module.eval()
    videos = module.pictures(to_device(shown, run.ranks.device))
    module.train()
    run.reporter.pictures(steps_done, videos, run.recipe.log.pictures)

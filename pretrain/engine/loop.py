"""A pre-training run from its recipe to its last step, or to the step at which it was asked to stop.

The same command starts and continues a run: what is done next follows from what is in the run folder.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import NoReturn

import torch.distributed as dist

from pretrain.checkpoint.restore import open_remote, prepare_resume
from pretrain.checkpoint.resume import find_checkpoint
from pretrain.checkpoint.save import Content, upload_rest
from pretrain.data.samples import Batch
from pretrain.data.stream_plan import open_plan
from pretrain.engine.assemble import (
    Run,
    build_run,
    check_continues,
    fingerprints,
    forget_after,
    keep_every,
    open_stream,
)
from pretrain.engine.demand import demand_of
from pretrain.engine.evaluation import Best
from pretrain.engine.evaluation import every_steps as evaluate_every_steps
from pretrain.engine.optimiser import set_weight_decay
from pretrain.engine.recovery import pass_over, recover
from pretrain.engine.schedules import build_schedule, every_steps, pictures_every_steps
from pretrain.engine.start_checks import check_data, check_hosts, tell_unhashed
from pretrain.engine.step import train_step
from pretrain.engine.transfers import to_device
from pretrain.errors import CheckpointError, DataError, TrainingError
from pretrain.guards.results import StepResult
from pretrain.models.frozen import frozen_notes
from pretrain.objectives.base import Method, Objective
from pretrain.recipe.show import show_recipe
from pretrain.runtime.cores import bind_to_device
from pretrain.runtime.disk import advice
from pretrain.runtime.environment import versions
from pretrain.runtime.logging import set_up_logging
from pretrain.runtime.orphans import die_with_launcher
from pretrain.runtime.process_group import Ranks, from_first, gather_objects, join, leave
from pretrain.runtime.run_folder import Hold, RunFolder, describe_start, open_folder
from pretrain.runtime.stopping import EXIT_REQUEUE, StopWatch
from pretrain.runtime.watchdog import Watchdog

logger = logging.getLogger(__name__)


def train(method: Method, resume: str = "auto") -> int:
    """Run a recipe on the ranks that were launched.

    Args:
        method: of the recipe.
        resume: auto: continue from the run folder's newest checkpoint that verifies, or start; never: start, and refuse
            a folder that holds checkpoints; otherwise the path of the checkpoint to continue from.

    Returns:
        Exit code: 0 the run is done, 75 stopped as asked with a checkpoint (start the same command again).

    Raises:
        TubeletError: the run can't start or go on; exit code 1.
    """
    # First of all: once its launcher is gone, a rank can hardly tell whether it ever had one.
    die_with_launcher()
    recipe = method.recipe
    ranks = join(timeout_s=recipe.watchdog.join_s)
    folder, hold = open_folder(recipe.run.dir, ranks, recipe.watchdog.beat_s)
    set_up_logging(ranks.rank, folder.logs)
    bind_to_device(ranks, recipe.data.affinity)
    stop = StopWatch(folder.root, ranks.first, recipe.run.time_limit_minutes)
    watchdog = Watchdog(recipe.watchdog, recipe.data.deadline_s, folder.root, ranks, hold.check)
    try:
        return _train(method, resume, ranks, folder, hold, stop, watchdog)
    except Exception:
        watchdog.leave_soon()
        raise
    finally:
        stop.close()
        hold.release()
        leave(ranks)
        # Last: to leave the process group may hang on a rank that is gone, which only the watchdog ends.
        watchdog.close()


def _train(
    method: Method, resume: str, ranks: Ranks, folder: RunFolder, hold: Hold, stop: StopWatch, watchdog: Watchdog
) -> int:
    recipe = method.recipe
    demand = demand_of(method, ranks)
    check_hosts(method, ranks, demand)
    plan = open_plan(replace(recipe.data, workers=demand.workers), recipe.batch, recipe.run.seed)
    check_data(fingerprints(plan.sources), ranks)
    tell_unhashed(plan.sources, ranks)
    schedule = build_schedule(recipe, plan.steps_per_epoch)
    resume_from = prepare_resume(folder.checkpoints, recipe.checkpoint, ranks, resume)
    found = find_checkpoint(folder.checkpoints, ranks, resume_from)
    if found is not None:
        check_continues(found, recipe, ranks, plan.sources)
        if resume != "auto" and ranks.first and (remote := open_remote(recipe.checkpoint)):
            remote.supersede_after(found.step)
        if found.step >= schedule.last:
            logger.info("%s: finished, %d of %d steps are done", folder.root, found.step, schedule.last)
            best = Best(**found.state["best"])
            upload_rest(folder.checkpoints, ranks, recipe.checkpoint, keep_every(recipe, schedule), best.steps)
            return 0
    # After the checks above: a command that they refuse must leave the run folder as it is.
    if ranks.first:
        describe_start(folder, show_recipe(recipe))
        forget_after(folder, found.step if found else 0, plan)
    first_step = found.step if found else 0
    watchdog.begin(first_step)
    run = build_run(method, ranks, folder, hold, plan, schedule, found, stop, watchdog)
    watchdog.renew_timeout()
    exit_code = 1
    try:
        exit_code = _loop(run, first_step)
    except Exception:
        watchdog.leave_soon()  # what follows may wait for a rank that is gone
        raise
    finally:
        run.saver.close()
        run.reporter.close(exit_code)
    # A launcher ends all ranks as soon as one leaves with 75: none may, before rank 0 has published and reported.
    dist.barrier()
    return exit_code


def _loop(run: Run, steps_done: int) -> int:
    """Train from `steps_done` to the end; returns the exit code."""
    saved = steps_done
    save_every = every_steps(run.recipe, run.schedule)
    pictures_every = pictures_every_steps(run.recipe, run.schedule, run.built.engine.module)
    shown = _shown_clips(run) if pictures_every else {}
    evaluate_every = evaluate_every_steps(run.evaluation, run.schedule) if run.evaluation else 0
    health_every = evaluate_every_steps(run.health, run.schedule) if run.health else 0
    while steps_done < run.schedule.last:
        lr = run.guard.lr(run.schedule.lr(steps_done))
        if run.guard.leaves_out(steps_done):
            result, steps_done = StepResult(applied=False), pass_over(run, steps_done, lr)
        else:
            run.built.engine.module.before_step(steps_done, run.schedule.steps_per_epoch, run.schedule.total)
            if (weight_decay := run.schedule.weight_decay(steps_done)) is not None:
                set_weight_decay(run.built.engine.optimizer, weight_decay)
            result = train_step(run.inputs, steps_done, lr)
            if result.out_of_data:
                _end_with(run, steps_done, run.inputs.batches.agreed_error(run.ranks), saved)
            steps_done += 1
            run.watchdog.step_done(steps_done)
            run.hold.check()
            run.reporter.step(steps_done, lr, result)
            run, went_back = recover(run, steps_done, lr, result)
            if went_back is not None:
                saved = steps_done = went_back
                continue
        # After an update only: averages and teachers would count a step that did not change the weights.
        if result.applied:
            run.built.engine.module.after_step()
        last = steps_done == run.schedule.last
        if pictures_every and (steps_done % pictures_every == 0 or last):
            with run.watchdog.long("pictures"):
                _make_pictures(run, steps_done, shown)
        if health_every and (steps_done % health_every == 0 or last):
            with run.watchdog.long("evaluate"):
                _check_health(run, steps_done)
        is_best = bool(evaluate_every) and (steps_done % evaluate_every == 0 or last) and _evaluate(run, steps_done)
        # Behind the evaluation: the checkpoint says whether its step is the best, and only then is kept.
        if steps_done % save_every == 0 or is_best or last or result.stop:
            with run.watchdog.long("save"):
                _save(run, steps_done)
            saved = steps_done
        if result.too_many_bad is not None:
            _end_with(run, steps_done, result.too_many_bad, saved)
        if result.stop and not last:
            return _finish(run, steps_done, EXIT_REQUEUE, _stop_reason(run))
    return _finish(run, steps_done, 0, "done")


def _evaluate(run: Run, steps_done: int) -> bool:
    """Measure on held-out data; tell whether this step is the best so far, whose checkpoint stays."""
    assert run.evaluation is not None
    started, module = time.monotonic(), run.built.engine.module
    module.eval()
    with run.watchdog.long("evaluate"):
        metrics = run.evaluation(module)
    module.train()
    is_best = run.best.consider(steps_done, run.evaluation.best_by, metrics[run.evaluation.best_by])
    if run.ranks.first:
        with run.reporter.tolerate("best.json"):
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


def _stop_reason(run: Run) -> str:
    """Name the first rank that was asked to stop, and the reason; all ranks call this once they agree that one was."""
    reasons = gather_objects(run.ranks, run.stop.reason)
    rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason is not None)
    return f"{reason} at rank {rank}" if rank else reason


def _finish(run: Run, steps_done: int, exit_code: int, reason: str) -> int:
    with run.watchdog.long("publish"):
        not_uploaded = run.saver.finish()
    run.stop.saved_in(run.saver.longest_s)
    run.reporter.summary(steps_done, exit_code, reason)
    # Only of a finished run: nothing would start it again, while one that was stopped uploads at its next start.
    if not_uploaded and exit_code == 0:
        raise CheckpointError(not_uploaded)
    return exit_code


def _end_with(run: Run, steps_done: int, error: DataError, saved: int) -> NoReturn:
    """End the run on all ranks for want of data; what was trained is kept, so that it can go on once data are back."""
    if steps_done > saved:
        with run.watchdog.long("save"):
            _save(run, steps_done)
    _finish(run, steps_done, 1, f"stopped: {error}")
    dist.barrier()  # a launcher ends all ranks as soon as one leaves: none may, before rank 0 has published
    raise error


def _keep_folder(run: Run) -> str:
    """Make folder and metrics.jsonl again where somebody took them away; return what ends the run, for all ranks."""
    try:
        if run.hold.renew():
            describe_start(run.folder, show_recipe(run.recipe))
        run.reporter.keep_lines()
    except TrainingError as error:
        return str(error)
    except OSError as error:
        logger.error("%s can't be made again: %s", run.folder.root, advice(error))  # the save says what comes of it
    return ""


def _save(run: Run, steps_done: int) -> None:
    if problem := from_first(run.ranks, _keep_folder(run) if run.ranks.first else ""):
        raise TrainingError(problem)
    objective: Objective = run.built.engine.module
    state = {
        "step": steps_done,
        "epoch": run.schedule.epoch(steps_done),
        "videos": steps_done * run.recipe.batch.samples,
        "world_size": run.ranks.world_size,
        "zero_stage": run.recipe.zero.stage,
        "seed": run.recipe.run.seed,
        "guard": run.guard.saved(),
        "sources": fingerprints(run.plan.sources),
        "bad_samples": gather_objects(run.ranks, run.inputs.ledger.state()),
        "best": asdict(run.best),
        "recipe": asdict(run.recipe),
        "frozen": frozen_notes(objective.frozen_parts()),
        "versions": versions(),
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    content = Content(steps_done, state, show_recipe(run.recipe), run.best.steps, objective.rank_state())
    seconds = run.saver.save(run.built.engine, content)
    run.stop.saved_in(max(seconds, run.saver.longest_s))


def _shown_clips(run: Run) -> Batch:
    """Fetch the rows of every picture: the first ones of the run, so that pictures of different steps compare."""
    batches: Iterator[Batch] = iter(open_stream(run.method, run.plan, run.ranks, first_step=0, in_process=True))
    count = run.recipe.log.pictures
    return {name: value[:count] for name, value in next(batches).items()}


def _make_pictures(run: Run, steps_done: int, shown: Batch) -> None:
    """Reconstruct on every rank (with sharded weights all must take part), write on rank 0."""
    module = run.built.engine.module
    module.eval()
    videos = module.pictures(to_device(shown, run.ranks.device))
    module.train()
    if videos:
        run.reporter.pictures(steps_done, videos, run.recipe.log.pictures)

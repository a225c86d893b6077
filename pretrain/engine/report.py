"""Reports of a run while it goes on: metrics.jsonl, console, wandb, pictures; written by rank 0."""

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pretrain.engine.schedules import Schedule
from pretrain.guards.results import StepResult
from pretrain.objectives.base import Method
from pretrain.runtime.disk import Tolerance
from pretrain.runtime.dtypes import DTYPES
from pretrain.runtime.metrics import JsonLines, Record
from pretrain.runtime.pictures import save_pictures
from pretrain.runtime.process_group import Ranks
from pretrain.runtime.progress import Goal, Progress, duration
from pretrain.runtime.run_folder import RunFolder
from pretrain.runtime.speed import matmul_tflops, peak_memory_gib
from pretrain.runtime.wandb_run import WandbRun, open_wandb

logger = logging.getLogger(__name__)

#: Steps at the start of a process that its mean speed leaves out.
SLOW_STEPS = 2


class Meter:
    """Conversion of seconds into clips, tokens and MFU.

    MFU is the share of the device's matrix product rate (log.peak_tflops, or measured) that the model's own work makes
    up: forward and backward, three times the forward pass. Work that is done twice for activation checkpointing does
    not count.
    """

    def __init__(self, method: Method, ranks: Ranks) -> None:
        recipe, cost = method.recipe, method.cost()
        self.clips = recipe.batch.samples * recipe.input.views
        # Two operations a multiply-accumulate, and a backward pass is two forward passes.
        self._flops = 2 * 3 * cost.executed * self.clips
        self._tokens = cost.tokens.get("all")
        self._device, self._world_size = ranks.device, ranks.world_size
        self.peak_tflops = recipe.log.peak_tflops or matmul_tflops(ranks.device, DTYPES[recipe.compute.dtype])

    def measure(self, result: StepResult) -> Record:
        """Measure speed and memory of one step."""
        record: Record = {
            "speed/step_s": result.step_s,
            "speed/data_wait_share": result.data_s / result.step_s,
            "speed/clips_per_s": self.clips / result.step_s,
            "speed/mfu": self._flops / result.step_s / self._world_size / (self.peak_tflops * 1e12),
            "memory/peak_gib": peak_memory_gib(self._device),
        }
        if self._tokens is not None:
            record["speed/tokens_per_s"] = self._tokens * self.clips / result.step_s
        return record


class Reporter:
    """Writer of what rank 0 reports; on other ranks nothing is built and nothing is written."""

    def __init__(self, method: Method, folder: RunFolder, schedule: Schedule, ranks: Ranks, first_step: int) -> None:
        recipe = method.recipe
        self._schedule, self._folder, self._every = schedule, folder, recipe.log.every_steps
        self._meter = Meter(method, ranks)  # every rank measures, so that they load a shared CPU alike
        self._first_step, self._started = first_step, time.monotonic()
        self._speeds: list[float] = []
        self._last: Record = {}
        self._evaluated: dict[str, float] = {}
        self._writes = ranks.first
        self.tolerate = Tolerance()
        if ranks.first:
            logger.info("matrix products: %.2f TFLOP/s a device, MFU is relative to it", self._meter.peak_tflops)
            self._lines = JsonLines(folder.metrics)
            self._progress = Progress(Goal(first_step, schedule.last, recipe.log.every_steps))
            self._wandb: WandbRun = open_wandb(
                recipe.log.wandb, recipe.log.wandb_project, recipe.run.name, folder.root, asdict(recipe)
            )

    def step(self, steps_done: int, lr: float, result: StepResult) -> None:
        """Report one step, after `steps_done` steps."""
        if not self._writes:
            return
        record: Record = {"step": steps_done, "epoch": self._schedule.epoch(steps_done)}
        record |= {f"train/{name}": value for name, value in result.metrics.items()}
        record |= {"optim/lr": lr, "optim/grad_norm": result.grad_norm, "optim/skipped": int(not result.applied)}
        if result.loss_scale is not None:
            record["optim/loss_scale"] = result.loss_scale
        record |= self._meter.measure(result) | {"data/bad_samples": result.bad_samples}
        self._lines.write(record)
        self._progress.show(record)
        if steps_done % self._every == 0 or steps_done == self._schedule.last:
            self._wandb.log(record, steps_done)
        if steps_done - self._first_step > SLOW_STEPS:
            self._speeds.append(record["speed/step_s"])
        self._last = record

    def skipped_step(self, steps_done: int, lr: float) -> None:
        """Report a step that passed without being trained on: it has no loss."""
        if self._writes:
            record: Record = {"step": steps_done, "epoch": self._schedule.epoch(steps_done)}
            self._lines.write(record | {"optim/lr": lr, "optim/skipped": 1, "guard/skipped_step": 1})

    def rewound(self, steps_done: int) -> None:
        """Reopen metrics.jsonl after a rewind to `steps_done`, which has shortened it: it is another file now."""
        if self._writes:
            self._lines.close()
            self._lines = JsonLines(self._folder.metrics)
            logger.info("metrics.jsonl goes on after step %d; wandb keeps the steps that it has seen", steps_done)

    def keep_lines(self) -> None:
        """Write metrics.jsonl again where somebody took it away."""
        if self._writes:
            self._lines.restore()

    def evaluation(self, steps_done: int, metrics: dict[str, float], seconds: float) -> None:
        """Report an evaluation after `steps_done` steps."""
        self._measured("evaluation", "eval", steps_done, metrics, seconds)
        self._evaluated = metrics

    def health(self, steps_done: int, metrics: dict[str, float], seconds: float) -> None:
        """Report the health signal after `steps_done` steps."""
        self._measured("health", "health", steps_done, metrics, seconds)

    def _measured(self, title: str, prefix: str, steps_done: int, metrics: dict[str, float], seconds: float) -> None:
        if not self._writes:
            return
        record: Record = {"step": steps_done, "epoch": self._schedule.epoch(steps_done)}
        record |= {f"{prefix}/{name}": value for name, value in metrics.items()} | {f"{prefix}/seconds": seconds}
        self._lines.write(record)
        self._wandb.log(record, steps_done)
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        logger.info("%s after step %d, epoch %.2f: %s", title, steps_done, record["epoch"], values)

    def pictures(self, steps_done: int, videos: dict[str, torch.Tensor], clips: int) -> None:
        """Write and send reconstruction pictures."""
        if not self._writes:
            return
        with self.tolerate("a picture"):
            paths = save_pictures(videos, self._folder.pictures / f"step_{steps_done:08d}", clips)
            logger.info("pictures: %s", ", ".join(map(str, paths)))
            self._wandb.log_pictures(paths, steps_done)

    def summary(self, steps_done: int, exit_code: int, reason: str) -> None:
        """Write summary.json and print it."""
        if not self._writes:
            return
        mean_s = sum(self._speeds) / len(self._speeds) if self._speeds else None
        summary = {
            "reason": reason,
            "exit_code": exit_code,
            "steps": steps_done,
            "epochs": self._schedule.epoch(steps_done),
            "loss": self._last.get("train/loss"),
            "evaluation": self._evaluated,
            "seconds": time.monotonic() - self._started,
            "clips_per_s": self._meter.clips / mean_s if mean_s else None,
            "bad_samples": self._last.get("data/bad_samples"),
            "picture": newest_picture(self._folder.pictures),
            "run_dir": str(self._folder.root),
        }
        with self.tolerate("summary.json"):
            # At once: a job script that looks just now must not find half of it.
            temporary = self._folder.summary.with_suffix(".tmp")
            temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self._folder.summary)
        for line in _summary_lines(summary):
            logger.info(line)

    def close(self, exit_code: int) -> None:
        """Close files and the wandb run."""
        if self._writes:
            self._progress.close()
            self._lines.close()
            self._wandb.close(exit_code)


def newest_picture(folder: Path) -> str | None:
    """Find the path of the contact sheet of the highest step, if there is one."""
    sheets = sorted(folder.glob("step_*.png"))
    return str(sheets[-1]) if sheets else None


def _summary_lines(summary: dict[str, Any]) -> list[str]:
    lines = [f"{summary['reason']}: {summary['steps']} steps, {summary['epochs']:.2f} epochs"]
    lines.append(f"  time of this process  {duration(summary['seconds'])}")
    if summary["loss"] is not None:
        lines.append(f"  loss of the last step  {summary['loss']:.4f}")
    if summary["clips_per_s"] is not None:
        lines.append(f"  speed  {summary['clips_per_s']:.1f} clips/s")
    lines += [
        f"  {name}  {summary[key]}" for name, key in (("picture", "picture"), ("run folder", "run_dir")) if summary[key]
    ]
    return lines

"""What all measurements of bench/gpu.py share: where they run, other processes, results as JSON and tables."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.runtime.environment import versions
from pretrain.runtime.speed import synchronize

ROOT = Path(__file__).resolve().parents[2]

#: A table: one dictionary a row, from column to value; rows may lack columns.
Rows = list[dict[str, Any]]

#: A model that a CPU trains in milliseconds, in place of the published ones.
TOY = ("model.dim=32", "model.depth=1", "model.heads=2", "model.decoder_dim=32", "model.decoder_depth=1",
       "model.decoder_heads=2", "input.height=32", "input.width=32", "input.views=1")  # fmt: skip


@dataclass(frozen=True)
class Session:
    """Where a measurement runs.

    Attributes:
        device: that it measures, without a number.
        folder: for its files; gone when it is over.
        overrides: key=value, of recipes that it trains.
    """

    device: torch.device
    folder: Path
    overrides: tuple[str, ...] = ()

    @property
    def toy(self) -> bool:
        """Whether sizes are those that show on a CPU that all goes through, and measure nothing."""
        return self.device.type == "cpu"

    @property
    def ranks(self) -> int:
        """Processes of a measurement on all GPUs."""
        return 2 if self.toy else torch.cuda.device_count()

    def recipe(self, name: str, *overrides: str) -> Any:
        """Load a recipe, or the demo's with a toy model in its place."""
        from pretrain.recipe.load import load_recipe

        words = [*(TOY if self.toy else ()), *overrides, *self.overrides]
        return load_recipe("demo" if self.toy else name, words)

    def environment(self) -> dict[str, str]:
        """Variables of a process that trains."""
        # DeepSpeed's first start compiles with ninja, which lies beside the interpreter.
        path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
        alone = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} if self.toy else {}
        return dict(os.environ) | {"PATH": path, "PYTHONPATH": str(ROOT)} | alone

    def command(self, words: Sequence[object], ranks: int) -> list[str]:
        """Return the command that runs `python WORDS` on ranks of this machine."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        return [sys.executable, *launcher, *map(str, words)]

    def run(self, words: Sequence[object], ranks: int, allowed: Sequence[int] = (0,)) -> str:
        """Run `python WORDS` on ranks to the end; return what it printed.

        Raises:
            RuntimeError: it ended with another exit code than those allowed.
        """
        command = self.command(words, ranks)
        done = subprocess.run(command, env=self.environment(), cwd=self.folder, capture_output=True, text=True)
        if done.returncode not in allowed:
            raise RuntimeError(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout


def describe(session: Session) -> dict[str, Any]:
    """Describe what a result was measured with: device, driver, versions, date."""
    found: dict[str, Any] = {"device": "cpu", "devices": 0, "driver": None}
    if not session.toy:
        names = "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"
        asked = subprocess.run(["nvidia-smi", *names], capture_output=True, text=True, check=False)
        found = {"device": torch.cuda.get_device_name(), "devices": torch.cuda.device_count()}
        found |= {"driver": asked.stdout.strip() or None, "cuda": torch.version.cuda, "cores": os.cpu_count()}
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found | {"date": time.strftime("%Y-%m-%d"), "versions": versions()}


def save(path: Path, session: Session, tables: Mapping[str, Rows], seconds: float) -> None:
    """Write a result; single numbers are the columns of the table `rates`, which plan.py --rates reads at the top."""
    path.parent.mkdir(parents=True, exist_ok=True)
    top = {key: value for row in tables.get("rates", []) for key, value in row.items()}
    content = describe(session) | top | {"seconds": round(seconds, 1), "tables": tables}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def as_markdown(title: str, rows: Rows) -> str:
    """Return a table with its title."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"\n{title}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows)])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def made_up(method: Any, samples: int, seed: int) -> Any:
    """Make a batch whose pixels follow from the seed; those of `Method.example` are the same in every batch."""
    batch = dict(method.example(samples))
    generator = torch.Generator().manual_seed(seed)
    return batch | {"video": torch.randint(256, batch["video"].shape, generator=generator, dtype=torch.uint8)}


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int = 7, warm_up: int = 3) -> float:
    """Measure the median time of some work, until the device has done it."""
    times = []
    for number in range(warm_up + repeats):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        if number >= warm_up:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def forget(device: torch.device) -> None:
    """Give memory and compiled graphs back before the next variant."""
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

"""Step and loader of two checkouts, in processes of their own that take turns: is it slower, is it the same?

    git worktree add ../before COMMIT
    python bench/checkouts.py ../before --shards FOLDER [--rounds 12] [--only step-fp32 loader-4]

One thread each; processor time, medians of rounds, and the median of the rounds' ratios. The step is ViT-S with dual
masking on two clips of 16 x 224 x 224, forward and backward, of one stored batch; the loader gives four clips of the
packed videos in FOLDER, by each checkout's own bench/loader.py. The last column tells whether losses and pixels of all
rounds are the same bit for bit.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("step-fp32", "step-bf16", "loader-1", "loader-4")
#: Clips of the loader's round.
CLIPS = 4


def main() -> None:
    """Let both take turns, kind after kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--shards", help="packed videos, for the loader")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, batch = options.worker
        work(options.before.resolve(), kind, batch, options.shards)
        return
    print("| | before, s | after, s | after / before | same values |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.only:
            if kind.startswith("loader") and not options.shards:
                continue
            print(race(kind, options, Path(folder, "batch.pt")), flush=True)


def race(kind: str, options: argparse.Namespace, batch: Path) -> str:
    """One line of the table."""
    processes = [start(root, kind, options.shards, batch) for root in (options.before, ROOT)]
    times: list[list[float]] = [[], []]
    values: list[list[str]] = [[], []]
    for turn in range(options.rounds):
        # Who begins changes: what the first leaves in the caches is the second's gain.
        for side in (0, 1) if turn % 2 else (1, 0):
            seconds, value = ask(processes[side]).split()
            times[side].append(float(seconds))
            values[side].append(value)
    for process in processes:
        process.kill()
    ratio = statistics.median(after / before for before, after in zip(*times, strict=True))
    medians = " | ".join(f"{statistics.median(one):.3f}" for one in times)
    return f"| {kind} | {medians} | {ratio:.2f} | {'yes' if values[0] == values[1] else '**no**'} |"


def start(root: Path, kind: str, shards: str | None, batch: Path) -> "subprocess.Popen[str]":
    """Start a checkout's process and wait until it has warmed up."""
    words = [
        sys.executable,
        __file__,
        str(root),
        "--worker",
        kind,
        str(batch),
        *(["--shards", shards] if shards else []),
    ]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root.resolve())}
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
    ask(process)
    return process


def ask(process: "subprocess.Popen[str]") -> str:
    """Let a process do its work once; what it answers."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    if not (line := process.stdout.readline()):
        raise SystemExit(f"{process.args!r} ended with {process.wait()}")
    return line


def work(root: Path, kind: str, batch: str, shards: str | None) -> None:
    """In a checkout's process: do the work each time that it is asked for, and print seconds and value."""
    sys.path[:] = [str(root), *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "bench"))]
    run = step(kind, Path(batch)) if kind.startswith("step") else loader(int(kind[-1]), str(shards))
    for _ in sys.stdin:
        began = time.process_time()
        value = run()
        print(time.process_time() - began, repr(value), flush=True)


def step(kind: str, stored: Path) -> Callable[[], float]:
    """Forward and backward of the objective; the first checkout that comes stores the batch."""
    import torch

    from pretrain.objectives.base import method_of
    from pretrain.recipe.load import load_recipe

    torch.set_num_threads(1)
    method: Any = method_of(load_recipe("vit_s_dual", ["input.views=1", "batch.micro=2"]))
    torch.manual_seed(0)
    objective = method.build().to(torch.bfloat16 if kind.endswith("bf16") else torch.float32)
    if not stored.exists():
        torch.save(dict(method.example(2)), stored)
    batch = torch.load(stored)

    def run() -> float:
        objective.zero_grad()
        loss = objective(batch).loss
        loss.backward()
        return float(loss.detach())

    return run


def loader(views: int, shards: str) -> Callable[[], float]:
    """The next clips of the training's stream."""
    import torch

    from bench import loader as own

    stream = own.ours(shards, views)

    def run() -> float:
        batches = [next(stream) for _ in range(CLIPS)]
        arrays = [value for batch in batches for value in batch.values() if isinstance(value, torch.Tensor)]
        return sum(float(array.double().sum()) for array in arrays)

    return run


if __name__ == "__main__":
    main()

"""Memory of every process of a run over time: ranks and data workers of the demo recipe, left alone.

    python bench/memory_over_time.py [--minutes 20] [--every 60] [--out FILE]

Pack the demo's shards first (make demo). Memory is what a process has of its own (USS), which shared pages don't blur.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
#: Far more epochs than any run here lasts.
OVERRIDES = ("schedule.epochs=100000", "log.pictures_every_steps=0", "log.wandb=disabled")


def main() -> None:
    """Start the run, look at it, end it, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=60, help="seconds between two looks")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    environ = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + environ["PATH"]
    with tempfile.TemporaryDirectory() as folder:
        words = ["deepspeed", "--num_accelerators", "2", "launch/pretrain.py", "--recipe", "demo"]
        with Path(folder, "output.log").open("w") as log:
            words += [f"run.dir={folder}/run", *OVERRIDES]
            run = subprocess.Popen(words, cwd=ROOT, env=environ, stdout=log, stderr=log)
            rows = list(looks(run, Path(folder, "run"), options.minutes * 60, options.every))
            for process in psutil.Process(run.pid).children(recursive=True):
                process.kill()
            run.kill()
    text = f"# Memory of a run over time, {date.today()}\n\n"
    text += f"{os.cpu_count()} cores, MB; `python bench/memory_over_time.py`\n\n"
    text += "| minutes | step | ranks | data workers |\n|---|---|---|---|\n" + "".join(rows)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


def looks(run: "subprocess.Popen[bytes]", folder: Path, seconds: float, every: float) -> Iterator[str]:
    """One line of the table a look."""
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        time.sleep(every)
        if run.poll() is not None:
            raise SystemExit(f"the run ended with {run.returncode}: are the demo's shards packed (make demo)?")
        metrics = folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        step = json.loads(lines[-1])["step"] if lines else 0
        children = psutil.Process(run.pid).children(recursive=True)
        ranks = memory(children, "--local_rank")
        yield f"| {(time.monotonic() - begun) / 60:.1f} | {step} | {ranks} | {memory(children, 'spawn_main')} |\n"


def memory(processes: list[psutil.Process], word: str) -> str:
    """Of each process with that word in its command line, MB."""
    found = [process for process in processes if word in " ".join(process.cmdline())]
    return ", ".join(f"{process.memory_full_info().uss / 1e6:.0f}" for process in found)


if __name__ == "__main__":
    main()

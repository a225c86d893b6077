"""Does pre-training help? Several seeds of pre-training and fine-tuning against the same network from scratch.

python bench/learning.py --seeds 0 1 2
The product's own commands on the data of `make demo` (pack them first: docs/finetuning.md). Each seed pre-trains, asks
its nearest neighbours, and fine-tunes with every method from the pre-trained and from random weights, with one budget.
Start it again after an interruption: what is tested is not done again, what was cut off continues. Results go to
bench/results/ with the machine and the date.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from finetune.commands.compare import read_tested

ROOT = Path(__file__).resolve().parents[1]
#: Methods that are trained on random weights too; on a frozen random network the others have nothing to build on.
FROM_SCRATCH = ("full",)
#: Options of each method. The rates of full and linear were compared, trained on men and judged on persons.
OPTIONS = {
    "full": (),
    "linear": ("optim.base_lr=1e-2", "optim.layer_decay=1"),
    "adaptformer": ("optim.base_lr=3e-3", "optim.layer_decay=1"),
    "vpt": ("optim.base_lr=1e-2", "optim.layer_decay=1"),
    "lora": ("optim.base_lr=3e-3", "optim.layer_decay=1"),
    "bitfit": ("optim.base_lr=3e-3", "optim.layer_decay=1"),
}
QUIET = ("log.wandb=disabled", "log.pictures_every_steps=0")


@dataclasses.dataclass(frozen=True)
class Job:
    """One command into one run folder, which keeps the command when it is done."""

    words: tuple[str, ...]
    folder: Path

    def run(self) -> None:
        """Run it unless it was done.

        Raises:
            SystemExit: it failed, or the folder holds what another command made.
        """
        note, command = self.folder / "done.txt", " ".join(self.words)
        if note.is_file():
            if note.read_text(encoding="utf-8") != command:
                raise SystemExit(f"{note} is from another command than\n{command}\nchoose another folder with --runs")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        print(f"$ python {command}", flush=True)
        environ = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | os.environ
        with (self.folder / "output.log").open("a") as log:
            code = subprocess.run(
                [sys.executable, *self.words], cwd=ROOT, env=environ, stdout=log, stderr=log
            ).returncode
        if code != 0:
            raise SystemExit(f"exit code {code} of\n{command}\nits output: {self.folder / 'output.log'}")
        note.write_text(command, encoding="utf-8")


def main() -> None:
    """Run what is missing, write and print the table."""
    options = parse()
    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in pool.map(lambda seed: run_seed(options, seed), options.seeds):
            pass  # waits, and raises what a seed raised
    report = collect(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = table(report)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"{text}\n{options.out}")


def run_seed(options: argparse.Namespace, seed: int) -> None:
    """Run what is missing of one seed."""
    for job in jobs(options, seed):
        job.run()


def parse() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    today = datetime.date.today().isoformat()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["full", "linear", "adaptformer"], choices=list(OPTIONS))
    parser.add_argument(
        "--once", nargs="*", default=["vpt", "lora", "bitfit"], choices=list(OPTIONS), help="with the first seed only"
    )
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time; each takes a core and a half")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), help="folder of all runs")
    parser.add_argument("--pretrain", nargs="*", default=[], metavar="KEY=VALUE", help="of recipes/demo.yaml")
    parser.add_argument("--tune", nargs="*", default=[], metavar="KEY=VALUE", help="of recipes/finetune/demo_finetune")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / f"learning_{today}.json")
    return parser.parse_args()


def jobs(options: argparse.Namespace, seed: int) -> Iterator[Job]:
    """Everything of one seed, in order."""
    runs: Path = options.runs

    def job(script: str, recipe: str, name: str, *words: str) -> Job:
        folder = runs / f"{name}_{seed}"
        start = (f"launch/{script}.py", "--recipe", recipe)
        return Job((*start, *words, f"run.seed={seed}", f"run.dir={folder}", *QUIET), folder)

    # One process with the whole batch: the same order, clips and masks as the demo's two.
    one = ("batch.micro=8", "batch.ranks=1", "checkpoint.every_epochs=10")
    yield job("pretrain", "demo", "pretrain", *one, *options.pretrain)
    starts = {"pretrained": (f"run.init_weights={runs / f'pretrain_{seed}'}",), "scratch": ()}
    for start, words in starts.items():
        yield job("evaluate", "demo_finetune", f"knn_{start}", "--method", "knn", *words)
    for method in methods(options, seed):
        for start, words in starts.items():
            if start == "pretrained" or method in FROM_SCRATCH:
                tuning = (f"tune.method={method}", *OPTIONS[method])
                yield job("finetune", "demo_finetune", f"{method}_{start}", *tuning, *words, *options.tune)


def methods(options: argparse.Namespace, seed: int) -> list[str]:
    """Methods of a seed."""
    return [*options.methods, *(options.once if seed == options.seeds[0] else [])]


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """Numbers of all runs, with what they were made on."""
    found: list[dict[str, Any]] = []
    for seed in options.seeds:
        for start in ("pretrained", "scratch"):
            common = {"start": start, "seed": seed}
            score = json.loads((ROOT / options.runs / f"knn_{start}_{seed}" / "frozen" / "knn.json").read_text())
            found.append(common | {"method": "knn", "trained": 0, "memory_gib": None, "top1": score["top1"]})
            for method in methods(options, seed):
                if start == "scratch" and method not in FROM_SCRATCH:
                    continue
                tested = read_tested(ROOT / options.runs / f"{method}_{start}_{seed}")
                numbers = {"trained": tested.trained, "memory_gib": tested.memory_gib, "classes": tested.classes}
                found.append(common | {"method": method} | numbers | tested.scores)
    settings = {"pretrain": options.pretrain, "tune": options.tune, "options": OPTIONS}
    return {"date": datetime.date.today().isoformat(), "machine": machine(), "settings": settings, "runs": found}


def machine() -> str:
    """Processor, cores, and the release of torch."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores, one thread a process, torch {torch.__version__}"


def table(report: dict[str, Any]) -> str:
    """Markdown: mean and sample standard deviation over seeds of the test's top-1."""
    runs = report["runs"]
    tested = [run for run in runs if "classes" in run]
    seeds = sorted({run["seed"] for run in runs})
    lines = [
        f"{report['date']}, {report['machine']}. {len(seeds)} seeds; mean and standard deviation of top-1 on "
        f"{tested[0]['videos']:.0f} clips that were not trained on; chance "
        f"{100 / tested[0]['classes']:.1f} %. Without a spread: one seed.\n",
        "| method | trained parameters | peak memory | pre-trained | from scratch |\n|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(run["method"] for run in runs):
        ours = [run for run in runs if run["method"] == method]
        peaks = [run["memory_gib"] for run in ours if run["memory_gib"] is not None]
        memory = f"{max(peaks):.2f} GiB" if peaks else ""
        cells = (_cell([run["top1"] for run in ours if run["start"] == start]) for start in ("pretrained", "scratch"))
        lines.append(f"| {method} | {ours[0]['trained']:,} | {memory} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} %"


if __name__ == "__main__":
    main()

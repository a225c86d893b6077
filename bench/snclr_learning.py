"""Do soft neighbours help? SNCLR beside plain InfoNCE and random weights, on action clips and on handwritten digits.

python bench/picture_sets.py mnist PICTURES
python launch/pack.py PICTURES/train SHARDS/mnist --kind image
python launch/pack.py PICTURES/test SHARDS/mnist_test --kind image
python bench/snclr_learning.py SHARDS [--sets digits actions] [--seeds 0 1 2]

SHARDS also holds the clips of `make demo` (actions, new_performer, new_performer_test; launch/demo.sh packs them). The
product's own commands, one thread: an encoder is trained without labels, then judged frozen, by nearest neighbours and
linear heads, on labelled samples of which it has seen none (clips: another performer). InfoNCE is the same recipe with
objective.neighbours=0. What is done is not done again; results go to bench/results/.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from bench.learning import Job, machine

ROOT = Path(__file__).resolve().parents[1]

RECIPE = """\
model: {model}
objective: {{name: snclr, dim: 64, hidden: 256, neighbours: 5, queue: {queue}, exclude_same_file: true,
             wait_for_queue: true}}
input: {input}
data:
  sources: {{own: {{shards: {shards}}}}}
  lanes: 4
  shuffle_window: 1000
  workers: 1
batch: {{samples: {batch}, micro: {batch}, ranks: 1}}
optim: {{base_lr: 1e-3, base_batch: {batch}, base_min_lr: 1e-5, betas: [0.9, 0.999], weight_decay: 0.1}}
schedule: {{epochs: {epochs}, warmup_epochs: 1, warmup_ends: start}}
compute: {{dtype: fp32}}
zero: {{stage: 0}}
checkpoint: {{every_epochs: 100}}
log: {{every_steps: 31, pictures_every_steps: 0, wandb: disabled}}
"""


@dataclasses.dataclass(frozen=True)
class Set:
    """A set of samples: how an encoder of them is trained, and the recipe by which it is judged.

    Attributes:
        model, input, shards, batch, epochs, queue: of the recipe above.
        judge: recipe of fine-tuning with the labelled samples.
        words: what the judged model is beside that recipe.
    """

    model: str
    input: str
    shards: str
    batch: int
    epochs: int
    queue: int
    judge: str
    words: tuple[str, ...] = ()


#: Views keep what tells classes apart: neither digits nor animations are mirrored, and colour says nothing of either.
SETS = {
    "digits": Set(
        "{name: moco_vit, image_size: 28, patch_size: 7, dim: 64, depth: 4, heads: 2}",
        "{height: 28, width: 28, first: {area: [0.4, 1], flip: 0, blur: 0.2, blur_radius: [0.1, 1]}, "
        "second: {area: [0.4, 1], flip: 0, blur: 0.1, blur_radius: [0.1, 1], solarise: 0}}",
        "mnist", 64, 8, 2000, "demo_pictures",
    ),
    "actions": Set(
        "{name: classifier, size: custom, patch_size: 16, dim: 128, depth: 3, heads: 4, mlp_ratio: 4, classes: 0}",
        "{frames: 8, stride: 2, height: 64, width: 64, first: {area: [0.5, 1], flip: 0, blur: 0.5}, "
        "second: {area: [0.5, 1], flip: 0, blur: 0.1, solarise: 0.2}}",
        "actions", 18, 20, 320, "demo_finetune", ("model.patch_size=16",),
    ),
}  # fmt: skip
#: What is trained, and what is asked of it.
METHODS: dict[str, tuple[str, ...]] = {"SNCLR": (), "InfoNCE": ("objective.neighbours=0",)}
RANDOM = "random weights"
SCORES = ("knn", "linear")


def main() -> None:
    """Run what is missing, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder with the packed sets")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, RANDOM], default=[*METHODS, RANDOM])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/snclr_learning"))
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    for name in options.sets:
        for seed in options.seeds:
            for job in jobs(name, seed, options):
                job.run()
    report = {"machine": machine(), "date": datetime.date.today().isoformat(), "runs": collect(options.runs)}
    path = options.out / f"snclr_learning_{report['date']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(collect(options.runs)))


def jobs(name: str, seed: int, options: argparse.Namespace) -> Iterator[Job]:
    """Training and judging of each method, in order."""
    chosen, shards = SETS[name], options.shards.absolute()
    for method in options.methods:
        folder = (options.runs / f"{name}_{method.split()[0]}_{seed}").absolute()
        start: tuple[str, ...] = ()
        if method in METHODS:
            recipe = folder / "own.yaml"
            folder.mkdir(parents=True, exist_ok=True)
            values = dataclasses.asdict(chosen) | {"shards": shards / chosen.shards}
            recipe.write_text(RECIPE.format(**values), encoding="utf-8")
            run = folder / "run"
            words = ("launch/pretrain.py", "--recipe", str(recipe), *METHODS[method], f"run.seed={seed}")
            yield Job((*words, f"run.dir={run}"), folder)
            start = (f"run.init_weights={run}",)
        for score in SCORES:
            judged = folder / score
            words = ("launch/evaluate.py", "--recipe", chosen.judge, "--method", score, f"data.root={shards}")
            more = (*chosen.words, f"run.seed={seed}", f"run.dir={judged}", "log.wandb=disabled", *start)
            yield Job((*words, *more), judged)


def collect(runs: Path) -> list[dict[str, object]]:
    """Accuracies of all runs that there are."""
    found: list[dict[str, object]] = []
    for path in sorted(runs.glob("*/*/frozen/*.json")):
        name, method, seed = path.parents[2].name.split("_")
        found.append({"set": name, "method": method, "seed": int(seed), "score": path.stem, "top1": _top1(path)})
    return found


def _top1(path: Path) -> float:
    return float(json.loads(path.read_text(encoding="utf-8"))["top1"])


def table(runs: list[dict[str, object]]) -> str:
    """Markdown: mean and sample standard deviation over seeds."""
    lines = ["| | " + " | ".join(f"{name}, {score}" for name in SETS for score in SCORES) + " |"]
    lines.append("|---" * (1 + len(SETS) * len(SCORES)) + "|")
    for method in (*METHODS, RANDOM):
        cells = []
        for name in SETS:
            for score in SCORES:
                wanted = {"set": name, "method": method.split()[0], "score": score}
                values = [float(str(run["top1"])) for run in runs if wanted.items() <= run.items()]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Do soft neighbours help? SNCLR beside plain InfoNCE and random weights, on handwritten digits and on action clips.

python bench/picture_sets.py mnist PICTURES
python launch/pack.py PICTURES/train SHARDS/mnist --kind image
python launch/pack.py PICTURES/test SHARDS/mnist_test --kind image
python bench/snclr_learning.py SHARDS RESULTS [--sets digits actions] [--seeds 0 1 2]

SHARDS also holds the clips of `make demo` (actions, new_performer, new_performer_test; launch/demo.sh packs them).
An encoder is trained without labels, then judged frozen, by 20 nearest neighbours and by linear heads, on samples of
which it has seen none (clips: another performer). InfoNCE is the same objective with neighbours=0. Objective, views,
optimiser and judges are the product's; one process trains them without its engine, whose start would take longer than
the training. What RESULTS holds is not done again.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

RECIPE = """\
model: {model}
objective: {{name: snclr, dim: 64, hidden: 256, neighbours: {neighbours}, queue: {queue}, exclude_same_file: true,
             wait_for_queue: true}}
input: {input}
data: {{sources: {{own: {{shards: none}}}}}}
batch: {{samples: {batch}, micro: {batch}}}
optim: {{base_lr: 1e-3, base_batch: {batch}, betas: [0.9, 0.999], weight_decay: 0.1}}
compute: {{dtype: fp32}}
zero: {{stage: 0}}
"""


@dataclasses.dataclass(frozen=True)
class Samples:
    """What an encoder is trained on, and judged by.

    Attributes:
        model, input, batch, steps, queue: of the training.
        train: shards without labels.
        judge: shards with labels, whose neighbours and heads judge those of the last ones.
    """

    model: str
    input: str
    train: str
    judge: tuple[str, str]
    batch: int
    steps: int
    queue: int


#: Views keep what tells classes apart: neither digits nor animations are mirrored. As many steps as half a minute of
#: one core has time for.
SETS = {
    "digits": Samples(
        "{name: moco_vit, image_size: 28, patch_size: 7, dim: 64, depth: 4, heads: 2}",
        "{height: 28, width: 28, first: {area: [0.4, 1], flip: 0, jitter_share: 0, grey: 0, blur: 0}, "
        "second: {area: [0.4, 1], flip: 0, jitter_share: 0, grey: 0, blur: 0, solarise: 0}}",
        "mnist", ("mnist", "mnist_test"), 64, 120, 1000,
    ),
    "actions": Samples(
        "{name: classifier, size: custom, patch_size: 16, dim: 64, depth: 3, heads: 2, mlp_ratio: 4, classes: 0}",
        "{frames: 8, stride: 2, height: 64, width: 64, first: {area: [0.5, 1], flip: 0, blur: 0.5}, "
        "second: {area: [0.5, 1], flip: 0, blur: 0.1, solarise: 0.2}}",
        "actions", ("new_performer", "new_performer_test"), 16, 30, 160,
    ),
}  # fmt: skip
#: Neighbours by method; random weights are not trained.
METHODS = {"SNCLR": 5, "InfoNCE": 0, "random": None}
SCORES = ("knn", "linear")
#: Samples of each half that judge and are judged.
MOST_JUDGED = 1000
#: Share of the steps in which the rate rises.
WARM_UP = 0.1


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="folder with the packed sets")
    parser.add_argument("results", type=Path, help="JSON lines, one a run")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    for name in options.sets:
        for seed in options.seeds:
            for method in options.methods:
                what = {"set": name, "method": method, "seed": seed}
                if any(what.items() <= run.items() for run in read(options.results)):
                    continue
                found = what | measure(SETS[name], METHODS[method], seed, options.shards)
                with options.results.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(found) + "\n")
                print(found, flush=True)
    print(table(read(options.results)))


def read(path: Path) -> list[dict[str, Any]]:
    """Runs that are done."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def measure(chosen: Samples, neighbours: int | None, seed: int, shards: Path) -> dict[str, Any]:
    """Train an encoder and judge it; accuracies in per cent, seconds of this process's cores."""
    import tempfile

    import torch

    from pretrain.objectives.base import method_of
    from pretrain.recipe.load import load_recipe

    values = dataclasses.asdict(chosen) | {"neighbours": neighbours or 0}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(RECIPE.format(**values))
        file.flush()
        method = method_of(load_recipe(file.name, [f"run.seed={seed}"]))
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    objective: Any = method.build()
    started = time.process_time()
    metrics = {} if neighbours is None else train(method, objective, chosen, seed, members_of(shards / chosen.train))
    trained = time.process_time() - started
    return judge(method, objective.eval(), chosen, shards, seed) | metrics | {"seconds": round(trained, 1)}


def members_of(folder: Path) -> list[Any]:
    """Files of each sample of packed shards."""
    from pretrain.data.members import Members

    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for entry in archive:
                key, _, ending = entry.name.partition(".")
                content = archive.extractfile(entry)
                assert content is not None
                found.setdefault(key, {})[ending] = content.read()
    return [Members(files) for _, files in sorted(found.items())]


def train(method: Any, objective: Any, chosen: Samples, seed: int, members: list[Any]) -> dict[str, float]:
    """Train on batches in a random order; returns the last step's metrics."""
    import numpy as np
    import torch

    from pretrain.engine.optimiser import build_optimizer, set_lr
    from pretrain.recipe.rates import half_cosine

    optimizer, rng = build_optimizer(method.recipe, objective.train(), torch.device("cpu")), np.random.default_rng(seed)
    passes = chosen.steps * chosen.batch // len(members) + 1
    order = np.concatenate([rng.permutation(len(members)) for _ in range(passes)])
    metrics: dict[str, Any] = {}
    for step in range(chosen.steps):
        objective.before_step(step, chosen.steps, chosen.steps)
        numbers = order[step * chosen.batch : (step + 1) * chosen.batch]
        loss, metrics = objective(batch_of(method, members, [int(number) for number in numbers], step * chosen.batch))
        set_lr(optimizer, method.recipe.optim.base_lr * rate(step, chosen.steps, half_cosine))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step()
    return {name: round(float(value), 4) for name, value in metrics.items()}


def rate(step: int, steps: int, half_cosine: Any) -> float:
    """Factor on the learning rate: a line up, half a cosine down."""
    rises = steps * WARM_UP
    return step / rises if step < rises else float(half_cosine(1.0, 0.0, (step - rises) / (steps - rises)))


def batch_of(method: Any, members: list[Any], numbers: list[int], position: int) -> Any:
    """Two views of each sample, as data workers make them."""
    from pretrain.data.samples import Place, Sample

    samples, source = method.samples(), source_of(method)
    made = []
    for slot, number in enumerate(numbers):
        place = Place(0, position + slot, 0, 0, number)
        made.append(Sample(place, str(number), samples(place, source, members[number])))
    return samples.collate(made)


def source_of(method: Any) -> Any:
    """The one source of the recipe."""
    from pretrain.data.samples import SourceInfo

    return SourceInfo("own", [], method.recipe.data.sources["own"])


def judge(method: Any, objective: Any, chosen: Samples, shards: Path, seed: int) -> dict[str, float]:
    """Top-1 of neighbours and of the best linear head of the grid, per cent."""
    from finetune.probe.features import Features
    from finetune.probe.heads import train_heads
    from pretrain.metrics.neighbours import knn_scores
    from pretrain.metrics.ranking import accuracy

    members = [spread(members_of(shards / name)) for name in chosen.judge]
    names = sorted({str(one.label) for one in members[0]})
    found = []
    for some in members:
        import torch

        values = torch.cat(list(features(method, objective, some)))
        targets = torch.tensor([names.index(str(one.label)) for one in some])
        found.append(Features([str(number) for number in range(len(some))], values, targets, names))
    train_set, test_set = found
    votes = knn_scores(train_set.values, train_set.targets, test_set.values, len(names))
    linear = train_heads(train_set, test_set, "linear", epochs=20, seed=seed)[0].top1
    return {"knn": round(accuracy(votes, test_set.targets), 2), "linear": round(linear, 2)}


def spread(members: list[Any]) -> list[Any]:
    """At most MOST_JUDGED of the samples, evenly."""
    return members[:: -(-len(members) // MOST_JUDGED)]


def features(method: Any, objective: Any, members: list[Any]) -> Iterator[Any]:
    """Features of the samples' middles, in pieces."""
    import numpy as np
    import torch

    samples, source = method.samples(), source_of(method)
    for start in range(0, len(members), 100):
        rows = [samples.without_chance(source, one)["video"] for one in members[start : start + 100]]
        with torch.no_grad():
            yield objective.features({"video": torch.from_numpy(np.concatenate(rows))})


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: mean and sample standard deviation over seeds."""
    lines = ["| | " + " | ".join(f"{name}, {score}" for name in SETS for score in SCORES) + " |"]
    lines.append("|---" * (1 + len(SETS) * len(SCORES)) + "|")
    for method in METHODS:
        cells = []
        for name in SETS:
            ours = [run for run in runs if (run["set"], run["method"]) == (name, method)]
            for score in SCORES:
                values = [run[score] for run in ours]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

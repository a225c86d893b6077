"""Command line of launch/evaluate.py: frozen evaluation of pre-trained weights."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.probe.shots import numbers
from finetune.recipe import TuneRecipe
from pretrain.commands.option_types import positive
from pretrain.commands.program import Program, run_program

if TYPE_CHECKING:
    from pretrain.objectives.base import Method

logger = logging.getLogger(__name__)

METHODS = ("knn", "linear", "attentive", "few-shot", "retrieval", "features", "windows")

EXAMPLES = """\
examples (the recipe says model, clip size and labelled data; the network stays frozen):
  python launch/evaluate.py --recipe vit_b_k400 --method knn run.init_weights=runs/vit_b_dual
      nearest neighbours among the training videos' features; no training
  python launch/evaluate.py --recipe vit_b_k400 --method attentive run.init_weights=model.pth
      a grid of attentive heads over the tokens, trained in one pass; linear: over pooled features
  python launch/evaluate.py --recipe vit_b_k400 --method few-shot --shots 1,5,10 run.init_weights=model.pth
      nearest class mean of k videos a class, mean and spread of 5 draws
  python launch/evaluate.py --recipe vit_b_ucf101 --method retrieval run.init_weights=runs/vit_b_dual
      R@k: is one of the k most similar training videos of the same class
  python launch/evaluate.py --recipe vit_b_k400 --method features --tokens run.init_weights=model.pth
      pooled features, or of all tokens, to runs/<name>/features/*.npz
  python launch/evaluate.py --recipe vit_b_k400 --method features --shards run.init_weights=model.pth
      the same to runs/<name>/features/{train,held_out}/*.tar, which webdataset reads: one .npy and .json a video
  python launch/evaluate.py --recipe vit_g_k710 --method windows --step 4 run.init_weights=model.pth
      sliding windows over whole test videos, one .npy each, as published for temporal detection
  python launch/evaluate.py --run runs/mine --train shards/in1k --val shards/in1k_val --method knn
      no recipe of fine-tuning: the features that a pre-training run gives by itself, whatever its model; pictures or
      clips; --run X --help tells more
  python launch/evaluate.py --from-csv detections.csv --truth ava_val_v2.2.csv --labels action_list.pbtxt
      no recipe: mAP of action detections in a file; --from-csv X --help tells more, docs/detection_metrics.md

exit codes: 0 done, 1 failed, 2 wrong recipe or usage
guide: docs/finetuning.md
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    options = {word.partition("=")[0] for word in words}
    # Files, and the features of a run, are scored without a recipe of fine-tuning.
    if "--from-csv" in options:
        from finetune.detection import from_csv

        return from_csv.main(words)
    if "--run" in options:
        from finetune.probe import evaluate_run

        return evaluate_run.main(words)
    return run_program(PROGRAM, argv)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, default="knn", help="what to do with the features (default knn)")
    parser.add_argument("--shots", type=numbers, default=[1, 5, 10], metavar="1,5,10", help="few-shot: videos a class")
    parser.add_argument("--epochs", type=positive, default=50, help="linear, attentive: passes over the features")
    parser.add_argument("--tokens", action="store_true", help="features: of all tokens instead of pooled")
    parser.add_argument(
        "--shards", action="store_true", help="features, windows: WebDataset shards instead of .npz and .npy files"
    )
    parser.add_argument("--step", type=positive, default=16, help="windows: frames between two of them")


def _run(method: "Method", arguments: argparse.Namespace) -> int:
    from finetune.classification.task import ClassificationTask
    from pretrain.errors import RecipeError
    from pretrain.models.initial_weights import read_weights
    from pretrain.runtime.dtypes import DTYPES
    from pretrain.runtime.logging import set_up_logging
    from pretrain.runtime.process_group import join, leave
    from pretrain.runtime.seeds import seed_everything

    if not isinstance(method, ClassificationTask):
        raise RecipeError(
            f"objective.name: found {method.recipe.objective.name}, allowed: classification, or a task that inherits "
            "from it; its labels and views are what features are measured with. Give such a recipe with the same model"
        )
    ranks, recipe = join(), method.recipe
    try:
        folder = Path(recipe.run.dir).absolute()
        set_up_logging(ranks.rank, folder / "logs")
        seed_everything(recipe.run.seed)
        objective: Any = method.build()
        if recipe.run.init_weights:
            weights = recipe.run.init_weights
            objective.load_pretrained(weights, read_weights(weights, recipe.run.init_averaged))
        objective = objective.to(device=ranks.device, dtype=DTYPES[recipe.compute.dtype]).eval()
        result = _evaluate(objective, recipe, arguments, ranks, folder)
        if ranks.first and result:
            path = folder / "frozen" / f"{arguments.method}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            logger.info("%s", path)
        return 0
    finally:
        leave(ranks)


def _evaluate(
    objective: Any, recipe: TuneRecipe, arguments: argparse.Namespace, ranks: Any, folder: Path
) -> dict[str, Any]:
    from finetune.classification.validation import labelled
    from finetune.probe.features import extract, held_out_sets, training_sets
    from finetune.probe.scores import scores

    if arguments.method == "windows":
        return _windows(objective, recipe, arguments, ranks, folder)
    kind: Any = "tokens" if arguments.method == "attentive" or arguments.tokens else "pooled"
    if arguments.method == "features" and arguments.shards:
        return _feature_shards(objective, recipe, kind, ranks, folder / "features")
    held_out_videos = labelled(held_out_sets(recipe))
    train = extract(objective, recipe, ranks, training_sets(recipe), kind)
    held_out = extract(objective, recipe, ranks, held_out_videos, kind)
    # Features are equal on all ranks: one of them trains the heads, and scores.
    if not ranks.first:
        return {}
    logger.info("%d training and %d held-out videos, chance %.2f %%",
                len(train.keys), len(held_out.keys), 100 / len(train.names))  # fmt: skip
    if arguments.method == "features":
        for name, features in (("train", train), ("held_out", held_out)):
            features.save(folder / "features" / f"{name}.npz")
        logger.info("features in %s", folder / "features")
        return {}
    return scores(train, held_out, arguments, recipe.run.seed, ranks.device)


def _feature_shards(objective: Any, recipe: TuneRecipe, kind: Any, ranks: Any, folder: Path) -> dict[str, Any]:
    from finetune.classification.validation import labelled
    from finetune.probe.feature_shards import write_shards
    from finetune.probe.features import held_out_sets, rows, training_sets

    result: dict[str, Any] = {}
    for name, sets in (("train", training_sets(recipe)), ("held_out", labelled(held_out_sets(recipe)))):
        result[name] = write_shards(folder / name, ranks, rows(objective, recipe, ranks, sets, kind))
        logger.info("%s features of %d videos in %s", kind, result[name], folder / name)
    return result


def _windows(
    objective: Any, recipe: TuneRecipe, arguments: argparse.Namespace, ranks: Any, folder: Path
) -> dict[str, Any]:
    """Write one .npy a test video, or shards; ranks share the videos."""
    from finetune.probe.feature_shards import write_shards
    from finetune.probe.features import held_out_sets
    from finetune.probe.windows import window_rows

    rows = window_rows(objective.model, recipe, ranks, held_out_sets(recipe), arguments.step)
    if arguments.shards:
        written = write_shards(folder / "windows" / "shards", ranks, rows)
    else:
        written = 0
        for row in rows:
            path = folder / "windows" / f"{row.key}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, row.features)
            written += 1
    logger.info("windows of %d videos in %s", written, folder / "windows")
    return {"videos": written, "step": arguments.step}


PROGRAM = Program(
    name="evaluate.py",
    description="Measure the features of a frozen network on labelled videos, or write them.",
    epilog=EXAMPLES,
    schema=TuneRecipe,
    run=_run,
    add_options=_add_options,
)

"""`evaluate.py --run`: what the features of a pre-training run are worth, by the run's own model and samples.

Where `evaluate.py --recipe` builds a classifier of fine-tuning around an encoder, here the method itself says what its
features are (`Objective.features`) and how a sample is judged (`Samples.without_chance`): any method, with a model
of any kind, of pictures or clips.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.probe.shots import numbers
from pretrain.commands.exit_codes import run_command
from pretrain.commands.option_types import positive

logger = logging.getLogger(__name__)

METHODS = ("knn", "linear", "few-shot", "retrieval")

EXAMPLES = """\
examples:
  python launch/evaluate.py --run runs/snclr --train shards/in1k --val shards/in1k_val
      20 nearest neighbours among the training samples' features
  python launch/evaluate.py --run runs/snclr --train shards/in1k --val shards/in1k_val --method linear --epochs 90
      a grid of linear heads over the features, trained in one pass
  python launch/evaluate.py --run runs/mine --train shards/ucf101_train --val shards/ucf101_test --method retrieval
      R@k: is one of the k most similar training videos of the same class

exit codes: 0 done, 1 failed, 2 wrong usage
guide: docs/finetuning.md
"""


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    return run_command("evaluate", _parser(), argv, _evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from finetune.probe.run_features import run_features
    from finetune.probe.scores import scores, spread
    from pretrain.runtime.logging import set_up_logging
    from pretrain.runtime.process_group import join, leave
    from pretrain.trained.load_run import load_trained

    trained = load_trained(arguments.run)
    ranks = join()
    try:
        set_up_logging(ranks.rank)
        train, held_out = run_features(trained, arguments.train, arguments.val, arguments.micro, ranks)
        # Features are equal on all ranks: one of them trains the heads, and scores.
        if not ranks.first:
            return
        logger.info("%s: %d training and %d held-out samples, %d channels, chance %.2f %%", trained.source,
                    len(train.keys), len(held_out.keys), train.values.shape[1], 100 / len(train.names))  # fmt: skip
        result = {"run": str(trained.source), "method": arguments.method} | spread(train)
        result |= scores(train, held_out, arguments, trained.recipe.run.seed, ranks.device)
        if arguments.out:
            _write(result, Path(arguments.out))
    finally:
        leave(ranks)


def _write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    logger.info("%s", path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py --run", description="Measure the features of a pre-training run on labelled samples.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "--run", required=True, metavar="RUN", help="run folder or URL, checkpoint, or export with recipe.yaml"
    )
    parser.add_argument("--train", required=True, metavar="SHARDS", help="labelled samples to learn from, packed")
    parser.add_argument("--val", required=True, metavar="SHARDS", help="labelled samples to measure on, packed")
    parser.add_argument("--method", choices=METHODS, default="knn", help="what to do with the features (default knn)")
    parser.add_argument("--shots", type=numbers, default=[1, 5, 10], metavar="1,5,10", help="few-shot: samples a class")
    parser.add_argument("--epochs", type=positive, default=50, help="linear: passes over the features (default 50)")
    parser.add_argument("--micro", type=positive, default=64, help="samples in one forward pass (default 64)")
    parser.add_argument("--out", metavar="FILE", help="JSON file for the numbers")
    # The deepspeed launcher's; ranks know their place from the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser

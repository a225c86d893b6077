"""Test of a trained model: clips x crops of every video, scores, pictures, and predictions to score again."""

import json
import logging
from pathlib import Path

import numpy as np

from finetune.classification.confusion import save_confusion
from finetune.classification.examples import pick_examples, save_examples
from finetune.classification.predictions import Predictions, class_accuracy, confusion, read_predictions, scores
from finetune.classification.validation import centre_view, labelled, predict, test_views, video_sets
from finetune.classification.views import VideoSet
from finetune.recipe import TuneRecipe
from finetune.tested_checkpoint import NO_SHARDS, choose_checkpoint, load_objective, predictions_of
from pretrain.errors import DataError
from pretrain.objectives.base import Method
from pretrain.runtime.process_group import Ranks, from_first, gather_objects

logger = logging.getLogger(__name__)

SHOWN_CLASSES = 5


def run_test(method: Method, ranks: Ranks, which: str) -> dict[str, float]:
    """Test a run's checkpoint on all ranks.

    Args:
        method: the run.
        ranks: this process among all.
        which: "last", "best", or the folder of a checkpoint.

    Raises:
        DataError: the recipe names no test shards.
        CheckpointError: no such checkpoint, or it does not verify.
    """
    recipe = method.recipe
    sets = labelled(video_sets(recipe, test=True))
    if not sets:
        raise DataError(NO_SHARDS)
    checkpoint = choose_checkpoint(recipe, ranks, which)
    objective, folder = load_objective(method, ranks, checkpoint), predictions_of(recipe, checkpoint)
    if ranks.first:
        # Of a test with more ranks some parts would stay, and their videos be found twice.
        for old in folder.glob("part_*.npz"):
            old.unlink()
    from_first(ranks, None)  # nobody writes before the old parts are gone
    predict(objective, recipe, ranks, sets, test_views(recipe)).write_part(folder, ranks.rank)
    # Rank 0 reads what the others have written: they must be done.
    gather_objects(ranks, None)
    result = from_first(ranks, _report(recipe, sets, folder) if ranks.first else {})
    return result


def _report(recipe: TuneRecipe, sets: list[VideoSet], folder: Path) -> dict[str, float]:
    """Write scores and pictures, on rank 0."""
    result, count = rescore(folder), recipe.evaluate.pictures
    if count and recipe.objective.task == "single":
        predictions = read_predictions(folder)
        examples = pick_examples(predictions, sets, centre_view(recipe), count, recipe.data.deadline_s)
        save_examples(examples, predictions.names, folder / "examples.png")
        logger.info("  picture: %s", folder / "examples.png")
    return result


def rescore(folder: Path) -> dict[str, float]:
    """Score the predictions in a folder, without the model; writes scores.json, per_class.csv and confusion.png.

    Raises:
        DataError: no predictions there.
    """
    predictions = read_predictions(folder)
    result = scores(predictions)
    (folder / "scores.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    views = predictions.logits.shape[1]
    logger.info("%s: %d videos x %d views", folder, len(predictions.keys), views)
    logger.info("  %s", ", ".join(f"{name} {value:.2f}" for name, value in result.items()))
    if predictions.task == "single":
        write_classes(predictions, folder)
    return result


def write_classes(predictions: Predictions, folder: Path) -> None:
    """Write per_class.csv, confusion.png, and a line about the classes that are hardest."""
    accuracy, table = class_accuracy(predictions), confusion(predictions)
    lines = ["class,videos,accuracy,most_often_taken_for"]
    for number, name in enumerate(predictions.names):
        others = table[number].copy()
        others[number] = 0
        taken = predictions.names[int(others.argmax())] if others.any() else ""
        share = "" if np.isnan(accuracy[number]) else f"{100 * accuracy[number]:.2f}"
        quoted, likely = (word.replace('"', '""') for word in (name, taken))
        lines.append(f'"{quoted}",{table[number].sum()},{share},"{likely}"')
    (folder / "per_class.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    save_confusion(table, predictions.names, folder / "confusion.png")
    known = [number for number in np.argsort(accuracy, kind="stable") if not np.isnan(accuracy[number])]
    hardest = ", ".join(f"{predictions.names[n]} {100 * accuracy[n]:.0f} %" for n in known[:SHOWN_CLASSES])
    logger.info("  hardest classes: %s", hardest)

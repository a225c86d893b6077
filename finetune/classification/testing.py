"""Test of a trained model: clips x crops of every video, scores, pictures, and predictions to score again."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from finetune.classification.confusion import save_confusion
from finetune.classification.examples import pick_examples, save_examples
from finetune.classification.predictions import Predictions, class_accuracy, confusion, read_predictions, scores
from finetune.classification.validation import centre_view, labelled, predict, test_views, video_sets
from finetune.classification.videos import VideoSet
from finetune.recipe import TuneRecipe
from pretrain.checkpoint.consolidate import newest_checkpoint
from pretrain.checkpoint.folders import folder_of
from pretrain.checkpoint.reshape import Layout
from pretrain.checkpoint.resume import load_weights, open_verified
from pretrain.engine.build import build_engine
from pretrain.errors import CheckpointError, DataError
from pretrain.objectives.base import Method
from pretrain.runtime.dtypes import DTYPES
from pretrain.runtime.process_group import Ranks, from_first, gather_objects
from pretrain.runtime.run_folder import RunFolder
from pretrain.runtime.untrusted import parse_json
from pretrain.trained.load_run import load_checkpoint

logger = logging.getLogger(__name__)

SHOWN_CLASSES = 5


def wants_test(recipe: TuneRecipe) -> bool:
    """Tell whether there is something to test at the end, and the run went to its end."""
    stopped_early = recipe.schedule.max_steps is not None
    held_out = any(source.test or source.val for source in recipe.data.sources.values())
    return recipe.evaluate.test != "none" and held_out and not stopped_early


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
        raise DataError("test: no source has test or val shards; give data.sources.<name>.test=FOLDER")
    root = Path(recipe.run.dir).absolute()
    # One rank chooses: hosts may see different newest checkpoints on a shared file system.
    checkpoint = Path(from_first(ranks, str(find(root, which)) if ranks.first else ""))
    objective = load_objective(method, ranks, checkpoint)
    folder = root / "predictions" / checkpoint.name
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


def find(root: Path, which: str) -> Path:
    """Find the folder of a checkpoint of the run in `root`.

    Raises:
        CheckpointError: it is not there.
    """
    if which == "last":
        return newest_checkpoint(RunFolder(root).checkpoints)
    if which != "best":
        return Path(which).absolute()
    note = root / "best.json"
    if not note.is_file():
        raise CheckpointError(f"{note}: not there, so no step was evaluated; test --test last, or give val shards")
    return folder_of(RunFolder(root).checkpoints, parse_json(note.read_text(encoding="utf-8"))["step"])


def load_objective(method: Method, ranks: Ranks, checkpoint: Path) -> Any:
    """Load the trained module onto this rank's device, in evaluation mode; sharded where training sharded it."""
    recipe = method.recipe
    # Sharded again: what needed stage 3 may not fit a device whole.
    if recipe.zero.stage == 3:
        accumulation = recipe.batch.samples // (recipe.batch.micro * ranks.world_size)
        built = build_engine(method, ranks, accumulation, resumes=True)
        here = Layout.of(ranks.world_size, asdict(recipe.zero))
        load_weights(built.engine, open_verified(checkpoint, ranks), here, built.groups)
        return built.engine.module.eval()
    objective = method.build()
    load_checkpoint(objective, checkpoint)
    return objective.to(device=ranks.device, dtype=DTYPES[recipe.compute.dtype]).eval()


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

"""Command line of launch/predict.py."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.commands.exit_codes import run_command
from pretrain.commands.option_types import positive
from pretrain.errors import RecipeError, WeightsError

if TYPE_CHECKING:
    from finetune.prediction import VideoPredictor

#: Files that hold a graph with its facts, without recipe and checkpoint.
GRAPHS = (".onnx", ".pt2")

DESCRIPTION = """\
Print what a fine-tuned model sees in a video. Of a classifier: the classes, and a picture of the frames that it was
given. Of a detector: who does what and when, and the video with boxes, tracks and actions drawn in.
"""
EPILOG = """\
examples:
  python launch/predict.py clip.mp4 --weights runs/vit_b_k400
  python launch/predict.py clip.mp4 --weights weights/vit_b_k400 --labels k400.txt --clips 5 --crops 3
  python launch/predict.py clip.mp4 --weights weights/vit_b_k400.onnx
  python launch/predict.py clip.mp4 --weights runs/vit_b_k400 --keep-rate 0.7
  python launch/predict.py cat.jpg --weights runs/sparseformer_tiny_in1k --regions cat_regions.png
  python launch/predict.py street.mp4 --weights runs/vit_b_ava --persons hog --out street_actions.mp4

exit codes: 0 done, 1 failed, 2 wrong usage
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command("predict", make_parser(), argv, _predict)


def _predict(arguments: argparse.Namespace) -> None:
    from finetune.prediction import Question, ask

    task, predictor = _predictor(arguments)
    options = {one.name: getattr(arguments, one.name) for one in dataclasses.fields(Question)}
    answer = ask(predictor, task, arguments.video, Question(**options))
    print("\n".join(answer.lines))
    for what, path in answer.files.items():
        print(f"{what}: {path}")


def _predictor(arguments: argparse.Namespace) -> "tuple[str, VideoPredictor]":
    """Open what was trained: its task and its predictor."""
    from finetune.classification.fine_tuned import load_task, set_keep_rate
    from finetune.classification.predictor import predictor_of_graph

    if Path(arguments.weights).suffix in GRAPHS:
        if arguments.keep_rate is not None:
            raise RecipeError(
                f"--keep-rate: {arguments.weights} is a graph of one rate; give the run or an export folder"
            )
        return "classification", predictor_of_graph(Path(arguments.weights))
    trained = load_task(arguments.weights)
    if arguments.keep_rate is not None:
        set_keep_rate(trained, arguments.keep_rate)
    task, predictor = trained.recipe.objective.name, trained.method.predictor(trained.objective, trained.source)
    if predictor is None:
        raise WeightsError(
            f"{arguments.weights}: objective {task} has no answer about a video; classification and detection do, "
            "tasks that inherit from them, and those that define Method.predictor"
        )
    return task, predictor


def make_parser() -> argparse.ArgumentParser:
    """Build the parser; every option's help states its default."""
    parser = argparse.ArgumentParser(
        "predict.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("video", help="video file, any fsspec URL")
    parser.add_argument(
        "--weights", required=True, metavar="RUN_OR_EXPORT",
        help="fine-tuning run (its newest checkpoint that verifies), checkpoint, or what export.py wrote: a folder, a "
        ".onnx or a .pt2 file",
    )  # fmt: skip
    parser.add_argument("--labels", metavar="FILE", help="class names, one a line or JSON (default: the run's)")
    parser.add_argument("--top", type=positive, help="classes to print (default 5); actions at a box (default 3)")
    parser.add_argument("--clips", type=positive, help="clips of the video (default 1: the middle)")
    parser.add_argument("--crops", type=positive, help="crops of each clip (default 1: the centre)")
    parser.add_argument("--keep-rate", type=float, metavar="R", help="share of tokens that three blocks keep (EViT)")
    parser.add_argument("--decoder", help="decord, pyav or torchcodec (default: the recipe's)")
    parser.add_argument(
        "--regions", type=Path, metavar="PICTURE", help="draw where the model looks (SparseFormer) into this file"
    )
    parser.add_argument(
        "--persons", metavar="DETECTOR",
        help="what finds the persons for a detector that is given boxes: hog (default; OpenCV's, no weights needed), "
        "torchvision:MODEL:WEIGHTS_FILE, or MODULE:FUNCTION of your own",
    )  # fmt: skip
    parser.add_argument("--person-score", type=float, metavar="S", help="least score of a person (default 0.7)")
    parser.add_argument(
        "--every", type=float, dest="every_s", metavar="SECONDS", help="seconds between two keyframes (default 1)"
    )
    parser.add_argument("--csv", type=Path, help="file to write what was detected to, as launch/evaluate.py reads it")
    parser.add_argument(
        "--out", type=Path,
        help="picture or video to write (default: VIDEO's name with _prediction.png or _actions.mp4, here)",
    )  # fmt: skip
    return parser

"""Command line of launch/predict.py."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pretrain.errors import TubeletError, WeightsError
from pretrain.runtime.terminal import take_any_name

if TYPE_CHECKING:
    from finetune.classification.predictor import Predictor

#: Files that hold a graph with its facts, without recipe and checkpoint.
GRAPHS = (".onnx", ".pt2")

DESCRIPTION = """\
Print the classes that a fine-tuned model sees in a video, and draw the frames that it was given.
"""
EPILOG = """\
examples:
  python launch/predict.py clip.mp4 --weights runs/vit_b_k400
  python launch/predict.py clip.mp4 --weights weights/vit_b_k400 --labels k400.txt --clips 5 --crops 3
  python launch/predict.py clip.mp4 --weights weights/vit_b_k400.onnx
  python launch/predict.py clip.mp4 --weights runs/vit_b_k400 --keep-rate 0.7
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    take_any_name()
    arguments = _parser().parse_args(argv)
    try:
        _predict(arguments)
    except TubeletError as error:
        print(f"predict: {error}", file=sys.stderr)
        return 1
    return 0


def _predict(arguments: argparse.Namespace) -> None:
    from finetune.classification.predictor import predict_video, save_frames, with_names

    predictor = _predictor(arguments)
    predictor = with_names(predictor, arguments.labels) if arguments.labels else predictor
    found = predict_video(predictor, arguments.video, arguments.clips, arguments.crops, arguments.decoder)
    views, frames, height, width = found.views.shape[:4]
    print(f"{arguments.video}: {views} x {frames} frames of {height} x {width} pixels, {predictor.source}")
    regression = predictor.task == "regression"
    for number in range(len(found.values)) if regression else found.top(arguments.top):
        value = float(found.values[number])
        print(
            f"  {value:10.4g}  {predictor.names[number]}"
            if regression
            else f"  {100 * value:5.1f} %  {predictor.names[number]}"
        )
    best = found.top(1)[0]
    caption = "" if regression else f"{predictor.names[best]} {100 * float(found.values[best]):.1f} %"
    out = arguments.out or Path(f"{PurePosixPath(arguments.video).stem}_prediction.png")
    save_frames(found, caption, out)
    print(f"picture: {out}")


def _predictor(arguments: argparse.Namespace) -> "Predictor":
    from finetune.classification.fine_tuned import load_task, set_keep_rate
    from finetune.classification.predictor import predictor_of_graph

    if Path(arguments.weights).suffix in GRAPHS:
        if arguments.keep_rate is not None:
            raise WeightsError(
                f"--keep-rate: {arguments.weights} is a graph of one rate; give the run or an export folder"
            )
        return predictor_of_graph(Path(arguments.weights))
    trained = load_task(arguments.weights)
    if arguments.keep_rate is not None:
        set_keep_rate(trained, arguments.keep_rate)
    predictor: Predictor | None = trained.method.predictor(trained.objective, trained.source)
    if predictor is None:
        raise WeightsError(
            f"{arguments.weights}: objective {trained.recipe.objective.name} predicts no classes of a video; "
            "classification does, tasks that inherit from it, and those that define Method.predictor"
        )
    return predictor


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument("--top", type=_count, default=5, help="classes to print (default 5)")
    parser.add_argument("--clips", type=_count, default=1, help="clips of the video (default 1: the middle)")
    parser.add_argument("--crops", type=_count, default=1, help="crops of each clip (default 1: the centre)")
    parser.add_argument("--keep-rate", type=float, metavar="R", help="share of tokens that three blocks keep (EViT)")
    parser.add_argument("--decoder", help="decord, pyav or torchcodec (default: the recipe's)")
    parser.add_argument("--out", type=Path, help="picture to write (default: VIDEO's name with _prediction.png, here)")
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError("at least 1")
    return count

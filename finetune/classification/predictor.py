"""Prediction of one video file by a fine-tuned model."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetune.classification.fine_tuned import FineTuned, label_map
from finetune.classification.frame_facts import choice_of
from finetune.classification.graphs import read_graph
from finetune.classification.labels import LabelMap, Task, read_names
from finetune.classification.predictions import Predictions
from finetune.classification.validation import test_views
from finetune.classification.views import EvaluationViews, SourceRules
from finetune.prediction import Answer, Question, default_out
from pretrain.data.decoders import open_video
from pretrain.data.linked_video import Footage, StillImage
from pretrain.data.media import is_of_kind
from pretrain.data.motion_tables import Curve
from pretrain.errors import DataError, RecipeError, SampleError
from pretrain.models.pixels import unit_pixels
from pretrain.runtime import storage
from pretrain.runtime.pictures import SHEET_FRAMES, contact_sheet
from pretrain.samples.clip import Config
from pretrain.samples.frame_choice import FrameChoice
from pretrain.samples.motion_choice import MotionChoice
from pretrain.samples.motion_curves import measure_of, motion_curve
from pretrain.samples.transforms import Clip

#: Views in one forward pass.
MICRO = 4
#: Classes that are told.
SHOWN = 5


@dataclass(frozen=True)
class Prediction:
    """One video's result.

    Attributes:
        values: probability of each class, float [K]; values of a regression.
        views: what the model was given, uint8 [V, T, H, W, 3].
    """

    values: npt.NDArray[Any]
    views: Clip

    def top(self, count: int) -> list[int]:
        """Rank the classes with the highest values, best first."""
        return np.argsort(-self.values, kind="stable")[:count].tolist()


@dataclass(frozen=True)
class Predictor:
    """Classifier of clips, whatever it was read from.

    Attributes:
        logits: float32 [V, K] of clips uint8 [V, T, H, W, 3].
        names: class names in order.
        rules: how frames are chosen and resized.
        size: frames, height and width of a clip.
        task: what the logits mean.
        average: what the mean over views is taken of.
        decoder: library that decodes.
        source: where it was read from.
        test_size: the same as `size`, of a test's views; None: `size`.
        draw_regions: picture of where the model looks in a view uint8 [T, H, W, 3]; None: it looks everywhere.
    """

    logits: Callable[[Tensor], Tensor]
    names: list[str]
    rules: SourceRules
    size: tuple[int, int, int]
    task: Task
    average: Literal["probabilities", "logits"]
    decoder: str
    source: str
    test_size: tuple[int, int, int] | None = None
    draw_regions: Callable[[Clip], Clip] | None = None

    @property
    def understood(self) -> frozenset[str]:
        drawn = frozenset[str]() if self.draw_regions is None else frozenset({"regions"})
        return frozenset({"labels", "top", "clips", "crops", "decoder"}) | drawn

    def answer(self, video: str, question: Question) -> Answer:
        """Tell the classes of a video, and draw the frames that were looked at.

        Raises:
            DataError: the video, the file of names or the picture's place can't be used.
        """
        named = with_names(self, question.labels) if question.labels else self
        found = predict_video(named, video, question.clips or 1, question.crops or 1, question.decoder)
        views, frames, height, width = found.views.shape[:4]
        lines = [f"{video}: {views} x {frames} frames of {height} x {width} pixels, {named.source}"]
        best = found.top(1)[0]
        if named.task == "regression":
            caption = ""
            lines += [f"  {value:10.4g}  {name}" for value, name in zip(found.values, named.names, strict=True)]
        else:
            caption = f"{named.names[best]} {100 * float(found.values[best]):.1f} %"
            lines += [
                f"  {100 * float(found.values[number]):5.1f} %  {named.names[number]}"
                for number in found.top(question.top or SHOWN)
            ]
        out = question.out or default_out(video, "_prediction.png")
        save_frames(found, caption, out)
        files = {"picture": out}
        if question.regions is not None and self.draw_regions is not None:
            files["regions"] = question.regions
            _save(self.draw_regions(found.views[0]), question.regions)
        return Answer(lines, files)


def predictor_of(tuned: FineTuned) -> Predictor:
    """Build a predictor of a fine-tuned model, on the accelerator where there is one.

    Frames are chosen by the rules of its recipe's first source.
    """
    recipe = tuned.recipe
    clip, source = recipe.input, next(iter(recipe.data.sources.values()))
    choice = clip.frame_choice(source.sampling, source.stride)
    side = source.short_side or clip.evaluated_side
    rules = SourceRules(label_map(tuned), choice, False, side, clip.GEOMETRY, picture_filter=clip.evaluated_filter)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = tuned.objective.to(device)
    return Predictor(
        lambda clips: objective.predict(clips.to(device)).cpu(),
        tuned.names,
        rules,
        clip.size,
        recipe.objective.task,
        recipe.evaluate.average,
        clip.decoder,
        str(tuned.source),
        test_views(recipe).size,
        functools.partial(_looks_of, objective) if objective.architecture.draws_looks else None,
    )


def _looks_of(objective: Any, view: Clip) -> Clip:
    clips = torch.from_numpy(view)[None].to(next(objective.parameters()).device)
    pixels = objective.normalization(unit_pixels(clips))
    sheet: Clip = objective.architecture.looks(objective.model, clips, pixels).sheet
    return sheet


def predictor_of_graph(path: Path) -> Predictor:
    """Open a .onnx or .pt2 file of launch/export.py as a predictor.

    Raises:
        WeightsError: not such a file.
    """
    graph = read_graph(path)
    facts = graph.facts
    rules = SourceRules(
        LabelMap(len(facts["classes"]), tuple(facts["classes"]), facts["task"]),
        choice_of(facts, str(path)),
        False,
        facts["short_side"],
        # Graphs of before there were others say nothing of these.
        facts.get("geometry", "videomae"),
        picture_filter=facts.get("picture_filter"),
    )
    frames, height, width = facts["clip"]
    size = (frames, height, width)
    return Predictor(
        graph.logits, facts["classes"], rules, size, facts["task"], facts["average"], Config().decoder, str(path)
    )


def with_names(predictor: Predictor, path: str) -> Predictor:
    """Give the same model the class names of a file.

    Raises:
        DataError: not as many names as classes, or no such file.
    """
    names = list(read_names(path))
    if len(names) != len(predictor.names):
        raise DataError(f"{path}: {len(names)} names, but the model has {len(predictor.names)} classes")
    return replace(predictor, names=names)


def predict_video(
    predictor: Predictor, video: str, clips: int = 1, crops: int = 1, decoder: str | None = None
) -> Prediction:
    """Classify a video as the run's validation does, or with more views as its test does; an image is one frame.

    Args:
        predictor: the model.
        video: file, any fsspec URL.
        clips: clips in time.
        crops: crops along the long side.
        decoder: library that decodes; None: the model's.

    Raises:
        RecipeError: several views of a picture, or no such decoder.
        DataError: a folder, no such file, no video or image that can be read, or the decoder is not installed.
        StorageError: a store does not answer.
    """
    if "://" not in video and not Path(video).is_file():
        found = "a folder" if Path(video).is_dir() else "no such file"
        raise DataError(f"{video}: {found}; one video or image is expected, of many labelled ones: launch/evaluate.py")
    if predictor.rules.picture_filter is not None and clips * crops > 1:
        raise RecipeError(
            f"{clips} x {crops} views: {predictor.source} takes pictures, which are judged by their middle alone; "
            "leave --clips and --crops out"
        )
    centre = clips * crops == 1
    size = predictor.size if centre else predictor.test_size or predictor.size
    make = EvaluationViews(size, decoder or predictor.decoder, clips, crops, validation=centre)
    content = storage.read_bytes(video)
    still = is_of_kind(video, "image")
    footage = StillImage(content) if still else content
    try:
        motion = _motion_of(footage, predictor.rules.choice, make.decoder)
        views = make(footage, predictor.rules, PurePosixPath(video).stem, motion)
    except SampleError as error:
        raise DataError(f"{video}: can't be read as a video or an image ({error})") from error
    logits = torch.cat([predictor.logits(part) for part in torch.from_numpy(views).split(MICRO)]).numpy()
    # Its target is made up: only merged views are asked for.
    predictions = Predictions(
        predictor.task, predictor.names, [video], np.zeros(1), logits[None], average=predictor.average
    )
    return Prediction(predictions.merged[0], views)


def _motion_of(footage: Footage, choice: FrameChoice, decoder: str) -> Curve | None:
    """Measure the motion of a video that no table lists, for a rule that looks at it."""
    if not isinstance(choice, MotionChoice):
        return None
    measure = measure_of(choice.kind)
    with open_video(footage, decoder) as reader:
        return motion_curve(reader.in_turn(), measure)


def save_frames(prediction: Prediction, caption: str, path: Path) -> None:
    """Draw all frames that the model was given, a view below the other, `caption` above the first.

    Raises:
        DataError: the picture can't be written there.
    """
    frames = prediction.views.shape[1]
    width = max(size for size in range(1, SHEET_FRAMES + 1) if frames % size == 0)
    rows = {
        f"view {number + 1}, frames {first + 1}-{first + width}": view[None, first : first + width]
        for number, view in enumerate(prediction.views)
        for first in range(0, frames, width)
    }
    titled = {(f"{caption}: {name}" if row == 0 else name): video for row, (name, video) in enumerate(rows.items())}
    _save(contact_sheet(titled), path)


def _save(sheet: Clip, path: Path) -> None:
    from PIL import Image

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(path)
    # ValueError: an ending that Pillow knows no format for.
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the picture can't be written ({error})") from error

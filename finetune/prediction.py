"""What launch/predict.py asks of a trained task about one video, and what it gets."""

from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Protocol

from pretrain.errors import RecipeError


@dataclass(frozen=True)
class Question:
    """Options of the command line; None where one was not given, so that each task has its own defaults.

    Attributes:
        out: file to write.
        labels: file of class names.
        top: classes to tell.
        clips, crops: of the video.
        decoder: library that decodes.
        regions: file to draw into where the model looks.
        persons: person detector, see `finetune.detection.persons`.
        person_score: least score of a person.
        every_s: seconds between two keyframes.
        csv: file to write what was detected to.
    """

    out: Path | None = None
    labels: str | None = None
    top: int | None = None
    clips: int | None = None
    crops: int | None = None
    decoder: str | None = None
    regions: Path | None = None
    persons: str | None = None
    person_score: float | None = None
    every_s: float | None = None
    csv: Path | None = None


@dataclass(frozen=True)
class Answer:
    """Lines to print, and the files that were written, by what they are."""

    lines: list[str]
    files: dict[str, Path]


class VideoPredictor(Protocol):
    """A trained model that answers."""

    @property
    def understood(self) -> frozenset[str]:
        """Names of the options that it reads; others are refused, since they would have no effect."""
        ...

    def answer(self, video: str, question: Question) -> Answer:
        """Look at a video, any fsspec URL, and write a picture or a video of the answer."""
        ...


def ask(predictor: VideoPredictor, task: str, video: str, question: Question) -> Answer:
    """Ask, after a look at the options.

    Args:
        predictor: of the task.
        task: its name, for the error.
        video: file, any fsspec URL.
        question: options.

    Raises:
        RecipeError: an option has no meaning for the task.
    """
    given = [one.name for one in fields(question) if getattr(question, one.name) is not None and one.name != "out"]
    if foreign := [name for name in given if name not in predictor.understood]:
        options = ", ".join("--" + name.replace("_", "-").removesuffix("-s") for name in foreign)
        allowed = ", ".join("--" + name.replace("_", "-").removesuffix("-s") for name in sorted(predictor.understood))
        raise RecipeError(f"{options}: without a meaning for the task {task}; allowed with it: {allowed}, --out")
    return predictor.answer(video, question)


def default_out(video: str, ending: str) -> Path:
    """Name the file that an answer is drawn into: the video's name with an ending, in the current folder."""
    return Path(f"{PurePosixPath(video).stem}{ending}")

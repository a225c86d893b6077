"""Who does what and when in a video: answers of launch/predict.py, as lines, as a table and as a video."""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from finetune.classification.labels import read_names
from finetune.detection.answers import Detections
from finetune.detection.final_test import write_detections
from finetune.detection.persons import PersonDetector, person_detector
from finetune.detection.rendering import Sighting, render
from finetune.detection.tracks import link_tracks
from finetune.prediction import Answer, Question, default_out
from pretrain.data.boxes.action_list import ActionList
from pretrain.data.decoders import VideoReader, open_video
from pretrain.data.samples import Batch
from pretrain.errors import DataError, RecipeError, SampleError
from pretrain.runtime import storage
from pretrain.samples.box_facts import KeyframeFacts
from pretrain.samples.boxes import BoxSamples, Config

#: Actions that are written at a box.
SHOWN = 3
#: Least score of a person, where none is asked for: below it HOG sees people in lamp posts.
PERSON_SCORE = 0.7
#: Least score of an action that is written at a box.
ACTION_SCORE = 0.1


@dataclass(frozen=True)
class DetectionPredictor:
    """A trained detector of actions.

    Attributes:
        detect: answers of a batch that lies on `device`.
        device: of the model.
        input: the recipe's input section.
        actions: what the outputs mean.
        finds_persons: the model finds the persons itself; else a person detector does.
        source: where it was read from.
    """

    detect: Callable[[Batch], list[Detections]]
    device: torch.device
    input: Config
    actions: ActionList
    finds_persons: bool
    source: str

    @property
    def understood(self) -> frozenset[str]:
        """Options of the command that it reads."""
        own = frozenset({"labels", "top", "decoder", "every_s", "csv"})
        return own if self.finds_persons else own | {"persons", "person_score"}

    def answer(self, video: str, question: Question) -> Answer:
        """Look at a keyframe every so many seconds, and draw what was detected into a copy of the video.

        Raises:
            RecipeError: an option has no usable value.
            DataError: the video can't be read, or a file can't be written.
        """
        outputs = self.actions.outputs
        own = [self.actions.name(output) for output in range(outputs)]
        names = list(read_names(question.labels)) if question.labels else own
        if len(names) != outputs:
            raise DataError(f"{question.labels}: {len(names)} names, but the model has {outputs} actions")
        every_s = 1.0 if question.every_s is None else question.every_s
        if not 0 < every_s < math.inf:
            raise RecipeError(f"--every: found {every_s:g}, allowed: more than 0 seconds")
        if question.person_score is not None and not 0 <= question.person_score <= 1:
            raise RecipeError(f"--person-score: found {question.person_score:g}, allowed: from 0 to 1")
        content = storage.read_bytes(video)
        try:
            with open_video(content, question.decoder or self.input.decoder) as reader:
                found = list(self._keyframes(video, reader, every_s, question))
        except SampleError as error:
            raise DataError(f"{video}: can't be read as a video ({error})") from error
        tracks = link_tracks([one.boxes for one in found])
        sightings = list(_sightings(found, tracks, names, question.top or SHOWN))
        out = question.out or default_out(video, "_actions.mp4")
        frames = render(io.BytesIO(content), sightings, every_s, out)
        files = {"video": out}
        if question.csv is not None:
            _write_table(found, self.actions, question.csv)
            files["table"] = question.csv
        persons = 1 + max((track for row in tracks for track in row), default=-1)
        first = f"{video}: {len(found)} keyframes, {persons} persons, {frames} frames, {self.source}"
        return Answer([first, *_summary(sightings)], files)

    def _keyframes(
        self, video: str, reader: VideoReader, every_s: float, question: Question
    ) -> Iterator[Detections]:
        score = PERSON_SCORE if question.person_score is None else question.person_score
        detector = None if self.finds_persons else person_detector(question.persons or "hog")
        options = replace(self.input, min_score=score)
        samples = BoxSamples(options, 0, self.actions.outputs, detected=detector is not None)
        for time in np.arange(min(every_s, reader.duration) / 2, reader.duration, every_s).tolist():
            keyframe = _keyframe(Path(video).stem, time, self.actions.outputs, reader, detector)
            batch = samples.judged(reader, keyframe)
            yield from self._detect(batch)

    def _detect(self, batch: Batch) -> list[Detections]:
        moved = {name: value.to(self.device) if torch.is_tensor(value) else value for name, value in batch.items()}
        return self.detect(moved)


def _keyframe(
    name: str, time: float, classes: int, reader: VideoReader, detector: PersonDetector | None
) -> KeyframeFacts:
    nobody = np.zeros((0, 4), np.float32)
    empty = KeyframeFacts(name, time, time, nobody, np.zeros((0, classes), np.float32), np.zeros(0, np.int64))
    if detector is None:
        return empty
    persons = detector(reader.frames([int(reader.indices_at(time))])[0])
    return replace(empty, detected=persons.boxes, detected_scores=persons.scores)


def _sightings(
    found: list[Detections], tracks: list[list[int]], names: list[str], shown: int
) -> Iterator[Sighting]:
    for keyframe, numbers in zip(found, tracks, strict=True):
        for box, scores, track in zip(keyframe.boxes.tolist(), keyframe.scores, numbers, strict=True):
            yield Sighting(keyframe.time, track, (box[0], box[1], box[2], box[3]), _lines(scores, names, shown))


def _lines(scores: npt.NDArray[np.float32], names: list[str], shown: int) -> tuple[str, ...]:
    best = np.argsort(-scores, kind="stable")[:shown].tolist()
    return tuple(f"{names[number]} {scores[number]:.2f}" for number in best if scores[number] >= ACTION_SCORE)


def _summary(sightings: list[Sighting]) -> Iterator[str]:
    """Tell of each keyframe who does what."""
    for one in sightings:
        yield f"  {one.time_s:7.2f} s  person {one.track + 1}: {', '.join(one.lines) or 'nothing that is known'}"


def _write_table(found: list[Detections], actions: ActionList, path: Path) -> None:
    """Write what was detected as a test does, ids of actions as in the annotation.

    Raises:
        DataError: the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_detections(found, actions, path)
    except OSError as error:
        raise DataError(f"{path}: the table can't be written ({error})") from error

"""The facts of a keyframe, as `launch/pack.py --task detection` writes them to `boxes.json`."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.decoders import VideoReader, open_video
from pretrain.data.members import Members
from pretrain.errors import SampleError

#: Coordinates are written with few decimals; beyond this a box does not belong to the picture.
TOLERANCE = 1e-3


def _none() -> npt.NDArray[np.float32]:
    return np.zeros((0, 4), np.float32)


@dataclass(frozen=True)
class KeyframeFacts:
    """Persons of one picture of a video.

    Attributes:
        video: name in the annotation.
        time: in the annotation: seconds, or a frame's number.
        seconds: from the segment's start to the keyframe.
        boxes: of annotated persons, shares of width and height, float32 [n, 4].
        labels: 1 for each action of each person, float32 [n, K].
        persons: numbers of tracks, -1 for none, int64 [n].
        detected: boxes of a person detector, float32 [m, 4].
        detected_scores: float32 [m].
        annotated: the annotation lists the keyframe, maybe with nobody on it; else only a detector's boxes do.
    """

    video: str
    time: float
    seconds: float
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.float32]
    persons: npt.NDArray[np.int64]
    detected: npt.NDArray[np.float32] = field(default_factory=_none)
    detected_scores: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    annotated: bool = True

    def __str__(self) -> str:
        return f"keyframe {self.video},{time_text(self.time)}"

    def take(self, rows: npt.NDArray[np.int64]) -> "KeyframeFacts":
        """Return it with some of its annotated persons."""
        return replace(self, boxes=self.boxes[rows], labels=self.labels[rows], persons=self.persons[rows])


def time_text(time: float) -> str:
    """Write a keyframe's time as annotations do, to a millionth: six digits in all would shift 1234.567 s."""
    return f"{time:.6f}".rstrip("0").rstrip(".")


def read_keyframe(members: Members, classes: int) -> KeyframeFacts:
    """Read and check a sample's `boxes.json`.

    Args:
        members: of the sample.
        classes: actions that labels are among, K.

    Raises:
        SampleError: "index" without it; "boxes" for a missing or wrong entry, or a box outside of the frame; "label"
            for a label that is no class.
    """
    facts = members.boxes()
    if not isinstance(facts, dict):
        raise SampleError("boxes", f"boxes.json holds {type(facts).__name__}, an object is allowed")
    try:
        video, time, seconds = str(facts["video"]), float(facts["time"]), float(facts["keyframe_s"])
        persons, found = list(facts["persons"]), list(facts.get("detections") or [])
        where = f"keyframe {video},{time_text(time)}"
        boxes = _boxes([one["box"] for one in persons], f"{where}, persons")
        detected = _boxes([one["box"] for one in found], f"{where}, detections")
        scores = np.array([float(one["score"]) for one in found], np.float32)
        numbers = [-1 if one.get("person") is None else int(one["person"]) for one in persons]
        # Without the entry nothing tells a keyframe that was looked at and found empty from one of a detector alone.
        annotated = _truth_value(facts.get("annotated", bool(persons)), where)
        named = [[_label(label, classes, where) for label in one.get("labels") or []] for one in persons]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SampleError("boxes", f"boxes.json has no usable entry ({error!r}); pack the data again") from error
    if not np.isfinite((seconds, *scores)).all() or seconds < 0:
        raise SampleError("boxes", f"{where}: keyframe_s={seconds:g} or a score is no finite number from 0 on")
    labels = np.zeros((len(persons), classes), np.float32)
    for row, ones in enumerate(named):
        labels[row, ones] = 1
    return KeyframeFacts(video, time, seconds, boxes, labels, np.array(numbers, np.int64), detected, scores, annotated)


def check_keyframe(members: Members, classes: int) -> None:
    """Read a sample's boxes as training does, and hold the keyframe against the video.

    Args:
        members: of the sample.
        classes: actions that labels are among, K.

    Raises:
        SampleError: what `read_keyframe` and `require_in_video` say, with the name of the member.
    """
    with open_video(members.footage(), "pyav", members.stamps) as reader:
        try:
            require_in_video(read_keyframe(members, classes), reader)
        except SampleError as error:
            told = str(error).removeprefix(f"{error.reason}: ")
            member = "boxes.json" if "boxes.json" in members.files else "json"
            raise SampleError(error.reason, told if member in told else f"{member}: {told}") from error


def require_in_video(keyframe: KeyframeFacts, reader: VideoReader) -> None:
    """Raise SampleError "keyframe" where a keyframe lies behind the end of its segment of video."""
    if keyframe.seconds > reader.duration:
        raise SampleError(
            "keyframe", f"{keyframe}: {keyframe.seconds:g} s into a video of {reader.duration:.3f} s; pack it again"
        )


def _truth_value(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise SampleError("boxes", f"{where}: annotated {value!r}, allowed: true, false")
    return value


def _label(value: Any, classes: int, where: str) -> int:
    # Not isinstance: a json's true would pass for class 1.
    if type(value) is not int or not 0 <= value < classes:
        raise SampleError("label", f"{where}: label {value!r}, allowed: outputs 0 to {classes - 1} (model.classes)")
    return value


def _boxes(values: list[Any], where: str) -> npt.NDArray[np.float32]:
    boxes = np.array(values, np.float64).reshape(len(values), 4)
    inside = ((boxes >= -TOLERANCE) & (boxes <= 1 + TOLERANCE)).all(1) & (boxes[:, :2] < boxes[:, 2:]).all(1)
    if not inside.all():  # NaN is not inside either
        wrong = boxes[int(np.argmin(inside))].tolist()
        raise SampleError("boxes", f"{where}: box {wrong}, allowed: x1 < x2, y1 < y2, shares of the frame from 0 to 1")
    return np.clip(boxes, 0, 1).astype(np.float32)

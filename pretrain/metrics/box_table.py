"""Boxes with labels and scores as columns, which is what metrics of detection take."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.errors import DataError
from pretrain.metrics.overlap import BoolArray, FloatArray, IntArray

#: One for each row: names, tuples of video and second, or numbers.
Keyframes = Sequence[Hashable] | NDArray[Any]


@dataclass(frozen=True)
class BoxTable:
    """One row a box and label.

    Attributes:
        keyframes: of each row: codes int64 [N], or any keys that can be told apart (names, tuples of video and second).
        boxes: float64 [N, 4], xyxy; shares of the frame for AVA's variants, pixels for those with inclusive sides.
        labels: int64 [N], output indices or ids, as the caller likes; `classes` of a metric are in the same.
        scores: float64 [N]; ones where left out, as for true boxes.

    Raises:
        DataError: lengths differ, or a number is not finite: a NaN would sort as the best of all.
    """

    keyframes: Keyframes
    boxes: FloatArray
    labels: IntArray
    scores: FloatArray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        boxes = np.asarray(self.boxes, dtype=np.float64).reshape(-1, 4)
        scores = np.ones(len(boxes)) if self.scores is None else np.asarray(self.scores, dtype=np.float64)
        labels = np.asarray(self.labels, dtype=np.int64)
        for name, value in (("boxes", boxes), ("labels", labels), ("scores", scores)):
            object.__setattr__(self, name, value)
            if len(value) != len(self.keyframes):
                raise DataError(f"table of boxes: {len(self.keyframes)} keyframes but {len(value)} {name}")
            if not np.isfinite(value).all():
                row = int(np.argwhere(~np.isfinite(value))[0, 0])
                raise DataError(
                    f"table of boxes: row {row} (keyframe {self.keyframes[row]}) has {name} {value[row]}; all must be "
                    "finite: look for what made it, a network that has diverged or a field that is no number"
                )

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def from_scores(cls, keyframes: Sequence[Hashable], boxes: FloatArray, scores: FloatArray) -> "BoxTable":
        """Make K rows of each box: keyframes [n], boxes [n, 4], scores [n, K]; labels are columns of `scores`."""
        count, classes = np.asarray(scores).shape
        return cls(
            [keyframe for keyframe in keyframes for _ in range(classes)],
            np.repeat(np.asarray(boxes), classes, axis=0),
            np.tile(np.arange(classes), count),
            np.asarray(scores).reshape(-1),
        )

    @classmethod
    def from_labels(cls, keyframes: Sequence[Hashable], boxes: FloatArray, labels: NDArray[Any]) -> "BoxTable":
        """Make a row of each label that a box has: keyframes [n], boxes [n, 4], labels [n, K] of 0 and 1."""
        row, label = np.nonzero(np.asarray(labels))
        return cls([keyframes[one] for one in row.tolist()], np.asarray(boxes)[row], label)


@dataclass(frozen=True)
class CodedBoxes:
    """Rows of a table whose keyframes are numbered from 0, and its labels in any counting from 0.

    Attributes:
        keyframes: int64 [N].
        boxes: float64 [N, 4].
        labels: int64 [N].
        scores: float64 [N].
    """

    keyframes: IntArray
    boxes: FloatArray
    labels: IntArray
    scores: FloatArray

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, which: BoolArray | IntArray) -> "CodedBoxes":
        """Take some rows, in the order given."""
        return CodedBoxes(self.keyframes[which], self.boxes[which], self.labels[which], self.scores[which])

    def groups(self) -> IntArray:
        """Give each pair of keyframe and label a number, int64 [N]."""
        groups: IntArray = self.keyframes * (int(self.labels.max(initial=0)) + 1) + self.labels
        return groups


class KeyframeCodes:
    """Numbers for keyframes, the same for equal ones wherever they stand."""

    def __init__(self) -> None:
        self._codes: dict[Hashable, int] = {}

    def number(self, keyframes: Keyframes) -> IntArray:
        """Number keyframes, int64 [N]; new ones get new numbers."""
        keys = keyframes.tolist() if isinstance(keyframes, np.ndarray) else keyframes
        codes = self._codes
        return np.fromiter((codes.setdefault(key, len(codes)) for key in keys), dtype=np.int64, count=len(keys))

    def table(self, table: BoxTable) -> CodedBoxes:
        """Number the keyframes of a table."""
        return CodedBoxes(self.number(table.keyframes), table.boxes, table.labels, table.scores)

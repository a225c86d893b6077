"""Linking: from tubelets of a detector, or boxes on frames, to tubes.

A *tubelet* is a box on each of K consecutive frames; a detector of frames makes tubelets of length 1. Each video and
class is linked by itself. Source: systems/action_detection.md section 5.3 (ACT's `BuildTubes`, MOC's parameters).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.errors import DataError
from pretrain.metrics.box_table import BoxTable
from pretrain.metrics.overlap import BoolArray, FloatArray, IntArray, best_of_groups, iou_inclusive, soften, suppress
from pretrain.metrics.tubes import Tube, suppress_tubes


@dataclass(frozen=True)
class Linking:
    """Parameters of linking.

    Attributes:
        tubelet_iou: mean IoU above which a tubelet beside a better one of its frame is suppressed.
        soft: a suppressed tubelet stays with score * (1 - IoU).
        top: tubelets of a frame and class that are kept.
        link_iou: overlap from which a tubelet may continue a tube.
        close_after: frames since its last tubelet after which a tube that finds no other is closed; None: the length of
            a tubelet.
        min_score: tubes below are dropped.
        min_length: tubes of fewer frames are dropped.
        tube_iou: IoU in space and time above which a tube beside a better one is dropped.
    """

    tubelet_iou: float = 0.3
    soft: bool = False
    top: int = 10
    link_iou: float = 0.2
    close_after: int | None = 5
    min_score: float = 0.01
    min_length: int = 15
    tube_iou: float = 0.3


LINKINGS = {
    "act": Linking(),
    "moc": Linking(tubelet_iou=0.6, soft=True, link_iou=0.5, close_after=None, min_score=0.005),
}


@dataclass(frozen=True)
class Tubelets:
    """Tubelets of one video.

    Attributes:
        video: name.
        starts: number of the first frame of each, int64 [N].
        boxes: float64 [N, K, 4], xyxy in pixels.
        scores: of each class, float64 [N, L].

    Raises:
        DataError: shapes that differ, or a number that is not finite.
    """

    video: str
    starts: IntArray
    boxes: FloatArray
    scores: FloatArray

    def __post_init__(self) -> None:
        for name, kind in (("starts", np.int64), ("boxes", np.float64), ("scores", np.float64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=kind))
        count = len(self.starts)
        if self.boxes.shape[:1] + self.boxes.shape[2:] != (count, 4) or self.scores.shape[:-1] != (count,):
            raise DataError(
                f"tubelets of {self.video}: found starts {self.starts.shape}, boxes {self.boxes.shape}, scores "
                f"{self.scores.shape}; needed are [N], [N, K, 4] and [N, L]"
            )
        if not (np.isfinite(self.boxes).all() and np.isfinite(self.scores).all()):
            raise DataError(f"tubelets of {self.video}: a box or score is not finite; look for what made it")

    def of_frames(self) -> tuple[IntArray, FloatArray, FloatArray]:
        """Take tubelets apart into frames [N*K], boxes [N*K, 4] and scores [N*K, L]: what frame-mAP is made of."""
        length = self.boxes.shape[1]
        frames: IntArray = (self.starts[:, None] + np.arange(length)).reshape(-1)
        return frames, self.boxes.reshape(-1, 4), np.repeat(self.scores, length, axis=0)


def frame_table(videos: Sequence[Tubelets]) -> BoxTable:
    """Make the table of `frame_map` from tubelets: a row a box and class, keyframes are pairs of video and frame."""
    parts = [(video.video, *video.of_frames()) for video in videos]
    return BoxTable.from_scores(
        [(name, frame) for name, frames, _, _ in parts for frame in frames.tolist()],
        np.concatenate([boxes for _, _, boxes, _ in parts]),
        np.concatenate([scores for _, _, _, scores in parts]),
    )


def link_video(tubelets: Tubelets, linking: Linking = LINKINGS["act"]) -> list[Tube]:
    """Link the tubelets of a video to tubes of every class, and keep the best of those of a class that overlap."""
    return [
        tube
        for label in range(tubelets.scores.shape[1])
        for tube in suppress_tubes(link_class(tubelets, label, linking), linking.tube_iou)
    ]


def link_class(tubelets: Tubelets, label: int, linking: Linking = LINKINGS["act"]) -> list[Tube]:
    """Link the tubelets of a video to tubes of one class, which may still overlap, in the order in which they end."""
    scores = tubelets.scores[:, label]
    order, scores = _best_tubelets(tubelets, scores, linking)
    length = tubelets.boxes.shape[1]
    close_after = length if linking.close_after is None else linking.close_after
    starts, boxes, scores = tubelets.starts[order], tubelets.boxes[order], scores[order]
    opened: list[_Chain] = []
    closed: list[_Chain] = []
    for frame in np.unique(starts).tolist():
        rows = np.flatnonzero(starts == frame)
        opened, ended, free = _continue(opened, frame, boxes[rows], scores[rows], linking.link_iou, close_after)
        closed += ended
        opened += [_Chain([frame], [boxes[row]], [float(scores[row])]) for row in rows[free]]
    tubes = [chain.tube(tubelets.video, label) for chain in closed + opened]
    return [tube for tube in tubes if tube.score >= linking.min_score and len(tube.boxes) >= linking.min_length]


def _best_tubelets(tubelets: Tubelets, scores: FloatArray, linking: Linking) -> tuple[IntArray, FloatArray]:
    """Choose rows by start frame and falling score, and give all rows their scores after suppression."""
    groups, boxes = tubelets.starts, tubelets.boxes
    if linking.soft:
        scores = soften(groups, boxes, scores, linking.tubelet_iou, iou_inclusive)
        kept = np.lexsort((-scores, groups))
    else:
        kept = suppress(groups, boxes, scores, linking.tubelet_iou, iou_inclusive)
    return kept[best_of_groups(groups[kept], scores[kept], linking.top)], scores


@dataclass
class _Chain:
    """Tubelets that were linked so far: start frames, boxes [K, 4], scores."""

    starts: list[int]
    boxes: list[FloatArray]
    scores: list[float]

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)

    def tube(self, video: str, label: int) -> Tube:
        """Average the boxes and scores of the tubelets that cover a frame.

        Frames that none covers, behind a gap longer than a tubelet, lie on the line between their neighbours; ACT's
        code divides by zero there.
        """
        length = len(self.boxes[0])
        frames = np.array(self.starts)[:, None] - self.starts[0] + np.arange(length)
        values = np.concatenate([np.array(self.boxes), np.repeat(self.scores, length).reshape(-1, length, 1)], axis=2)
        sums = np.zeros((frames.max() + 1, 5))
        np.add.at(sums, frames, values)
        covered = np.bincount(frames.reshape(-1), minlength=len(sums))
        there = np.flatnonzero(covered)
        means = sums[there] / covered[there, None]
        rows = np.stack([np.interp(np.arange(len(sums)), there, column) for column in means.T], axis=1)
        return Tube(video, label, self.starts[0], rows[:, :4], self.mean, rows[:, 4])


def _continue(
    chains: list[_Chain], frame: int, boxes: FloatArray, scores: FloatArray, link_iou: float, close_after: int
) -> tuple[list[_Chain], list[_Chain], BoolArray]:
    """Give the tubes that are open their tubelets of a frame, the best tube first.

    Returns:
        Tubes that stay open, tubes that end, and which of the tubelets [rows] nobody took.
    """
    free = np.ones(len(scores), dtype=bool)
    # Frames without a tubelet are not visited: what would have been closed on the one before this must not go on here.
    ended = [chain for chain in chains if frame - 1 - chain.starts[-1] >= close_after]
    chains = [chain for chain in chains if frame - 1 - chain.starts[-1] < close_after]
    if not chains:
        return [], ended, free
    chains = sorted(chains, key=lambda chain: -chain.mean)
    near = _overlaps(chains, frame, boxes) >= link_iou
    stay: list[_Chain] = []
    for chain, candidates in zip(chains, near, strict=True):
        rows = np.flatnonzero(candidates & free)
        if len(rows):
            best = rows[scores[rows].argmax()]
            chain.starts.append(frame)
            chain.boxes.append(boxes[best])
            chain.scores.append(float(scores[best]))
            free[best] = False
        (stay if len(rows) or frame - chain.starts[-1] < close_after else ended).append(chain)
    return stay, ended, free


def _overlaps(chains: Sequence[_Chain], frame: int, boxes: FloatArray) -> FloatArray:
    """Compare the tubelets of a frame [rows, K, 4] with the last one of each tube, on the frames that both have.

    Where they have none, the first box of the one is compared with the last of the other.

    Returns:
        Mean IoU [tubes, rows].
    """
    length = boxes.shape[1]
    offsets = np.array([frame - chain.starts[-1] for chain in chains])
    place = np.minimum(np.arange(length) + offsets[:, None], length - 1)
    last = np.stack([chain.boxes[-1] for chain in chains])[np.arange(len(chains))[:, None], place]
    common = np.maximum(length - offsets, 1)
    counted = np.arange(length) < common[:, None]
    overlaps: FloatArray = (iou_inclusive(boxes, last[:, None]) * counted[:, None]).sum(axis=2) / common[:, None]
    return overlaps

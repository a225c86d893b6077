"""Tubes of one frame, gaps, ties, taken tubes, classes without truth; parameters of linking one by one."""

from dataclasses import replace

import numpy as np
import pytest

from pretrain.errors import DataError
from pretrain.metrics.detection import frame_map
from pretrain.metrics.linking import LINKINGS, Linking, Tubelets, frame_table, link_class, link_video
from pretrain.metrics.tubes import (
    Tube,
    mean_of_splits,
    suppress_tubes,
    tube_iou_continuous,
    tube_iou_inclusive,
    video_map,
)

BOX = [10.0, 10.0, 29.0, 29.0]
FAR = [100.0, 10.0, 119.0, 29.0]
#: Every tube counts, however short; a frame without a tubelet ends one.
SHORT = Linking(min_length=1, close_after=1)


def tube(first: int, frames: int, box: list[float] = BOX, score: float = 1.0, label: int = 0, video: str = "v") -> Tube:
    return Tube(video, label, first, np.tile(box, (frames, 1)), score)


def frames(*rows: tuple[int, list[float], float]) -> Tubelets:
    """Boxes of one class on frames."""
    return Tubelets("v", np.array([row[0] for row in rows]), np.array([[row[1]] for row in rows]),
                    np.array([[row[2]] for row in rows]))  # fmt: skip


def shifted(pixels: float) -> list[float]:
    return [BOX[0] + pixels, BOX[1], BOX[2] + pixels, BOX[3]]


def test_overlap_is_that_of_boxes_times_that_of_times() -> None:
    assert tube_iou_inclusive(tube(1, 10), tube(6, 10)) == pytest.approx(5 / 15)
    assert tube_iou_continuous(tube(1, 10), tube(6, 10)) == pytest.approx(4 / 14)
    half = tube(6, 10, shifted(10))
    assert tube_iou_inclusive(tube(1, 10), half) == pytest.approx(5 / 15 * 10 / 30)
    assert tube_iou_continuous(tube(1, 10), half) == pytest.approx(4 / 14 * 9 / 29)
    assert tube_iou_inclusive(tube(1, 5), tube(6, 5)) == tube_iou_continuous(tube(1, 5), tube(6, 5)) == 0


def test_overlap_of_single_frames() -> None:
    """The continuous length of a frame is none: sharing one counts nothing, and two tubes of one frame are 0/0."""
    assert tube_iou_inclusive(tube(3, 1), tube(3, 1)) == 1
    assert tube_iou_continuous(tube(3, 1), tube(3, 1)) == 0
    assert tube_iou_continuous(tube(1, 3), tube(3, 3)) == 0
    assert tube_iou_inclusive(tube(1, 3), tube(3, 3)) == pytest.approx(1 / 5)


def test_tubes_that_are_none_are_refused() -> None:
    with pytest.raises(DataError, match="tube of label 2 in v from frame 4: 0 boxes"):
        Tube("v", 2, 4, np.zeros((0, 4)))
    with pytest.raises(DataError, match="not finite"):
        tube(1, 3, score=float("nan"))
    with pytest.raises(DataError, match="not finite"):
        tube(1, 3, [0, 0, float("inf"), 1])
    with pytest.raises(DataError, match="3 boxes, 2 scores"):
        Tube("v", 0, 1, np.zeros((3, 4)), 1.0, np.ones(2))


def test_suppression_keeps_the_best_and_the_earlier_of_equals() -> None:
    tubes = [tube(1, 10, score=0.5), tube(1, 10, FAR, 0.4), tube(2, 10, score=0.5), tube(1, 10, shifted(2), 0.9)]
    assert [next(place for place, one in enumerate(tubes) if one is kept) for kept in suppress_tubes(tubes)] == [3, 1]
    kept = suppress_tubes([tubes[0], tubes[2]])
    assert len(kept) == 1 and kept[0] is tubes[0]


def test_video_map_of_a_perfect_answer_and_of_none() -> None:
    truth = [tube(1, 20), tube(1, 20, label=2, video="w")]
    result = video_map(truth, [tube(1, 20, score=0.3), tube(1, 20, label=2, video="w", score=0.9)], range(3))
    assert result.by_threshold == {0.2: 1, 0.5: 1, 0.75: 1}
    assert result.strict == pytest.approx(1)
    assert result.by_class[0.5] == {0: 1, 1: None, 2: 1}
    assert (result.truths, result.detections) == ({0: 1, 1: 0, 2: 1}, {0: 1, 1: 0, 2: 1})
    assert video_map(truth, [], range(3)).by_threshold == {0.2: 0, 0.5: 0, 0.75: 0}


def test_a_tube_of_another_video_or_label_finds_nothing() -> None:
    for other in (tube(1, 20, video="w"), tube(1, 20, label=1)):
        assert video_map([tube(1, 20)], [other], [0, 1]).by_threshold[0.5] == 0


def test_a_tube_that_is_found_is_out_of_the_game_or_keeps_its_rivals() -> None:
    """Both detections lie nearest to the first true tube; the second overlaps the other one by 0.5 as well."""
    truth = [tube(1, 30), tube(1, 30, shifted(5))]
    found = [tube(1, 30, score=0.9), tube(1, 30, shifted(1), 0.8)]
    act = video_map(truth, found, [0]).by_threshold[0.5]
    voc = video_map(truth, found, [0], "voc").by_threshold[0.5]
    assert (act, voc) == (1, 0.5)


def test_video_map_says_what_it_was_not_given() -> None:
    with pytest.raises(DataError, match="found variant 'coco', allowed: act, voc"):
        video_map([tube(1, 20)], [], [0], "coco")
    with pytest.raises(DataError, match="none of 1 true tubes is of the 2 evaluated labels"):
        video_map([tube(1, 20, label=7)], [], [0, 1])


def test_mean_of_splits() -> None:
    assert mean_of_splits([{0.2: 0.5, 0.5: 0.1}, {0.2: 0.7, 0.5: 0.3}]) == pytest.approx({0.2: 0.6, 0.5: 0.2})
    with pytest.raises(DataError, match="mean of splits"):
        mean_of_splits([{0.2: 0.5}, {0.5: 0.1}])
    with pytest.raises(DataError, match="mean of splits"):
        mean_of_splits([])


def test_tubelets_of_wrong_shapes_or_numbers_are_refused() -> None:
    with pytest.raises(DataError, match=r"boxes \(2, 4\)"):
        Tubelets("v", np.array([1, 2]), np.zeros((2, 4)), np.zeros((2, 3)))
    with pytest.raises(DataError, match="not finite"):
        frames((1, BOX, float("nan")))


def test_boxes_become_a_tube() -> None:
    tubes = link_class(frames(*((frame, shifted(frame), 0.1 * frame) for frame in range(1, 5))), 0, SHORT)
    assert len(tubes) == 1
    assert (tubes[0].first, tubes[0].last) == (1, 4)
    assert tubes[0].score == pytest.approx(0.25)
    assert tubes[0].frame_scores == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert tubes[0].boxes.tolist() == [shifted(frame) for frame in range(1, 5)]


def test_a_tube_takes_the_candidate_of_the_highest_score_not_of_the_best_overlap() -> None:
    rows = [(1, BOX, 0.5), (2, BOX, 0.5), (2, shifted(12), 0.8)]
    best = max(link_class(frames(*rows), 0, SHORT), key=lambda one: len(one.boxes))
    assert best.boxes.tolist() == [BOX, shifted(12)]
    # Below the overlap that is asked for it is no candidate.
    best = max(link_class(frames(*rows), 0, replace(SHORT, link_iou=0.5)), key=lambda one: len(one.boxes))
    assert best.boxes.tolist() == [BOX, BOX]


def test_the_better_tube_chooses_first() -> None:
    rows = [(1, BOX, 0.2), (1, shifted(12), 0.9), (2, shifted(6), 0.6)]
    longest = max(link_class(frames(*rows), 0, SHORT), key=lambda one: len(one.boxes))
    assert longest.boxes.tolist() == [shifted(12), shifted(6)]


@pytest.mark.parametrize(("close_after", "pieces"), [(1, 2), (2, 2), (3, 1)])
def test_a_gap_ends_a_tube_or_is_filled(close_after: int, pieces: int) -> None:
    """Nothing at all is found on frames 3 and 4."""
    rows = [(1, BOX, 0.5), (2, BOX, 0.5), (5, shifted(3), 0.8), (6, shifted(3), 0.8)]
    tubes = link_class(frames(*rows), 0, replace(SHORT, close_after=close_after))
    assert len(tubes) == pieces
    if pieces == 1:
        assert tubes[0].boxes[:, 0] == pytest.approx([10, 10, 11, 12, 13, 13])
        assert tubes[0].frame_scores == pytest.approx([0.5, 0.5, 0.6, 0.7, 0.8, 0.8])
        assert tubes[0].score == pytest.approx(0.65)


@pytest.mark.parametrize(("close_after", "pieces"), [(1, 2), (3, 1)])
def test_a_gap_with_other_boxes_on_it(close_after: int, pieces: int) -> None:
    rows = [(1, BOX, 0.5), (2, FAR, 0.5), (3, FAR, 0.5), (4, BOX, 0.5)]
    tubes = link_class(frames(*rows), 0, replace(SHORT, close_after=close_after))
    assert sum(one.boxes[0].tolist() == BOX for one in tubes) == pieces


def test_tubelets_are_averaged_on_frames_that_they_share() -> None:
    boxes = np.array([[BOX, BOX, BOX], [shifted(2)] * 3])
    linking = replace(SHORT, close_after=None)
    tubes = link_class(Tubelets("v", np.array([1, 3]), boxes, np.array([[0.2], [0.6]])), 0, linking)
    assert len(tubes) == 1
    assert tubes[0].boxes[:, 0] == pytest.approx([10, 10, 11, 12, 12])
    assert tubes[0].frame_scores == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.6])
    assert tubes[0].score == pytest.approx(0.4)


def test_tubelets_are_compared_on_the_frames_that_both_have() -> None:
    """The second goes on where the first has gone; compared with where that began, they would not meet."""
    first = [BOX, shifted(20), shifted(40)]
    second = [shifted(20), shifted(40), shifted(60)]
    tubes = link_class(Tubelets("v", np.array([1, 2]), np.array([first, second]), np.full((2, 1), 0.5)), 0, SHORT)
    assert [len(one.boxes) for one in tubes] == [4]
    # Behind the end of the first, its last box is compared with the first of the second.
    third = [shifted(42), shifted(80), shifted(120)]
    tubes = link_class(Tubelets("v", np.array([1, 4]), np.array([first, third]), np.full((2, 1), 0.5)), 0,
                       replace(SHORT, close_after=3, link_iou=0.5))  # fmt: skip
    assert [len(one.boxes) for one in tubes] == [6]


def test_suppression_of_tubelets_hard_and_soft() -> None:
    rows = frames((1, BOX, 0.9), (1, shifted(4), 0.8), (1, FAR, 0.7))
    # Of 20 pixels moved by 4, 16 of 24 are shared.
    assert sorted(one.score for one in link_class(rows, 0, SHORT)) == pytest.approx([0.7, 0.9])
    soft = replace(SHORT, soft=True, tubelet_iou=0.6)
    assert sorted(one.score for one in link_class(rows, 0, soft)) == pytest.approx([0.8 * (1 - 16 / 24), 0.7, 0.9])
    # The best are chosen by their lowered scores.
    assert sorted(one.score for one in link_class(rows, 0, replace(soft, top=2))) == pytest.approx([0.7, 0.9])


def test_short_and_weak_tubes_are_dropped() -> None:
    rows = frames(*((frame, BOX, 0.02) for frame in range(1, 16)), *((frame, FAR, 0.009) for frame in range(1, 16)))
    assert [one.boxes[0].tolist() for one in link_class(rows, 0)] == [BOX]
    assert link_class(rows, 0, replace(LINKINGS["act"], min_length=16)) == []
    assert len(link_class(rows, 0, replace(LINKINGS["act"], min_score=0.001))) == 2
    # MOC's threshold lies lower.
    assert len(link_class(rows, 0, LINKINGS["moc"])) == 2


def test_a_video_from_tubelets_to_both_numbers() -> None:
    """Every class is linked, and what is left of each is suppressed."""
    starts = np.repeat(np.arange(1, 21), 2)
    boxes = np.tile(np.array([[BOX], [shifted(14)]]), (20, 1, 1))
    scores = np.tile([[0.9, 0.1], [0.2, 0.7]], (20, 1))
    video = Tubelets("v", starts, boxes, scores)
    tubes = link_video(video)
    assert {(one.label, one.score > 0.5) for one in tubes} >= {(0, True), (1, True)}
    truth = [tube(1, 20), tube(1, 20, shifted(14), label=1)]
    assert video_map(truth, tubes, [0, 1]).by_threshold[0.75] == 1
    table = frame_table([video])
    true = frame_table([Tubelets("v", starts, boxes, np.tile([[1.0, 0.0], [0.0, 1.0]], (20, 1)))])
    own = true.scores > 0
    true = type(true)([key for key, keep in zip(true.keyframes, own, strict=True) if keep], true.boxes[own],
                      true.labels[own])  # fmt: skip
    assert frame_map(true, table, [0, 1], "act").mean == pytest.approx(1)


def test_a_video_without_detections_has_no_tubes() -> None:
    assert link_video(Tubelets("v", np.zeros(0), np.zeros((0, 6, 4)), np.zeros((0, 24)))) == []

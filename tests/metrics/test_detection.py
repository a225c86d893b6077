"""Frame-mAP on what goes wrong: ties, taken boxes, empty keyframes, classes without truth, numbers that are none."""

from typing import Any

import numpy as np
import pytest

from pretrain.errors import DataError
from pretrain.metrics.average_precision import envelope_area, trapezoid_area
from pretrain.metrics.detection import (
    PROTOCOLS,
    BoxTable,
    frame_map,
    person_precision,
    strict_precision,
    suppressed,
)
from pretrain.metrics.matching import Matching
from pretrain.metrics.overlap import best_of_groups, iou_continuous, iou_inclusive, soften, suppress

#: IoU of LEFT and MIDDLE is 0.5, of LEFT and RIGHT 0.
LEFT, MIDDLE, RIGHT = [0.0, 0.0, 0.3, 1.0], [0.1, 0.0, 0.4, 1.0], [0.6, 0.0, 0.9, 1.0]
AVA = ["activitynet", "slowfast", "alphaction"]


def table(*rows: tuple[Any, list[float], int] | tuple[Any, list[float], int, float]) -> BoxTable:
    scores = np.array([row[3] for row in rows]) if rows and len(rows[0]) == 4 else None
    return BoxTable([row[0] for row in rows], np.array([row[1] for row in rows]), np.array([row[2] for row in rows]),
                    scores)  # fmt: skip


@pytest.mark.parametrize("variant", AVA)
def test_a_perfect_answer(variant: str) -> None:
    truth = table(("a", LEFT, 0), ("a", RIGHT, 0), ("b", MIDDLE, 2))
    result = frame_map(
        truth, table(("a", LEFT, 0, 0.9), ("a", RIGHT, 0, 0.2), ("b", MIDDLE, 2, 0.4)), range(3), variant
    )
    assert result.mean == 1
    assert result.by_class == {0: 1, 1: None, 2: 1}
    assert result.truths == {0: 2, 1: 0, 2: 1}
    assert result.detections == {0: 2, 1: 0, 2: 1}


def test_a_class_with_truth_and_no_detection_counts_as_zero() -> None:
    truth = table(("a", LEFT, 0), ("a", LEFT, 1))
    assert frame_map(truth, table(("a", LEFT, 0, 0.9)), [0, 1]).by_class == {0: 1, 1: 0}
    assert frame_map(truth, table(), [0, 1]).mean == 0


def test_no_truth_of_an_evaluated_class_is_refused() -> None:
    with pytest.raises(DataError, match="none of 1 rows of truth is of an evaluated class"):
        frame_map(table(("a", LEFT, 80)), table(("a", LEFT, 80, 0.5)), range(80))


def test_the_best_box_is_chosen_before_it_is_looked_up_whether_it_is_taken() -> None:
    """The second overlaps RIGHT's neighbour best, which is taken, and the free one by 0.5 as well: still wrong."""
    truth = table(("a", LEFT, 0), ("a", MIDDLE, 0))
    # Both lie nearest to LEFT; 0.02 to the right the overlap with MIDDLE is 0.58.
    rows = table(("a", LEFT, 0, 0.9), ("a", [0.02, 0, 0.32, 1], 0, 0.8))
    for variant in [*AVA, "voc"]:
        assert frame_map(truth, rows, [0], variant).mean == pytest.approx(0.5)
    pixels = [BoxTable(one.keyframes, one.boxes * 1000, one.labels, one.scores) for one in (truth, rows)]
    # ACT takes what it has found out of the game (suppression would drop the second: it is asked about matching alone).
    groups = np.zeros(2, dtype=np.int64)
    matching = Matching.of_boxes(groups, pixels[1].boxes, groups, pixels[0].boxes, iou_inclusive)
    assert matching.hits_by_free(0.5).tolist() == [True, True]
    assert matching.hits_by_best(0.5).tolist() == [True, False]


def test_the_first_of_equal_boxes_is_the_best() -> None:
    """Two true boxes are the same: the second detection finds the first of them again."""
    truth, rows = table(("a", LEFT, 0), ("a", LEFT, 0)), table(("a", LEFT, 0, 0.9), ("a", LEFT, 0, 0.8))
    assert frame_map(truth, rows, [0]).mean == 0.5


def test_overlap_of_exactly_the_threshold_finds() -> None:
    boxes = [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.5]]
    assert frame_map(table(("a", boxes[0], 0)), table(("a", boxes[1], 0, 0.9)), [0]).mean == 1
    assert frame_map(table(("a", boxes[0], 0)), table(("a", boxes[1], 0, 0.9)), [0], thresholds=[0.5001]).mean == 0


def test_rows_of_a_keyframe_are_matched_as_they_stand_or_by_score() -> None:
    """Worse score first in the file: SlowFast gives it the true box, so that the better one is the wrong one."""
    truth, rows = table(("a", LEFT, 0)), table(("a", LEFT, 0, 0.2), ("a", LEFT, 0, 0.9))
    assert frame_map(truth, rows, [0], "slowfast").mean == 0.5
    assert frame_map(truth, rows, [0], "alphaction").mean == 1
    assert frame_map(truth, rows, [0], "activitynet").mean == 1


def test_equal_scores_count_in_the_order_of_rows() -> None:
    truth = table(("a", LEFT, 0), ("b", LEFT, 0))
    right, wrong = ("a", LEFT, 0, 0.5), ("b", RIGHT, 0, 0.5)
    assert frame_map(truth, table(right, wrong), [0]).mean == 0.5
    assert frame_map(truth, table(wrong, right), [0]).mean == 0.25
    # The same with many, where an unstable sort would mix them.
    keys = [f"k{number}" for number in range(400)]
    half = table(*((key, LEFT if number < 200 else RIGHT, 0, 0.5) for number, key in enumerate(keys)))
    assert frame_map(table(*((key, LEFT, 0) for key in keys)), half, [0]).mean == 0.5


def test_the_official_cap_is_over_all_evaluated_classes_and_before_boxes_without_area_go() -> None:
    truth = table(("a", LEFT, 0))
    better = [("a", RIGHT, 1, 0.9)] * 25 + [("a", [0.5, 0.5, 0.5, 0.5], 0, 0.9)] * 25
    result = frame_map(truth, table(*better, ("a", LEFT, 0, 0.1)), [0, 1])
    assert result.mean == 0
    assert result.counts["detection_rows_over_the_cap"] == 1
    assert result.counts["detection_rows_without_area"] == 25
    assert frame_map(truth, table(*better[1:], ("a", LEFT, 0, 0.1)), [0, 1]).mean == 1
    # Rows of classes that are not evaluated take no place.
    assert frame_map(truth, table(*better, ("a", LEFT, 0, 0.1)), [0]).mean == 1
    assert frame_map(truth, table(*better, ("a", LEFT, 0, 0.1)), [0, 1], "alphaction").mean == 1


@pytest.mark.parametrize(("variant", "mean"), [("activitynet", 1.0), ("slowfast", 0.5), ("alphaction", 0.5)])
def test_keyframes_that_the_truth_does_not_list(variant: str, mean: float) -> None:
    truth, rows = table(("a", LEFT, 0)), table(("b", LEFT, 0, 0.9), ("a", LEFT, 0, 0.8))
    result = frame_map(truth, rows, [0], variant)
    assert result.mean == mean
    assert (result.counts["detection_keyframes_unlisted"], result.counts["detection_rows_unlisted"]) == (1, 1)
    # Listed as empty, or with a row of another class, it was looked at: the row there is wrong in every variant.
    assert frame_map(truth, rows, [0], variant, listed=["b"]).mean == 0.5
    other = table(("a", LEFT, 0), ("b", LEFT, 7))
    assert frame_map(other, rows, [0], variant).mean == 0.5


def test_excluded_keyframes() -> None:
    truth = table(("a", LEFT, 0), ("b", LEFT, 0))
    rows = table(("b", RIGHT, 0, 0.9), ("a", LEFT, 0, 0.8))
    result = frame_map(truth, rows, [0], "slowfast", excluded=["b", "unknown"])
    assert result.mean == 1
    assert (result.counts["truth_rows_excluded"], result.counts["detection_rows_excluded"]) == (1, 1)
    with pytest.raises(DataError, match="activitynet knows no excluded keyframes, found 1.*slowfast, alphaction"):
        frame_map(truth, rows, [0], excluded=["b"])


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(DataError, match="found variant 'kinetics', allowed: activitynet, slowfast"):
        frame_map(table(("a", LEFT, 0)), table(), [0], "kinetics")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(DataError, match=r"row 1 \(keyframe b\) has scores"):
        table(("a", LEFT, 0, 0.5), ("b", LEFT, 0, value))
    with pytest.raises(DataError, match=r"row 0 \(keyframe a\) has boxes"):
        table(("a", [0.0, 0.0, value, 1.0], 0, 0.5))


def test_columns_of_other_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="2 keyframes but 1 boxes"):
        BoxTable(["a", "b"], np.zeros((1, 4)), np.zeros(2, dtype=np.int64))


def test_keyframes_may_be_codes_names_or_pairs() -> None:
    truth, rows = table((7, LEFT, 0), (9, LEFT, 0)), table((9, LEFT, 0, 0.9), (8, LEFT, 0, 0.95))
    codes = BoxTable(np.array([9, 8]), rows.boxes, rows.labels, rows.scores)
    pairs = [BoxTable([("v", float(one)) for one in two.keyframes], two.boxes, two.labels, two.scores)
             for two in (truth, rows)]  # fmt: skip
    means = [frame_map(*two, [0], "alphaction").mean for two in ((truth, rows), (truth, codes), pairs)]
    assert means == [means[0]] * 3


def test_tables_from_scores_and_from_labels() -> None:
    boxes = np.array([LEFT, RIGHT])
    truth = BoxTable.from_labels(["a", "b"], boxes, np.array([[1, 0, 1], [0, 0, 0]]))
    assert (list(truth.keyframes), truth.labels.tolist()) == (["a", "a"], [0, 2])
    rows = BoxTable.from_scores(["a", "b"], boxes, np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]))
    assert list(rows.keyframes) == ["a"] * 3 + ["b"] * 3
    assert rows.labels.tolist() == [0, 1, 2] * 2
    assert rows.scores.tolist() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert rows.boxes.tolist() == [LEFT] * 3 + [RIGHT] * 3


def test_sides_of_the_two_conventions() -> None:
    one, other = np.array([0.0, 0.0, 9.0, 9.0]), np.array([5.0, 0.0, 14.0, 9.0])
    assert iou_inclusive(one, other) == pytest.approx(50 / 150)
    assert iou_continuous(one, other) == pytest.approx(36 / 126)
    # One pixel wide, the inclusive box has an area; two continuous ones without area have none to share.
    point = np.array([3.0, 3.0, 3.0, 3.0])
    assert (iou_inclusive(point, point), iou_continuous(point, point)) == (1, 0)


def test_areas_under_the_curve() -> None:
    hits = np.array([False, True, True, False])
    assert envelope_area(hits, 4) == pytest.approx(2 / 4 * 2 / 3)
    assert trapezoid_area(hits, 4) == pytest.approx(1 / 4 * (0 + 1 / 2) / 2 + 1 / 4 * (1 / 2 + 2 / 3) / 2)
    nothing = np.zeros(0, dtype=bool)
    assert (envelope_area(nothing, 3), trapezoid_area(nothing, 3)) == (0, 0)


def test_suppression_compares_with_what_is_kept_inside_a_group() -> None:
    boxes = np.array([[0, 0, 9, 9], [4, 0, 13, 9], [8, 0, 17, 9], [0, 0, 9, 9]], dtype=float)
    scores, groups = np.array([0.9, 0.8, 0.7, 0.1]), np.array([0, 0, 0, 1])
    # The second goes with the first, so the third, which only the second overlaps, stays; the fourth is elsewhere.
    assert suppress(groups, boxes, scores, 0.3, iou_inclusive).tolist() == [0, 2, 3]
    # Exactly the threshold stays.
    assert suppress(groups, boxes, scores, 60 / 140, iou_inclusive).tolist() == [0, 1, 2, 3]
    assert soften(groups, boxes, scores, 0.3, iou_inclusive) == pytest.approx([0.9, 0.8 * (1 - 60 / 140), 0.7, 0.1])


def test_the_best_of_groups_prefer_the_earlier_of_equals() -> None:
    best = best_of_groups(np.array([1, 0, 1, 1, 0]), np.array([0.5, 0.1, 0.9, 0.5, 0.1]), 2)
    assert best.tolist() == [True, True, True, False, True]


def test_frames_without_truth_are_left_out_where_the_variant_says_so() -> None:
    box = [10.0, 10.0, 50.0, 50.0]
    truth, rows = table((0, box, 0)), table((1, box, 0, 0.9), (0, box, 0, 0.8))
    assert frame_map(truth, rows, [0], "act").mean == pytest.approx((1 / 2 + 0) / 2)
    assert frame_map(truth, rows, [0], "annotated").mean == 1
    assert frame_map(truth, rows, [0], "voc").mean == 0.5


def test_suppression_of_a_table_hard_and_soft() -> None:
    near = [[0.0, 0.0, 9.0, 9.0], [1.0, 0.0, 10.0, 9.0]]
    rows = BoxTable(np.array([3, 3, 3]), np.array([near[1], near[0], near[0]]), np.array([0, 0, 1]),
                    np.array([0.5, 0.9, 0.1]))  # fmt: skip
    assert suppressed(rows).scores.tolist() == [0.9, 0.1]
    assert suppressed(rows, 0.6, soft=True).scores == pytest.approx([0.5 * (1 - 90 / 110), 0.9, 0.1])


def plain_hits(groups: Any, boxes: Any, true_groups: Any, true_boxes: Any, threshold: float, free: bool) -> list[bool]:
    """The rules of sections 4 and 5.2 word by word."""
    taken: set[int] = set()
    hits = []
    for group, box in zip(groups, boxes, strict=True):
        there = [i for i in range(len(true_groups)) if true_groups[i] == group and not (free and i in taken)]
        overlaps = [float(iou_continuous(box, true_boxes[i])) for i in there]
        best = there[int(np.argmax(overlaps))] if there else -1
        hit = bool(there) and max(overlaps) >= threshold and best not in taken
        hits.append(hit)
        taken |= {best} if hit else set()
    return hits


@pytest.mark.parametrize("seed", range(8))
def test_matching_beside_the_rules_word_by_word(seed: int) -> None:
    """Coordinates on a coarse grid, so that overlaps tie, touch the threshold and vanish."""
    random = np.random.default_rng(seed)
    groups, true_groups = random.integers(0, 5, 80), random.integers(0, 6, 20)
    corners = [random.integers(0, 4, (count, 2)) for count in (80, 20)]
    boxes, true_boxes = [
        np.concatenate([low, low + random.integers(1, 5, low.shape)], 1).astype(float) for low in corners
    ]
    matching = Matching.of_boxes(groups, boxes, true_groups, true_boxes, iou_continuous)
    for threshold in (0.25, 0.5, 0.75):
        plain = [plain_hits(groups, boxes, true_groups, true_boxes, threshold, free) for free in (False, True)]
        assert matching.hits_by_best(threshold).tolist() == plain[0]
        assert matching.hits_by_free(threshold).tolist() == plain[1]


def test_strict_numbers_are_means_over_thresholds() -> None:
    truth, rows = table(("a", LEFT, 0)), table(("a", [0.0, 0.0, 0.3, 0.78], 0, 0.9))
    result = strict_precision(truth, rows, [0])
    # 0.78 is above 0.50, 0.55, 0.60, 0.65, 0.70 and 0.75.
    assert result == pytest.approx({"AP": 60, "AP50": 100, "AP75": 100})


def test_a_variant_says_what_it_does() -> None:
    assert {name for name, protocol in PROTOCOLS.items() if protocol.exclusions} == set(PROTOCOLS) - {"activitynet"}


def persons() -> tuple[BoxTable, BoxTable]:
    """Twenty keyframes: true boxes of up to five persons, boxes near them, and others, more than 100 on some."""
    rng = np.random.default_rng(0)
    true: list[tuple[int, Any]] = []
    found: list[tuple[int, Any, float]] = []
    for image in range(20):
        for _ in range(rng.integers(0, 6)):
            x, y, w, h = rng.uniform(0.05, 0.4, 4)
            box = np.array([x, y, x + w, y + h])
            true.append((image, box))
            for _ in range(rng.integers(0, 4)):
                near = box + rng.normal(0, 0.02, 4)
                found.append((image, near, rng.uniform()))
    for image in range(20):
        for _ in range(40 if image % 7 else 120):
            x, y, w, h = rng.uniform(0.05, 0.4, 4)
            found.append((image, [x, y, x + w, y + h], rng.uniform() * 0.6))
    return table(*((*one, 0) for one in true)), table(*((*one[:2], 0, one[2]) for one in found))


def test_persons_are_counted_as_coco_does() -> None:
    """Numbers of pycocotools 2.0.11 on the same boxes."""
    truth, found = persons()
    result = person_precision(truth, found, listed=list(range(20)))
    values = list(result.by_threshold.values())
    assert [result.mean, values[0], values[5]] == pytest.approx(
        [0.17419266428551927, 0.3899288909913854, 0.13136993596783844], abs=1e-12
    )
    assert result.counts["detection_rows_over_the_cap"] > 0


def test_a_person_is_one_box_whatever_it_does() -> None:
    """Rows of several labels neither count as several persons nor as false alarms; what is not listed is left out."""
    truth = table(("a", LEFT, 3), ("a", LEFT, 7), ("b", RIGHT, 3))
    rows = [("a", LEFT, 3, 0.2), ("a", LEFT, 7, 0.9), ("b", RIGHT, 1, 0.8), ("c", RIGHT, 1, 0.95)]
    found = person_precision(truth, table(*rows))
    assert found.mean == 1 and found.truths == found.detections == {0: 2}
    # On a listed keyframe with nobody on it the surest row is wrong; a row per label would have had 0.2.
    assert person_precision(truth, table(*rows), listed=["c"]).mean == pytest.approx(2 / 3)

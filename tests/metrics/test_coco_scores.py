"""COCO's scores by boxes and masks: the numbers of pycocotools 2.0.11, crowds, caps, pictures dealt out in any way."""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from pretrain.data.instance_masks import mask_of, packed_runs, runs_of
from pretrain.metrics.coco_scores import (
    PictureMatches,
    TrueObjects,
    best_of_classes,
    box_overlaps,
    coco_scores,
    mask_overlaps,
    match_picture,
)

CLASSES, HEIGHT, WIDTH = 3, 120, 150


@dataclass(frozen=True)
class Thing:
    """One object, there or found: class, box xyxy, mask, score or crowd."""

    label: int
    box: list[float]
    mask: Any
    score: float = 0.0
    crowd: bool = False


def around(corners: Any) -> list[float]:
    x, y = corners[0::2], corners[1::2]
    return [float(value) for value in (min(x), min(y), max(x), max(y))]


def pictures() -> list[tuple[list[Thing], list[Thing]]]:
    """24 pictures with objects of three sizes, some crowds, and what a careless detector finds, with equal scores;
    in the third it finds more than are looked at."""
    rng = np.random.default_rng(1)

    def polygon(x: float, y: float, radius: float) -> Any:
        turns = np.sort(rng.uniform(0, 2 * np.pi, 8))
        return np.stack([x + radius * np.cos(turns), y + radius * np.sin(turns)], 1).reshape(-1).round(2)

    def thing(corners: Any, label: int, **more: Any) -> Thing:
        return Thing(label, around(corners), mask_of([corners.tolist()], HEIGHT, WIDTH), **more)

    found = []
    for number in range(24):
        true, seen = [], []
        for _ in range(rng.integers(0, 6)):
            x, y = rng.uniform(5, WIDTH - 5), rng.uniform(5, HEIGHT - 5)
            radius, label = rng.choice([5, 20, 90]), int(rng.integers(CLASSES))
            corners = polygon(x, y, radius)
            true.append(thing(corners, label, crowd=bool(rng.random() < 0.15)))
            for _ in range(rng.integers(0, 4)):
                near = (corners + rng.normal(0, radius / 12, len(corners))).round(2)
                other = label if rng.random() < 0.8 else int(rng.integers(CLASSES))
                seen.append(thing(near, other, score=float(rng.integers(20) / 20)))
        for _ in range(130 if number == 2 else 2):
            corners = polygon(rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), rng.choice([5, 20]))
            seen.append(thing(corners, 0, score=float(rng.integers(20) / 20)))
        found.append((true, seen))
    return found


def matched(true: list[Thing], seen: list[Thing], masks: bool) -> PictureMatches:
    labels = np.array([one.label for one in seen], np.int64)
    scores = np.array([one.score for one in seen], np.float64)
    rows, places = best_of_classes(labels, scores)
    facts = TrueObjects(
        np.array([one.label for one in true], np.int64),
        np.array([float(one.mask.sum()) for one in true], np.float64),
        np.array([one.crowd for one in true], bool),
    )
    if masks:
        pixels, there = (np.array([one.mask for one in part], bool).reshape(-1, HEIGHT, WIDTH)
                         for part in ([seen[row] for row in rows], true))  # fmt: skip
        areas, overlaps = pixels.sum((1, 2)).astype(np.float64), mask_overlaps(pixels, there, facts.crowd)
    else:
        boxes, others = (np.array([one.box for one in part], np.float64).reshape(-1, 4)
                         for part in ([seen[row] for row in rows], true))  # fmt: skip
        areas, overlaps = (boxes[:, 2:] - boxes[:, :2]).prod(1), box_overlaps(boxes, others, facts.crowd)
    return match_picture(labels[rows], scores[rows], places, areas, overlaps, facts)


def numbers_of_pycocotools(masks: bool) -> list[float]:
    """The twelve numbers, computed by the package itself."""
    coco: Any = pytest.importorskip("pycocotools.coco")
    evaluation: Any = pytest.importorskip("pycocotools.cocoeval")

    def annotation(number: int, one: Thing) -> dict[str, Any]:
        box = [one.box[0], one.box[1], one.box[2] - one.box[0], one.box[3] - one.box[1]]
        segmentation = {"size": [HEIGHT, WIDTH], "counts": packed_runs(runs_of(one.mask))}
        return {"image_id": number, "category_id": one.label, "bbox": box, "segmentation": segmentation,
                "area": float(one.mask.sum()), "iscrowd": int(one.crowd)}  # fmt: skip

    truth = [annotation(number, one) for number, (true, _) in enumerate(pictures(), 1) for one in true]
    results = []
    for number, (_, seen) in enumerate(pictures(), 1):
        for one in seen:
            row = annotation(number, one) | {"score": one.score}
            results.append({name: row[name] for name in row if name != ("bbox" if masks else "segmentation")})
    with contextlib.redirect_stdout(io.StringIO()):
        whole = coco.COCO()
        whole.dataset = {
            "images": [{"id": number, "height": HEIGHT, "width": WIDTH} for number in range(1, 25)],
            "annotations": [{"id": number, **one} for number, one in enumerate(truth, 1)],
            "categories": [{"id": number, "name": str(number)} for number in range(CLASSES)],
        }
        whole.createIndex()
        judged = evaluation.COCOeval(whole, whole.loadRes(results), "segm" if masks else "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return [float(value) for value in judged.stats]


#: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl by boxes and by masks: pycocotools 2.0.11.
PYCOCOTOOLS = {
    False: [
        0.25459844735131243, 0.33399623607180656, 0.3256852344867151, 0.2772661442465759,
        0.3084373965548787, 0.555642647598093, 0.3027266081871345, 0.5149780701754386,
        0.5283114035087719, 0.5044973544973544, 0.5555555555555556, 0.6805555555555555,
    ],
    True: [
        0.2764565357731689, 0.3556687051840153, 0.3338790262161184, 0.2448806152473043,
        0.45807311500380804, 0.6313806380638064, 0.3228508771929824, 0.5427997076023392,
        0.5605774853801169, 0.5244047619047619, 0.5749999999999998, 0.7388888888888889,
    ],
}


@pytest.mark.parametrize("masks", [False, True])
def test_numbers_are_those_of_pycocotools(masks: bool) -> None:
    matches = [matched(true, seen, masks) for true, seen in pictures()]
    found = coco_scores(matches, CLASSES)
    assert list(found.named().values()) == pytest.approx(PYCOCOTOOLS[masks], abs=1e-12)
    assert found.named()["AP"] == pytest.approx(np.mean(found.by_class()))
    # No picture's numbers depend on another's: in two halves, joined, they are the same.
    halves = [matched(true, seen, masks) for half in (slice(0, 9), slice(9, 24)) for true, seen in pictures()[half]]
    assert coco_scores(halves, CLASSES).named() == found.named()


@pytest.mark.parametrize("masks", [False, True])
def test_equal_to_pycocotools(masks: bool) -> None:
    matches = [matched(true, seen, masks) for true, seen in pictures()]
    expected = numbers_of_pycocotools(masks)
    assert list(coco_scores(matches, CLASSES).named().values()) == pytest.approx(expected, abs=1e-12)


def square(x: int, y: int, side: int, label: int = 0, **more: Any) -> Thing:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + side, x : x + side] = True
    return Thing(label, [x, y, x + side, y + side], mask, **more)


def test_what_is_found_on_a_crowd_counts_neither_way() -> None:
    true = [square(10, 10, 40), square(60, 10, 50, crowd=True)]
    hit, on_crowd, beside = square(10, 10, 40, score=0.5), square(70, 20, 20, score=0.9), square(5, 80, 30, score=0.8)
    for masks in (False, True):
        both = coco_scores([matched(true, [hit, on_crowd, on_crowd], masks)], 1).named()
        assert both["AP"] == both["AR100"] == 1
        assert coco_scores([matched(true, [hit, beside], masks)], 1).named()["AP"] == pytest.approx(0.5)


def test_an_object_is_found_once_and_nothing_is_no_score() -> None:
    twice = [square(10, 10, 40, score=0.9), square(10, 10, 40, score=0.95)]
    late = [matched([square(10, 10, 40)], twice, True), matched([square(10, 10, 40)], [], True)]
    named = coco_scores(late, 2).named()
    # One of two found, and behind a wrong row: precision 1 up to a recall of one half.
    assert named["AR1"] == named["AR100"] == 0.5 and named["AP"] == pytest.approx(51 / 101)
    assert np.isnan(named["APl"]) and np.isnan(coco_scores(late, 2).by_class()[1])
    assert all(np.isnan(value) for value in coco_scores([], 3).named().values())
    assert all(np.isnan(value) for value in coco_scores([matched([], twice, False)], 1).named().values())

"""Linking, suppression, frame-mAP and video-mAP of UCF101-24 and JHMDB beside ACT's code and HIT's.

Every length of tubelet that io.safetensors holds, with the parameters of meta.json.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pretrain.metrics.average_precision import trapezoid_area
from pretrain.metrics.box_table import BoxTable
from pretrain.metrics.detection import frame_map, suppressed
from pretrain.metrics.linking import Linking, Tubelets, link_class
from pretrain.metrics.matching import Matching
from pretrain.metrics.overlap import iou_inclusive
from pretrain.metrics.tubes import Tube, suppress_tubes, tube_iou_continuous, tube_iou_inclusive, video_map

KINDS = ("video_map",)

#: Frame numbers below this, so that video and frame are one code.
FRAMES = 100_000


def parts(case: Any) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, expected numbers and tensors of every length of tubelet, as float64."""
    expected = json.loads((case.folder / "expected.json").read_text())
    tensors = safetensors.numpy.load_file(case.folder / "io.safetensors")
    names = [name for name, numbers in expected.items() if "K" in numbers]
    assert names
    for name in names:
        own = {key.removeprefix(f"{name}."): value.astype(np.float64)
               for key, value in tensors.items() if key.startswith(f"{name}.")}  # fmt: skip
        yield name, expected[name], own


def linking_of(case: Any, length: int) -> Linking:
    given = case.meta["parameters"]
    gaps = {int(found[2]): int(found[1]) for found in re.finditer(r"G = (\d+) for K=(\d+)", given["max_gap"])}
    return Linking(
        tubelet_iou=given["tubelet_nms"], top=given["top_k"], link_iou=given["link_iou"], close_after=gaps[length],
        min_score=given["min_score"], min_length=given["min_length"], tube_iou=given["tube_nms"],
    )  # fmt: skip


def linked(case: Any, numbers: dict[str, Any], own: dict[str, Any]) -> Iterator[tuple[int, int, int, Tube, bool]]:
    """Video, label, number, tube, and whether suppression keeps it."""
    length, linking = numbers["K"], linking_of(case, numbers["K"])
    for video in range(len(numbers["videos"])):
        rows = own["tubelets"][own["tubelets"][:, 0] == video]
        boxes, scores = rows[:, 2 : 2 + 4 * length].reshape(-1, length, 4), rows[:, 3 + 4 * length :]
        tubelets = Tubelets(str(video), rows[:, 1].astype(np.int64), boxes, scores)
        for label in range(len(numbers["labels"])):
            tubes = link_class(tubelets, label, linking)
            kept = suppress_tubes(tubes, linking.tube_iou)
            for number, tube in enumerate(tubes):
                yield video, label, number, tube, any(tube is one for one in kept)


def true_tubes(own: dict[str, Any]) -> list[Tube]:
    rows = own["gt_tubes"]
    tubes = []
    for key in np.unique(rows[:, :3], axis=0):
        tube = rows[(rows[:, :3] == key).all(axis=1)]
        assert (np.diff(tube[:, 3]) == 1).all()
        tubes.append(Tube(str(int(key[0])), int(key[1]), int(tube[0, 3]), tube[:, 4:]))
    return tubes


def test_tubes(case: Any) -> None:
    for name, numbers, own in parts(case):
        tubes = list(linked(case, numbers, own))
        facts = [[*place, tube.score, tube.first, tube.last, kept] for *place, tube, kept in tubes]
        np.testing.assert_allclose(facts, own["expected.tube_scores"], atol=case.meta["tolerance"], err_msg=name)
        rows = [
            np.column_stack([np.full(len(tube.boxes), value) for value in place]
                            + [np.arange(tube.first, tube.last + 1), tube.boxes, tube.frame_scores])
            for *place, tube, _ in tubes
        ]  # fmt: skip
        np.testing.assert_allclose(
            np.concatenate(rows), own["expected.tubes"], atol=case.meta["tolerance"], err_msg=name
        )


def test_video_map(case: Any) -> None:
    for name, numbers, own in parts(case):
        kept = [tube for *_, tube, keep in linked(case, numbers, own) if keep]
        labels = range(len(numbers["labels"]))
        near = {"abs": case.meta["tolerance"]}
        act = video_map(true_tubes(own), kept, labels, thresholds=[float(one) for one in numbers["video_ap_act"]])
        for threshold, by_class in numbers["video_ap_act"].items():
            found = act.by_class[float(threshold)]
            precisions = {numbers["labels"][label]: 100 * value for label, value in found.items() if value is not None}
            assert precisions == pytest.approx(by_class, **near), (name, threshold)
            mean = numbers["means"][f"video_ap_act@{threshold}"]
            assert 100 * act.by_threshold[float(threshold)] == pytest.approx(mean, **near)
        assert 100 * act.strict == pytest.approx(numbers["video_map_act_50_95"], **near), name
        thresholds = [float(one) for one in numbers["video_map_voc"]]
        voc = video_map(true_tubes(own), kept, labels, "voc", thresholds=thresholds)
        for threshold, mean in numbers["video_map_voc"].items():
            assert 100 * voc.by_threshold[float(threshold)] == pytest.approx(mean, **near), (name, threshold)


def frames_of(numbers: dict[str, Any], own: dict[str, Any]) -> BoxTable:
    length, rows = numbers["K"], own["frame_detections"]
    frames = rows[:, 1:2] + np.arange(length)
    codes = (rows[:, :1] * FRAMES + frames).reshape(-1).astype(np.int64)
    labels, scores = (np.repeat(rows[:, column], length) for column in (2, 3))
    return BoxTable(codes, rows[:, 4:].reshape(-1, 4), labels.astype(np.int64), scores)


def true_boxes(own: dict[str, Any]) -> BoxTable:
    rows = own["gt_tubes"]
    codes = (rows[:, 0] * FRAMES + rows[:, 3]).astype(np.int64)
    return BoxTable(codes, rows[:, 4:], rows[:, 1].astype(np.int64))


def test_suppression_of_frames(case: Any) -> None:
    for name, numbers, own in parts(case):
        table = frames_of(numbers, own)
        # `suppressed` numbers keyframes by their first row.
        first = np.unique(np.asarray(table.keyframes), return_index=True)[1]
        codes = np.asarray(table.keyframes)[np.sort(first)]
        left = suppressed(table, case.meta["parameters"]["frame_nms"])
        code = codes[np.asarray(left.keyframes)]
        found = np.column_stack([code // FRAMES, code % FRAMES, left.labels, left.scores, left.boxes])
        order = [rows[np.lexsort((-rows[:, 3], rows[:, 2], rows[:, 1], rows[:, 0]))]
                 for rows in (found, own["expected.frame_detections_after_nms"])]  # fmt: skip
        np.testing.assert_allclose(*order, atol=case.meta["tolerance"], err_msg=name)


def as_numpy_sorts(own: dict[str, Any]) -> BoxTable:
    """What suppression leaves, each class in the order in which numpy's default sort of single precision puts it.

    That order decides between equal scores in the official codes, which every frame of a tubelet has. Ours keeps equal
    ones as they stand, so they are given as they stood.
    """
    rows = own["expected.frame_detections_after_nms"]
    classes = [rows[rows[:, 2] == label] for label in np.unique(rows[:, 2])]
    rows = np.concatenate([one[np.argsort(-one[:, 3].astype(np.float32))] for one in classes])
    codes = (rows[:, 0] * FRAMES + rows[:, 1]).astype(np.int64)
    return BoxTable(codes, rows[:, 4:], rows[:, 2].astype(np.int64), rows[:, 3])


def bounds(truth: BoxTable, table: BoxTable, label: int, threshold: float) -> tuple[float, float]:
    """AP in percent where of equal scores the wrong ones come first, and where the right ones do."""
    true, own = truth.labels == label, np.flatnonzero(table.labels == label)
    own = own[np.argsort(-table.scores[own], kind="stable")]
    codes, boxes, scores = np.asarray(table.keyframes)[own], table.boxes[own], table.scores[own]
    matching = Matching.of_boxes(codes, boxes, np.asarray(truth.keyframes)[true], truth.boxes[true], iou_inclusive)
    hits = matching.hits_by_free(threshold)
    areas = [100 * trapezoid_area(hits[np.lexsort((order, -scores))], int(true.sum())) for order in (hits, ~hits)]
    return areas[0], areas[1]


def sorts_as_the_goldens() -> bool:
    """Numpy's default sort puts equal values in an order that depends on the processor; the goldens' had AVX-512."""
    extensions: Any = np.show_config(mode="dicts")
    return "X86_V4" in extensions["SIMD Extensions"].get("found", ())


def test_frame_map(case: Any) -> None:
    for name, numbers, own in parts(case):
        truth, table, labels = true_boxes(own), as_numpy_sorts(own), numbers["labels"]
        near = {"abs": case.meta["tolerance"]}
        for text, by_class in numbers["frame_ap_act"].items():
            found = frame_map(truth, table, range(len(labels)), "act", thresholds=[float(text)])
            precisions = {labels[label]: 100 * value for label, value in found.by_class.items() if value is not None}
            assert set(precisions) == set(by_class)
            for label, expected in by_class.items():
                low, high = bounds(truth, table, labels.index(label), float(text))
                # Exact where no scores are equal; and everywhere on a processor that sorts equal ones as theirs did.
                assert low - near["abs"] <= expected <= high + near["abs"], (name, text, label)
                assert low - near["abs"] <= precisions[label] <= high + near["abs"], (name, text, label)
                if sorts_as_the_goldens():
                    assert precisions[label] == pytest.approx(expected, **near), (name, text, label)
            if sorts_as_the_goldens():
                assert 100 * found.mean == pytest.approx(numbers["means"][f"frame_ap_act@{text}"], **near), (name, text)
                voc = frame_map(truth, table, range(len(labels)), "voc", thresholds=[float(text)])
                assert 100 * voc.mean == pytest.approx(numbers["frame_map_voc"][text], **near), (name, text)


def test_suppression_of_tubes(case: Any) -> None:
    tensors = safetensors.numpy.load_file(case.folder / "io.safetensors")
    rows, scores = tensors["nms.tubes"].astype(np.float64), tensors["nms.scores"].astype(np.float64)
    tubes = []
    for number, score in enumerate(scores.tolist()):
        own = rows[rows[:, 0] == number]
        tubes.append(Tube("video", 0, int(own[0, 1]), own[:, 2:], score))
    for iou, name in ((tube_iou_inclusive, "nms.iou_act"), (tube_iou_continuous, "nms.iou_voc")):
        found = [[iou(one, other) for other in tubes] for one in tubes]
        np.testing.assert_allclose(found, tensors[name], atol=case.meta["tolerance"], err_msg=name)
    kept = {name: keep for name, keep in tensors.items() if name.startswith("nms.keep_")}
    assert kept
    for name, keep in kept.items():
        found = suppress_tubes(tubes, float(name.removeprefix("nms.keep_")))
        assert [next(place for place, tube in enumerate(tubes) if tube is one) for one in found] == keep.tolist()

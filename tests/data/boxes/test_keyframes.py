"""Rows become keyframes: grouped, clipped, counted, and refused with their file and line."""

from pathlib import Path

import pytest

from pretrain.data.boxes.action_list import AVA_LEFT_OUT, ActionList, make_action_list
from pretrain.data.boxes.ava_files import read_ava
from pretrain.data.boxes.box_csv import read_box_csv
from pretrain.data.boxes.keyframes import Film, RowLimits, collect_keyframes
from pretrain.data.boxes.tube_files import read_pyannot
from pretrain.errors import RecipeError
from tests.data.boxes.box_files import pyannot, write

CLASSES = make_action_list("list", {1: "run", 2: "jump", 4: "wave"})
AVA = make_action_list("list", {one: f"n{one}" for one in range(1, 81) if one not in AVA_LEFT_OUT})
FILMS = {"a": Film(640, 360, 1000.0)}


def problems(path: str, limits: RowLimits = RowLimits(), classes: ActionList = CLASSES, films=FILMS) -> list[str]:  # type: ignore  # noqa: B008
    with pytest.raises(RecipeError) as caught:
        collect_keyframes([read_ava(path)], classes, limits, films=films)
    return caught.value.problems


def test_rows_of_a_person_are_joined(tmp_path: Path) -> None:
    rows = ["a,0902,0.1,0.2,0.5,0.6,4,3", "a,902,0.1,0.2,0.5,0.6,1,3", "a,902,0.1,0.2,0.5,0.6,2,8",
            "a,902,0.1,0.2,0.5,0.6,1,3", "a,0901,0.1,0.2,0.5,0.6,,3", "a,0903"]  # fmt: skip
    records = read_ava(write(tmp_path / "a.csv", "\n".join(rows)))
    found = collect_keyframes([records], CLASSES, RowLimits())
    assert [one.time for one in found.keyframes] == [901, 902, 903] and found.unit == "second"
    assert [(one.labels, one.person) for one in found.keyframes[1].persons] == [([0, 3], 3), ([1], 8)], "id - 1"
    assert found.keyframes[0].persons[0].labels == [] and found.keyframes[2].persons == []
    assert found.counts["rows that repeat another"] == 1 and found.by_class() == [1, 1, 0, 1]
    by_box = collect_keyframes([records], CLASSES, RowLimits(grouping="box")).keyframes[1].persons
    assert [(one.labels, one.person) for one in by_box] == [([0, 1, 3], 3)]


def test_keyframes_of_a_detector_alone_are_told_from_annotated_ones(tmp_path: Path) -> None:
    people = read_ava(write(tmp_path / "d.csv", "".join(f"a,{at},0,0,1,1,,0.9\n" for at in (902, 903, 904))), "score")
    for rows in ("a,902,0,0,1,1,4,3\na,903\n", "a,903\na,902,0,0,1,1,,3\n"):
        records = read_ava(write(tmp_path / "a.csv", rows))
        found = collect_keyframes([records], CLASSES, RowLimits(), [people]).keyframes
        assert [(one.time, one.annotated) for one in found] == [(902, True), (903, True), (904, False)]
    refused = read_ava(write(tmp_path / "a.csv", "a,902,0,0,1,1,4,3\na,904,0,0,1,7,4,3\n"))
    found = collect_keyframes([refused], CLASSES, RowLimits(skip=True), [people]).keyframes
    assert [one.annotated for one in found] == [True, False, False], "of a refused row nothing is known"


def test_boxes_are_clipped_within_the_tolerance(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a,902,-0.001,0.2,1.001,0.6,4,3\na,902,0,0,1,1,4,4\n")
    found = collect_keyframes([read_ava(path)], CLASSES, RowLimits())
    assert found.keyframes[0].persons[0].box == (0, 0.2, 1, 0.6) and found.counts["boxes clipped"] == 1
    assert "a.csv:1: box -0.001, 0.2, 1.001, 0.6 lies outside the frame" in problems(path, RowLimits(tolerance=0))[0]


def test_every_faulty_row_is_refused_with_its_line(tmp_path: Path) -> None:
    rows = ["a,902,0.5,0.2,0.5,0.6,4,3", "a,902,0.1,0.2,0.5,1.2,4,3", "a,902,0.1,0.2,0.5,0.6,3,3", "b,902,0,0,1,1,1,1",
            "a,1001,0,0,1,1,1,1", "a,902,0.1,0.2,0.5,0.6,5,3", "a,902,0,0,1,1,1,1", "b,903,0,0,1,1,1,1"]  # fmt: skip
    path = write(tmp_path / "a.csv", "\n".join(rows))
    found = problems(path)
    assert [one.removeprefix(path).split(":")[1] for one in found] == ["1", "2", "3", "4", "5", "6"], found
    expected = ["x1 < x2", "by more than 0.01", "class id 3 is not in the action list", "no such video",
                "its last frame is at 1000", "class id 5"]  # fmt: skip
    assert all(text in one for text, one in zip(expected, found, strict=True))
    assert "--classes 4" in found[2] and "--labels" in found[5]
    kept = collect_keyframes([read_ava(path)], CLASSES, RowLimits(skip=True), films=FILMS)
    assert [one.video for one in kept.keyframes] == ["a"] and len(kept.keyframes[0].persons) == 1
    assert kept.counts["rows refused"] == 7 and kept.refused == found


def test_ids_that_are_trained_and_not_evaluated(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a,902,0,0,1,1,2,1\n")
    assert collect_keyframes([read_ava(path)], AVA, RowLimits()).keyframes[0].persons[0].labels == [1]
    gap = write(tmp_path / "b.csv", "a,902,0,0,1,1,3,1\n")
    assert collect_keyframes([read_ava(gap)], CLASSES, RowLimits(unnamed=True)).keyframes[0].persons[0].labels == [2]
    beyond = write(tmp_path / "c.csv", "a,902,0,0,1,1,81,1\na,902,0,0,1,1,0,1\n")
    assert len(problems(beyond, RowLimits(unnamed=True), AVA)) == 2


def test_times_and_excluded_keyframes(tmp_path: Path) -> None:
    rows = [f"a,{time},0,0,1,1,1,1" for time in (901, 902, 903, 904)] + ["a,905"]
    records = read_ava(write(tmp_path / "a.csv", "\n".join(rows)))
    found = collect_keyframes([records], CLASSES, RowLimits(first=902, last=904), excluded=[("a", 903.0)])
    assert [one.time for one in found.keyframes] == [902, 904]
    assert found.counts["rows outside of the times asked for"] == 1
    assert found.counts["keyframes outside of the times asked for"] == 1
    assert found.counts["rows of excluded keyframes"] == 1


def test_detections_make_keyframes_of_their_own(tmp_path: Path) -> None:
    records = read_ava(write(tmp_path / "a.csv", "a,902,0,0,1,1,1,1\n"))
    rows = "a,902,0,0,0.5,1,,0.9\na,902,0,0,0.5,1,77,0.9\na,903,0,0,0.5,1,,0.8\na,904,0,0,1,1,,1.5\n"
    people = read_ava(write(tmp_path / "d.csv", rows), "score")
    found = collect_keyframes([records], CLASSES, RowLimits(skip=True), [people])
    assert [(one.time, len(one.persons), one.detections) for one in found.keyframes] == [
        (902, 1, [((0, 0, 0.5, 1), 0.9)]), (903, 0, [((0, 0, 0.5, 1), 0.8)]),
    ]  # fmt: skip
    assert found.refused == [f"{tmp_path}/d.csv:4: score 1.5; scores are from 0 to 1"]


def test_more_persons_than_the_limit(tmp_path: Path) -> None:
    rows = [f"a,902,0,0,1,{one}e-1,1,{one}" for one in range(1, 6)]
    path = write(tmp_path / "a.csv", "\n".join(rows))
    (found,) = problems(path, RowLimits(max_persons=4))
    assert found.startswith(f"{path}:1: 5 persons on a at 902, at most 4")
    kept = collect_keyframes([read_ava(path)], CLASSES, RowLimits(max_persons=4, skip=True))
    assert len(kept.keyframes[0].persons) == 4 and kept.counts["persons refused"] == 1


def test_pixels_become_shares_of_the_video(tmp_path: Path) -> None:
    records = read_pyannot(write(tmp_path / "p.pkl", pyannot("a")))
    classes = make_action_list("list", {1: "x", 2: "y"})
    found = collect_keyframes([records], classes, RowLimits(), films={"a": Film(320, 240, 6)})
    assert [one.time for one in found.keyframes] == [1, 2, 3, 4, 5, 6] and found.unit == "frame"
    assert found.keyframes[1].persons[0].box == (10 / 320, 20 / 240, 60 / 320, 120 / 240)
    with pytest.raises(RecipeError, match="no such video"):
        collect_keyframes([records], classes, RowLimits(), films={})
    with pytest.raises(RecipeError, match="without the videos' sizes"):
        collect_keyframes([records], classes, RowLimits())
    with pytest.raises(RecipeError, match="its last frame is at 5"):
        collect_keyframes([records], classes, RowLimits(), films={"a": Film(320, 240, 5)})
    with pytest.raises(RecipeError, match=r"a at frame 1: its first frame is at 2$"):
        collect_keyframes([records], classes, RowLimits(), films={"a": Film(320, 240, 6, 2)})


def test_labels_by_name(tmp_path: Path) -> None:
    header = "video,time,x1,y1,x2,y2,label\n"
    records = read_box_csv(write(tmp_path / "a.csv", header + "a,1,0,0,1,1,wave\na,1,0,0,1,1,run\n"))
    assert collect_keyframes([records], CLASSES, RowLimits()).keyframes[0].persons[0].labels == [0, 3]
    records = read_box_csv(write(tmp_path / "b.csv", header + "a,1,0,0,1,1,wave\na,1,0,0,1,1,Run\n"))
    with pytest.raises(RecipeError, match="b.csv:3: class 'Run' is not in the action list"):
        collect_keyframes([records], CLASSES, RowLimits())


def test_nothing_left(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a,1,0,0,1,1,1,1\n")
    assert "1 rows outside" in problems(path, RowLimits(first=902))[0]

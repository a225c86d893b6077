"""Readers of all formats but AVA's own: what stands in the file, and every fault with its place."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data.boxes.alphaction_files import read_alphaction, read_alphaction_detections
from pretrain.data.boxes.box_csv import read_box_csv
from pretrain.data.boxes.box_formats import ReadingOptions, format_of, read_box_files, read_detections
from pretrain.data.boxes.foreign_pickle import read_pickle
from pretrain.data.boxes.records import NONE
from pretrain.data.boxes.slowfast_files import read_frame_list
from pretrain.data.boxes.tube_files import read_act, read_mmaction, read_pyannot
from pretrain.data.boxes.yowo_files import read_yowo
from pretrain.errors import RecipeError
from tests.data.boxes.box_files import act, alphaction, as_json, pyannot, python_2_pickle, write

AVA = "a,0902,0.1,0.2,0.5,0.6,12,3\n"


def refused(function: Any, *arguments: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        function(*arguments)
    return "\n".join(caught.value.problems)


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def test_pickles_name_nothing_but_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        data = pickle.dumps({"a,0902": Harmful()}, protocol)
        text = refused(read_mmaction, write(tmp_path / "a.pkl", data))
        assert "asks for posix.system" in text or "asks for nt.system" in text
    for attack in (b"cbuiltins\neval\n(S'1'\ntR.", b"cbuiltins\ngetattr\n(cnumpy\nload\nS'x'\ntR.", b"cos\nsystem\n."):
        assert "asks for" in refused(read_pickle, write(tmp_path / "a.pkl", attack))
    assert not (tmp_path / "harmed").exists()
    assert "no readable pickle" in refused(read_pickle, write(tmp_path / "a.pkl", b"\x80\x04nonsense"))
    assert "no such file" in refused(read_pickle, str(tmp_path / "none.pkl"))


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    box = np.array([[0.1, 0.2, 0.5, 0.6, 0.9]], np.float32)
    content: dict[str, Any] = {"a,0902": box, "b,0903": np.zeros((0, 5)), "c,3": [[0] * 5]}
    content["d,4"] = [[np.float64(0.5)] * 5]
    found = read_mmaction(write(tmp_path / "a.pkl", pickle.dumps(content, protocol)), 0.1)
    assert found.videos == ["a", "d"] and found.times.tolist() == [902, 4]
    np.testing.assert_allclose(found.boxes[0], [0.1, 0.2, 0.5, 0.6], atol=1e-7)
    assert found.empty == [("b", 903.0, "'b,0903'"), ("c", 3.0, "'c,3'")]


def test_pickles_of_python_2(tmp_path: Path) -> None:
    found = read_mmaction(write(tmp_path / "a.pkl", python_2_pickle("Café,0902".encode("latin1"))))
    assert found.videos == ["Café"] and found.scores.tolist() == [0.9]
    assert found.boxes.tolist() == [[0.1, 0.2, 0.5, 0.6]]


def test_wrong_keys_of_mmaction(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pkl", {"a0902": np.zeros((1, 5)), "b,1": np.zeros((1, 4)), "c,x": np.zeros((1, 5))})
    text = refused(read_mmaction, path)
    assert all(f"{path}: '{key}'" in text for key in ("a0902", "b,1", "c,x"))


def test_tubes_of_act(tmp_path: Path) -> None:
    path = write(tmp_path / "gt.pkl", act({"Basketball/v_a": 6, "Biking/v_b": 4}))
    assert format_of(path) == "act"
    found, classes = read_act(path, "test")
    assert classes.names == {1: "Basketball", 2: "Biking"} and found.unit == "frame" and not found.pixels
    assert found.videos == ["Biking/v_b"] * 2 and found.times.tolist() == [2, 3] and found.labels.tolist() == [2, 2]
    np.testing.assert_allclose(found.boxes[0], [12 / 320, 20 / 240, 62 / 320, 120 / 240])
    assert [(one[0], one[1]) for one in found.empty] == [("Biking/v_b", 1), ("Biking/v_b", 4)]
    assert found.persons.tolist() == [0, 0] and found.where(0).endswith("gttubes['Biking/v_b'][1][0] frame 2")
    assert set(read_act(path)[0].videos) == {"Basketball/v_a", "Biking/v_b"}
    assert "test_videos has 1" in refused(read_act, path, "test", 2)


def test_wrong_tubes(tmp_path: Path) -> None:
    content = act({"a": 6, "b": 6, "c": 6})
    content["gttubes"]["a"] = {5: [np.zeros((1, 5))]}
    content["gttubes"]["b"] = {0: [np.zeros((3, 4))]}
    content["gttubes"]["c"] = {0: [np.full((1, 5), 9.0)]}
    text = refused(read_act, write(tmp_path / "gt.pkl", content))
    assert "['a']: ValueError: label 5; there are 2" in text and "['b']: ValueError: [0][0]: shape (3, 4)" in text
    assert "frames 9 to 9; the video has 1 to 6" in text
    assert "not ACT's" in refused(read_act, write(tmp_path / "b.pkl", {"a": 1}))


def test_pyannot(tmp_path: Path) -> None:
    path = write(tmp_path / "pyannot.pkl", pyannot("Biking/v_b"))
    assert format_of(path) == "pyannot"
    found = read_pyannot(path)
    assert found.pixels and found.unit == "frame" and found.times.tolist() == [2, 3, 4, 5]
    assert found.boxes[0].tolist() == [10, 20, 60, 120] and found.labels.tolist() == [2] * 4
    assert [one[1] for one in found.empty] == [1, 6]
    content = pyannot("b")
    content["b"]["annotations"][0]["ef"] = 9
    assert "'b': ValueError: annotations[0]: frames 1 to 9 of 6" in refused(
        read_pyannot, write(tmp_path / "p.pkl", content)
    )


def test_alphaction(tmp_path: Path) -> None:
    annotations, detections = alphaction()
    path, boxes = write(tmp_path / "a.json", as_json(annotations)), write(tmp_path / "d.json", as_json(detections))
    found, images = read_alphaction(path)
    assert found.labels.tolist() == [12, 80] and found.persons.tolist() == [3, 3] and found.videos == ["a", "a"]
    np.testing.assert_allclose(found.boxes, [[0.1, 0.1, 0.6, 0.6]] * 2)
    assert found.empty == [("a", 903.0, "images 10903")]
    people = read_alphaction_detections(boxes, images, 0.8)
    assert people.scores.tolist() == [0.95] and people.times.tolist() == [903]
    detections[0]["image_id"] = 1
    assert "detections[0]: image_id 1 is none" in refused(
        read_alphaction_detections, write(tmp_path / "d.json", as_json(detections)), images
    )
    del annotations["annotations"][0]["bbox"]
    assert "annotations[0]: lacks 'bbox'" in refused(read_alphaction, write(tmp_path / "a.json", as_json(annotations)))
    assert "no known format" in refused(format_of, write(tmp_path / "x.json", "{}"))


HEADER = "original_vido_id video_id frame_id path labels\n"


def test_frame_lists(tmp_path: Path) -> None:
    rows = [f'a 0 {number} a/a_{number + 1:06d}.jpg ""\n' for number in range(12)]
    rows += [f'b 1 {number} b/{number + 9}.jpg ""\r\n' for number in range(3)]
    found = read_frame_list(write(tmp_path / "train.csv", HEADER + "".join(rows)))
    assert (found["a"].folder, found["a"].first, found["a"].count, found["a"].line) == ("a", 1, 12, 2)
    assert (found["b"].folder, found["b"].first, found["b"].count) == ("b", 9, 3)
    text = refused(read_frame_list, write(tmp_path / "x.csv", HEADER + "".join(rows[:3] + rows[4:5]) + "a b\n"))
    assert ":5: 'a/a_000005.jpg', expected is 'a/a_000004.jpg'" in text and ":6: 2 fields" in text
    assert "no frame list" in refused(read_frame_list, write(tmp_path / "y.csv", AVA))


def test_yowo(tmp_path: Path) -> None:
    write(tmp_path / "l/Biking/v_b/00002.txt", "2 10 20 60 120\n1 0 0 5 5\n")
    write(tmp_path / "l/Biking/v_b/00003.txt", "")
    write(tmp_path / "l/Biking_v_c_00001.txt", "2 10 20 60 120")
    write(tmp_path / "l/trainlist.txt", "Biking/v_b")
    found = read_yowo(str(tmp_path / "l"))
    assert found.pixels and found.unit == "frame" and found.videos == ["Biking/v_b"] * 2 + ["Biking_v_c"]
    assert found.labels.tolist() == [2, 1, 2] and found.boxes[0].tolist() == [10, 20, 60, 120]
    assert found.empty == [("Biking/v_b", 3.0, "Biking/v_b/00003.txt")]
    write(tmp_path / "l/Biking/v_b/00002.txt", "2 10 20 60\n")
    assert "00002.txt:1: '2 10 20 60'" in refused(read_yowo, str(tmp_path / "l"))
    people = read_yowo(write(tmp_path / "d.csv", "Biking/v_b,2,10,20,60,120,2,0.7\n"))
    assert people.pixels and people.unit == "frame" and people.scores.tolist() == [0.7]


OWN = "video,time,x1,y1,x2,y2,label,person\n"


def test_a_csv_of_ones_own(tmp_path: Path) -> None:
    text = "\ufeffVideo;Time;x1;y1;x2;y2;Label;score\r\nclub ü.mp4;1.5;0.1;0.2;0.5;1.001;wave;0.9\r\n"
    text += "club ü.mp4;1.5;0.1;0.2;0.5;1.001;a jump;\r\nclub ü.mp4;2;;;;;;\r\n"
    path = write(tmp_path / "a.csv", text)
    assert format_of(path) == "csv"
    found = read_box_csv(path)
    assert found.videos == ["club ü.mp4"] * 2 and found.names == ("a jump", "wave") and found.labels.tolist() == [1, 0]
    assert found.empty == [("club ü.mp4", 2.0, 4)] and not found.pixels and found.unit == "second"
    assert found.scores[0] == 0.9 and np.isnan(found.scores[1])
    found = read_box_csv(write(tmp_path / "b.csv", OWN + "a,1,10,20,50,60,3,7\na,1,10,20,50,60,,7\n"))
    assert found.pixels and found.labels.tolist() == [3, NONE] and found.persons.tolist() == [7, 7]


def test_frames_in_place_of_times(tmp_path: Path) -> None:
    text = OWN.replace("time", "frame")
    path = write(tmp_path / "a.csv", text + "a,0,0,0,1,1,3,7\na,5,0,0,1,1,3,7\n")
    assert read_box_csv(path).times.tolist() == [1, 6] and read_box_csv(path).unit == "frame"
    path = write(tmp_path / "b.csv", text + "a,4,0,0,1,1,3,7\n")
    assert "--first-frame" in refused(read_box_csv, path)
    assert read_box_csv(path, "auto", 1).times.tolist() == [4]
    path = write(tmp_path / "c.csv", text + "a,0,0,0,1,1,3,7\n")
    assert ":2: frame 0; --first-frame is 1" in refused(read_box_csv, path, "auto", 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,time,x1,y1,x2\n", ":1: no column y2"),
        ("video,x1,y1,x2,y2\n", ":1: no column time or frame"),
        (OWN, "no row below the header"),
        (OWN + "a,1,0,0,1,1,3\n", ":2: 7 columns"),
        (OWN + "a,1,0,0,1,,3,1\n", ":2: y2 ''"),
        (OWN + "a,1,0,0,1,1,3,1.5\n", ":2: person '1.5'"),
        (OWN + "a,1,0,0,1,1,3,1\na,1,0,0,1,1,run,1\n", ":2: label '3' is a number, others are names ('run')"),
        (OWN + "a,1,0,0,1,1,3,1\na,1,10,20,30,40,3,1\n", "--box-unit pixel or share"),
        (OWN + ",1,0,0,1,1,3,1\n", ":2: no video"),
        (OWN + "a,1 s,0,0,1,1,3,1\n", ":2: time '1 s'"),
    ],
)
def test_wrong_csv_of_ones_own(text: str, message: str, tmp_path: Path) -> None:
    assert message in refused(read_box_csv, write(tmp_path / "a.csv", text))


def test_formats_are_told_apart(tmp_path: Path) -> None:
    annotations, detections = alphaction()
    ava = write(tmp_path / "a.csv", AVA)
    frames = write(tmp_path / "f.csv", HEADER + 'a 0 0 a/1.jpg ""\n')
    found = read_box_files([ava, frames], ReadingOptions())
    assert found.records[0].persons.tolist() == [3] and found.pictures["a"].count == 1
    assert np.isnan(read_box_files([ava], ReadingOptions("ava")).records[0].scores).all()
    scored = write(tmp_path / "s.csv", "a,902,0,0,1,1,7,1\na,902,0,0,1,1,7,0.5\n")
    assert read_box_files([scored, frames], ReadingOptions("slowfast", 0.9)).records[0].scores.tolist() == [1]
    (people,) = read_detections([scored], {}, ReadingOptions("ava"))
    assert people.scores.tolist() == [1, 0.5]
    path, boxes = write(tmp_path / "a.json", as_json(annotations)), write(tmp_path / "d.json", as_json(detections))
    both = read_box_files([path], ReadingOptions())
    assert len(read_detections([boxes], both.images, ReadingOptions())[0]) == 2
    assert "--annotations" in refused(read_detections, [frames], {}, ReadingOptions())
    gt = write(tmp_path / "gt.pkl", act({"a": 6}))
    assert "counted in different ways" in refused(read_box_files, [ava, gt], ReadingOptions())
    paths = [str(tmp_path / "none.csv"), write(tmp_path / "w.csv", "a,1\nb,x,y\n")]
    text = refused(read_box_files, paths, ReadingOptions())
    assert "none.csv: no such file" in text and "w.csv:2: 3 columns" in text

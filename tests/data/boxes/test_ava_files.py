"""AVA's csv files and label maps, with what real ones hold: 0902, empty labels, byte order marks, gaps."""

import json
from pathlib import Path

import numpy as np
import pytest

from pretrain.data.boxes.action_list import AVA_GROUPS, AVA_LEFT_OUT, is_ava, parse_groups, read_action_list
from pretrain.data.boxes.ava_files import read_ava, read_keyframes
from pretrain.data.boxes.records import NONE
from pretrain.errors import RecipeError

ROWS = "a,0902,0.1,0.2,0.5,0.6,12,3\nvidéo b,903,0.077,0.151,1.001,0.811,80,10\n"


def written(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def problems_of(function, *arguments) -> list[str]:  # type: ignore[no-untyped-def]
    with pytest.raises(RecipeError) as caught:
        function(*arguments)
    return caught.value.problems


@pytest.mark.parametrize(
    "text", [ROWS, ROWS.replace("\n", "\r\n"), "\ufeff" + ROWS, ROWS.replace(",", ", "), ROWS + "\n", f'"a"{ROWS[1:]}']
)
def test_annotations(text: str, tmp_path: Path) -> None:
    found = read_ava(written(tmp_path / "a.csv", text))
    assert found.videos == ["a", "vidéo b"] and found.times.tolist() == [902, 903]
    assert found.boxes.tolist() == [[0.1, 0.2, 0.5, 0.6], [0.077, 0.151, 1.001, 0.811]]
    assert found.labels.tolist() == [12, 80] and found.persons.tolist() == [3, 10] and list(found.places) == [1, 2]
    assert np.isnan(found.scores).all() and not found.empty and found.where(1) == f"{tmp_path}/a.csv:2"


def test_keyframes_without_a_box_and_boxes_without_a_label(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "a,0902,0.1,0.2,0.5,0.6,,3\n\na,0904\na,0903,0.1,0.2,0.5,0.6,-1,\n")
    found = read_ava(path)
    assert found.labels.tolist() == [NONE, NONE] and found.persons.tolist() == [3, NONE]
    assert found.empty == [("a", 904.0, 3)] and list(found.places) == [1, 4]


def test_scores(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "a,902,0,0,1,1,,0.95\na,902,0,0,1,1,7,0.8\na,903,0,0,1,1,-1,0.5\n")
    found = read_ava(path, "auto", 0.8)
    assert found.scores.tolist() == [0.95, 0.8] and found.labels.tolist() == [NONE, 7]
    assert found.persons.tolist() == [NONE, NONE] and list(found.places) == [1, 2]
    assert read_ava(written(tmp_path / "b.csv", ROWS), "auto").persons.tolist() == [3, 10]
    assert read_ava(written(tmp_path / "c.csv", "a,902,0,0,1,1,7\n"), "auto").persons.tolist() == [NONE]
    assert "--format slowfast" in problems_of(read_ava, path)[0]


def test_every_wrong_row_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", ROWS + "a,902,0.1,0.2,x,0.6,12,3\na,902,0.1\na,902,0.1,0.2,0.3,0.6,1.5,3\n")
    found = problems_of(read_ava, path)
    assert [one.split(": ")[0] for one in found] == [f"{path}:4"], "rows of another width come first"
    path = written(tmp_path / "a.csv", ROWS + "a,902,0.1,0.2,x,0.6,12,3\na,nan,0.1,0.2,0.3,0.6,1,3\n")
    assert problems_of(read_ava, path)[0] == f"{path}:4: second 'nan': a number is expected"
    path = written(tmp_path / "a.csv", "a,902,0.1,0.2,0.3,0.6,1.5,3\n")
    assert problems_of(read_ava, path) == [f"{path}:1: action id '1.5': a whole number is expected"]
    assert "--format csv" in problems_of(read_ava, written(tmp_path / "h.csv", "video,time,x1,y1,x2,y2,label,s\n"))[0]
    assert "not separated by commas" in problems_of(read_ava, written(tmp_path / "s.csv", "a 902 0 0 1 1 2 3\n"))[0]
    assert ":2: not text in UTF-8" in problems_of(read_ava, written(tmp_path / "l.csv", ROWS.encode("latin1")))[0]
    assert "no such file" in problems_of(read_ava, str(tmp_path / "none.csv"))[0]


def test_excluded_keyframes(tmp_path: Path) -> None:
    assert read_keyframes(written(tmp_path / "e.csv", "a,0906\r\nb,907\r\n")) == [("a", 906.0), ("b", 907.0)]
    assert ":1: 3 columns" in problems_of(read_keyframes, written(tmp_path / "e.csv", "a,0906,1\n"))[0]


ITEMS = 'item {\n  name: "bend/bow (at the waist)"\n  id: 1\n}\nitem{id:3 name:\'eat } "x"\'}\n# item { }\n'
LABELS = 'label {\r\n\tname: "walk"\r\n\tlabel_id: 1\r\n\tlabel_type: PERSON_MOVEMENT\r\n}\nlabel { name: "eat" ' \
    "label_id: 2 label_type: OBJECT_MANIPULATION }"  # fmt: skip


def test_both_dialects_of_label_maps(tmp_path: Path) -> None:
    found = read_action_list(written(tmp_path / "a.pbtxt", ITEMS))
    assert found.names == {1: "bend/bow (at the waist)", 3: 'eat } "x"'}
    assert (found.outputs, found.first, found.unnamed, found.groups) == (3, 1, [2], None), "ids keep their places"
    found = read_action_list(written(tmp_path / "b.pbtxt", LABELS))
    assert found.names == {1: "walk", 2: "eat"} and found.groups == {"pose": (0, 1), "object": (1, 2)}
    found = read_action_list(written(tmp_path / "c.pbtxt", 'item { name: "a" id: 0 } item { name: "b" id: 1 }'))
    assert list(found.ids) == [0, 1] and found.first == 0


def test_the_evaluation_list_of_ava(tmp_path: Path) -> None:
    ids = [one for one in range(1, 81) if one not in AVA_LEFT_OUT]
    text = "\n".join(f'item {{\n  name: "n{one}"\n  id: {one}\n}}' for one in ids)
    found = read_action_list(written(tmp_path / "a.pbtxt", text))
    assert len(ids) == 60 and found.outputs == 80 and is_ava(found) and found.groups == AVA_GROUPS
    facts = json.loads(found.to_json())
    assert facts["ids"] == list(range(1, 81)) and facts["evaluated"] == [one - 1 for one in ids]
    assert facts["names"][0] == "n1" and facts["names"][1] == "class 2" and facts["groups"]["object"] == [14, 63]
    again = read_action_list(written(tmp_path / "classes.json", found.to_json()))
    assert again == found


def test_label_maps_in_text(tmp_path: Path) -> None:
    found = read_action_list(written(tmp_path / "a.txt", "run\n2 people dance\n"))
    assert found.names == {1: "run", 2: "2 people dance"}
    assert read_action_list(written(tmp_path / "b.txt", "3 jump\n1,run\n")).names == {1: "run", 3: "jump"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.pbtxt", 'item { name: "a" id: 1 }\nitem { name: "b" id: 1 }', ":2: id 1 ('b') is that of 'a'"),
        ("a.pbtxt", 'item { name: "a" id: 1 }\nitem { name: "a" id: 2 }', ":2: 'a' is named already"),
        ("a.pbtxt", 'item { name: "a" }', ":1: a class needs"),
        ("a.pbtxt", 'item { name: "a" id: -1 }', "class id -1"),
        ("a.txt", "run\nrun\n", ":2: 'run' is named already"),
        ("a.txt", "", "holds no classes"),
        ("a.json", '{"names": ["a"], "ids": [1, 3], "evaluated": []}', "not the classes.json"),
    ],
)
def test_wrong_label_maps(name: str, text: str, message: str, tmp_path: Path) -> None:
    assert message in problems_of(read_action_list, written(tmp_path / name, text))[0]


def test_groups_by_their_sizes() -> None:
    assert parse_groups("pose:14,object:49,interaction:17", 80) == AVA_GROUPS
    with pytest.raises(ValueError, match="63 classes in all"):
        parse_groups("pose:14,object:49", 80)
    with pytest.raises(ValueError, match="NAME:CLASSES"):
        parse_groups("pose", 80)

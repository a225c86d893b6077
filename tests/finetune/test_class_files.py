"""Class files and labels in every usual form; what does not fit is said at the start."""

from collections import Counter
from pathlib import Path

import pytest

from finetune.classification import labels
from finetune.classification.class_files import misfits, read_names
from finetune.classification.labels import LabelMap, open_labels
from pretrain.errors import DataError, SampleError

NAMES = ("run", "walk fast", "2 people dance")
FORMS = {
    "plain.txt": "run\nwalk fast\n\n2 people dance\n",
    "mark.txt": "\ufeffrun\r\nwalk fast\r\n2 people dance\r\n",
    "from zero.txt": "0 run\n1 walk fast\n2 2 people dance\n",
    "from one.txt": "3 2 people dance\n1 run\n2 walk fast\n",
    "kinetics.csv": "id,name\n0,run\n1,walk fast\n2,2 people dance\n",
    "behind.txt": "run\t0\n2 people dance\t2\nwalk fast\t1\n",
    "list.json": '["run", "walk fast", "2 people dance"]',
    "numbers.json": '{"walk fast": 1, "run": 0, "2 people dance": 2}',
    "something.json": '{"walk fast": "1", "run": "0", "2 people dance": "2"}',
    "turned.json": '{"0": "run", "2": "2 people dance", "1": "walk fast"}',
    "config.json": '{"model_type": "vit", "id2label": {"0": "run", "1": "walk fast", "2": "2 people dance"}}',
    "mark.json": '\ufeff["run", "walk fast", "2 people dance"]',
}


@pytest.mark.parametrize("name", FORMS)
def test_every_usual_form(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FORMS[name], encoding="utf-8")
    assert read_names(str(tmp_path / name)) == NAMES


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", "Stra\xdfe\n".encode("latin-1"), "iconv -f latin1"),
        ("a.json", '["Stra\xdfe"]'.encode("latin-1"), "not in UTF-8"),
        ("a.txt", b"run\nwalk\nrun\n", "'run' more than once"),
        ("a.txt", b"\n \n", "no names"),
        ("a.json", b"{}", "allowed: a list of names"),
        ("a.json", b'{"run": 0, "walk": 2}', "0 to 1 .or 1 to 2., each once"),
        ("a.json", b'{"run": 0, "walk": 0}', "each once"),
        ("a.json", b'{"run": true}', "allowed: a list of names"),
        ("a.json", b'{"run": "zero"}', "allowed: a list of names"),
        ("a.json", b"[" * 100_000, "nested too deep"),
        ("a.json", b'[{"name": "run"}]', "allowed: a list of names"),
    ],
)
def test_what_is_no_class_file_is_said(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_names(str(tmp_path / name))


@pytest.mark.parametrize(
    ("label", "number"),
    [
        *((0, 0), (2.0, 2), ("2", 2), ("0 ", 0)),
        *(("walk fast", 1), (" walk fast", 1), ("walk [fast]", 1), ("2 people dance", 2)),
    ],
)
def test_labels_in_every_usual_form(label: object, number: int) -> None:
    assert int(LabelMap(3, NAMES).target(label)) == number


@pytest.mark.parametrize("label", [None, True, -1, 3, "3", 1.5, "None", "", "\u00b2", "Run", [0], float("nan")])
def test_labels_that_are_none(label: object) -> None:
    with pytest.raises(SampleError, match="label"):
        LabelMap(3, NAMES).target(label)


def test_names_that_are_numbers_are_names_first() -> None:
    assert [int(LabelMap(3, ("2", "0", "1")).target(label)) for label in ("2", "1", 2)] == [0, 2, 2]


@pytest.mark.parametrize(
    ("counts", "classes", "names", "told"),
    [
        ({"0": 5, "1": 5, "2": 1}, 3, (), ""),
        ({"0": 5, "2": 1}, 3, (), ""),
        ({"1": 5, "2": 5, "3": 1}, 3, (), "labels run from 1 to 3, classes from 0 to 2"),
        ({"0": 5, "4": 1}, 3, (), "labels 4 of 1 samples are no classes from 0 to 2; set model.classes=5"),
        ({"-1": 2, "0": 5}, 3, (), "labels -1 of 2 samples are no classes"),
        ({"run": 5, "walk fast": 2}, 3, NAMES, ""),
        ({"run": 5, "walk [fast]": 2}, 3, NAMES, ""),
        ({"run": 5, "walk  fast": 2}, 3, NAMES, "is 'walk  fast' meant to be 'walk fast'"),
        ({"None": 5, "0": 2}, 3, NAMES, "'None' are none of the 3 class names"),
        ({"run": 5, "1": 2}, 3, NAMES, ""),
        ({"run": 5}, 3, (), "no class names are known; set labels=auto"),
    ],
)
def test_misfits(counts: dict[str, int], classes: int, names: tuple[str, ...], told: str) -> None:
    found = "\n".join(misfits(counts, classes, names, "here"))
    assert told in found if told else not found, found


def test_a_source_that_does_not_fit_ends_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(counts: dict[str, int], rule: str = "integer") -> LabelMap:
        monkeypatch.setattr(labels, "count_labels", lambda shards: Counter(counts))
        return open_labels(rule, "shards", 3, "single")

    assert opened({"0": 1, "2": 5}).names == ()
    assert opened({"0": 1, "1": 5, "2": 1}, "auto").names == (), "folders named 0, 1, 2"
    assert opened({"b": 1, "a": 5, "c": 1}, "auto").names == ("a", "b", "c")
    with pytest.raises(DataError, match="labels run from 1 to 3"):
        opened({"1": 400, "2": 400, "3": 1})
    with pytest.raises(DataError, match="2 names and 1 numbers"):
        opened({"a": 1, "b": 5, "7": 1}, "auto")
    with pytest.raises(DataError, match="2 class names, but model.classes=3"):
        opened({"a": 1, "b": 5}, "auto")

"""What a sample's files hold, and by which reason it is counted where they don't."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from pretrain.data.members import Members
from pretrain.errors import SampleError


@pytest.mark.parametrize(
    ("files", "read", "reason"),
    [
        ({"jpg": b"", "json": b'{"caption": "cut'}, Members.texts, "text: the sample's json is damaged"),
        ({"jpg": b"", "json": b"[1, 2]"}, Members.texts, "text: the sample's json holds list"),
        ({"jpg": b"", "json": b'{"boxes": [[1,'}, Members.boxes, "boxes: the sample's json is damaged"),
        ({"jpg": b"", "json": b'{"label": '}, lambda members: members.label, "label: the sample's json is damaged"),
        ({"jpg": b"", "caption.json": b"null"}, Members.texts, "text: caption.json holds null"),
        ({"jpg": b"", "boxes.json": b"null"}, Members.boxes, "boxes: boxes.json holds null"),
        ({"jpg": b"", "boxes.json": b"[[1"}, Members.boxes, "boxes: boxes.json is damaged"),
        ({"jpg": b"", "caption.json": b'["a cat", 3]'}, Members.texts, "text: its json holds no text"),
        ({"jpg": b"", "json": b'{"caption": null}'}, Members.texts, "index: no text"),
        ({"jpg": b"", "json": b'{"meta": 3}'}, Members.boxes, "index: no boxes"),
        ({"txt": "caf\u00e9".encode("latin-1")}, Members.texts, "text: txt is not in UTF-8"),
    ],
)
def test_reasons(files: dict[str, bytes], read: Callable[[Members], Any], reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        read(Members(files, "a"))


def test_damaged_json_costs_only_what_is_read_of_it() -> None:
    members = Members({"tiff": b"II*", "txt": b"a cat", "json": b"{"}, "a")
    assert members.image() == b"II*" and members.text() == "a cat" and members.stamps is None


def test_texts_of_json() -> None:
    meta = {"caption": ["a cat", "one cat"], "boxes": [[1, 2, 3, 4]]}
    members = Members({"jpg": b"", "json": json.dumps({"caption": None, "meta": meta}).encode()})
    assert members.texts() == ["a cat", "one cat"] and members.boxes() == [[1, 2, 3, 4]]

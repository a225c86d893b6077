"""Keys, order and parts."""

import random
from pathlib import Path

import pytest

from pretrain.data.pack.discover import Item, gather
from pretrain.data.pack.pack_plan import Part, key_from, make_plan


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("class0/v_1.2", "class0/v_1_2"),
        ("../a//b", "a/b"),
        ("s3://bucket/x y", "bucket/x_y"),
        ("跑步", "_"),
        ("", "_"),
    ],
)
def test_key(name: str, key: str) -> None:
    assert key_from(name) == key


def test_long_keys_stay_different_and_short() -> None:
    one, two = key_from("a" * 300), key_from("a" * 301)
    assert one != two and len(one) == len(two) == 180


def test_colliding_names_get_the_same_keys_in_any_order() -> None:
    names = ["a.b/c.mp4", "a_b/c.mp4", "a b/c.mp4", "other.mp4"]
    items = [Item("/data/" + name, name) for name in names]
    keys = {item.name: item.key for item in make_plan(items).items}
    assert len(set(keys.values())) == 4 and keys["other.mp4"] == "other"
    for seed in range(5):
        mixed = random.Random(seed).sample(items, 4)
        plan = make_plan(mixed)
        assert {item.name: item.key for item in plan.items} == keys
        assert plan.items == make_plan(items).items


def test_repeated_paths_are_packed_once() -> None:
    plan = make_plan([Item("/a.mp4", "a.mp4"), Item("/b.mp4", "b.mp4"), Item("/a.mp4", "a.mp4", 3)])
    assert sorted(item.path for item in plan.items) == ["/a.mp4", "/b.mp4"]
    assert [item.label for item in plan.repeated] == [3]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_parts_cover_everything_once_and_equal_sizes_meet(count: int) -> None:
    plan = make_plan([Item(f"/{n}.mp4", f"{n}.mp4", size=n // 2) for n in range(200)])
    parts = [plan.part(Part(index, count)) for index in range(count)]
    assert sorted(item.path for part in parts for item in part) == sorted(item.path for item in plan.items)
    for part in parts:
        sizes = [item.size for item in part]
        assert all(sizes.count(size) == 2 for size in sizes)
    assert min(len(part) for part in parts) > 200 / count / 3


def test_fingerprint_depends_on_items_and_options() -> None:
    plan, other = make_plan([Item("/a.mp4", "a.mp4")]), make_plan([Item("/a.mp4", "a.mp4", size=5)])
    prints = {plan.fingerprint("x"), plan.fingerprint("y"), other.fingerprint("x")}
    assert len(prints) == 3 and plan.fingerprint("x") in prints


def test_folder_gives_labels_and_frame_folders(tmp_path: Path) -> None:
    for name in ("run/a.mp4", "run/deep/b.MOV", "top.mp4", "walk/clip7/img_1.jpg", "walk/clip7/img_2.jpg",
                 "run/notes.txt", ".hidden.mp4", "run/cover.jpg"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    items = {item.name: item for item in gather([str(tmp_path)])}
    assert set(items) == {"run/a.mp4", "run/deep/b.MOV", "top.mp4", "walk/clip7"}
    labels = {name: item.label for name, item in items.items()}
    assert labels == {"run/a.mp4": "run", "run/deep/b.MOV": "deep", "top.mp4": None, "walk/clip7": "walk"}
    assert items["walk/clip7"].is_folder and items["walk/clip7"].size == 10
    assert {item.label for item in gather([str(tmp_path)], labels="none")} == {None}

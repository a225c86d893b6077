"""Labels, frames and views of a sample; evaluation deals every video out once."""

import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finetune.classification.label_sources import source_rules
from finetune.classification.labels import (
    LabelMap,
    RangeFile,
    count_labels,
    imbalance_report,
    known_counts,
    open_labels,
    read_label,
    read_names,
)
from finetune.classification.validation import test_views as views_of_the_test
from finetune.classification.validation import video_sets
from finetune.classification.views import TrainingViews, held_out_videos
from finetune.recipe import load_tune_recipe
from pretrain.commands.pack import main
from pretrain.data.members import Members
from pretrain.data.samples import Place, SourceInfo
from pretrain.errors import DataError, SampleError
from pretrain.objectives.base import method_of
from pretrain.runtime import storage


def test_labels_are_names_numbers_or_lists() -> None:
    single = LabelMap(3, ("a", "b", "c"))
    assert [int(single.target(label)) for label in ("c", 0)] == [2, 0]
    assert LabelMap(3, ("a", "b", "c"), "multi").target(["a", 2]).tolist() == [1, 0, 1]
    assert LabelMap(2, (), "regression").target([1.5, -2]).tolist() == [1.5, -2]
    for labels, wrong in ((single, "d"), (single, 3), (single, None), (single, True), (single, -1),
                          (LabelMap(2, (), "regression"), [1.0]), (LabelMap(1, (), "regression"), "x")):  # fmt: skip
        with pytest.raises(SampleError, match="label"):
            labels.target(wrong)


def test_label_files(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("run\nwalk\n\n")
    (tmp_path / "names.json").write_text('{"walk": 1, "run": 0}')
    (tmp_path / "gap.json").write_text('{"walk": 2, "run": 0}')
    assert read_names(f"{tmp_path}/names.txt") == read_names(f"{tmp_path}/names.json") == ("run", "walk")
    with pytest.raises(DataError, match="each once"):
        read_names(f"{tmp_path}/gap.json")
    for text, told in (("[run", "not JSON"), ("7", "holds .7., allowed")):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(DataError, match=told):
            read_names(f"{tmp_path}/broken.json")
    with pytest.raises(DataError, match="2 class names, but model.classes=5"):
        open_labels(f"{tmp_path}/names.txt", "nowhere", 5, "single")


def test_labels_are_counted_once_and_kept_with_the_fingerprint(toy: Any) -> None:
    assert count_labels(f"{toy.folder}/train") == Counter(down=8, left=8, right=8)
    kept = toy.folder / "train" / "labels.json"
    text = kept.read_text()
    kept.write_text(text.replace('"left": 8', '"left": 9'))
    assert known_counts(f"{toy.folder}/train")["left"] == 9, "read, not counted again"  # type: ignore[index]
    kept.write_text(text.replace('"fingerprint": "', '"fingerprint": "x'))
    assert known_counts(f"{toy.folder}/train") is None and count_labels(f"{toy.folder}/train")["left"] == 8


def write_members(file: io.IOBase, files: list[tuple[str, bytes]]) -> int:
    """A tar in the order of its files, which webdataset's writer sorts; returns where the last one ends."""
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(f"./clips/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        return int(tar.offset)


def in_store(*files: tuple[str, bytes], key: str = "0001") -> RangeFile:
    """A sample of some members, in the middle of a shard."""
    content = io.BytesIO(bytes(1024))
    content.seek(1024)
    end = write_members(content, [(f"{key}.{name}", data) for name, data in files])
    storage.write_bytes("memory://labels/shard.tar", content.getvalue())
    return RangeFile("memory://labels/shard.tar", 1024, end - 1024)


#: Larger than what is read at once.
VIDEO = bytes(100_000)


@pytest.mark.parametrize(
    ("files", "label", "reads"),
    [
        ([("json", b'{"label": "walk"}'), ("mp4", VIDEO)], "walk", 1),
        ([("cls", b"7\n"), ("jpg", bytes(5000))], 7, 1),
        ([("cls", b"walk"), ("jpg", bytes(700)), ("json", b'{"fps": 25}')], "walk", 1),
        ([("json", b'{"fps": 25}'), ("CLS", b"3"), ("mp4", VIDEO)], 3, 1),
        ([("cls", b"3"), ("json", b'{"label": "walk"}')], "walk", 1),
        ([("json", b'{"fps": 25}'), ("mp4", VIDEO)], None, 1),
        ([("mp4", VIDEO), ("cls", b"walk")], "walk", 2),
        ([("json", b'{"fps": 25}'), ("mp4", VIDEO), ("wav", VIDEO), ("cls", b"3")], 3, 3),
        ([("mp4", VIDEO), ("json", b'{"label": "walk"}')], "walk", 2),
        ([("mp4", VIDEO), ("txt", b"a caption")], None, 2),
    ],
)
@pytest.mark.parametrize("key", ["0001", "long" * 40, "\u00fcml\u00e4ut", "caf\udce9"])
def test_a_label_is_found_wherever_it_lies(
    files: list[tuple[str, bytes]], label: Any, reads: int, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, plain, places = in_store(*files, key=key), storage.read_bytes, []
    monkeypatch.setattr(storage, "read_bytes", lambda *where: places.append(where) or plain(*where))
    assert read_label(sample, "shard: key") == label
    assert Members({name.lower(): data for name, data in files}).label == label, "as in training"
    # tarfile looks at the byte before a header, which may be the last one of a read.
    assert reads <= len(places) <= (reads if reads == 1 else 2 * reads)


@pytest.mark.parametrize(
    ("files", "message"),
    [([("json", b'{"label": ')], "json is damaged"), ([("json", b'{"a": "' + bytes(17 << 20))], "bytes of JSON")],
)
def test_a_label_that_cannot_be_read(files: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(DataError, match=f"shard: key: no readable label .*{message}"):
        read_label(in_store(*files), "shard: key")
    with pytest.raises(DataError, match="no readable label .no files in its place"):
        read_label(RangeFile("memory://labels/shard.tar", 100, 600), "shard: key")


def test_classes_of_foreign_shards_are_counted(toy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As other people write them: a picture, a json that says other things, the class behind it; two have no class."""
    picture = io.BytesIO()
    Image.effect_noise((200, 150), 90).save(picture, "PNG")
    files = []
    for number, name in enumerate(("run", "walk", "run", None, "")):
        files += [(f"{number}.json", b'{"width": 200}'), (f"{number}.png", picture.getvalue())]
        files += [] if name is None else [(f"{number}.cls", name.encode())]
    with open(tmp_path / "a-000000.tar", "wb") as file:
        write_members(file, files)
    assert main(["--index-only", str(tmp_path)]) == 0
    labels = open_labels("auto", str(tmp_path), 2, "single")
    assert labels.names == ("run", "walk") and count_labels(str(tmp_path)) == Counter(run=2, walk=1)
    assert "2 of 5 samples have no label, neither in their json nor in a member cls" in caplog.text


def test_a_class_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "a-000000.tar", "wb") as file:
        members = [
            (f"{n}.{end}", data) for n in (1, 2) for end, data in (("json", b'{"label": "caf\\udce9"}'), ("mp4", b""))
        ]
        write_members(file, members)
    assert main(["--index-only", str(tmp_path)]) == 0
    with pytest.raises(DataError, match=r"class 'caf\\udce9' is no text in UTF-8"):
        open_labels("auto", str(tmp_path), 1, "single")


@pytest.mark.parametrize("labels", ["auto", "integer"])
def test_shards_without_any_label_end_the_start(labels: str, tmp_path: Path) -> None:
    with open(tmp_path / "a-000000.tar", "wb") as file:
        write_members(file, [("0001.mp4", b"film"), ("0001.txt", b"a caption")])
    assert main(["--index-only", str(tmp_path)]) == 0
    with pytest.raises(DataError, match="no sample has one. Allowed are `label` in the samples' json and a .* `cls`"):
        open_labels(labels, str(tmp_path), 2, "single")


def test_imbalance() -> None:
    lines = imbalance_report(Counter(a=1000, b=999, c=10))
    assert "100.0 to 1" in lines[0] and "1 classes have less than 1/10" in lines[1] and lines[1].count("c;")
    assert len(imbalance_report(Counter(a=10, b=9))) == 1 and imbalance_report(Counter()) == []


def test_training_views_are_a_function_of_the_place(toy: Any) -> None:
    recipe = load_tune_recipe(str(toy.recipe))
    make = TrainingViews(recipe, source_rules(recipe))
    sets = video_sets(recipe, test=False)
    from pretrain.data.fetch import SampleReader
    from pretrain.data.samples import parse_sample

    members = parse_sample(SampleReader([sets[0].index], None, 10).read(0, 0, 1))
    source = SourceInfo("toy", (), 2)
    one = make(Place(0, 5, 0, 0, 1), source, members)
    assert one["video"].shape == (2, 4, 32, 32, 3) and one["video"].dtype == np.uint8
    assert one["target"].tolist() == [1, 1], "left, for both views"
    again, other = make(Place(0, 5, 0, 1, 0), source, members), make(Place(1, 5, 0, 0, 1), source, members)
    assert (one["video"] == again["video"]).all() and (one["video"] != other["video"]).any()
    assert (one["video"][0] != one["video"][1]).any()


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_evaluation_sees_every_video_once(toy: Any, world_size: int) -> None:
    recipe = load_tune_recipe(str(toy.recipe))
    sets, views = video_sets(recipe, test=True), views_of_the_test(recipe)
    dealt = [held_out_videos(sets, views, rank, world_size, 10) for rank in range(world_size)]
    keys = [video.batch["key"] for videos in dealt for video in videos]
    assert len(keys) == len(set(keys)) == 11 == sum(map(len, dealt))


def test_views_of_the_test_are_clips_times_crops(toy: Any) -> None:
    recipe = load_tune_recipe(str(toy.recipe))
    sets = video_sets(recipe, test=True)
    views = next(iter(held_out_videos(sets, views_of_the_test(recipe), 0, 1, 10))).batch["views"].numpy()
    assert views.shape == (6, 4, 32, 32, 3)
    # 64 x 48 with short side 32 is 42 x 32: crops of a clip begin at columns 0, 5 and 10 of the same frames.
    left, middle, right = views[:3]
    assert (left[:, :, 5:] == middle[:, :, :27]).all() and (left[:, :, 10:] == right[:, :, :22]).all()
    assert (views[0] != views[3]).any(), "another clip"


@pytest.mark.parametrize("split", ["val", "test"])
def test_held_out_videos_of_classes_that_are_not_trained_end_the_start(toy: Any, split: str, tmp_path: Path) -> None:
    with open(tmp_path / "a-000000.tar", "wb") as file:
        members = [("1.json", b'{"label": "left"}'), ("1.mp4", b""), ("2.json", b'{"label": "Right!"}'), ("2.mp4", b"")]
        write_members(file, members)
    assert main(["--index-only", str(tmp_path)]) == 0
    recipe = load_tune_recipe(str(toy.recipe), [f"data.sources.toy.{split}={tmp_path}"])
    with pytest.raises(DataError, match="which is held out: 'Right!' are none of the 3 .* meant to be 'right'"):
        method_of(recipe).samples()
    assert video_sets(recipe, test=True), "sliding windows need no labels"


def test_test_shards_that_are_not_there_end_the_start(toy: Any) -> None:
    recipe = load_tune_recipe(str(toy.recipe), [f"data.sources.toy.test={toy.folder}/nowhere"])
    with pytest.raises(DataError, match="nowhere/index.json: no readable index"):
        method_of(recipe).samples()

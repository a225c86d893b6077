"""Labels, frames and views of a sample; evaluation deals every video out once."""

import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from finetune.classification.label_sources import source_rules
from finetune.classification.labels import (
    LabelMap,
    count_labels,
    imbalance_report,
    known_counts,
    label_in_head,
    open_labels,
    read_names,
)
from finetune.classification.validation import test_views as views_of_the_test
from finetune.classification.validation import video_sets
from finetune.classification.videos import Videos
from finetune.classification.views import SourceRules, TrainingViews, training_frames, validation_frames
from finetune.recipe import load_tune_recipe
from pretrain.data.members import Members
from pretrain.data.randomness import generator
from pretrain.data.samples import Place, SourceInfo
from pretrain.errors import DataError, SampleError
from tests.toy_shards import index


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


def head(*files: tuple[str, bytes]) -> bytes:
    """The first bytes of a sample of some members."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files:
            info = tarfile.TarInfo(f"./clips/0001.{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()[: sum(512 + -(-len(data) // 512) * 512 for _, data in files)]


@pytest.mark.parametrize(
    ("files", "label"),
    [
        ([("json", b'{"label": "walk"}'), ("mp4", bytes(99))], "walk"),
        ([("cls", b"7\n"), ("jpg", bytes(5000))], 7),
        ([("cls", b"walk"), ("jpg", bytes(700)), ("json", b'{"fps": 25}')], "walk"),
        ([("json", b'{"fps": 25}'), ("CLS", b"3"), ("mp4", bytes(2048))], 3),
        ([("cls", b"3"), ("json", b'{"label": "walk"}')], "walk"),
        ([("json", b'{"fps": 25}'), ("mp4", bytes(99))], None),
    ],
)
def test_a_label_in_front_is_that_of_the_sample(files: list[tuple[str, bytes]], label: Any) -> None:
    assert label_in_head(head(*files), "shard: key") == label
    assert Members({name.lower(): data for name, data in files}).label == label, "as in training"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (head(("mp4", bytes(99))), "neither json nor cls is the first file"),
        (head(("json", b'{"label": "walk"}'))[:520], "neither json nor cls is the first file"),
        (head(("json", b'{"label": ')), "no readable json"),
        (bytes(1024), "neither json nor cls"),
    ],
)
def test_what_has_no_label_in_front(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_in_head(data, "shard: key")


def test_classes_of_foreign_shards_are_counted(toy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As other people write them: class, picture, and a json that says other things; one sample has no class."""
    picture = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(picture, "JPEG")
    with wds.TarWriter(str(tmp_path / "a-000000.tar")) as tar:
        for number, name in enumerate(("run", "walk", "run", None)):
            sample = {"__key__": f"{number:04d}", "jpg": picture.getvalue(), "json": {"width": 40}}
            tar.write(sample | ({"cls": name} if name else {}))
    index(tmp_path)
    labels = open_labels("auto", str(tmp_path), 2, "single")
    assert labels.names == ("run", "walk") and count_labels(str(tmp_path)) == Counter(run=2, walk=1)


def test_imbalance() -> None:
    lines = imbalance_report(Counter(a=1000, b=999, c=10))
    assert "100.0 to 1" in lines[0] and "1 classes have less than 1/10" in lines[1] and lines[1].count("c;")
    assert len(imbalance_report(Counter(a=10, b=9))) == 1 and imbalance_report(Counter()) == []


def test_training_frames() -> None:
    rules = SourceRules(LabelMap(2), "dense", 4, True, 224)
    drawn = [training_frames(100, 16, rules, generator(seed)) for seed in range(200)]
    ends = {int(indices[-1]) for indices in drawn}
    assert min(ends) == 63 and max(ends) == 98, "exclusive end uniform over 64 ... 99"
    assert all(len(indices) == 16 and (np.diff(indices) >= 4).all() for indices in drawn)
    sparse = SourceRules(LabelMap(2), "sparse", 4, False, 224)
    for seed in range(50):
        indices = training_frames(50, 16, sparse, generator(seed))
        assert (indices // 3 == np.arange(16)).all(), "one frame of each segment"
    for frames in (1, 5, 15, 16, 64, 65):
        for rule in (rules, sparse):
            for indices in (training_frames(frames, 16, rule, generator(0)), validation_frames(frames, 16, rule)):
                assert len(indices) == 16 and indices.min() >= 0 and indices.max() < frames


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
    dealt = [Videos(sets, views, rank, world_size, 10) for rank in range(world_size)]
    keys = [video["key"] for videos in dealt for video in videos]
    assert len(keys) == len(set(keys)) == 11 == sum(map(len, dealt))


def test_views_of_the_test_are_clips_times_crops(toy: Any) -> None:
    recipe = load_tune_recipe(str(toy.recipe))
    video = next(iter(Videos(video_sets(recipe, test=True), views_of_the_test(recipe), 0, 1, 10)))
    views = video["views"].numpy()
    assert views.shape == (6, 4, 32, 32, 3)
    # 64 x 48 with short side 32 is 42 x 32: crops of a clip begin at columns 0, 5 and 10 of the same frames.
    left, middle, right = views[:3]
    assert (left[:, :, 5:] == middle[:, :, :27]).all() and (left[:, :, 10:] == right[:, :, :22]).all()
    assert (views[0] != views[3]).any(), "another clip"

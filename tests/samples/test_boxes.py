"""Clips around keyframes: which frames, which boxes, what a batch of them holds, and what is refused."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.data.decoders import open_video
from pretrain.data.members import Members
from pretrain.data.samples import Place, Sample, SourceInfo
from pretrain.errors import SampleError
from pretrain.recipe.schema import Source
from pretrain.samples.box_facts import read_keyframe
from pretrain.samples.boxes import BoxSamples, Config, clip_offsets, keyframe_indices
from tests.toy_shards import encoded

SOURCE = SourceInfo("films", (), Source(shards=""))
WIDTH, HEIGHT, FRAMES, RATE = 80, 48, 30, 10
#: A white person on black, in pixels: 16..39 x 12..35, first and last.
PERSON = [16 / WIDTH, 12 / HEIGHT, 40 / WIDTH, 36 / HEIGHT]
FACTS = {
    "video": "film", "time": 902.0, "keyframe_s": 1.5, "width": WIDTH, "height": HEIGHT, "classes": 5,
    "persons": [{"box": PERSON, "labels": [1, 4], "person": 7}, {"box": [0.5, 0.1, 0.9, 1.0], "labels": []}],
    "detections": [{"box": [0.1, 0.2, 0.5, 0.6], "score": 0.97}, {"box": [0.0, 0.0, 0.5, 0.5], "score": 0.5}],
}  # fmt: skip


@pytest.fixture(scope="module")
def film() -> bytes:
    """Brightness of the background tells the frame: 4 levels each."""
    frames = np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    frames += 4 * np.arange(FRAMES, dtype=np.uint8)[:, None, None, None]
    frames[:, 12:36, 16:40] = 250
    return encoded(frames, RATE)


def members(film: bytes, **facts: Any) -> Members:
    return Members({"mp4": film, "boxes.json": json.dumps(FACTS | facts).encode()}, "film,902")


def made(film: bytes, position: int = 0, source: SourceInfo = SOURCE, **options: Any) -> dict[str, np.ndarray]:
    samples = BoxSamples(Config(**{"frames": 4, "stride": 2, "short_side": 48, "flip": 0.0} | options), 3, 5)
    return samples(Place(0, position, 0, 0, 0), source, members(film))


def numbers(clip: np.ndarray) -> list[int]:
    """Which frames a clip shows, by the corner that no person reaches."""
    return [round(frame[-4:, :8].mean() / 4) for frame in clip]


def test_places_of_the_keyframe() -> None:
    """The numbers of systems/action_detection.md sections 2.3 and 2.4."""
    assert clip_offsets(16, 4, "slowfast").tolist() == list(range(-32, 29, 4))
    assert clip_offsets(16, 4, "slowfast")[8] == 0
    assert (50 + clip_offsets(16, 4, "alphaction")).tolist() == list(range(19, 80, 4))
    assert [int(clip_offsets(16, 4, "alphaction", phase)[0]) for phase in range(4)] == [-32, -31, -30, -29]
    assert clip_offsets(5, 3, "slowfast")[0] == -7 and clip_offsets(5, 3, "alphaction")[0] == -8 + 1


def test_frames_lie_around_the_keyframe_and_repeat_at_the_ends(film: bytes) -> None:
    with open_video(film, "pyav") as reader:
        for seconds, stride, wanted in [(1.5, 2, [11, 13, 15, 17]), (0.2, 2, [0, 0, 2, 4]), (2.8, 4, [20, 24, 28, 29])]:
            keyframe = read_keyframe(members(film, keyframe_s=seconds), 5)
            assert keyframe_indices(reader, keyframe, Config(frames=4, stride=stride)).tolist() == wanted
        at_rate = Config(frames=4, stride=2, video_fps=5.0)  # counts every second frame of this film
        assert keyframe_indices(reader, read_keyframe(members(film), 5), at_rate).tolist() == [7, 11, 15, 19]
        with pytest.raises(SampleError, match=r"keyframe: keyframe film,902: 3.2 s into a video of 3.000 s"):
            keyframe_indices(reader, read_keyframe(members(film, keyframe_s=3.2), 5), Config())
    assert numbers(made(film)["video"][0]) == [11, 13, 15, 17]
    assert numbers(made(film, source=replace(SOURCE, options=Source(shards="", stride=1)))["video"][0]) == [
        13,
        14,
        15,
        16,
    ]


def test_slow_jitter_draws_the_first_frame(film: bytes) -> None:
    options = {"keyframe": "alphaction", "slow_jitter": True, "stride": 3}
    starts = {numbers(made(film, position, **options)["video"][0])[0] for position in range(20)}
    assert starts == {9, 10, 11}


@pytest.mark.parametrize("convention", ["alphaction", "slowfast", "continuous"])
@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("crop", ["none", "random"])
def test_the_box_lies_around_the_white_person(film: bytes, convention: str, flip: float, crop: str) -> None:
    """To a pixel, at three times the size: whatever is done to the pixels is done to the box."""
    options = {"convention": convention, "flip": flip, "crop": crop, "crop_size": 120, "short_side": 144}
    for position in range(3):
        arrays = made(film, position, **options)
        clip, box = arrays["video"][0], arrays["boxes"][0]
        white = np.argwhere(clip[0].mean(-1) > 150)
        (y1, x1), (y2, x2) = white.min(0), white.max(0)
        assert np.abs(box - [x1, y1, x2, y2]).max() <= 3.01, (position, box)
        assert arrays["sizes"].tolist() == [list(clip.shape[1:3])]
        assert arrays["originals"].tolist() == [[HEIGHT, WIDTH]]
    assert arrays["labels"].tolist() == [[0, 1, 0, 0, 1], [0] * 5] and arrays["persons"].tolist() == [7, -1]


def test_jitter_and_colour_are_drawn_by_the_sample(film: bytes) -> None:
    plain, options = made(film), {"jitter": True, "colour": "hsv", "flip": 0.5}
    same, other = (made(film, position, **options) for position in (0, 1))
    again = made(film, 0, **options)
    assert all((same[name] == again[name]).all() for name in same)
    assert (same["boxes"] != plain["boxes"]).any() and (same["boxes"] != other["boxes"]).any()
    assert (same["video"] != plain["video"]).any()


def test_labels_stay_with_their_persons(film: bytes) -> None:
    """Officially labels come from the full list and boxes from the sampled one."""
    persons = [{"box": [0, 0, 0.1 + 0.2 * n, 1], "labels": [n], "person": n} for n in range(5)]
    samples = BoxSamples(Config(frames=2, stride=1, short_side=48, flip=0.0, max_boxes=2), 3, 5)
    chosen = set()
    for position in range(12):
        arrays = samples(Place(0, position, 0, 0, 0), SOURCE, members(film, persons=persons))
        assert arrays["counts"].tolist() == [2] and len(arrays["boxes"]) == 2
        widths = np.rint((arrays["boxes"][:, 2] / WIDTH - 0.1) / 0.2).astype(int)
        assert (arrays["labels"].argmax(1) == widths).all() and (arrays["persons"] == widths).all()
        chosen.add(tuple(widths))
    assert len(chosen) > 3


def test_persons_that_a_crop_leaves_out(film: bytes) -> None:
    """Officially they stay, as boxes without area at the border; as an option they are dropped with their labels."""
    persons = [{"box": [0, 0, 0.3, 0.6], "labels": [0]}, {"box": [0.7, 0.4, 1, 1], "labels": [3]}]

    def counts(**options: Any) -> list[list[float]]:
        samples = BoxSamples(Config(frames=2, short_side=48, crop="random", crop_size=24, flip=0, **options), 3, 5)
        found = []
        for position in range(30):
            try:
                arrays = samples(Place(0, position, 0, 0, 0), SOURCE, members(film, persons=persons))
            except SampleError as error:
                assert error.reason == "cropped"
                continue
            area = (arrays["boxes"][:, 2:] - arrays["boxes"][:, :2]).prod(1)
            found.append([len(area), float(area.min()), *arrays["labels"].sum(0)[[0, 3]]])
        return found

    assert all(row[0] == 2 and row[2:] == [1, 1] for row in counts()) and len(counts()) == 30
    kept = counts(min_remaining=0.5)
    assert 0 < len(kept) < 30 and all(row[0] == 1 and row[1] > 20 and sum(row[2:]) == 1 for row in kept)


def test_a_batch_of_different_sizes(film: bytes) -> None:
    samples = BoxSamples(Config(frames=4, stride=2, short_side=40, pad=32), 3, 5)
    places = [Place(0, n, 0, 0, n) for n in range(3)]
    rows = [Sample(place, f"key{place.row}", samples(place, SOURCE, members(film))) for place in places[:2]]
    tall = encoded(np.full((8, 80, 48, 3), 200, np.uint8))
    alone = [{"box": [0, 0, 1, 1], "labels": [2]}]
    other = members(tall, keyframe_s=0.2, persons=alone, video="tall", time=3)
    rows.append(Sample(places[2], "key2", samples(places[2], SOURCE, other)))
    batch = samples.collate(rows)
    assert batch["video"].shape == (3, 4, 96, 96, 3) and batch["video"].dtype == torch.uint8
    assert batch["sizes"].tolist() == [[40, 67], [40, 67], [67, 40]]
    assert batch["originals"].tolist() == [[48, 80], [48, 80], [80, 48]]
    assert batch["counts"].tolist() == [2, 2, 1] and batch["boxes"].shape == (5, 4)
    assert batch["labels"].shape == (5, 5) and batch["box_scores"].tolist() == [1] * 5
    assert batch["videos"] == ["film", "film", "tall"] and batch["times"].tolist() == [902, 902, 3]
    assert batch["key"] == ["key0", "key1", "key2"] and batch["view"].tolist() == [0, 0, 0]
    for clip, (height, width) in zip(batch["video"], batch["sizes"].tolist(), strict=True):
        assert (
            clip[:, height:].sum() == 0 and clip[:, :, width:].sum() == 0 and clip[:, :height, :width].min(-1)[0].any()
        )
    assert rows[2].arrays["video"].shape == (1, 4, 67, 40, 3), "what was made stays as it is"


def test_keyframes_with_nobody_on_them_are_kept_where_asked(film: bytes) -> None:
    """Beside others in a batch; those of a detector alone are not, since nobody looked at them."""
    options = {"empty": "keep", "crop": "random", "crop_size": 32, "min_remaining": 0.2, "jitter": True, "flip": 1.0}
    samples = BoxSamples(Config(frames=4, stride=2, short_side=48, **options), 3, 5)  # type: ignore[arg-type]
    place = Place(0, 0, 0, 0, 0)
    nobody = samples(place, SOURCE, members(film, persons=[], annotated=True))
    some = samples(place, SOURCE, members(film, persons=[{"box": [0, 0, 1, 1], "labels": [2]}]))
    batch = samples.collate([Sample(place, "", one) for one in (nobody, some)])
    assert batch["counts"].tolist() == [0, 1] and batch["boxes"].shape == (1, 4) and batch["labels"].shape == (1, 5)
    with pytest.raises(SampleError, match="no_persons"):
        samples(place, SOURCE, members(film, persons=[], annotated=False))


def test_judged_clips(film: bytes) -> None:
    """No chance: whole frames, the detector's boxes above the threshold; the annotation beside them."""
    options = Config(
        frames=4, stride=2, short_side=48, crop="random", crop_size=32, jitter=True, colour="hsv", flip=1.0
    )
    by_truth = BoxSamples(options, 3, 5).without_chance(SOURCE, members(film))
    assert by_truth["video"].shape == (1, 4, 48, 80, 3) and numbers(by_truth["video"][0]) == [11, 13, 15, 17]
    assert (by_truth["boxes"] == by_truth["truth_boxes"]).all() and by_truth["box_scores"].tolist() == [1, 1]
    np.testing.assert_allclose(by_truth["boxes"][0], [16, 12, 40, 36], rtol=1e-6)
    detected = BoxSamples(options, 3, 5, detected=True)
    found = detected.without_chance(SOURCE, members(film))
    np.testing.assert_allclose(found["boxes"], [[8, 9.6, 40, 28.8]], rtol=1e-6)
    assert found["box_scores"].tolist() == [np.float32(0.97)] and found["counts"].tolist() == [1]
    assert found["truth_counts"].tolist() == [2] and found["truth_labels"].shape == (2, 5)
    nobody = detected.without_chance(SOURCE, members(film, persons=[], detections=[], annotated=True))
    batch = detected.collate([Sample(Place(0, n, 0, 0, n), "", one) for n, one in enumerate((found, nobody))])
    assert batch["counts"].tolist() == [1, 0] and batch["truth_counts"].tolist() == [2, 0]
    assert batch["annotated"].tolist() == [True, True]
    assert not read_keyframe(members(film, annotated=False), 5).annotated
    assert not read_keyframe(members(film, persons=[]), 5).annotated, "packed before there was the entry"
    assert batch["truth_boxes"].shape == (2, 4) and batch["labels"].shape == (1, 5)


def test_the_example_looks_like_a_batch(film: bytes) -> None:
    samples = BoxSamples(Config(frames=4, stride=2, short_side=48, flip=0.0), 3, 5)
    example = samples.example(2)
    real = samples.collate([Sample(Place(0, 0, 0, 0, 0), "", samples(Place(0, 0, 0, 0, 0), SOURCE, members(film)))])
    assert {name: getattr(value, "dtype", type(value)) for name, value in example.items()} == {
        name: getattr(value, "dtype", type(value)) for name, value in real.items()
    }
    assert example["video"].shape[1:] == (*Config(frames=4, short_side=48).size, 3)
    sides = example["sizes"].repeat_interleave(example["counts"], dim=0).flip(1).repeat(1, 2)
    assert (example["boxes"] >= 0).all() and (example["boxes"] <= sides).all() and example["labels"].sum() == 6


def box(**change: Any) -> dict[str, Any]:
    return {"persons": [{"box": PERSON, "labels": [1]} | change]}


@pytest.mark.parametrize(
    ("facts", "reason", "said"),
    [
        ({"persons": []}, "no_persons", "keyframe film,902: training needs a person"),
        ({"persons": [], "annotated": True}, "no_persons", "pack with --drop-empty"),
        (box(labels=[5]), "label", "label 5, allowed: outputs 0 to 4 (model.classes)"),
        (box(labels=[-1]), "label", "label -1"),
        (box(labels=[True]), "label", "label True"),
        (box(labels=["run"]), "label", "label 'run'"),
        (box(box=[0.1, 0.1, 1.2, 0.5]), "boxes", "keyframe film,902, persons: box [0.1, 0.1, 1.2, 0.5], allowed"),
        (box(box=[16, 12, 40, 36]), "boxes", "box [16.0, 12.0, 40.0, 36.0]"),
        (box(box=[0.5, 0.1, 0.5, 0.5]), "boxes", "allowed: x1 < x2"),
        (box(box=[0.1, 0.1, float("nan"), 0.5]), "boxes", "nan"),
        (box(box=[0.1, 0.1, 0.5]), "boxes", "no usable entry"),
        (box(box=None), "boxes", "no usable entry"),
        ({"keyframe_s": -1}, "boxes", "keyframe_s=-1"),
        ({"time": "soon"}, "boxes", "no usable entry"),
        ({"detections": [{"box": PERSON}]}, "boxes", "KeyError('score')"),
        ({"persons": 3}, "boxes", "no usable entry"),
        ({"annotated": "no"}, "boxes", "keyframe film,902: annotated 'no', allowed: true, false"),
    ],
)
def test_what_is_refused(film: bytes, facts: dict[str, Any], reason: str, said: str) -> None:
    samples = BoxSamples(Config(frames=2, stride=1, short_side=48), 3, 5)
    with pytest.raises(SampleError) as caught:
        samples(Place(0, 0, 0, 0, 0), SOURCE, members(film, **facts))
    assert caught.value.reason == reason and said in str(caught.value)


def test_rounded_coordinates_are_cut() -> None:
    keyframe = read_keyframe(members(b"", **box(box=[-0.0004, 0, 1.001, 1.0])), 5)
    assert keyframe.boxes.tolist() == [[0, 0, 1, 1]]


def test_sections_that_cannot_work() -> None:
    assert Config().problems() == []
    wrong = Config(frames=0, flip=1.5, views=2, crop="random", crop_size=300, slow_jitter=True)
    assert [line.partition(":")[0] for line in wrong.problems()] == [
        "input.frames", "input.flip", "input.views", "input.crop_size", "input.slow_jitter"
    ]  # fmt: skip
    assert Config(crop="random").size == (16, 224, 224) and Config().size == (16, 256, 464)
    assert Config(short_side=288, long_side=1333, pad=32, convention="slowfast").size == (16, 288, 512)

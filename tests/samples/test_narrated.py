"""Narrated films: words and times, alignment, windows, frames, crops, texts, and what is refused."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data.members import Members
from pretrain.data.samples import Place, SourceInfo
from pretrain.errors import SampleError
from pretrain.recipe.schema import Source
from pretrain.samples.narrated import Config, NarratedClips, part_frames, spread_frames
from pretrain.samples.transcripts import _distances, aligned, parse_transcript
from tests.narrated_films import COLOURS, RATE, film, make_tokenizer, narration
from tests.toy_shards import encoded

ORDER = ("green", "red", "white", "blue")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("narrated")
    make_tokenizer(folder / "tokenizer.json")
    return {"frames": 8, "height": 30, "width": 30, "narrated": ["films"], "seconds": (1,), "gap": 0.25,
            "tokenizer": str(folder / "tokenizer.json"), "context": 5}  # fmt: skip


def members(text: Any = None, video: bytes | None = None, **facts: Any) -> Members:
    facts |= {} if text is None else {"caption": text}
    return Members({"mp4": video or film(ORDER, 3), "json": json.dumps(facts).encode()}, "film03")


def made(samples: NarratedClips, source: str, of: Members, position: int = 0) -> dict[str, np.ndarray]:
    return samples(Place(0, position, 0, 0, 0), SourceInfo(source, [], Source(shards="")), of)


def levenshtein(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first):
        above, row = row, [i + 1]
        for j, other in enumerate(second):
            row.append(min(above[j] + (letter != other), above[j + 1] + 1, row[j] + 1))
    return row[-1]


def test_distances_of_words() -> None:
    draw = random.Random(0)
    some, others = (["".join(draw.choices("abé", k=draw.randint(1, most))) for _ in range(30)] for most in (9, 6))
    found, rows, columns = _distances(some, others)
    for i, first in enumerate(some):
        assert [found[rows[i], column] for column in columns] == [levenshtein(first, other) for other in others]


def costs_so_far(costs: np.ndarray) -> np.ndarray:
    """Cost of the best path to each pair, by the textbook."""
    table = np.full((costs.shape[0] + 1, costs.shape[1] + 1), np.inf)
    table[0, 0] = 0
    for i, j in np.ndindex(costs.shape):
        table[i + 1, j + 1] = costs[i, j] + min(table[i, j], table[i, j + 1], table[i + 1, j])
    return table[1:, 1:]


def test_alignment_lies_on_a_cheapest_path() -> None:
    draw = random.Random(1)
    words = ["cut", "the", "onion", "now", "and", "stir", "it", "well", "a", "pan"]
    for _ in range(30):
        better = draw.choices(words, k=draw.randint(2, 12))
        spoken = [word + "s" * (draw.random() < 0.3) for word in better if draw.random() < 0.8] or ["uh"]
        found = aligned(spoken, better)
        costs = np.array([[levenshtein(word, other) for other in better] for word in spoken])
        through = costs_so_far(costs) + costs_so_far(costs[::-1, ::-1])[::-1, ::-1] - costs
        assert (np.diff(found) >= 0).all()
        assert (through[found, np.arange(len(better))] == through[0, 0]).all(), (spoken, better, found)
    said = "so uh we cut the unions now".split()
    assert aligned(said, "So we cut the onions now".split()).tolist() == [0, 2, 3, 4, 5, 6]
    long = [f"word{number}" for number in range(500)]
    assert aligned(long, long[::1]).tolist() == list(range(500))
    missing = [word for number, word in enumerate(long) if number % 9]
    assert [long[place] for place in aligned(long, missing)] == missing


def test_transcripts_of_both_kinds() -> None:
    found = parse_transcript(narration(ORDER))
    assert found.words == ORDER and found.times.tolist() == pytest.approx([0.6, 1.85, 3.1, 4.35])
    assert found.between(0.6, 3.1) == "red" and found.between(0.59, 3.11) == "green red white"
    said = [{"word": word, "time": time} for word, time in (("b", 2), ("&gt;", 1), ("amp;", 1), ("â€œa", 1.5))]
    mended = parse_transcript({"subtitles": said})
    assert mended.words == ('"a', "b") and mended.times.tolist() == [1.5, 2]
    parts = [{"start": 1, "end": 3, "text": "one two"}, {"start": 3, "end": 4, "text": ""}]
    spread = parse_transcript({"segments": parts})
    assert spread.words == ("one", "two") and spread.times.tolist() == [1.5, 2.5]
    wrong: list[Any] = [{}, [], {"subtitles": [{"word": "a"}]}, {"subtitles": []}, {"segments": [{"text": "a"}]}, 7]
    wrong += [{"subtitles": [{"word": "a", "time": "nan"}]}, {"subtitles": [{"word": "a", "time": "soon"}]}]
    for content in wrong:
        with pytest.raises(SampleError, match="^narration"):
            parse_transcript(content)


def test_texts_and_frames_are_of_one_window(options: dict[str, Any]) -> None:
    """Each part of the window shows the colour that its text names, whenever the window begins."""
    samples = NarratedClips(Config(**options), 7, (16, 5))
    starts = set()
    for position in range(6):
        arrays = made(samples, "films", members(narration=narration(ORDER)), position)
        assert arrays["video"].shape == (1, 8, 30, 30, 3) and arrays["ids"].shape == (1, 4, 5)
        names = [samples._tokenizer.decode(ids) for ids in arrays["ids"][0]]
        assert names == list(ORDER) and arrays["cut"].tolist() == [0]
        # The two frames of each part; one of them may lie in the pause.
        centre = arrays["video"][0, :, 12:18, 12:18].mean((1, 2)).reshape(4, 2, 3)
        for name, colours in zip(ORDER, centre, strict=True):
            assert np.abs(colours - COLOURS[name]).max(1).min() < 40, (name, colours)
        assert sorted(set(arrays["visible"][0].tolist())) == sorted(arrays["visible"][0].tolist())
        assert arrays["visible"].shape == (1, 5) and arrays["visible"].max() < 16
        starts.add(arrays["video"].tobytes())
        again = made(samples, "films", members(narration=narration(ORDER)), position)
        assert all(np.array_equal(arrays[name], again[name]) for name in arrays)
    assert len(starts) == 6
    packed = made(samples, "films", members(meta=narration(ORDER)))
    assert np.array_equal(packed["ids"], made(samples, "films", members(narration=narration(ORDER)))["ids"])


def test_captions(options: dict[str, Any]) -> None:
    samples = NarratedClips(Config(**options), 7)
    arrays = made(samples, "clips", members(["a red square square square", "a person"]))
    again = [made(samples, "clips", members(["a red square square square", "a person"]), p) for p in range(8)]
    assert arrays["ids"].shape == (1, 1, 5) and "visible" not in arrays
    assert {int(one["cut"][0]) for one in again} == {0, 2}, "one of both is drawn, and lost tokens are counted"
    source = SourceInfo("held out", [], Source(shards=""))
    held_out = samples.without_chance(source, members(["a red square", "a person"]))
    assert samples._tokenizer.decode(held_out["ids"][0, 0]) == "a red square"
    textless = NarratedClips(Config(**options), 7, texts=False)
    only = textless.without_chance(source, members())
    assert set(only) == {"video"} and np.array_equal(only["video"], held_out["video"])


@pytest.mark.parametrize(
    ("source", "facts", "reason", "changed"),
    [
        ("clips", {"caption": "  "}, "text", {}),
        ("clips", {}, "index", {}),
        ("clips", {"caption": "привет мир"}, "text_unknown", {}),
        ("clips", {"caption": "a red square square"}, "text_too_long", {"too_long": "refuse"}),
        ("films", {}, "narration", {}),
        ("films", {"narration": None}, "narration", {}),
        ("films", {"narration": {"subtitles": narration(ORDER)["subtitles"][:3]}}, "narration", {}),
        ("films", {"narration": narration(ORDER)}, "narration", {"min_words": 2}),
        ("films", {"narration": narration(ORDER)}, "too_short", {"seconds": (2,)}),
        ("films", {"narration": narration(ORDER)}, "too_short", {"frames": 100}),
    ],
)
def test_what_can_not_be_used_is_refused_with_its_reason(
    options: dict[str, Any], source: str, facts: dict[str, Any], reason: str, changed: dict[str, Any]
) -> None:
    samples = NarratedClips(Config(**options | changed), 0)
    with pytest.raises(SampleError) as error:
        made(samples, source, members(**facts))
    assert error.value.reason == reason, error.value


def test_frames_of_parts() -> None:
    assert part_frames(12, 4, None).tolist() == [1, 4, 7, 10]
    assert part_frames(10, 4, None).tolist() == [0, 3, 5, 8]
    rng = np.random.default_rng(0)
    drawn = np.stack([part_frames(12, 4, rng) for _ in range(200)])
    assert [sorted(set(column)) for column in drawn.T.tolist()] == [[0, 1], [3, 4], [6, 7], [9, 10]]
    assert part_frames(4, 4, rng).tolist() == [0, 1, 2, 3]
    assert spread_frames(25, 12).tolist() == [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 24]


def test_crops_take_the_nearest_pixel(options: dict[str, Any], tmp_path: Path) -> None:
    """As torch's nearest interpolation of the whole frame, and then the crop."""
    import torch
    from torch.nn import functional

    frame = np.random.default_rng(0).integers(0, 255, (44, 60, 3), dtype=np.uint8)
    clip = np.repeat(frame[None], 2, 0)
    found = NarratedClips(Config(**options), 0)._cropped(clip, None)
    pixels = torch.from_numpy(clip).permute(0, 3, 1, 2).float()
    whole = functional.interpolate(pixels, size=(36, 49), mode="nearest").permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, whole[:, 3:33, 10:40].astype(np.uint8))
    rng = np.random.default_rng(2)
    places = {NarratedClips(Config(**options), 0)._cropped(clip, rng).tobytes() for _ in range(12)}
    assert len(places) > 6
    smooth = NarratedClips(Config(**options | {"interpolation": "bilinear"}), 0)._cropped(clip, None)
    assert smooth.shape == found.shape and not np.array_equal(smooth, found)


def test_a_picture_is_shown_all_the_time(options: dict[str, Any]) -> None:
    frame = np.random.default_rng(0).integers(0, 255, (44, 60, 3), dtype=np.uint8)
    one = members("a red square", encoded([frame], RATE))
    clip = made(NarratedClips(Config(**options), 0), "clips", one)["video"][0]
    assert (clip == clip[:1]).all()


def test_options_are_checked() -> None:
    wrong = Config(frames=0, views=2, seconds=(), gap=-1, scale=0.5, windows=0)
    lines = [line.split(":")[0] for line in wrong.problems()]
    assert lines == [f"input.{name}" for name in ("frames", "windows", "views", "seconds", "gap", "scale")]

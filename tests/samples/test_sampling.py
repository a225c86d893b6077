"""Where clips of a video with a grid of reference frames may begin."""

import json
from collections.abc import Callable

import numpy as np
import pytest

from pretrain.data.members import Members
from pretrain.data.samples import Place, SourceInfo
from pretrain.recipe.schema import Source
from pretrain.samples.clip import ClipSamples, Config
from pretrain.samples.sampling import grid_starts


@pytest.mark.parametrize(
    ("stride", "step", "phase", "expected"),
    [
        (4, 4, 3, [3, 7, 11, 15, 19]),
        (8, 4, 3, [3, 7, 11, 15, 19]),
        (2, 4, 3, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]),
        (3, 4, 2, list(range(20))),
        (1, 4, 2, list(range(20))),
        (4, 1, 0, list(range(20))),
    ],
)
def test_starts_meet_as_many_references_as_the_stride_can(
    stride: int, step: int, phase: int, expected: list[int]
) -> None:
    assert list(grid_starts(20, stride, step, phase)) == expected
    met = [sum((start + stride * i - phase) % step == 0 for i in range(16)) for start in range(20)]
    assert all(met[start] == max(met) for start in expected) or 1 in (stride, step) or stride == 3


def test_every_start_is_some_phases_start() -> None:
    """Over videos of random phase, the published starts: each of them once."""
    assert sorted(start for phase in range(4) for start in grid_starts(21, 4, 4, phase)) == list(range(21))


def test_a_video_too_short_for_its_phase_begins_anywhere() -> None:
    assert list(grid_starts(1, 4, 4, 3)) == [0]
    assert list(grid_starts(3, 4, 4, 3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"grid": {"step": 4, "phase": 2}}, (4, 2)),
        ({}, (1, 0)),
        ({"grid": "3x3"}, (1, 0)),
        ({"grid": {"step": 0, "phase": 0}}, (1, 0)),
        ({"grid": {"step": 4, "phase": -1}}, (1, 0)),
        ([1], (1, 0)),
    ],
)
def test_only_a_grid_is_taken_for_one(facts: object, expected: tuple[int, int]) -> None:
    assert Members({"json": json.dumps(facts).encode()}).grid == expected


def test_json_of_foreign_shards_may_be_damaged_or_missing() -> None:
    assert Members({"json": b"\xff{"}).grid == Members({}).grid == (1, 0)


@pytest.mark.parametrize(("grid", "residues"), [("auto", {3}), ("off", {0, 1, 2, 3})])
def test_clips_begin_on_the_grid_unless_told_otherwise(
    grid: str, residues: set[int], encode: Callable[..., bytes], frame_number: Callable[[np.ndarray], int]
) -> None:
    options = Config(frames=4, height=48, width=64, crop="center", grid=grid)  # type: ignore[arg-type]
    samples = ClipSamples(options, 0)
    facts = {"grid": {"step": 4, "phase": 3}}
    members = Members({"mp4": encode(frames=60), "json": json.dumps(facts).encode()})
    begins = set()
    for position in range(40):
        clip = samples(Place(0, position, 0, 0, 0), SourceInfo("a", (), Source(stride=4)), members)["video"][0]
        numbers = [frame_number(frame) for frame in clip]
        assert np.diff(numbers).tolist() == [4, 4, 4]
        begins.add(numbers[0])
    assert {begin % 4 for begin in begins} == residues and len(begins) > 6

"""Segments of a video: where they lie in training, validation and test."""

from itertools import product

import numpy as np
import pytest

from pretrain.data.randomness import generator
from pretrain.recipe.schema import Source
from pretrain.samples.frame_choice import VideoFacts
from pretrain.samples.motion import MotionOptions
from pretrain.samples.segments import Config


def starts(indices: np.ndarray, window: int = 5) -> list[int]:
    return indices[..., ::window].tolist()


def test_frames_follow_from_segments_and_window() -> None:
    assert Config().frames == 40 and Config(segments=16, window=1).frames == 16
    assert Config(segments=16).size == (80, 224, 224)
    assert Config(frames=40).problems() == []
    assert "input.frames: found 16, allowed: 40" in Config(frames=16).problems()[0]
    assert "input.segments: found 0, allowed: more than 0" in Config(segments=0).problems()
    assert "input.stride: found 4, allowed: 1" in Config(stride=4).problems()[0]
    assert "data.sources.k400.stride: found 2" in Config().source_problems("k400", Source("x", stride=2))[0]
    assert "found strided, allowed with input.name=segments" in Config().sampling_problems("a", "strided")[0]
    assert Config().sampling_problems("a", "sparse") == Config().sampling_problems("a", "dense") == []


@pytest.mark.parametrize("sampling", ["sparse", "dense"])
def test_any_length_gives_frames_of_the_video(sampling: str) -> None:
    for window, segments, length in product((1, 3, 5), (2, 8, 16), (*range(1, 30), 64, 65, 300)):
        for clips in ("random", "spread"):
            rule = Config(segments=segments, window=window, test_clips=clips).frame_choice(sampling, None)
            video, rng = VideoFacts(length), generator(length)
            found = [rule.training(video, rng), rule.validation(video), *rule.clips(video, 3, rng)]
            for indices in found:
                assert indices.shape == (segments * window,) and 0 <= indices.min() and indices.max() < length
                assert sampling == "dense" or (np.diff(indices[::window]) >= 0).all()


def test_training_draws_one_start_in_each_part() -> None:
    rule = Config().frame_choice("sparse", None)
    drawn = np.array([starts(rule.training(VideoFacts(44), generator(seed))) for seed in range(200)])
    assert (drawn // 5 == np.arange(8)).all(), "parts of floor((44 - 4) / 8) frames"
    assert all(set(drawn[:, part] % 5) == set(range(5)) for part in range(8))
    short = np.array([starts(rule.training(VideoFacts(11), generator(seed))) for seed in range(200)])
    assert (np.diff(short) >= 0).all() and set(short.ravel()) == set(range(7))
    assert not rule.training(VideoFacts(8), generator(0))[::5].any()


def test_test_clips_are_drawn_or_spread() -> None:
    drawn, spread = (Config(test_clips=kind).frame_choice("sparse", None) for kind in ("random", "spread"))
    video = VideoFacts(84)
    for rule in (drawn, spread):
        assert (rule.clips(video, 1, generator(0))[0] == rule.validation(video)).all()
    clips = drawn.clips(video, 10, generator("a video"))
    assert clips.shape == (10, 40) and len({tuple(one) for one in clips.tolist()}) == 10
    assert (clips == drawn.clips(video, 10, generator("a video"))).all()
    assert (clips != drawn.clips(video, 10, generator("another"))).any()
    assert starts(spread.clips(video, 2, generator(0)))[0] == [2, 12, 22, 32, 42, 52, 62, 72]
    assert starts(spread.clips(video, 2, generator(0)))[1] == [7, 17, 27, 37, 47, 57, 67, 77]


def test_dense_clips_lie_in_64_frames() -> None:
    rule = Config(test_clips="spread").frame_choice("dense", None)
    assert starts(rule.validation(VideoFacts(100))) == [18, 26, 34, 42, 50, 58, 66, 74]
    assert starts(rule.validation(VideoFacts(20))) == [0, 8, 16, 4, 12, 0, 8, 16], "begins again"
    begins = {starts(rule.training(VideoFacts(66), generator(seed)))[0] for seed in range(50)}
    assert begins == {0, 1, 2}
    assert [row[0] for row in starts(rule.clips(VideoFacts(84), 3, generator(0)))] == [0, 10, 20]


def test_segments_by_motion_lie_around_what_moves() -> None:
    """A window stands around its frame, and is cut where the video ends (systems/mgsampler.md section 5)."""
    motion = np.zeros(59, dtype=np.float32)
    motion[[20, 57]] = 1.0
    rule = Config(segments=2, window=5, motion=MotionOptions(rule="inverse")).frame_choice("motion", None)
    found = rule.validation(VideoFacts(60, motion)).reshape(2, 5)
    assert found.tolist() == [[18, 19, 20, 21, 22], [55, 56, 57, 58, 59]]
    assert not Config().sampling_problems("a", "motion")
    assert "windows of 5 frames" in Config(motion=MotionOptions(pairs=True)).problems()[0]

"""Frames by motion: the rule of MGSampler, its edges, and the choice of a clip's frames (systems/mgsampler.md)."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from finetune.classification.frame_facts import choice_of, facts_of
from pretrain.data.randomness import generator
from pretrain.errors import SampleError, WeightsError
from pretrain.samples.augmented_clip import Config
from pretrain.samples.frame_choice import VideoFacts
from pretrain.samples.motion import MotionOptions, distribution, positions, training_targets
from pretrain.samples.motion import test_targets as middle_targets
from pretrain.samples.motion_choice import motion_choice
from pretrain.samples.motion_curves import FeatureDifference, convolution_of, measure_of, motion_curve

#: Section 3 of the specification.
EXAMPLE = [0.04, 0.16, 0.36, 0.16, 0.04]


def chosen(curve: Any, count: int, frames: int | None = None, clips: int = 1, **options: Any) -> np.ndarray:
    """Frames of a test's clips, [clips, frames]."""
    motion = None if curve is None else np.asarray(curve, dtype=np.float32)
    length = frames or (0 if motion is None else len(motion) + 1)
    rule = motion_choice(count, options.pop("window", 1), MotionOptions(**options))
    return rule.clips(VideoFacts(length, motion), clips, generator("unused"))


@pytest.mark.parametrize(("count", "expected"), [(4, [1, 2, 3, 4]), (8, [1, 1, 2, 2, 3, 3, 4, 4])])
def test_the_worked_example(count: int, expected: list[int]) -> None:
    shares = distribution(EXAMPLE)
    assert shares is not None
    np.testing.assert_allclose(shares, [0.1111, 0.3333, 0.6667, 0.8889, 1.0], atol=5e-5)
    assert (chosen(EXAMPLE, count)[0] + 1).tolist() == expected


def test_steady_motion_never_reaches_the_last_frame() -> None:
    assert (chosen(np.ones(16), 16)[0] + 1).tolist() == [1, 1, *range(2, 16)]


def test_a_spike_gets_most_frames() -> None:
    curve = np.full(30, 1e-3)
    curve[17] = 5.0
    found = chosen(curve, 16)[0]
    assert (np.isin(found, (16, 17))).sum() > 10 and (np.diff(found) >= 0).all()


def test_no_exponent_is_uniform_in_time_whatever_moves() -> None:
    rng = np.random.default_rng(0)
    uneven = rng.random(40) ** 8
    uneven[:10] = 0
    assert (chosen(uneven, 16, mu=0.0) == chosen(np.ones(40), 16)).all()
    assert (chosen(np.zeros(40), 16, mu=0.0) == chosen(np.ones(40), 16)).all()


def test_the_inverse_rule_reaches_the_wanted_share() -> None:
    shares = distribution(EXAMPLE)
    assert shares is not None
    targets = np.array([0.0, 0.1, 0.12, 0.34, 0.9, 0.9999999])
    assert positions(shares, targets, "inverse").tolist() == [0, 0, 1, 2, 4, 4]
    assert positions(np.array([0.5, 1 - 1e-16]), np.array([1.0]), "inverse").tolist() == [1], "a rounded end"
    assert (chosen(EXAMPLE, 8, rule="inverse") != chosen(EXAMPLE, 8)).any()


def test_training_draws_one_share_in_each_part() -> None:
    for seed in range(20):
        assert (training_targets(8, generator(seed)) * 8).astype(int).tolist() == list(range(8))
    curve = np.random.default_rng(1).random(50).astype(np.float32)
    rule = Config(frames=8).frame_choice("motion", None)
    drawn = [rule.training(VideoFacts(51, curve), generator(seed)) for seed in range(50)]
    assert all((np.diff(found) >= 0).all() and found.min() >= 0 and found.max() < 50 for found in drawn)
    assert len({tuple(found) for found in drawn}) > 40, "drawn anew"
    assert (rule.training(VideoFacts(51, curve), generator(3)) == drawn[3]).all(), "by the sample's generator alone"


def test_clips_of_a_test_share_out_each_part() -> None:
    targets = middle_targets(4, 3)
    assert targets.shape == (3, 4) and (np.sort(targets.T.reshape(-1)) == targets.T.reshape(-1)).all()
    np.testing.assert_allclose(targets.T.reshape(-1), (np.arange(12) + 0.5) / 12, atol=1e-15)
    curve = np.random.default_rng(1).random(500)
    clips = chosen(curve, 4, clips=3)
    assert clips.shape == (3, 4) and (clips.T.reshape(-1) == chosen(curve, 12)[0]).all()
    facts = VideoFacts(501, curve.astype(np.float32))
    rule = Config(frames=4).frame_choice("motion", None)
    assert (rule.validation(facts) == rule.clips(facts, 1, generator(0))[0]).all()


@pytest.mark.parametrize(
    ("curve", "frames"),
    [(np.zeros(40), 41), (None, 41), ([np.nan] * 40, 41), ([1.0] * 39 + [np.inf], 41), ([], 41)],
    ids=["static", "missing", "nan", "inf", "empty"],
)
def test_without_motion_frames_are_uniform_in_time(curve: Any, frames: int) -> None:
    assert chosen(curve, 4, frames)[0].tolist() == [5, 15, 25, 35]
    assert chosen(curve, 4, 2)[0].tolist() == [0, 0, 1, 1] if curve is None else True


def test_one_frame_is_repeated() -> None:
    for curve in (None, []):
        assert chosen(curve, 4, 1).tolist() == [[0, 0, 0, 0]]
        assert chosen(curve, 4, 1, strict=True, pairs=True).tolist() == [[0, 0, 0, 0]]


def test_values_below_nothing_count_as_nothing() -> None:
    assert (chosen([-1e-9, *EXAMPLE, -1e-9], 8) == chosen([0, *EXAMPLE, 0], 8)).all()


@pytest.mark.parametrize("curve", [None, [np.nan] * 40])
def test_strict_refuses_a_video_without_curve(curve: Any) -> None:
    with pytest.raises(SampleError, match="^motion: .*run launch/motion_index.py, or set input.motion.strict=false"):
        chosen(curve, 4, 41, strict=True)
    assert chosen(np.zeros(40), 4, strict=True).shape == (1, 4), "nothing moves: that is known"


@pytest.mark.parametrize(("frames", "length"), [(40, 40), (42, 40), (200, 190), (3, 1)])
def test_a_curve_of_another_decoder_is_moved(frames: int, length: int) -> None:
    curve = np.random.default_rng(2).random(length)
    found, own = chosen(curve, 8, frames)[0], chosen(curve, 8)[0]
    assert found.max() <= frames - 2 and (np.diff(found) >= 0).all()
    assert np.abs(found - own * (frames - 1) / length).max() <= 1


@pytest.mark.parametrize(("frames", "length"), [(40, 30), (100, 300), (5, 1)])
def test_a_curve_of_another_video_is_refused(frames: int, length: int) -> None:
    with pytest.raises(SampleError, match=f"its curve is of {length + 1} frames and the video has {frames}"):
        chosen(np.ones(length), 4, frames)


def test_pairs_show_the_motion_of_each_tubelet() -> None:
    curve = np.random.default_rng(3).random(60)
    found = chosen(curve, 16, pairs=True)[0]
    assert (found[::2] == chosen(curve, 8)[0]).all() and (found[1::2] == found[::2] + 1).all()
    uniform = chosen(None, 16, 9, pairs=True)[0]
    assert uniform.max() == 8 and (np.diff(uniform.reshape(-1, 2)) <= 1).all(), "the last frame has none after it"


def test_windows_lie_around_the_chosen_frames() -> None:
    curve = np.random.default_rng(4).random(60)
    curve[:3] = 10
    found = chosen(curve, 40, window=5)[0].reshape(8, 5)
    centres = chosen(curve, 8)[0]
    assert (found == np.clip(centres[:, None] + np.arange(-2, 3), 0, 60)).all()
    assert found.min() == 0, "clamped at the start"


def test_the_rule_travels() -> None:
    rule = Config(frames=8, motion=MotionOptions(mu=0.3, pairs=True)).frame_choice("motion", 3)
    assert pickle.loads(pickle.dumps(rule)) == rule and rule.needs_motion
    facts = {"clip": [8, 32, 32]} | facts_of(rule)
    assert facts["sampling"] == "motion" and choice_of(facts, "a.onnx") == rule


def test_options_that_can_t_work() -> None:
    assert not Config(motion=MotionOptions(mu=1.0)).problems()
    (wrong,) = Config(motion=MotionOptions(mu=1.5)).problems()
    assert wrong.startswith("input.motion.mu: found 1.5, allowed: from 0")
    (odd,) = Config(frames=7, motion=MotionOptions(pairs=True)).problems()
    assert odd.startswith("input.motion.pairs: 7 frames can't be halved")


def test_measures_of_frames_that_do_not_fit() -> None:
    frames = np.zeros((3, 6, 40, 3), dtype=np.uint8)
    with pytest.raises(SampleError, match="motion: frames of 40 x 6 pixels, ssim needs 7 x 7"):
        motion_curve(frames, measure_of("ssim"))
    assert motion_curve(frames, measure_of("abs")).tolist() == [0, 0]
    assert motion_curve(frames[:1], measure_of("abs")).shape == (0,)
    with pytest.raises(SampleError, match="frames of .* in one video"):
        motion_curve([frames[0], frames[0, :5]], measure_of("abs"))


@pytest.mark.parametrize("kind", ["ssim", "abs", "feature"])
def test_what_stands_still_has_no_motion(kind: Any) -> None:
    """Exactly, or a still film would be sampled by roundings."""
    rng = np.random.default_rng(5)
    still = np.repeat(rng.integers(0, 256, (1, 20, 30, 3), dtype=np.uint8), 4, axis=0)
    weights = {"weight": rng.normal(size=(8, 3, 7, 7)).astype("f4"), "bias": np.zeros(8, "f4")}
    tensors = {f"module.PA.shallow_conv.{name}": torch.from_numpy(value) for name, value in weights.items()}
    measure = convolution_of(tensors, "pan.pth") if kind == "feature" else measure_of(kind)
    curve = motion_curve(still, measure)
    if isinstance(measure, FeatureDifference):
        np.testing.assert_allclose(curve, 20 * 30 * 8**0.5 * 1e-6, rtol=1e-3)  # the constant inside of the norm
    else:
        assert not curve.any()


def test_a_small_side_keeps_the_shape_of_the_curve() -> None:
    rng = np.random.default_rng(6)
    ground = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(12, axis=0).repeat(16, axis=1)
    steps = [0, 0, 1, 2, 8, 16, 16, 17]
    frames = [np.roll(ground, step, axis=1) for step in steps]
    full, small = (motion_curve(frames, measure_of("abs"), side) for side in (None, 32))
    assert np.corrcoef(full, small)[0, 1] > 0.98 and (motion_curve(frames, measure_of("abs"), 500) == full).all()


def test_weights_that_are_no_convolution() -> None:
    with pytest.raises(WeightsError, match="pan.pth: no module.PA.shallow_conv.weight and .bias.*found other"):
        convolution_of({"other": torch.zeros(1)}, "pan.pth")
    wrong = {"shallow_conv.weight": torch.zeros(8, 4, 7, 7), "shallow_conv.bias": torch.zeros(8)}
    with pytest.raises(WeightsError, match=r"shallow_conv.weight has shape \[8, 4, 7, 7\]"):
        convolution_of(wrong, "pan.pth")
    with pytest.raises(WeightsError, match="needs the weights of its convolution"):
        measure_of("feature")

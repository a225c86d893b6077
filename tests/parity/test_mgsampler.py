"""Curves, distributions and frame numbers equal those of the released MGSampler (systems/mgsampler.md)."""

import re
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from pretrain.samples.motion import distribution, positions, training_targets
from pretrain.samples.motion import test_targets as middle_targets
from pretrain.samples.motion_curves import AbsoluteDifference, convolution_of, grey, measure_of, motion_curve

KINDS = ("mgsampler",)
#: Entries of the file with chosen frames: how many, and the exponent.
CHOSEN = re.compile(r"test_indices_1based_n(?P<count>\d+)(_mu(?P<mu>[\d.]+))?")


class GivenDraws:
    """A generator whose next numbers are known."""

    def __init__(self, draws: np.ndarray) -> None:
        self.draws = draws

    def random(self, size: int) -> np.ndarray:
        assert size == len(self.draws)
        return self.draws


def within(case: Any, quantity: str) -> float:
    """The tolerance that the meta file states."""
    found = re.search(rf"{quantity} (\d\S*\d)", case.meta["tolerance"])
    assert found, case.meta["tolerance"]
    return float(found[1])


def frames(curve: Any, targets: np.ndarray, mu: float = 0.5) -> list[int]:
    """Chosen frames, counted from 1."""
    shares = distribution(curve, mu)
    assert shares is not None
    return (positions(shares, targets).reshape(-1) + 1).tolist()


def test_frames_of_curves(case: Any) -> None:
    entries = case.meta.get("data", [])
    for e in entries:
        assert len(e["diffs"]) == e["num_frames"] - 1
        np.testing.assert_allclose(distribution(e["diffs"]), e["cdf"], rtol=0, atol=within(case, "cdf abs"))
        found = [match for match in map(CHOSEN.fullmatch, e) if match]
        assert len(found) >= 4, "the names of the file are understood"
        for match in found:
            targets = middle_targets(int(match["count"]))
            assert frames(e["diffs"], targets, float(match["mu"] or 0.5)) == e[match.string], (e["name"], match.string)
        for name in [name for name in e if name.startswith("train_indices_1based_n")]:
            assert frames(e["diffs"], np.array(e["train_draws"])) == e[name], (e["name"], name)
    assert entries or "tensors" in case.meta


def test_targets_are_drawn_one_in_each_part(case: Any) -> None:
    """The draws of the file, made again from where each lies in its part."""
    for draws in [np.array(e["train_draws"]) for e in case.meta.get("data", [])]:
        count = len(draws)
        inside = draws * count - np.arange(count)
        assert ((inside >= 0) & (inside < 1)).all()
        given: Any = GivenDraws(inside)
        np.testing.assert_allclose(training_targets(count, given), draws, rtol=0, atol=1e-15)


@pytest.fixture
def tensors(case: Any) -> dict[str, np.ndarray]:
    if "tensors" not in case.meta:
        pytest.skip("curves only")
    return {name: tensor.numpy() for name, tensor in case.tensors().items()}


def test_structural_similarity(case: Any, tensors: dict[str, np.ndarray]) -> None:
    assert (grey(tensors["frames_rgb"]) == tensors["frames_gray"]).all()
    curve = motion_curve(tensors["frames_rgb"], measure_of("ssim"))
    np.testing.assert_allclose(curve, tensors["one_minus_ssim"], rtol=0, atol=within(case, "ssim"))
    count = len(tensors["test_indices_ssim"])
    assert frames(curve, middle_targets(count)) == tensors["test_indices_ssim"].tolist()
    assert frames(curve, tensors["train_draws_ssim"]) == tensors["train_indices_ssim"].tolist()


def test_absolute_difference(case: Any, tensors: dict[str, np.ndarray]) -> None:
    measure = AbsoluteDifference()
    curve = motion_curve(tensors["frames_rgb"], measure)
    assert curve.tolist() == tensors["abs_diff_rgb_sum"].tolist()
    assert motion_curve(tensors["frames_gray"], measure).tolist() == tensors["abs_diff_gray_sum"].tolist()
    indices = tensors["test_indices_abs_rgb"]
    assert frames(curve, middle_targets(len(indices))) == indices.tolist()


def test_features(case: Any, tensors: dict[str, np.ndarray]) -> None:
    rtol = within(case, "rel")
    measure = convolution_of(load_file(case.weights), case.weights)
    prepared = [measure.prepare(frame) for frame in tensors["frames_rgb"]]
    maps = [measure.distances(*two).numpy() for two in zip(prepared, prepared[1:], strict=False)]
    np.testing.assert_allclose(maps, tensors["feature_diff_map"], rtol=1e-4, atol=1e-4)
    curve = motion_curve(tensors["frames_rgb"], measure)
    np.testing.assert_allclose(curve, tensors["feature_motion"], rtol=rtol)
    np.testing.assert_allclose(distribution(curve), tensors["feature_cdf"], rtol=rtol)
    indices = tensors["test_indices_feature"]
    assert frames(curve, middle_targets(len(indices))) == indices.tolist()

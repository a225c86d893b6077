"""Masks of objects: the pixels and texts of pycocotools 2.0.11, and what is none."""

from typing import Any

import numpy as np
import pytest

from pretrain.data.instance_masks import (
    check_segmentation,
    mask_of,
    mask_of_runs,
    packed_runs,
    runs_of,
    unpacked_runs,
)


def drawn(*rows: str) -> np.ndarray:
    return np.array([[letter == "x" for letter in row] for row in rows])


def test_a_square_ends_where_its_corners_lie() -> None:
    """Corners at whole numbers are borders between pixels; at halves they are pixels' centres, which count."""
    square = [1, 1, 1, 3, 4, 3, 4, 1]
    assert np.array_equal(mask_of([square], 4, 6), drawn("......", ".xxx..", ".xxx..", "......"))
    # Two parts are joined, also where they lie over one another; outside of the picture nothing is left.
    both = mask_of([square, [3, 2, 9, 2, 9, 9, 3, 9]], 4, 6)
    assert np.array_equal(both, drawn("......", ".xxx..", ".xxxxx", "...xxx"))
    assert not mask_of([[20, 20, 20, 30, 30, 30]], 4, 6).any() and not mask_of([[-9, -9, -2, -9, -5, -2]], 4, 6).any()


def polygons(seed: int, count: int = 40) -> list[tuple[list[float], int, int]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        height, width, corners = (int(rng.integers(low, high)) for low, high in ((1, 60), (1, 60), (3, 12)))
        digits = int(rng.integers(0, 3))
        found.append((rng.uniform(-15, 75, 2 * corners).round(digits).tolist(), height, width))
    return found


def test_pixels_are_those_of_pycocotools() -> None:
    """A sum of all pixels' numbers, weighted by their place, over 40 polygons; computed with pycocotools 2.0.11."""
    sums = [0, 0]
    for polygon, height, width in polygons(11):
        mask = mask_of([polygon], height, width)
        sums[0] += int(mask.sum())
        sums[1] += int((mask * np.arange(1, height * width + 1).reshape(height, width)).sum())
    assert sums == [9645, 8976191]


@pytest.mark.parametrize("seed", [1, 2])
def test_equal_to_pycocotools(seed: int) -> None:
    reference: Any = pytest.importorskip("pycocotools.mask")
    for polygon, height, width in polygons(seed):
        (encoded,) = reference.frPyObjects([polygon], height, width)
        expected = reference.decode(encoded).astype(bool)
        assert np.array_equal(mask_of([polygon], height, width), expected)
        again = reference.encode(np.asfortranarray(expected.astype(np.uint8)))["counts"].decode()
        assert packed_runs(runs_of(expected)) == again


def test_run_lengths_go_there_and_back() -> None:
    rng = np.random.default_rng(0)
    for height, width, share in ((7, 5, 0.5), (40, 33, 0.02), (1, 9, 1.0), (6, 1, 0.0), (300, 400, 0.001)):
        mask = rng.uniform(size=(height, width)) < share
        runs = runs_of(mask)
        assert sum(runs) == height * width and np.array_equal(mask_of_runs(runs, height, width), mask)
        assert unpacked_runs(packed_runs(runs)) == runs
        packed = {"size": [height, width], "counts": packed_runs(runs)}
        assert np.array_equal(mask_of(packed, height, width), mask)
    # Down the columns: the second pixel of the first row is the third of six.
    assert runs_of(drawn(".x", "..", "..")) == [3, 1, 2] and runs_of(drawn("x.", "..")) == [0, 1, 3]
    assert packed_runs([3, 1, 2]) == "312" and packed_runs([100, 40, 7, 9]) == "T3X17QO"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ([[1, 2, 3, 4]], "a polygon of 4 numbers, allowed: x and y of three corners"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 numbers"),
        ([[1, 2, 3, float("nan"), 5, 6]], "a polygon of 6 numbers, .*finite"),
        ([[1, 2, 3, "x", 5, 6]], "something else than numbers"),
        ([3, 4], "a polygon of 1 numbers"),
        ({"size": [5, 4], "counts": [20]}, r"a mask of \[5, 4\], the picture has \[4, 5\]"),
        ({"size": [4, 5], "counts": [19]}, "run lengths of 19 pixels, the picture has 20"),
        ({"size": [4, 5], "counts": [25, -5]}, "allowed: a list of whole numbers from 0 on"),
        ({"size": [4, 5], "counts": "T"}, "end within a number"),
        ({"size": [4, 5], "counts": "3 1"}, "where there is no such letter"),
        ({"size": [4, 5], "counts": "o" * 40}, "where there is no such letter"),
        ("0110", "neither a list of polygons nor a dictionary"),
    ],
)
def test_what_is_no_mask_is_told(wrong: Any, told: str) -> None:
    for read in (mask_of, check_segmentation):
        with pytest.raises(ValueError, match=told):
            read(wrong, 4, 5)

"""Augmentations: the same for all frames, a function of the sample alone, nothing global touched."""

import copy
import random

import numpy as np
import pytest
from PIL import Image

from finetune.recipe import Augment
from pretrain.data.randomness import generator
from pretrain.samples import augment
from pretrain.samples.augment import erase, rand_augment, randaugment, resized_crop_box

OFFICIAL = "rand-m7-n4-mstd0.5-inc1"


def clip(frames: int = 4, height: int = 40, width: int = 56) -> np.ndarray:
    """The same picture in every frame."""
    picture = generator("picture").integers(0, 255, (height, width, 3), dtype=np.uint8)
    return np.stack([picture] * frames)


@pytest.mark.parametrize("seed", range(12))
def test_randaugment_is_equal_in_all_frames_and_touches_nothing_global(seed: int) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    first = rand_augment(clip(), OFFICIAL, generator(seed))
    random.random()  # whatever others draw
    again = rand_augment(clip(), OFFICIAL, generator(seed))
    assert (first == first[:1]).all() and (first == again).all()
    assert first.dtype == np.uint8 and first.shape == clip().shape
    random.setstate(states[0])
    rand_augment(clip(), OFFICIAL, generator(seed))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # type: ignore[index, union-attr]


def test_randaugment_is_timm_with_the_official_operations() -> None:
    policy = randaugment(OFFICIAL)
    assert policy.num_layers == 4 and len(policy.ops) == 15
    assert {op.name for op in policy.ops} == {
        "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd",
        "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing", "ShearX", "ShearY",
        "TranslateXRel", "TranslateYRel",
    }  # fmt: skip
    assert {(op.prob, op.magnitude, op.magnitude_std) for op in policy.ops} == {(0.5, 7, 0.5)}
    changed = sum((rand_augment(clip(1), OFFICIAL, generator(seed)) != clip(1)).any() for seed in range(60))
    assert 40 < changed < 60  # four operations with probability 1/2 each; some change little


@pytest.mark.parametrize("level", [0, 2.5, 9.99, 10])
def test_every_operation_works_at_every_level(level: float) -> None:
    """Pillow 13 refuses to keep 0 bits, which is what timm's PosterizeIncreasing does at level 10."""
    picture = Image.fromarray(clip(1)[0])
    for notation in ("rand-m9", "rand-m9-inc1", "rand-m9-inc1-t3a", "rand-m9-inc1-t3aw", "rand-m9-tweights"):
        for op in randaugment(notation).ops:
            strongest = copy.copy(op)
            strongest.prob, strongest.magnitude, strongest.magnitude_std = 1.0, level, 0
            found = strongest(picture)
            assert (found.mode, found.size) == ("RGB", picture.size), op.name
            if op.name == "PosterizeIncreasing" and level == 10:
                assert not np.asarray(found).any(), "no bit is left"


def test_resized_crop_boxes() -> None:
    boxes = [resized_crop_box(56, 40, (0.08, 1.0), (0.75, 4 / 3), generator(seed)) for seed in range(300)]
    assert all(0 <= b.x <= 56 - b.width and 0 <= b.y <= 40 - b.height for b in boxes)
    shares = np.array([b.width * b.height / (56 * 40) for b in boxes])
    assert 0.06 < shares.min() and 0.4 < shares.mean() < 0.6 and len(set(boxes)) > 290
    # Nothing of this aspect fits: the largest allowed box in the middle.
    assert resized_crop_box(100, 10, (1.0, 1.0), (0.75, 4 / 3), generator(0)) == (43, 0, 13, 10)


def test_erasing_takes_one_box_with_fresh_noise_in_every_frame() -> None:
    before = np.full((5, 40, 56, 3), 7, np.uint8)
    after = erase(before, generator(3))
    changed = (after != before).any(axis=-1)
    rows, columns = np.flatnonzero(changed.any(axis=(0, 2))), np.flatnonzero(changed.any(axis=(0, 1)))
    box = after[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert 0.015 < box[0].size / after[0].size < 0.36
    assert (before == 7).all(), "the input stays as it is"
    assert all((box[i] != box[i + 1]).mean() > 0.9 for i in range(4))
    normal = (box / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert abs(normal.mean()) < 0.15 and abs(normal.std() - 1) < 0.15


def test_views_differ_and_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    def view(number: int, flip: bool = True) -> np.ndarray:
        def draw(purpose: str) -> np.random.Generator:
            return generator(0, 1, 2, number, purpose)

        return augment.augment(clip(), Augment(), flip, (32, 24), draw)

    assert view(0).shape == (4, 24, 32, 3)
    assert (view(0) == view(0)).all() and (view(0) != view(1)).any()
    # A source that forbids flips never gets one: half of the views are mirrored otherwise.
    plain = Augment(randaugment=None, erasing=0)
    mirrored = 0
    for number in range(40):
        draw = lambda purpose, n=number: generator(0, 0, 0, n, purpose)  # noqa: E731
        without = augment.augment(clip(), plain, False, (32, 24), draw)
        mirrored += (augment.augment(clip(), plain, True, (32, 24), draw) == without[:, :, ::-1]).all()
    assert 10 < mirrored < 30


def test_erasing_reaches_the_published_aspects_and_tries_a_hundred_boxes() -> None:
    # In a strip only the flattest boxes fit, so that ten tries would often find none.
    strip = np.full((1, 10, 300, 3), 7, np.uint8)
    found = [(erase(strip, generator(seed)) != strip).any(axis=(0, 3)) for seed in range(300)]
    assert np.mean([changed.any() for changed in found]) > 0.97
    square = np.full((1, 200, 200, 3), 7, np.uint8)
    boxes = [(erase(square, generator(seed)) != square).any(axis=(0, 3)) for seed in range(1200)]
    ratios = np.array([box.any(axis=1).sum() / box.any(axis=0).sum() for box in boxes])
    assert 3.31 < ratios.max() < 3.45 and 0.29 < ratios.min() < 0.31, "height / width from 0.3 to 10/3"

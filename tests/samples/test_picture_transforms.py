"""Pictures of input.name=picture against timm's own transforms, fed with the draws that ours made: every pixel."""

import contextlib
import functools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.data.randomness import generator
from pretrain.runtime.vision_ops import ensure_torchvision
from pretrain.samples.augment import grey_levels
from pretrain.samples.picture import Config
from pretrain.samples.picture_transforms import Picture, erase_boxes
from pretrain.samples.pixel_augment import PixelAugment

ensure_torchvision()
from timm.data import auto_augment, create_transform, random_erasing  # noqa: E402
from timm.data import transforms as timm_transforms  # noqa: E402
from torchvision import transforms  # noqa: E402
from torchvision.transforms.functional import to_pil_image  # noqa: E402

RAND = "rand-m9-mstd0.5-inc1"
ERASING = {"pixel": "pixel", "colour": "rand", "mean": "const"}
Log = dict[str, list[tuple[str, Any]]]


def picture(height: int, width: int, seed: int = 0) -> Picture:
    """Smooth colours with edges: noise alone would hide a shift by a pixel after resizing."""
    rng, (y, x) = generator("picture", seed), np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(3, 30) + y / rng.uniform(3, 30) + rng.uniform(0, 6)) for _ in range(3)]
    pixels = 127 + 100 * np.stack(waves, axis=-1) + rng.normal(0, 8, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return pixels.clip(0, 255).astype(np.uint8)


class Recorder:
    """A generator that keeps what it was asked for."""

    def __init__(self, rng: np.random.Generator, kept: list[tuple[str, Any]]) -> None:
        self._rng, self._kept = rng, kept

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*words: Any, **options: Any) -> Any:
            value = getattr(self._rng, name)(*words, **options)
            self._kept.append((name, value))
            return value

        return call


class Fed:
    """Python's `random` as a module of timm sees it, with the numbers that ours drew."""

    def __init__(self, kept: list[tuple[str, Any]], integers: list[int]) -> None:
        self._floats = [value for name, value in kept if name in ("uniform", "random")]
        self._integers = integers

    def uniform(self, low: float, high: float) -> float:
        assert low <= self._floats[0] <= high
        return self._floats.pop(0)

    def random(self) -> float:
        return self._floats.pop(0)

    def randint(self, low: int, high: int) -> int:
        assert low <= self._integers[0] <= high
        return self._integers.pop(0)

    def choice(self, options: Any) -> Any:
        return options[self._integers.pop(0)]

    @property
    def is_empty(self) -> bool:
        return not self._floats and not self._integers


def integers(kept: list[tuple[str, Any]]) -> list[int]:
    return [int(value) for name, value in kept if name == "integers"]


@contextlib.contextmanager
def feeding(log: Log, boxed: bool) -> Iterator[None]:
    """timm draws what `log` says; at the end it must have drawn all of it."""
    crop = integers(log["crop"])
    if boxed:
        crop[:2] = crop[1::-1]  # timm draws the row first
    fed = {timm_transforms: Fed(log["crop"], crop), random_erasing: Fed(log["erasing"], integers(log["erasing"]))}
    with pytest.MonkeyPatch.context() as patch:
        for module, source in fed.items():
            patch.setattr(module, "random", source)
        noise = iter([value for name, value in log["erasing"] if name == "standard_normal"])
        patch.setattr(random_erasing, "_get_pixels", functools.partial(fed_pixels, noise))
        patch.setattr(torch, "rand", lambda _: torch.tensor([log["flip"][0][1]], dtype=torch.float64))
        patch.setattr(np.random, "choice", functools.partial(fed_operations, log["randaugment"]))
        patch.setattr(transforms.ColorJitter, "get_params", functools.partial(fed_jitter, log["jitter"]))
        yield
    assert all(source.is_empty for source in fed.values()) and not list(noise), "timm asked for as many numbers"


def fed_pixels(noise: Iterator[Any], per_pixel: bool, colour: bool, size: Any, **_: Any) -> torch.Tensor:
    if not per_pixel and not colour:
        return torch.zeros(size[0], 1, 1)
    values = torch.from_numpy(next(noise))
    return values.permute(2, 0, 1) if per_pixel else values[:, None, None]


def fed_operations(kept: list[tuple[str, Any]], ops: Any, count: int, replace: bool, p: Any) -> list[Any]:
    (_, chosen), (_, seeds) = kept
    assert len(chosen) == count

    def seeded(op: Any, seed: int, image: Any) -> Any:
        random.seed(seed)
        return op(image)

    return [functools.partial(seeded, ops[index], int(seed)) for index, seed in zip(chosen, seeds, strict=True)]


def fed_jitter(kept: list[tuple[str, Any]], *ranges: Any) -> tuple[Any, ...]:
    (_, factors), (_, order) = kept
    assert all(low <= factor <= high for factor, (low, high) in zip(factors, ranges, strict=False))
    return (torch.tensor([*order, 3]), *(float(factor) for factor in factors), None)


def both(view: int, source: Picture, augment: PixelAugment, **options: Any) -> tuple[Picture, Picture, Log]:
    """A training view, the one that timm makes of the same draws, and the draws."""
    log: Log = defaultdict(list)
    config = Config(height=48, width=48, **options)
    ours = config.training_view(
        source[None],
        augment,
        True,
        lambda purpose: Recorder(generator(3, view, purpose), log[purpose]),  # type: ignore[arg-type,return-value]
    )
    pipeline = create_transform(
        48, is_training=True, scale=augment.area, ratio=augment.aspect, interpolation=config.interpolation,
        color_jitter=config.colour_jitter or None, auto_augment=augment.randaugment, re_prob=augment.erasing,
        re_mode=ERASING[config.erase_with], re_count=config.erase_boxes,
    )  # fmt: skip
    boxed = len(integers(log["crop"])) >= 2
    with feeding(log, boxed):
        theirs = pipeline(to_pil_image(source))
    return ours[0], grey_levels(theirs.permute(1, 2, 0).numpy()), log


SETTINGS: dict[str, tuple[PixelAugment, dict[str, Any]]] = {
    "DeiT": (PixelAugment(randaugment=RAND, erasing=0.25), {}),
    "random filters": (PixelAugment(randaugment="rand-m9-n3-mstd0.5", erasing=0), {"interpolation": "random"}),
    "weighted operations": (PixelAugment(randaugment="rand-m7-n2-mstd1-inc1-tweights", erasing=0), {}),
    "jitter": (PixelAugment(randaugment=None, erasing=1.0), {"colour_jitter": 0.4, "erase_with": "colour"}),
    "bilinear": (PixelAugment(randaugment=None, area=(0.5, 1), erasing=1.0),
                 {"interpolation": "bilinear", "colour_jitter": 1.3, "erase_with": "mean", "erase_boxes": 3}),
    "middle alone": (PixelAugment(randaugment=None, area=(0.9, 1), aspect=(1.9, 2.0), erasing=0), {"colour_jitter": 0}),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shape", [(61, 90), (80, 40)])
def test_training_views_are_timms_to_the_pixel(name: str, shape: tuple[int, int]) -> None:
    augment, options = SETTINGS[name]
    seen, fallbacks = set(), 0
    for view in range(12):
        ours, theirs, log = both(view, picture(*shape, view), augment, **options)
        assert ours.shape == (48, 48, 3) and np.array_equal(ours, theirs), f"view {view}"
        seen.add(ours.tobytes())
        fallbacks += len(integers(log["crop"])) < 2
    assert len(seen) == 12
    assert (fallbacks == 12) == (name == "middle alone"), "a box of this aspect never fits: the largest in the middle"


def test_nothing_global_is_touched_and_views_repeat() -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index,union-attr]
    augment, config = SETTINGS["DeiT"][0], Config(height=48, width=48)
    views = [
        config.training_view(picture(61, 90)[None], augment, True, functools.partial(generator, 1, number))
        for number in (0, 0, 1)
    ]
    assert np.array_equal(views[0], views[1]) and not np.array_equal(views[0], views[2])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]  # type: ignore[index,union-attr]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_half_of_the_pictures_are_mirrored_where_the_source_allows_it() -> None:
    plain, config = PixelAugment(randaugment=None, erasing=0), Config(height=48, width=48, colour_jitter=0)
    mirrored = 0
    for number in range(40):
        draw = functools.partial(generator, 2, number)
        without = config.training_view(picture(61, 90)[None], plain, False, draw)
        found = config.training_view(picture(61, 90)[None], plain, True, draw)
        mirrored += np.array_equal(found, without[:, :, ::-1])
        assert np.array_equal(found, without) or np.array_equal(found, without[:, :, ::-1])
    assert 10 < mirrored < 30


@pytest.mark.parametrize("shape", [(48, 48), (61, 90), (90, 61), (30, 40), (301, 47), (333, 500)])
@pytest.mark.parametrize(("size", "share"), [(48, 0.875), (33, 0.9), (40, 1.0), (64, 0.95)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluated_pictures_are_timms_to_the_pixel(
    shape: tuple[int, int], size: int, share: float, interpolation: Any
) -> None:
    config = Config(height=size, width=size, crop="center", interpolation=interpolation, crop_share=share)
    # crop=center: a training view that is the evaluated one.
    found = config.training_view(picture(*shape)[None], PixelAugment(), True, None)  # type: ignore[arg-type]
    timm = create_transform(size, is_training=False, interpolation=interpolation, crop_pct=share, normalize=False)
    assert np.array_equal(found[0], timm(to_pil_image(picture(*shape))).permute(1, 2, 0).numpy())


def test_the_resized_side_is_deits() -> None:
    found = [Config(height=size, width=size).evaluated_side for size in range(16, 1025, 16)]
    assert found == [int(256 / 224 * size) for size in range(16, 1025, 16)]
    assert Config(interpolation="random").evaluated_filter == "bicubic"


def test_several_boxes_share_the_area() -> None:
    def erased(most: int) -> float:
        shares = []
        for number in range(200):
            view = np.full((60, 60, 3), 7, np.uint8)
            erase_boxes(view, "mean", most, generator(most, number))
            shares.append((view != 7).any(axis=2).mean())
        return float(np.mean(shares))

    assert 0.12 < erased(4) < erased(1) < 0.2, "overlaps take a little"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"frames": 2}, "input.frames: found 2, allowed: 1"),
        ({"height": 32}, "input.height=32, input.width=224: allowed: one number for both"),
        ({"crop_share": 1.5}, "input.crop_share: found 1.5"),
        ({"colour_jitter": -1.0}, "input.colour_jitter: found -1.0"),
        ({"erase_boxes": 0}, "input.erase_boxes: found 0, allowed: 1 or more"),
    ],
)
def test_what_can_not_work_is_said(options: dict[str, Any], expected: str) -> None:
    (problem,) = Config(**options).problems()
    assert problem.startswith(expected)
    assert Config().problems() == []


def test_timms_operations_are_looked_up_where_they_are_fed() -> None:
    """The names that these tests replace are those that timm uses; else they would compare nothing."""
    assert auto_augment.np is np and auto_augment.random is random

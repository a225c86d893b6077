"""Two views of pictures and clips: pixels beside torchvision's operations on the same draws, how often, and of what."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pretrain.data.members import Members
from pretrain.data.randomness import generator
from pretrain.data.samples import Place, SourceInfo, draws
from pretrain.recipe.schema import Source
from pretrain.runtime.vision_ops import ensure_torchvision
from pretrain.samples.image_views import Config, ImageViews
from pretrain.samples.picture_transforms import evaluated_picture
from pretrain.samples.view_augment import ViewAugment, augmented_view, view_box, view_problems

ensure_torchvision()
from torchvision.transforms import InterpolationMode, functional  # noqa: E402

SOURCE = SourceInfo("films", (), Source(shards=""))
NOTHING = ViewAugment(jitter_share=0, grey=0, blur=0, solarise=0, flip=0)
ADJUST = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, functional.adjust_hue)


def picture(height: int = 47, width: int = 61) -> np.ndarray:
    """Smooth colours and noise."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7 + channel) + np.cos(y / (5 + channel)) for channel in range(3)], axis=-1)
    return (127 + 55 * waves + generator("views").normal(0, 9, waves.shape)).clip(0, 255).astype(np.uint8)


def png(pixels: np.ndarray) -> Members:
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "png")
    return Members({"png": stored.getvalue()})


def place(position: int) -> Place:
    return Place(epoch=1, position=position, source=0, shard=0, row=0)


def expected(pixels: np.ndarray, size: int, options: ViewAugment, draw: Any) -> np.ndarray:
    """MoCo-v3's list of transforms, by torchvision's functions and the numbers that were drawn."""
    box = view_box(pixels.shape[1], pixels.shape[0], options, draw)
    image = functional.resized_crop(
        Image.fromarray(pixels), box.y, box.x, box.height, box.width, [size, size], InterpolationMode.BILINEAR
    )
    if (rng := draw("jitter")).random() < options.jitter_share:
        b, c, s, h = options.jitter
        factors = rng.uniform([1 - b, 1 - c, 1 - s, -h], [1 + b, 1 + c, 1 + s, h])
        for number in rng.permutation(4):
            image = ADJUST[number](image, float(factors[number]))
    if draw("grey").random() < options.grey:
        image = functional.rgb_to_grayscale(image, 3)
    if (rng := draw("blur")).random() < options.blur:
        image = image.filter(ImageFilter.GaussianBlur(radius=rng.uniform(0.1, 2.0)))
    if draw("solarise").random() < options.solarise:
        image = functional.solarize(image, 128)
    if draw("flip").random() < options.flip:
        image = functional.hflip(image)
    return np.asarray(image)


def test_every_pixel_is_that_of_the_published_transforms() -> None:
    """Twenty pictures; between them all operations come up, in both views."""
    options, pixels = Config(height=24, width=24), picture()
    for position in range(20):
        views = ImageViews(options, seed=7)(place(position), SOURCE, png(pixels))["video"]
        assert views.shape == (2, 1, 24, 24, 3)
        each = zip(views, (options.first, options.second), draws(7, place(position), 2), strict=True)
        assert all(np.array_equal(view[0], expected(pixels, 24, how, draw)) for view, how, draw in each)
        assert not np.array_equal(views[0], views[1])


@pytest.mark.parametrize(("name", "shares"), [("jitter_share", (0.8, 0.8)), ("grey", (0.2, 0.2)), ("blur", (1, 0.1)),
                                              ("solarise", (0, 0.2)), ("flip", (0.5, 0.5))])  # fmt: skip
def test_operations_are_as_frequent_as_published(name: str, shares: tuple[float, float]) -> None:
    pixels, tries = picture(8, 8)[None], 500
    for view, options in enumerate((Config().first, Config().second)):
        # No faint blur, which may round to nothing.
        alone = replace(NOTHING, area=(1, 1), aspect=(1, 1), blur_radius=(1, 2), **{name: getattr(options, name)})
        made = (augmented_view(pixels, (8, 8), alone, draws(3, place(n), 2)[view]) for n in range(tries))
        share = np.mean([not np.array_equal(one, pixels) for one in made])
        assert abs(share - shares[view]) <= 3 * np.sqrt(shares[view] * (1 - shares[view]) / tries)


def test_all_frames_of_a_view_are_treated_alike() -> None:
    frames = np.repeat(picture()[None], 3, axis=0)
    for position in range(12):
        (draw,) = draws(0, place(position), 1)
        view = augmented_view(frames, (16, 16), Config().second, draw)
        assert np.array_equal(view[0], view[1]) and np.array_equal(view[0], view[2])


def shown(views: np.ndarray, frame_number: Callable[[np.ndarray], int]) -> list[list[int]]:
    return [[frame_number(frame) for frame in view] for view in views]


@pytest.mark.parametrize("frames", [1, 4])
def test_views_of_a_film_are_clips_of_their_own_or_one(
    frames: int, encode: Callable[..., bytes], frame_number: Callable[[np.ndarray], int]
) -> None:
    plain = replace(NOTHING, area=(1, 1), aspect=(1, 1))
    film = Members({"mp4": encode(frames=60, width=64, height=64)})
    starts: dict[str, list[tuple[int, int]]] = {}
    for clips in ("own", "same"):
        options = Config(frames=frames, stride=3, height=64, width=64, clips=clips, first=plain, second=plain)  # type: ignore[arg-type]
        found = [shown(ImageViews(options, 1)(place(n), SOURCE, film)["video"], frame_number) for n in range(12)]
        assert all(np.diff(view).tolist() == [3] * (frames - 1) for views in found for view in views)
        starts[clips] = [(first[0], second[0]) for first, second in found]
    assert all(first == second for first, second in starts["same"])
    assert sum(first != second for first, second in starts["own"]) > 8
    assert [first for first, _ in starts["own"]] == [first for first, _ in starts["same"]]
    middle = shown(ImageViews(options, 1).without_chance(SOURCE, film)["video"], frame_number)
    assert len(middle) == 1 and abs(np.mean(middle[0]) - 29.5) < 4


@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
def test_a_sample_is_the_same_again_and_has_odd_sizes(decoder: Any, encode: Callable[..., bytes]) -> None:
    pytest.importorskip(decoder.replace("pyav", "av"))
    options = Config(frames=3, height=19, width=19, decoder=decoder)
    film = Members({"mp4": encode(frames=20, width=70, height=46)})
    first, again = (ImageViews(options, 5)(place(2), SOURCE, film)["video"] for _ in range(2))
    assert first.shape == (2, 3, 19, 19, 3) and np.array_equal(first, again)
    assert not np.array_equal(first, ImageViews(options, 6)(place(2), SOURCE, film)["video"])
    tall = ImageViews(Config(height=9, width=9), 5)(place(0), SOURCE, png(picture(101, 3)))["video"]
    assert tall.shape == (2, 1, 9, 9, 3)


def test_held_out_samples_are_cut_without_chance() -> None:
    pixels = picture()
    middle = evaluated_picture(pixels, 21, 24, "bilinear")
    samples = ImageViews(Config(height=21, width=21), 5)
    assert np.array_equal(samples.without_chance(SOURCE, png(pixels))["video"], middle[None, None])
    centred = ImageViews(Config(height=21, width=21, crop="center"), 5)(place(3), SOURCE, png(pixels))["video"]
    assert np.array_equal(centred, np.stack([middle[None]] * 2))


def test_a_batch_has_the_views_of_a_sample_side_by_side() -> None:
    batch = ImageViews(Config(frames=2, height=10, width=10), 0).example(3)
    assert batch["video"].shape == (6, 2, 10, 10, 3)
    assert batch["position"].tolist() == [0, 0, 1, 1, 2, 2] and batch["view"].tolist() == [0, 1] * 3


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"views": 3}, "input.views: found 3, allowed: 2"),
        ({"height": 32}, "input.height=32, input.width=224"),
        ({"crop_share": 0.0}, "input.crop_share"),
        ({"second": replace(NOTHING, blur=1.2)}, "input.second.blur: found 1.2, allowed: 0 to 1"),
        ({"first": replace(NOTHING, flip=float("nan"))}, "input.first.flip"),
        ({"first": replace(NOTHING, area=(0.5, 0.2))}, "input.first.area"),
        ({"first": replace(NOTHING, aspect=(0.0, 1.0))}, "input.first.aspect"),
        ({"second": replace(NOTHING, blur_radius=(2.0, 0.1))}, "input.second.blur_radius"),
        ({"second": replace(NOTHING, jitter=(0.4, 0.4, 0.2, 0.6))}, "input.second.jitter"),
        ({"second": replace(NOTHING, jitter=(0.4, float("nan"), 0.2, 0.1))}, "input.second.jitter"),
    ],
)
def test_what_can_not_work_is_said(changed: dict[str, Any], word: str) -> None:
    assert not Config().problems() and not view_problems("input.first", NOTHING)
    found = Config(**changed).problems()
    assert len(found) == 1 and word in found[0]


def test_descriptions() -> None:
    assert Config().describe()[0][2] == "two views of a picture" and Config().describe_source(Source(shards="")) == ""
    assert "each of its own clip; every 4 frames" in Config(frames=8).describe()[0][2]
    assert Config(frames=8).describe_source(Source(shards="", stride=2)) == "stride 2"

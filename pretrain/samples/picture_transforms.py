"""Pictures as timm makes them ready for training and evaluation: Pillow's operations, all draws the sample's own.

Operations and their order are those of timm.data.create_transform (transforms_factory.py), on which DeiT, EViT, Swin
and most image models were trained; tests/samples/test_picture_transforms.py compares every pixel on the same draws.
Beside them the order of augment.py, which is VideoMAE's, is another one: there RandAugment precedes the crop.
Pictures are uint8 [H, W, 3].
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from pretrain.data.decoders.crops import cut
from pretrain.data.media import MEAN
from pretrain.samples.augment import erased_box, grey_levels, randaugment, randaugmented, resized_crop_box
from pretrain.samples.pixel_augment import PixelAugment
from pretrain.samples.transforms import centred

Picture = npt.NDArray[np.uint8]
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
#: Colour that rotated and shifted pictures are filled with: ImageNet's mean.
MEAN_FILL = tuple(round(255 * mean) for mean in MEAN)
#: Random erasing gives up after so many boxes that don't fit.
ERASE_TRIES = 10


class PictureOptions(Protocol):
    """What `picture.Config` says of training views."""

    height: int
    width: int
    interpolation: Any
    colour_jitter: float
    erase_with: Any
    erase_boxes: int


def training_picture(
    picture: Picture,
    options: PictureOptions,
    augment: PixelAugment,
    flip: bool,
    draw: Callable[[str], np.random.Generator],
) -> Picture:
    """Make one training view [height, width, 3] of a decoded picture.

    Args:
        picture: as decoded, any size.
        options: the input section.
        augment: the recipe's section.
        flip: mirror every second picture.
        draw: purpose -> generator of this sample and view.
    """
    image = _resized_crop(picture, options, augment, draw("crop"))
    if flip and draw("flip").random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment.randaugment:
        policy = randaugment(augment.randaugment, MEAN_FILL, FILTERS.get(options.interpolation))
        image = randaugmented([image], policy, draw("randaugment"))[0]
    elif options.colour_jitter:
        image = jittered(image, options.colour_jitter, draw("jitter"))
    view = np.array(image)
    if augment.erasing and (rng := draw("erasing")).random() < augment.erasing:
        erase_boxes(view, options.erase_with, options.erase_boxes, rng)
    return view


def _resized_crop(
    picture: Picture, options: PictureOptions, augment: PixelAugment, rng: np.random.Generator
) -> Image.Image:
    box = resized_crop_box(picture.shape[1], picture.shape[0], augment.area, augment.aspect, rng)
    chosen = options.interpolation
    if chosen == "random":
        chosen = ("bilinear", "bicubic")[int(rng.integers(2))]
    # Cut before it is resized, and not Pillow's argument `box`: that lets pixels from outside the crop shine in.
    crop = Image.fromarray(np.ascontiguousarray(cut(picture, box)))
    return crop.resize((options.width, options.height), FILTERS[chosen])


def jittered(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation by factors around 1, in a random order (torchvision's ColorJitter).

    Args:
        image: RGB.
        strength: factors are drawn from [max(0, 1 - strength), 1 + strength].
        rng: of the sample.
    """
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, size=len(enhancers))
    for number in rng.permutation(len(enhancers)):
        image = enhancers[number](image).enhance(float(factors[number]))
    return image


def erase_boxes(view: Picture, content: str, most: int, rng: np.random.Generator) -> None:
    """Fill 1 to `most` boxes of a picture in place, which share the area that a single one has.

    timm erases normalised pixels. Here they are still uint8, so that noise N(0, 1) is cut at black and white (1 to 2 %
    of the values) and rounded to a 255th.
    """
    height, width = view.shape[:2]
    count = int(rng.integers(1, most + 1)) if most > 1 else 1
    for _ in range(count):
        box = erased_box(width, height, rng, ERASE_TRIES, count)
        if box is not None:
            view[box.y : box.y + box.height, box.x : box.x + box.width] = _filling(content, box, rng)


def _filling(content: str, box: Any, rng: np.random.Generator) -> Picture:
    if content == "pixel":
        return grey_levels(rng.standard_normal((box.height, box.width, 3), dtype=np.float32))
    return grey_levels(rng.standard_normal(3, dtype=np.float32) if content == "colour" else np.zeros(3, np.float32))


def evaluated_picture(picture: Picture, size: int, short: int, resample: str) -> Picture:
    """Resize a picture and cut the square out of its middle, as timm and torchvision do.

    Args:
        picture: as decoded, any size.
        size: side of the square.
        short: short side of the resized picture; the long one keeps the aspect, rounded down. At least `size`.
        resample: bilinear or bicubic.
    """
    height, width = picture.shape[:2]
    short = max(short, size)
    new_width = short if width <= height else int(short * width / height)
    new_height = short if height <= width else int(short * height / width)
    image = Image.fromarray(picture).resize((new_width, new_height), FILTERS[resample])
    x, y = centred(new_width - size), centred(new_height - size)
    return np.array(image.crop((x, y, x + size, y + size)))

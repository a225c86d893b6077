"""Augmentations of a whole clip in uint8: the same parameters for all frames, drawn from the sample's own generator.

Sources: datasets/rand_augment.py, random_erasing.py, video_transforms.py and kinetics.py of OpenGVLab/VideoMAEv2;
systems/videomae.md section 8.
"""

import functools
import math
import random
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pretrain.data.decoders.crops import Box, cut
from pretrain.data.media import MEAN, STD
from pretrain.data.samples import Draw
from pretrain.runtime.vision_ops import ensure_torchvision
from pretrain.samples import transforms
from pretrain.samples.pixel_augment import PixelAugment
from pretrain.samples.transforms import Clip

#: Colour that rotated and shifted frames are filled with.
FILL = (128, 128, 128)
#: Random resized crop and erasing give up after so many boxes that don't fit.
TRIES, ERASE_TRIES = 10, 100
#: Erased box: share of the clip's area, and height / width.
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 10 / 3)


@functools.cache
def randaugment(
    notation: str, fill: tuple[int, ...] = FILL, resample: Image.Resampling | None = Image.Resampling.BICUBIC
) -> Any:
    """Build timm's RandAugment.

    Args:
        notation: such as `rand-m7-n4-mstd0.5-inc1`.
        fill: colour where rotated and shifted pictures end.
        resample: Pillow's filter; None: bilinear or bicubic, drawn at each operation.

    Raises:
        AssertionError, ValueError: timm does not know the notation.
    """
    ensure_torchvision()
    # timm imports torchvision, which does not load where its CUDA build lies beside a CPU torch.
    from timm.data.auto_augment import rand_augment_transform

    options: dict[str, Any] = {"img_mean": fill}
    policy = rand_augment_transform(notation, options if resample is None else options | {"interpolation": resample})
    for op in policy.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterized
    return policy


def _posterized(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the upper bits of each channel: timm's operation, and 0 bits too, which its strongest level keeps.

    Pillow from release 13 on refuses those, which ends a run at the first picture that draws the level: before, and
    here, it is black.
    """
    if bits <= 0:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def rand_augment(clip: Clip, notation: str, rng: np.random.Generator) -> Clip:
    """Apply RandAugment with timm's operations, parameters equal in all frames."""
    frames = randaugmented([Image.fromarray(frame) for frame in clip], randaugment(notation), rng)
    return np.stack([np.asarray(frame) for frame in frames])


def randaugmented(frames: list[Image.Image], policy: Any, rng: np.random.Generator) -> list[Image.Image]:
    """Apply RandAugment to pictures of one size, with the same parameters for all.

    timm draws from Python's global generator while it works on a picture. Here that name inside timm's module means a
    generator of this sample, seeded alike for every frame: so all frames get the same, and nothing global is touched.

    Args:
        frames: RGB.
        policy: from `randaugment`.
        rng: of the sample.
    """
    # The choice of operations is the one draw that timm takes from NumPy's global generator.
    chosen = rng.choice(len(policy.ops), policy.num_layers, replace=policy.choice_weights is None,
                        p=policy.choice_weights)  # fmt: skip
    seeds = [int(seed) for seed in rng.integers(2**63, size=policy.num_layers)]
    for op, seed in zip((policy.ops[index] for index in chosen), seeds, strict=True):
        frames = [_with_seed(op, seed, frame) for frame in frames]
    return frames


def _with_seed(op: Any, seed: int, frame: Image.Image) -> Image.Image:
    from timm.data import auto_augment

    name: Any = auto_augment
    # Put back in any case: timm's other users in this process would draw this sample's numbers.
    before, name.random = name.random, random.Random(seed)
    try:
        result: Image.Image = op(frame)
    finally:
        name.random = before
    return result


def resized_crop_box(
    width: int, height: int, area: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draw a box with a random share of the area and a log-uniform aspect; the largest centred one after 10 misses."""
    for _ in range(TRIES):
        wanted = rng.uniform(*area) * width * height
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        box_width, box_height = round(math.sqrt(wanted * ratio)), round(math.sqrt(wanted / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            x, y = int(rng.integers(width - box_width + 1)), int(rng.integers(height - box_height + 1))
            return Box(x, y, box_width, box_height)
    ratio = min(max(width / height, aspect[0]), aspect[1])
    box_width, box_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    return Box((width - box_width) // 2, (height - box_height) // 2, box_width, box_height)


def crop_resize(clip: Clip, box: Box, out_width: int, out_height: int) -> Clip:
    """Cut and resize without antialiasing, as the official code does with tensors in training."""
    return transforms.resize(cut(clip, box), out_width, out_height, antialias=False)


def erase(clip: Clip, rng: np.random.Generator) -> Clip:
    """Fill one box, the same in all frames, with fresh noise for every pixel of every frame.

    The noise is N(0, 1) of normalised pixels; brought to uint8 it is cut at black and white (1 to 2 % of the values).
    """
    frames, height, width = clip.shape[:3]
    box = erased_box(width, height, rng, ERASE_TRIES)
    if box is None:
        return clip
    noise = rng.standard_normal((frames, box.height, box.width, 3), dtype=np.float32)
    erased = clip.copy()
    erased[:, box.y : box.y + box.height, box.x : box.x + box.width] = grey_levels(noise)
    return erased


def erased_box(width: int, height: int, rng: np.random.Generator, tries: int, parts: int = 1) -> Box | None:
    """Draw a box to erase; None where `tries` boxes in a row were as large as the picture on a side.

    Args:
        width, height: of the picture.
        rng: of the sample.
        tries: boxes that may be drawn.
        parts: boxes that share the area.
    """
    for _ in range(tries):
        wanted = rng.uniform(*ERASED_AREA) * height * width / parts
        ratio = math.exp(rng.uniform(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])))
        box_height, box_width = round(math.sqrt(wanted * ratio)), round(math.sqrt(wanted / ratio))
        # Smaller than the frame on both sides, as officially: no clip becomes noise altogether.
        if 0 < box_width < width and 0 < box_height < height:
            y, x = int(rng.integers(height - box_height + 1)), int(rng.integers(width - box_width + 1))
            return Box(x, y, box_width, box_height)
    return None


def grey_levels(normalised: npt.NDArray[np.float32]) -> Clip:
    """Bring normalised pixels [..., 3] back to uint8, cut at black and white."""
    pixels = (normalised * np.array(STD, np.float32) + np.array(MEAN, np.float32)) * 255
    return pixels.round().clip(0, 255).astype(np.uint8)


def mirrors(flip: bool, draw: Draw) -> bool:
    """Tell whether a view is mirrored; the same whenever it is asked."""
    return flip and bool(draw("flip").random() < 0.5)


def augment(
    clip: Clip, options: PixelAugment, flip: bool, size: tuple[int, int], draw: Draw, crop: str = "resized"
) -> Clip:
    """Make one training view of a decoded clip, in the official order.

    Args:
        clip: uint8 [T, h, w, 3].
        options: the recipe's section.
        flip: mirror every second clip.
        size: (width, height) of the view.
        draw: purpose -> generator of this sample and view.
        crop: resized, or multiscale as in pre-training.
    """
    if options.randaugment:
        clip = rand_augment(clip, options.randaugment, draw("randaugment"))
    if crop == "multiscale":
        box = transforms.multiscale_box(clip.shape[2], clip.shape[1], *size, draw("crop"))
        clip = transforms.crop_resize(clip, box, *size)
    else:
        box = resized_crop_box(clip.shape[2], clip.shape[1], options.area, options.aspect, draw("crop"))
        clip = crop_resize(clip, box, *size)
    if mirrors(flip, draw):
        # A copy: torch takes no array with negative strides.
        clip = np.ascontiguousarray(clip[:, :, ::-1])
    erasing = draw("erasing")
    return erase(clip, erasing) if erasing.random() < options.erasing else clip

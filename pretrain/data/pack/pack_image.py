"""One image: kept byte for byte where it is upright and of a kind that all decoders know, else encoded anew."""

import hashlib
import io
from typing import Any

from pretrain.data.decoders.image import open_picture, upright_rgb
from pretrain.data.pack.contents import describe
from pretrain.data.pack.discover import Item
from pretrain.data.pack.options import Options
from pretrain.data.pack.originals import fetch_whole, keep
from pretrain.data.pack.packed import Packed

#: Formats that are kept, with their members' ending: the format decides, not the ending (ImageNet has a PNG as .JPEG).
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
#: EXIF tag of the orientation; 1 is upright.
ORIENTATION = 0x0112


def pack_image(item: Item, options: Options, folder: str) -> Packed:
    """Make the sample of one image; errors as by `decode_image` and `fetch`."""
    data = fetch_whole(item.path)
    with open_picture(data) as image:
        original = {
            "format": image.format, "mode": image.mode, "width": image.width, "height": image.height,
            "orientation": image.getexif().get(ORIENTATION, 1), "pictures": getattr(image, "n_frames", 1),
            "bytes": len(data),
        }  # fmt: skip
        why = _reason_to_encode(original, options)
        ending = KEPT.get(original["format"], "png")
        if why is not None:
            written, ending = _encoded(image, options)
        else:
            written = data
    facts = {
        "key": item.key,
        "label": item.label,
        "source": item.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        **describe(ending, written),
        "reencoded": why,
        "original": original,
    }
    facts |= {"meta": item.meta} if item.meta else {}
    return Packed({ending: keep(written, ending, folder)}, facts, len(data))


def _reason_to_encode(original: dict[str, Any], options: Options) -> str | None:
    """Say why the file can't stay as it is; None where it can."""
    if original["format"] not in KEPT:
        return f"{original['format']} is kept as PNG"
    # Readers that ignore the tag would train on turned pictures; 0 says no more than 1.
    if original["orientation"] not in (0, 1):
        return f"turned by its orientation {original['orientation']}"
    side = options.image_short_side
    if side is not None and min(original["width"], original["height"]) > side:
        return f"resized to a short side of {side}"
    return None


def _encoded(image: Any, options: Options) -> tuple[bytes, str]:
    """Encode the upright picture, resized if asked for: JPEG where it was one, else PNG, which loses nothing."""
    from PIL import Image

    was_jpeg = image.format in ("JPEG", "MPO")
    picture = upright_rgb(image)
    short = min(picture.size)
    side = options.image_short_side
    if side is not None and short > side:
        size = [round(length * side / short) for length in picture.size]
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    # What the original said about itself (orientation, colour profile) is no longer true of these pixels.
    picture.info.clear()
    target = io.BytesIO()
    if was_jpeg:
        # Colour at full size: a second halving would lose what the first one has left.
        picture.save(target, "JPEG", quality=options.image_quality, subsampling=0, exif=b"")
    else:
        picture.save(target, "PNG")
    return target.getvalue(), "jpg" if was_jpeg else "png"

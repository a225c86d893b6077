"""Images by Pillow: whatever the file holds becomes upright RGB of 8 bits, by these rules.

| file | picture |
|---|---|
| EXIF orientation | applied: the picture as a viewer shows it |
| alpha, palette with a transparent colour | laid over `background`; None: the colours stored below, as torchvision |
| greyscale, 1 bit, palette | the same grey three times; the palette's colours |
| 16 bits, grey | scaled from 65,535 to 255 and rounded, not cut off at 255 as `convert` does |
| 16 bits, colour | the upper 8 bits of each channel, as Pillow reads them: one level from rounding at most |
| 16 bits, colour, TIFF with a plane for each channel | refused: Pillow takes the bytes of one channel for others |
| CMYK, YCCK | Pillow's plain conversion, without the colour profile, as torchvision's folder of images gives it |
| animated GIF, WebP, PNG; several pictures in one file | the first picture |
| 32-bit numbers, floats (modes I, F of TIFF) | refused: these are measurements, to be packed with --kind raster |
| colour profiles | ignored, as all published pipelines do |
"""

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.decoders import VideoReader, cut_all
from pretrain.data.decoders.crops import Boxes
from pretrain.errors import SampleError

#: Pixels of the largest picture that is decoded: a small file can hold one that fills the memory. Pillow's own limit.
MAX_PIXELS = 89_478_485
WHITE = (255, 255, 255)
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_MEASUREMENTS = ("I", "F")
_TIFF = (b"II*\0", b"MM\0*")
#: TIFF's tags of the bits of each channel, and of how channels are stored.
_BITS, _PLANES = 258, 284


def decode_image(
    data: bytes, background: tuple[int, int, int] | None = WHITE, max_pixels: int = MAX_PIXELS
) -> npt.NDArray[np.uint8]:
    """Decode an image as a clip of one frame.

    Args:
        data: The whole file.
        background: RGB colour below transparent pixels; None drops the alpha channel.
        max_pixels: Larger pictures are refused before they are decoded.

    Returns:
        RGB, uint8 [1, H, W, 3], upright.

    Raises:
        SampleError: "empty", "open" for something that is no image, "too_large", "decode" for damage or measurements.
    """
    with open_picture(data, max_pixels) as image:
        # A copy: the array over Pillow's own memory is read-only, and torch warns of it.
        return np.array(upright_rgb(image, background))[None]


class ImageReader(VideoReader):
    """An image behind the interface of a video of one frame, so that crops and views are those of clips."""

    def __init__(self, data: bytes) -> None:
        self._picture = decode_image(data)
        self.num_frames, self.fps = 1, 0.0

    def times(self) -> npt.NDArray[np.float64]:
        """Give the time of the one frame, which is shown from the beginning."""
        return np.zeros(1)

    def _decode(self, wanted: list[int], boxes: Boxes) -> list[npt.NDArray[np.uint8]]:
        return cut_all(self._picture, boxes)

    def close(self) -> None:
        """Do nothing: the picture is decoded at once, and no file stays open."""


def open_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Any:
    """Open a Pillow image without decoding its pixels; errors as for `decode_image`."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise SampleError("empty", "no bytes")
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise SampleError("too_large", str(error)) from error
    except UnidentifiedImageError as error:  # its own text holds an address in memory, another one each time
        raster = "; a TIFF of many bands is packed with --kind raster" if data[:4] in _TIFF else ""
        raise SampleError("open", f"no image of a kind that Pillow knows{raster}") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise SampleError("open", str(error)) from error
    if image.width * image.height > max_pixels:
        image.close()
        raise SampleError("too_large", f"{image.width} x {image.height} pixels, at most {max_pixels} are decoded")
    return image


def upright_rgb(image: Any, background: tuple[int, int, int] | None = WHITE) -> Any:
    """Convert an opened Pillow image to mode RGB, upright, by the rules above; errors as for `decode_image`."""
    from PIL import Image, ImageOps

    if image.format == "TIFF" and image.tag_v2.get(_PLANES) == 2 and max(image.tag_v2.get(_BITS, [8])) > 8:
        raise SampleError(
            "decode", "a TIFF of 16 bits with a plane for each channel, which Pillow misreads; store channels "
            "interleaved, or pack it with --kind raster"
        )  # fmt: skip
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode in _SIXTEEN_BITS:
            image = _eight_bits(image)
        if image.mode in _MEASUREMENTS:
            raise SampleError("decode", f"a picture of mode {image.mode} holds measurements, not colours")
        if background is None or not image.has_transparency_data:
            return image.convert("RGB")
        # Not convert("RGB"): that shows the colour which an encoder happened to leave below transparent pixels.
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer).convert("RGB")
    except SampleError:
        raise
    # Pillow's decoders raise all of these on damaged files: struct.error, zlib.error and IndexError among them.
    except Exception as error:
        raise SampleError("decode", f"{type(error).__name__}: {error}") from error


def _eight_bits(image: Any) -> Any:
    """Scale a grey picture of 16 bits, [0, 65535], to 8 bits."""
    from PIL import Image

    # 32 bits, since 65,535 x 255 does not fit into 16. Pillow's own conversion cuts all above 255.
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))

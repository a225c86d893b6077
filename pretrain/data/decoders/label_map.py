"""Masks of classes by Pillow: a whole number for each pixel, as it is stored.

| file | labels |
|---|---|
| grey of 8 or 16 bits, 1 bit | the values |
| palette | the indices, whatever colours they have (Pascal VOC) |
| colours, transparency, floats | refused: which colour is which class stands in no file |
"""

import numpy as np
import numpy.typing as npt

from pretrain.data.decoders.image import open_picture
from pretrain.errors import SampleError

LabelMap = npt.NDArray[np.int32]
#: Pillow's modes that hold a number for each pixel.
_NUMBERS = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B", "I;16N")


def decode_label_map(data: bytes) -> LabelMap:
    """Decode a mask, int32 [H, W].

    Raises:
        SampleError: "mask" for a picture of colours; those of `open_picture`; "decode" for damage.
    """
    with open_picture(data) as image:
        if image.mode not in _NUMBERS:
            bands = ", ".join(image.getbands())
            raise SampleError(
                "mask",
                f"a mask of mode {image.mode} ({bands}); allowed: one number for each pixel, grey or with a palette; "
                "turn colours into class numbers before packing",
            )
        try:
            return np.array(image).astype(np.int32)
        # Pillow's decoders raise many kinds on damaged files: struct.error, zlib.error and IndexError among them.
        except Exception as error:
            raise SampleError("decode", f"mask: {type(error).__name__}: {error}") from error

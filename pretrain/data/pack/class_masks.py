"""Masks of classes that go along with pictures: the member `mask` has a number for each of the picture's pixels."""

from pretrain.data.decoders.label_map import decode_label_map
from pretrain.data.media import kind_of_ending
from pretrain.errors import SampleError

#: First part of the ending of a member that is one, as samples/picture_mask.py looks for it.
MASK = "mask"


def is_mask(ending: str) -> bool:
    """Tell whether the member of an ending is a mask of classes."""
    return ending.partition(".")[0] == MASK and kind_of_ending(ending) == "image"


def check_mask(data: bytes, width: object, height: object) -> None:
    """Hold a mask against the picture that it is of.

    Args:
        data: the mask's file.
        width: of the picture as it is packed, pixels.
        height: of the picture.

    Raises:
        SampleError: "mask" where it has another size, or colours in the place of numbers; "decode" for damage.
    """
    found_height, found_width = decode_label_map(data).shape
    if (found_width, found_height) != (width, height):
        raise SampleError(
            "mask",
            f"{found_width} x {found_height} pixels beside a picture of {width} x {height}; make it as large as the "
            "picture is packed (--short-side makes pictures smaller), or name a member otherwise that is no mask of "
            "classes",
        )

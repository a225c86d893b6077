"""Colours of videos that are encoded anew: matrix and tags stay the source's, full range becomes limited.

The same numbers under another tag are another picture, so the scaler is told the matrix and gives back the same one.
"""

from typing import Any

#: FFmpeg's number for primaries and curves that are not stated.
UNSPECIFIED = 2
#: Its numbers of ranges, and of matrices.
LIMITED, FULL = 1, 2
RGB, BT601 = 0, 6
#: Matrices with a name of their own, and the parts of red and blue in their luma (ITU-T H.273, table 4).
_MATRICES = {
    1: ("BT.709", 0.2126, 0.0722),
    4: ("FCC", 0.30, 0.11),
    7: ("SMPTE 240M", 0.212, 0.087),
    9: ("BT.2020", 0.2627, 0.0593),
    10: ("BT.2020", 0.2627, 0.0593),
}
_BT601 = ("BT.601", 0.299, 0.114)


def tag_stream(context: Any, frame: Any) -> None:
    """Give an encoder the tags of its first frame, so that a reader turns the numbers back as it would the source's."""
    # Limited range, what every player assumes. RGB has no matrix: the scaler makes BT.601 of it.
    context.color_range, context.colorspace = LIMITED, BT601 if frame.colorspace == RGB else frame.colorspace
    context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc


def scaler_tags(frame: Any) -> tuple[int, int]:
    """Return (matrix, range) of a frame for the scaler: a range that is not stated is limited."""
    return frame.colorspace, FULL if frame.color_range == FULL else LIMITED


def set_scaler_tags(frame: Any) -> None:
    """Leave on a frame what the scaler needs; primaries and curve are the stream's, and reserved ones would fail it."""
    frame.colorspace, frame.color_range = scaler_tags(frame)
    frame.color_primaries = frame.color_trc = UNSPECIFIED


def luma_weights(matrix: int) -> tuple[float, float]:
    """Return the parts of red and blue in luma; of a matrix that is not stated BT.601's, as decoders have it."""
    return _MATRICES.get(matrix, _BT601)[1:]


def colours_of(frame: Any) -> str:
    """Say by what matrix and range readers turn a frame, or the frames of a codec context, into RGB."""
    matrix, color_range = scaler_tags(frame)
    name = _MATRICES.get(matrix, _BT601)[0]
    return f"{name}{' (not stated)' * (matrix == UNSPECIFIED)}, {'full' if color_range == FULL else 'limited'} range"


def same_colours(one: Any, two: Any) -> bool:
    """Tell whether the same numbers are the same picture in two frames or codec contexts."""
    (first, first_range), (second, second_range) = scaler_tags(one), scaler_tags(two)
    return luma_weights(first) == luma_weights(second) and first_range == second_range


def is_yuv(frame: Any) -> bool:
    """Tell whether a frame has chroma planes: grey and palettes have no matrix, nor has RGB."""
    layout = frame.format
    return len(layout.components) >= 3 and not (layout.is_rgb or layout.has_palette or layout.name.startswith("xyz"))

"""Colours of videos that are encoded anew: matrix and tags stay the source's, full range becomes limited.

The same numbers under another tag are another picture, so the scaler is told the matrix and gives back the same one.
"""

from typing import Any

#: FFmpeg's number for primaries and curves that are not stated.
UNSPECIFIED = 2
#: Its numbers of ranges, and of matrices.
LIMITED, FULL = 1, 2
RGB, BT601 = 0, 6


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

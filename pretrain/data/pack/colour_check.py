"""Comparison of a source's colours with those of what was written of it, each by its own tags.

Means over parts of pictures are compared and not pixels: what lossy coding takes away, fine detail and the sharpness of
chroma, hardly moves them; another matrix, range or order of planes does. They are turned into RGB here and not by
FFmpeg, whose conversion is what is checked, and not cut off at 0 and 255, where colours finer than chroma would change.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.pack.colour import FULL, colours_of, is_yuv, luma_weights, scaler_tags
from pretrain.data.pack.options import ENCODERS, Options
from pretrain.errors import SampleError

#: Frames of a video that are compared, about: each costs two conversions to small pictures.
COMPARED = 8
#: Side of those, pixels, and parts of a side.
SIDE, PARTS = 64, 8
#: Least height and width of a part of a written picture, pixels: of smaller ones chroma has little to say.
PART_PIXELS = 32
#: Mean difference of a channel, of 255, that coding at a codec's default quality stays below: camera and drawn films
#: come to 0.8 (5.0 at CRF 51), red and green stripes by x264's fast presets to 3.0. Saturated colours by another matrix
#: come to 5 and more.
LIMIT = 3.5
#: Steps of CRF that double the limit: twelve make the quantiser four times as coarse, and its noise twice as loud.
DOUBLING_CRF = 12
CHANNELS = ("red", "green", "blue")

Parts = npt.NDArray[np.float64]


class ColourCheck:
    """Colours of some frames of one video, as its source has them and as they were written.

    Args:
        options: of packing.
        frames: how many will be written, about.
        rotation: of the source, degrees counter-clockwise; what is written is upright.
    """

    def __init__(self, options: Options, frames: float, rotation: int = 0) -> None:
        from av.video.reformatter import VideoReformatter

        self._options, self._turns = options, rotation // 90
        self._step = max(1, math.ceil(frames / COMPARED))
        self._converter = VideoReformatter()
        self._sources: dict[int, Parts] = {}
        self._differences: list[npt.NDArray[np.float64]] = []
        self._seen = self._first = 0
        self._tags = ["", ""]

    def source(self, frame: Any) -> None:
        """Note a frame of the source, in the order of showing and with its time for the encoder."""
        rate = self._options.fps
        # As FFmpeg's fps filter rounds. Of several frames with one number the last is written.
        number = math.ceil(frame.pts * Fraction(frame.time_base) * rate) if rate else self._seen
        self._first = self._first if self._seen else number
        self._seen += 1
        number -= self._first
        if number % self._step == 0:
            self._sources[number] = np.rot90(self._parts(frame), k=self._turns)
            self._tags[0] = self._tags[0] or colours_of(frame)

    def written(self, number: int, frame: Any) -> None:
        """Compare a frame of what was written with the source's of that number, if there is one."""
        if number not in self._sources:
            return
        self._tags[1] = self._tags[1] or colours_of(frame)
        smallest = min(frame.width, frame.height) // PART_PIXELS
        joined = PARTS // max(1, min(PARTS, 2 ** int(math.log2(max(smallest, 1)))))
        difference = self._sources[number] - self._parts(frame)
        self._differences.append(np.abs(_joined(difference, joined)).mean((0, 1)))

    def differences(self) -> npt.NDArray[np.float64]:
        """Return the mean difference of each channel, of 255."""
        return np.asarray(np.mean(self._differences, axis=0))

    def check(self) -> None:
        """Raise SampleError("colours") where a channel differs by more than coding explains."""
        found = self.differences()
        limit = colour_limit(self._options)
        if found.max() > limit:
            channels = ", ".join(f"{name} {value:.1f}" for name, value in zip(CHANNELS, found, strict=True))
            raise SampleError(
                "colours", f"{channels} levels of 255 from the source's in the mean, coding explains {limit:.1f} "
                f"(source {self._tags[0]}, written {self._tags[1]}): keep the stream with --copy, or convert the file "
                "to 8 bits of BT.709 first"
            )  # fmt: skip

    def _parts(self, frame: Any) -> Parts:
        """Compute mean colours of parts of a picture: RGB, of 255, [PARTS, PARTS, 3]."""
        from av.video.reformatter import ColorRange, Interpolation

        how = Interpolation.AREA | Interpolation.ACCURATE_RND
        if not is_yuv(frame):
            picture = self._converter.reformat(frame, SIDE, SIDE, "rgb24", interpolation=how, threads=1).to_ndarray()
            return _joined(picture, SIDE // PARTS)
        full = scaler_tags(frame)[1] == FULL
        # One range for both, and no matrix: the numbers stay those of the frame.
        same = ColorRange.JPEG if full else ColorRange.MPEG
        small = self._converter.reformat(
            frame, SIDE, SIDE, "yuv444p", interpolation=how, src_color_range=same, dst_color_range=same, threads=1
        )
        planes = np.moveaxis(small.to_ndarray(), 0, -1)
        return _rgb(_joined(planes, SIDE // PARTS), luma_weights(frame.colorspace), full)


def colour_limit(options: Options) -> float:
    """Compute the mean difference of a channel that counts as coding loss at a quality."""
    default = ENCODERS[options.codec].crf
    crf = default if options.crf is None else options.crf
    return LIMIT * float(2 ** (max(0, crf - default) / DOUBLING_CRF))


def _joined(values: npt.NDArray[Any], count: int) -> Parts:
    """Average squares of count x count values of [side, side, 3]."""
    side = values.shape[0] // count
    return values.reshape(side, count, side, count, 3).mean((1, 3), dtype=np.float64)


def _rgb(yuv: Parts, weights: tuple[float, float], full: bool) -> Parts:
    """Convert Y, Cb, Cr of 8 bits to RGB of 255, not cut off (ITU-T H.273, section 8.3)."""
    red, blue = weights
    black, white, chroma = (0, 255, 255) if full else (16, 219, 224)
    y = (yuv[..., 0] - black) / white
    r = y + 2 * (1 - red) * (yuv[..., 2] - 128) / chroma
    b = y + 2 * (1 - blue) * (yuv[..., 1] - 128) / chroma
    g = (y - red * r - blue * b) / (1 - red - blue)
    return 255 * np.stack([r, g, b], axis=-1)

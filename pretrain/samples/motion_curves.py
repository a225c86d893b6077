"""Motion between neighbouring frames of a video, measured in three ways, two frames in memory at a time.

Sources: the two scripts of MCG-NJU/MGSampler @ 758bcd9 that write curves (ssim, feature), and the paper's words for the
image difference (abs). Frames are uint8 [H, W, 3], RGB, in full resolution and before any augmentation.
"""

import abc
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from pretrain.errors import SampleError, WeightsError
from pretrain.samples.motion import Kind
from pretrain.samples.transforms import resize_short

Frame = npt.NDArray[np.uint8]
Curve = npt.NDArray[np.float32]

#: Side of the window of structural similarity, pixels, and the constants K1 = 0.01, K2 = 0.03 at a range of 255.
WINDOW = 7
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
#: Where PAN's checkpoints hold the convolution, and where a file of its own may.
CONVOLUTION = ("module.PA.shallow_conv", "PA.shallow_conv", "shallow_conv")


class MotionMeasure(abc.ABC):
    """A measure of the motion between two frames.

    Attributes:
        kind: its name in recipes and tables.
    """

    kind: ClassVar[Kind]

    @abc.abstractmethod
    def prepare(self, frame: Frame) -> Any:
        """Work out what both comparisons of a frame need, with the one before it and with the one after it."""

    @abc.abstractmethod
    def between(self, before: Any, after: Any) -> float:
        """Measure the motion between two neighbouring frames that were prepared: 0 or more."""


def motion_curve(frames: Iterable[Frame], measure: MotionMeasure, short_side: int | None = None) -> Curve:
    """Measure the motion of a video.

    Args:
        frames: all of them, in order.
        measure: of the motion between two.
        short_side: shrink frames to so many pixels first; None, or a smaller frame: as they are (as released).

    Returns:
        d, float32 [M - 1]; empty for one frame.

    Raises:
        SampleError: "motion" for frames that can't be measured.
    """
    found: list[float] = []
    before: Any = None
    size: tuple[int, ...] | None = None
    for frame in frames:
        if size not in (None, frame.shape):
            raise SampleError("motion", f"frames of {size} and of {frame.shape} in one video")
        size = frame.shape
        if short_side is not None and min(frame.shape[:2]) > short_side:
            frame = resize_short(frame[None], short_side)[0]
        after = measure.prepare(frame)
        if before is not None:
            found.append(measure.between(before, after))
        before = after
    return np.array(found, dtype=np.float32)


def grey(frame: Frame) -> Frame:
    """Turn RGB to 8-bit grey, 0.299 R + 0.587 G + 0.114 B in the fixed point of current OpenCV."""
    found = frame[..., 0] * np.int32(9798)
    found += frame[..., 1] * np.int32(19235)
    found += frame[..., 2] * np.int32(3735)
    found += 16384
    return (found >> 15).astype(np.uint8)


class Windows(NamedTuple):
    """A grey frame with the sums of its windows, int32: sums of pixels, their squares, and 49 x 48 x the variances."""

    pixels: npt.NDArray[np.int32]
    sums: npt.NDArray[np.int32]
    squares: npt.NDArray[np.int32]
    variances: npt.NDArray[np.int32]


class StructuralSimilarity(MotionMeasure):
    """1 - mean structural similarity of grey frames: uniform windows of 7 x 7, sample covariance, no border.

    As scikit-image computes it for 8-bit pictures, but for roundings: sums, their products (at most 1.6e8) and
    covariances are whole numbers, so that frames without a difference have a similarity of exactly 1.
    """

    kind = "ssim"

    def prepare(self, frame: Frame) -> Windows:
        """Sum up the windows."""
        if min(frame.shape[:2]) < WINDOW:
            height, width = frame.shape[:2]
            raise SampleError("motion", f"frames of {width} x {height} pixels, ssim needs {WINDOW} x {WINDOW} or more")
        pixels = grey(frame).astype(np.int32)
        sums = _window_sums(pixels)
        squares = sums * sums
        variances = _window_sums(pixels * pixels)
        variances *= WINDOW**2
        variances -= squares
        return Windows(pixels, sums, squares, variances)

    def between(self, before: Windows, after: Windows) -> float:
        """Compare window by window."""
        pixels = WINDOW**2
        # Both parts of the quotient times (49 x 49) x (49 x 48), where the sums are whole numbers.
        mean_constant, variance_constant = np.float32(pixels**2 * C1), np.float32(pixels * (pixels - 1) * C2)
        products = before.sums * after.sums
        covariances = _window_sums(before.pixels * after.pixels)
        covariances *= pixels
        covariances -= products
        # Two quotients: divided by one after the other, their product would be 1 but for a rounding in still windows.
        similarity = _raised(2 * products, mean_constant)
        similarity /= _raised(before.squares + after.squares, mean_constant)
        structure = _raised(2 * covariances, variance_constant)
        structure /= _raised(before.variances + after.variances, variance_constant)
        similarity *= structure
        return max(1.0 - float(similarity.mean(dtype=np.float64)), 0.0)


def _raised(values: npt.NDArray[np.int32], constant: np.float32) -> npt.NDArray[np.float32]:
    """Add a constant in float32, which rounds the quotients to 1e-7 and takes half the time of float64."""
    found = values.astype(np.float32)
    found += constant
    return found


def _window_sums(values: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Sum up every 7 x 7 window that lies inside; squares of bytes stay far below 2**31."""
    # In pairs, four additions instead of six, and in place: this is most of the time that indexing takes.
    two = values[:-1] + values[1:]
    rows = two[:-5] + two[2:-3]
    rows += two[4:-1]
    rows += values[6:]
    two = rows[:, :-1] + rows[:, 1:]
    found = two[:, :-5] + two[:, 2:-3]
    found += two[:, 4:-1]
    found += rows[:, 6:]
    return found


class AbsoluteDifference(MotionMeasure):
    """Sum over pixels and channels of the absolute difference, as the paper describes the image difference."""

    kind = "abs"

    def prepare(self, frame: Frame) -> npt.NDArray[np.int16]:
        """Make room for a sign."""
        return frame.astype(np.int16)

    def between(self, before: npt.NDArray[np.int16], after: npt.NDArray[np.int16]) -> float:
        """Sum up the differences."""
        return float(np.abs(after - before).sum(dtype=np.int64))


class FeatureDifference(MotionMeasure):
    """Sum over pixels of the distance between the outputs of one 7 x 7 convolution.

    Pixels are 0..255 and not normalised, their channels in the order blue, green, red, as OpenCV reads them.

    Args:
        weight: float32 [C, 3, 7, 7].
        bias: float32 [C].
    """

    kind = "feature"

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias = weight, bias

    @property
    def hash(self) -> str:
        """Hash of the weights."""
        digest = hashlib.sha256()
        for tensor in (self._weight, self._bias):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.inference_mode()
    def prepare(self, frame: Frame) -> Tensor:
        """Convolve: float32 [C, H, W]."""
        pixels = torch.from_numpy(np.ascontiguousarray(frame[..., ::-1])).permute(2, 0, 1).float()
        return functional.conv2d(pixels[None], self._weight, self._bias, padding=self._weight.shape[-1] // 2)[0]

    def between(self, before: Tensor, after: Tensor) -> float:
        """Sum up the map of distances."""
        return float(self.distances(before, after).sum())

    @staticmethod
    @torch.inference_mode()
    def distances(before: Tensor, after: Tensor) -> Tensor:
        """Give the map of distances, float32 [H, W]."""
        # Written out: torch's pairwise_distance reduces another dimension than it did for the released script.
        return (before - after + 1e-6).norm(dim=0)


def convolution_of(tensors: Mapping[str, Tensor], where: str) -> FeatureDifference:
    """Find the convolution of `feature` among the weights of a file.

    Args:
        tensors: of a checkpoint of PAN, or of a file that holds the convolution alone.
        where: the file, for the error.

    Raises:
        WeightsError: none is in it, or one of another shape.
    """
    name = next((name for name in CONVOLUTION if f"{name}.weight" in tensors and f"{name}.bias" in tensors), None)
    if name is None:
        found = ", ".join(sorted(tensors)[:4]) or "nothing"
        wanted = f"{CONVOLUTION[0]}.weight and .bias, which a checkpoint of PAN has"
        raise WeightsError(f"{where}: no {wanted}; found {found}")
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    if weight.ndim != 4 or weight.shape[1] != 3 or weight.shape[-1] % 2 == 0 or bias.shape != weight.shape[:1]:
        raise WeightsError(f"{where}: {name}.weight has shape {list(weight.shape)}, allowed: [channels, 3, odd, odd]")
    return FeatureDifference(weight.float(), bias.float())


def measure_of(kind: Kind) -> MotionMeasure:
    """Make a measure that needs no weights.

    Raises:
        WeightsError: feature, which needs some.
    """
    if kind == "feature":
        raise WeightsError("motion of kind feature needs the weights of its convolution (launch/motion_index.py "
                           "--weights FILE, a checkpoint of PAN); ssim and abs need none")  # fmt: skip
    return StructuralSimilarity() if kind == "ssim" else AbsoluteDifference()

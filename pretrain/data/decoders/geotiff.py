"""Rasters from GeoTIFF files by rasterio: all bands as they are stored, and where on the Earth they lie."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.errors import DataError, SampleError

#: Bytes of the part that is read, when decoded.
MAX_BYTES = 2 << 30


@dataclass(frozen=True)
class RasterFacts:
    """Facts that a raster's file states.

    Attributes:
        bands, height, width: its size; pixels.
        dtype: numpy's name of its numbers' type.
        crs: coordinate reference system, "EPSG:32633" say; None without.
        transform: (a, b, c, d, e, f): column and row of a pixel's corner become x = a*column + b*row + c and
            y = d*column + e*row + f in that system.
        nodata: number that stands for a missing value; None without.
        names: of the bands; "" for one that has none.
    """

    bands: int
    height: int
    width: int
    dtype: str
    crs: str | None
    transform: tuple[float, ...]
    nodata: float | None
    names: tuple[str, ...]


def decode_raster(
    data: bytes, window: tuple[int, int, int, int] | None = None, max_bytes: int = MAX_BYTES
) -> npt.NDArray[Any]:
    """Read a raster, or a window of it without decoding the rest (as far as its tiles allow).

    Args:
        data: The whole GeoTIFF file.
        window: (row, column, height, width), pixels; None reads all.
        max_bytes: Larger results are refused before they are read.

    Returns:
        [bands, height, width] of the stored type (whole complex numbers as complex64); missing values are what the file
        has for them (`nodata`).

    Raises:
        SampleError: "empty", "open" for something else, "too_large", "too_short" for a window that is not inside,
            "decode" for damage.
        DataError: rasterio is missing.
    """
    with _opened(data) as file:
        row, column, height, width = window or (0, 0, file.height, file.width)
        inside = 0 <= row < row + height <= file.height and 0 <= column < column + width <= file.width
        if not inside:
            raise SampleError("too_short", f"window {window} asked of a raster of {file.height} x {file.width} pixels")
        # Before anything is read: a few bytes of header can state a raster that fills the memory.
        size = sum(_dtype(kind).itemsize for kind in file.dtypes) * height * width
        if size > max_bytes:
            raise SampleError("too_large", f"{size} bytes of pixels, at most {max_bytes} are decoded")
        pixels: npt.NDArray[Any] = file.read(window=((row, row + height), (column, column + width)))
        return pixels


def probe_raster(data: bytes) -> RasterFacts:
    """Read a raster's facts from its file, without pixels; errors as for `decode_raster`."""
    with _opened(data) as file:
        kinds = np.result_type(*map(_dtype, file.dtypes))
        names = tuple(name or "" for name in file.descriptions)
        crs = None if file.crs is None else file.crs.to_string()
        return RasterFacts(
            file.count, file.height, file.width, str(kinds), crs, tuple(file.transform)[:6], file.nodata, names
        )


def _dtype(kind: str) -> np.dtype[Any]:
    """Give the type that rasterio reads numbers of a stored type as; numpy has no whole complex ones (radar images)."""
    return np.dtype("complex64" if kind == "complex_int16" else kind)


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    try:
        import rasterio
        from rasterio.errors import RasterioError, RasterioIOError
        from rasterio.io import MemoryFile
    except ImportError as error:
        raise DataError(
            f"GeoTIFF files need rasterio, which can't be imported ({error}): pip install 'tubelet[raster]'"
        ) from error
    import warnings

    if not data:
        raise SampleError("empty", "no bytes")
    # Only the one driver: GDAL's others would follow what a file names, other files and addresses among it.
    try:
        with rasterio.Env(GDAL_NUM_THREADS="1"), warnings.catch_warnings():
            # Not every raster has a place on the Earth, and workers would say so for each sample.
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with MemoryFile(data) as memory:
                try:
                    opened = memory.open(driver="GTiff")
                except RasterioIOError as error:
                    raise SampleError("open", str(error)) from error
                with opened as file:
                    yield file
    except (RasterioError, ValueError) as error:
        raise SampleError("decode", f"{type(error).__name__}: {error}") from error

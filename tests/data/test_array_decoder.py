"""Arrays and rasters: the numbers that were stored, no objects, no memory full of nothing."""

import io
import struct
import sys
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from pretrain.data.decoders.array import decode_array, decode_arrays
from pretrain.data.decoders.geotiff import decode_raster, probe_raster
from pretrain.errors import DataError, SampleError
from tests.pack.media_files import array_bytes, geotiff_bytes, hdf5_bytes

RNG = np.random.default_rng(0)
HOLES = RNG.normal(size=(7, 13)).astype(np.float32)
HOLES[2, 3], HOLES[5, 0], HOLES[0, 0] = np.nan, np.inf, -0.0
ARRAYS = {"rgb": HOLES, "counts": RNG.integers(-9, 9, (3, 1, 5)).astype(np.int16), "yes": np.array([True, False])}


def _npz(arrays: dict[str, Any]) -> bytes:
    target = io.BytesIO()
    np.savez_compressed(target, **arrays)
    return target.getvalue()


def _same(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "array", [HOLES, np.asfortranarray(HOLES), HOLES.astype(">f8"), np.float16(3), *ARRAYS.values()]
)
def test_npy(array: np.ndarray) -> None:
    found = decode_array(array_bytes(array))
    assert found.dtype == array.dtype and np.array_equal(found, array, equal_nan=array.dtype.kind == "f")


@pytest.mark.parametrize(
    "write", [_npz, hdf5_bytes, lambda arrays: save({n: torch.tensor(a) for n, a in arrays.items()})]
)
def test_files_of_several_arrays(write: Any) -> None:
    data = write(ARRAYS)
    found = decode_arrays(data)
    assert set(found) == set(ARRAYS) and all(_same(found[name], ARRAYS[name]) for name in ARRAYS)
    assert _same(decode_array(data, "counts"), ARRAYS["counts"])
    with pytest.raises(SampleError, match="no array named 'flow'.*'counts', 'rgb', 'yes'"):
        decode_array(data, "flow")
    with pytest.raises(SampleError, match="index"):
        decode_array(data)


def test_bfloat16_and_groups() -> None:
    numbers = torch.tensor([1.5, -3e38, float("nan")], dtype=torch.bfloat16)
    found = decode_array(save({"x": numbers}))
    assert found.dtype == np.float32 and np.array_equal(found, numbers.float().numpy(), equal_nan=True)
    assert list(decode_arrays(hdf5_bytes({"v/one": HOLES, "v/two": HOLES}))) == ["v/one", "v/two"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"some text that is no array", "open"),
        (array_bytes(np.array([{"a": 1}], dtype=object), allow_pickle=True), "decode"),
        (_npz({"a": np.array([None], dtype=object)}), "decode"),
        (array_bytes(np.array(["a", "b"])), "decode"),
        (hdf5_bytes({"names": np.array([b"one", b"two"])}), "decode"),
        (array_bytes(HOLES)[:-1], "decode"),
        (_npz(ARRAYS)[:-80], "decode"),
        (save({"x": torch.ones(9)})[:-4], "decode"),
        (hdf5_bytes({"x": np.ones((50, 50))})[:-600], "decode"),
        (_npz({}), "open"),
    ],
)
def test_what_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError) as error:
        decode_arrays(data)
    assert error.value.reason == reason


def _stating(shape: tuple[int, ...]) -> bytes:
    header = str({"descr": "<f4", "fortran_order": False, "shape": shape}).encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def test_sizes_are_checked_before_anything_is_read() -> None:
    for data in (_stating((1 << 40,)), hdf5_bytes({"a": HOLES}), _npz({"a": HOLES}), save({"a": torch.tensor(HOLES)})):
        with pytest.raises(SampleError) as error:
            decode_arrays(data, max_bytes=200)
        assert error.value.reason == "too_large"
    with pytest.raises(SampleError, match="the file is cut"):
        decode_arrays(_stating((1 << 20,)))


RASTER = RNG.integers(0, 60000, (4, 35, 61)).astype(np.uint16)


@pytest.mark.parametrize("options", [{}, {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"}])
def test_geotiff(options: dict[str, Any]) -> None:
    data = geotiff_bytes(RASTER, nodata=0, **options)
    assert _same(decode_raster(data), RASTER)
    assert _same(decode_raster(data, window=(3, 40, 20, 21)), np.ascontiguousarray(RASTER[:, 3:23, 40:61]))
    facts = probe_raster(data)
    assert (facts.bands, facts.height, facts.width, facts.dtype, facts.crs) == (4, 35, 61, "uint16", "EPSG:32633")
    assert facts.transform == (30, 0, 500000, 0, -30, 4600000) and facts.nodata == 0


def test_float_rasters_keep_their_holes() -> None:
    assert _same(decode_raster(geotiff_bytes(HOLES[None], nodata=float("nan"))), HOLES[None])


@pytest.mark.parametrize(
    ("data", "window", "reason"),
    [
        (b"", None, "empty"),
        (b"II*\x00 and then no tiff", None, "open"),
        (geotiff_bytes(RASTER)[:9000], None, "decode"),
        (geotiff_bytes(RASTER), (0, 0, 36, 61), "too_short"),
        (geotiff_bytes(RASTER), (-1, 0, 5, 5), "too_short"),
    ],
)
def test_rasters_that_are_refused(data: bytes, window: Any, reason: str) -> None:
    with pytest.raises(SampleError) as error:
        decode_raster(data, window)
    assert error.value.reason == reason


def test_large_rasters_are_refused_before_they_are_read() -> None:
    with pytest.raises(SampleError, match="too_large"):
        decode_raster(geotiff_bytes(RASTER), max_bytes=1000)
    assert decode_raster(geotiff_bytes(RASTER), (0, 0, 5, 5), max_bytes=1000).shape == (4, 5, 5)


@pytest.mark.parametrize(("module", "extra"), [("h5py", "arrays"), ("rasterio", "raster")])
def test_a_missing_library_names_its_extra(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = hdf5_bytes({"a": HOLES}) if module == "h5py" else geotiff_bytes(RASTER)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"tubelet\[{extra}\]"):
        decode_arrays(data) if module == "h5py" else decode_raster(data)

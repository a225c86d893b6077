"""Arrays and rasters: the numbers that were stored, no objects, no memory full of nothing."""

import io
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import h5py
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


def test_numbers_that_get_larger_count_as_they_become() -> None:
    with pytest.raises(SampleError, match="too_large: 4000 bytes"):
        decode_arrays(save({"x": torch.zeros(1000, dtype=torch.bfloat16)}), max_bytes=3000)


def test_an_archive_that_understates_its_size_is_not_unpacked() -> None:
    data = bytearray(_npz({"a": np.zeros(1 << 24)}))
    data[(entry := data.rfind(b"PK\x01\x02") + 24) : entry + 4] = struct.pack("<I", 1000)
    tracemalloc.start()
    try:
        with pytest.raises(SampleError, match="decode"):
            decode_arrays(bytes(data), max_bytes=2000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.npy", array_bytes(HOLES))
    with pytest.raises(SampleError, match="a.npy is compressed by a method"):
        decode_arrays(target.getvalue())


def test_hdf5_files_that_name_others_are_refused(tmp_path: Path) -> None:
    other, numbers = tmp_path / "other.h5", tmp_path / "numbers.bin"
    other.write_bytes(hdf5_bytes({"x": np.arange(10.0)}))
    numbers.write_bytes(np.arange(10.0).tobytes())
    virtual = h5py.VirtualLayout((10,), "f8")
    virtual[:] = h5py.VirtualSource(str(other), "x", shape=(10,))
    writers: dict[str, Any] = {
        "linked": lambda file: file.__setitem__("group/linked", h5py.ExternalLink(str(other), "x")),
        "virtual": lambda file: file.create_virtual_dataset("virtual", virtual),
        "external": lambda file: file.create_dataset("external", (10,), "f8", external=[(str(numbers), 0, 80)]),
        "empty": lambda file: file.__setitem__("empty", h5py.Empty("f8")),
    }
    for name, write in writers.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["own"], file["own_too"] = HOLES, h5py.SoftLink("/own")
            write(file)
        with pytest.raises(SampleError) as error:
            decode_arrays((tmp_path / f"{name}.h5").read_bytes())
        what = "without numbers" if name == "empty" else "in another file"
        assert error.value.reason == "decode" and f"{name}'" in str(error.value) and what in str(error.value)


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


def test_whole_complex_numbers_of_radar() -> None:
    real, imaginary = RNG.integers(-30000, 30000, (2, 1, 5, 4))
    numbers = (real + 1j * imaginary).astype(np.complex64)
    data = geotiff_bytes(numbers, dtype="complex_int16")
    assert _same(decode_raster(data), numbers) and probe_raster(data).dtype == "complex64"
    with pytest.raises(SampleError, match=f"too_large: {8 * numbers.size} bytes"):
        decode_raster(data, max_bytes=4 * numbers.size)


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

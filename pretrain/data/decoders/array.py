"""Arrays from npy, npz, safetensors and HDF5 files, told apart by their first bytes; no pickle is ever loaded.

Numbers keep their type (bfloat16 of safetensors becomes float32, which holds all of its values). Sizes are read from
headers first: a file of a few bytes can state an array that fills the memory. Nothing outside of the file is read, as
HDF5 would for links, virtual and external datasets: shards of others could name any file of this machine.
"""

import io
import math
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.errors import DataError, SampleError

#: Bytes of all arrays of one file together, when decoded.
MAX_BYTES = 2 << 30
#: Kinds of numbers: booleans, whole numbers with and without sign, floats, complex.
NUMBERS = "biufc"

AnyArray = npt.NDArray[Any]


def decode_arrays(data: bytes, max_bytes: int = MAX_BYTES) -> dict[str, AnyArray]:
    """Decode all arrays of a file by name; the one of an npy file is named "".

    Args:
        data: The whole file.
        max_bytes: Larger contents are refused before they are read.

    Raises:
        SampleError: "empty", "open" for none of the four formats, "decode" for damage, objects, strings or pickles,
            "too_large".
        DataError: HDF5 without h5py.
    """
    if not data:
        raise SampleError("empty", "no bytes")
    read = next((read for magic, read in _READERS if data.startswith(magic)), None)
    if read is None and data[8:9] == b"{":  # safetensors: the header's length, then JSON
        read = _safetensors
    if read is None:
        raise SampleError("open", f"neither npy, npz, safetensors nor HDF5: it begins with {data[:8]!r}")
    try:
        arrays = read(data, max_bytes)
    except (SampleError, DataError):
        raise
    # Damaged files raise what the format's library happens to meet: KeyError, struct.error, zipfile's, HDF5's.
    except Exception as error:
        raise SampleError("decode", f"{type(error).__name__}: {error}") from error
    if not arrays:
        raise SampleError("decode", "the file holds no array")
    return arrays


def decode_array(data: bytes, name: str = "", max_bytes: int = MAX_BYTES) -> AnyArray:
    """Decode one array of a file.

    Args:
        data: The whole file.
        name: Of the array; may be left out where the file holds one only.
        max_bytes: As for `decode_arrays`.

    Raises:
        SampleError: as by `decode_arrays`, and "index" where there is no such array, or more than one without a name.
    """
    arrays = decode_arrays(data, max_bytes)
    if not name and len(arrays) == 1:
        return next(iter(arrays.values()))
    if name not in arrays:
        raise SampleError("index", f"no array named {name!r} in the file, which holds {sorted(arrays)}")
    return arrays[name]


def _npy(data: bytes, max_bytes: int) -> dict[str, AnyArray]:
    return {"": _one_npy(io.BytesIO(data), len(data), max_bytes)}


def _one_npy(file: Any, length: int, max_bytes: int) -> AnyArray:
    """Read one npy file, after its header has been found to fit its length."""
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = header(file)
    _check_type("", kind)
    size = math.prod(shape) * kind.itemsize
    _check_size(size, max_bytes)
    if size > length - file.tell():
        raise SampleError("decode", f"{size} bytes of numbers stated, {length - file.tell()} there: the file is cut")
    file.seek(0)
    array: AnyArray = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _npz(data: bytes, max_bytes: int) -> dict[str, AnyArray]:
    arrays: dict[str, AnyArray] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        _check_size(sum(entry.file_size for entry in entries), max_bytes)
        for entry in entries:
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise SampleError("decode", f"{entry.filename} is compressed by a method that numpy does not write")
            # Not archive.read: that unpacks up to 2 GiB before it looks whether the entry is as large as it states.
            with archive.open(entry) as file:
                content = file.read(entry.file_size)
            arrays[entry.filename.removesuffix(".npy")] = _one_npy(io.BytesIO(content), len(content), max_bytes)
    return arrays


def _safetensors(data: bytes, max_bytes: int) -> dict[str, AnyArray]:
    import torch
    from safetensors.torch import load

    _check_size(len(data), max_bytes)
    tensors = load(data)
    floats = {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}  # numpy has no such types
    _check_size(sum(one.numel() * (4 if one.dtype in floats else one.itemsize) for one in tensors.values()), max_bytes)
    return {name: (one.float() if one.dtype in floats else one).numpy() for name, one in sorted(tensors.items())}


def _hdf5(data: bytes, max_bytes: int) -> dict[str, AnyArray]:
    try:
        import h5py
    except ImportError as error:
        raise DataError(
            f"HDF5 files need h5py, which can't be imported ({error}): pip install 'tubelet[arrays]'"
        ) from error
    arrays: dict[str, AnyArray] = {}
    with h5py.File(io.BytesIO(data), "r") as file:
        found: list[str] = []
        file.visititems(lambda name, node: found.append(name) if isinstance(node, h5py.Dataset) else None)
        links: list[str] = []
        file.visititems_links(lambda name, link: links.append(name) if isinstance(link, h5py.ExternalLink) else None)
        for name in links:
            _check_inside(name, outside=True)
        for name in found:
            _check_inside(name, file[name].is_virtual or file[name].external is not None)
            _check_type(name, file[name].dtype)
            if file[name].shape is None:
                raise SampleError("decode", f"array {name!r} is a dataset without numbers (h5py.Empty); leave it out")
        _check_size(sum(file[name].nbytes for name in found), max_bytes)
        for name in found:
            arrays[name] = np.asarray(file[name][()])
    return arrays


def _check_inside(name: str, outside: bool) -> None:
    if outside:
        raise SampleError(
            "decode", f"array {name!r} lies in another file, which is not read; store its numbers in this one"
        )


def _check_type(name: str, kind: np.dtype[Any]) -> None:
    if kind.kind not in NUMBERS:
        where = f"array {name!r}" if name else "the array"
        raise SampleError("decode", f"{where} holds {kind} and no numbers; objects and texts are not read")


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise SampleError("too_large", f"{size} bytes of arrays, at most {max_bytes} are decoded")


_READERS: list[tuple[bytes, Callable[[bytes, int], dict[str, AnyArray]]]] = [
    (b"\x93NUMPY", _npy),
    (b"PK\x03\x04", _npz),
    (b"\x89HDF\r\n\x1a\n", _hdf5),
]

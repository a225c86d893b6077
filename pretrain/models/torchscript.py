"""Import of the tensors of a TorchScript archive without running its code.

OpenAI published CLIP so. `torch.jit.load` would compile and partly run what the archive holds, and is deprecated. The
file is a zip: `<name>/data.pkl` pickles the modules' attributes, `<name>/data/<key>` are the tensors' bytes.
"""

import io
import pickle
import zipfile
from typing import IO, Any

import torch
from torch import Tensor

from pretrain.errors import WeightsError

#: Tensor types by the name of their storage class.
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
#: What a damaged archive raises in zipfile, pickle and torch.
BROKEN = (
    StopIteration, KeyError, ValueError, TypeError, AttributeError, EOFError, RuntimeError, IndexError,
    pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


def is_torchscript(file: IO[bytes]) -> bool:
    """Tell whether this is a TorchScript archive; the zips that torch.save writes hold no code."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(file: IO[bytes], source: str) -> dict[str, Tensor]:
    """Read parameters and buffers by their dotted names.

    Args:
        file: the archive, seekable.
        source: its name, for errors.

    Raises:
        WeightsError: it holds anything but modules, tensors and plain values, or is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            pickled = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            root = _Unpickler(archive, pickled.removesuffix(".pkl")).load()
    except BROKEN as error:
        reason = str(error) or type(error).__name__
        raise WeightsError(f"{source}: a TorchScript archive that can't be read as tensors ({reason})") from error
    found = dict(_tensors(root, ""))
    if not found:
        raise WeightsError(f"{source}: a TorchScript archive without tensors")
    return found


class _Archived:
    """A module of the archive; its state becomes `__dict__`, its class is never looked for."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}.pkl")))
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Archived
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _strided
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle" and name.startswith("build_") and name.endswith("list"):
            return list
        # A list of what is allowed: anything else that a pickle names would be called, with arguments of its choice.
        raise pickle.UnpicklingError(f"it holds {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        # torch.frombuffer warns of memory that can't be written, which bytes are.
        data = bytearray(self._archive.read(f"{self._folder}/{key}"))
        return torch.frombuffer(data, dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _strided(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    # A copy: tensors that share a storage would keep all of it alive, and be written to together.
    return torch.as_strided(storage, size, stride, offset).clone()


def _tensors(value: Any, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    if not isinstance(value, _Archived):
        return []
    prefix = f"{name}." if name else ""
    return [found for key, inner in vars(value).items() for found in _tensors(inner, f"{prefix}{key}")]

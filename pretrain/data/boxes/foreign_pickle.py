"""Pickles of strangers: read as plain containers and numpy arrays, and as nothing else.

A pickle is a program: what it names, it can call. Here it may name what builds arrays and containers; any other name
ends the reading before anything is run. Python 2's pickles are read too, their texts as Latin-1.
"""

import io
import pickle
from typing import Any

from pretrain.data.boxes.records import read_file
from pretrain.errors import RecipeError

#: Names that pickles of plain data hold, by module; numpy's are those of versions 1 and 2.
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
ALLOWED: frozenset[tuple[str, str]] = frozenset(
    [(module, name) for module in _NUMPY for name in ("_reconstruct", "scalar")]
    + [(module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")]
    + [("numpy", name) for name in ("ndarray", "dtype")]
    + [("collections", name) for name in ("OrderedDict", "defaultdict")]
    + [("_codecs", "encode")]
    + [
        (module, name)
        for module in ("builtins", "__builtin__")
        for name in ("dict", "list", "tuple", "set", "frozenset", "int", "float", "str", "bytes", "bytearray")
    ]
)
#: Of Python 2's own types, what stands for them.
_PYTHON_2 = {"unicode": str, "long": int, "xrange": range}


class _Refused(Exception):
    """A pickle names something else than plain data."""


class _PlainData(pickle.Unpickler):
    """An unpickler that knows the names above."""

    def find_class(self, module: str, name: str) -> Any:
        """Find a class or function by its name."""
        if module == "__builtin__" and name in _PYTHON_2:
            return _PYTHON_2[name]
        if (module, name) not in ALLOWED:
            raise _Refused(f"{module}.{name}")
        return super().find_class(module, name)


def read_pickle(source: str) -> Any:
    """Read a pickle of containers, numbers, texts and numpy arrays.

    Args:
        source: path or URL.

    Raises:
        RecipeError: it asks for anything else, with the name; or it is damaged or no pickle.
    """
    try:
        # latin1: Python 2's texts are bytes, and so are the buffers of its arrays.
        return _PlainData(io.BytesIO(read_file(source)), encoding="latin1").load()
    except _Refused as error:
        raise RecipeError(
            f"{source}: the pickle asks for {error}, which could run anything; allowed are containers, numbers, texts "
            "and numpy arrays. If you trust its maker, load it yourself and write it again as these"
        ) from error
    except RecipeError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises anything
        raise RecipeError(f"{source}: no readable pickle ({type(error).__name__}: {error})") from error

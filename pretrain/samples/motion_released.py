"""Motion curves of the released MGSampler: one JSON object a split, {video name: [numbers]}.

The file of the image difference holds raw curves, that of the feature difference cumulative ones (after the exponent
0.5); which of the two it is shows in its numbers. Cumulative curves are turned back, up to their scale, which says
nothing: officially they are summed up a second time, and frames move towards the end.
"""

import posixpath
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pretrain.data.media import kind_of
from pretrain.data.motion_tables import Curve
from pretrain.data.pack.pack_plan import key_from
from pretrain.errors import DataError, StorageError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json
from pretrain.samples.motion import Kind

#: How far from 1 the last value of a cumulative curve may be.
ROUNDING = 1e-6
#: Exponent that cumulative curves were made with.
RELEASED_MU = 0.5


@dataclass(frozen=True)
class ReleasedCurves:
    """Raw curves by video name, of one measure: ssim for the image file, feature for the other one."""

    kind: Kind
    curves: Mapping[str, Curve]


def read_released(paths: Iterable[str]) -> ReleasedCurves:
    """Read released files, of a training and a validation split for example.

    Raises:
        DataError: one is no such file, or they are of both kinds.
    """
    kinds: dict[str, Kind] = {}
    curves: dict[str, Curve] = {}
    for path in paths:
        found = _read(path)
        cumulative = _all_cumulative(found.values())
        kinds[path] = "feature" if cumulative else "ssim"
        for name, values in found.items():
            curves[name] = (raw_of(values) if cumulative else np.maximum(values, 0)).astype(np.float32)
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{path}: {'cumulative (feature)' if kind == 'feature' else 'raw (image)'}"
                         for path, kind in kinds.items())  # fmt: skip
        raise DataError(f"files of both kinds of curves, which don't mix in a data set: {told}; import one kind")
    return ReleasedCurves(next(iter(kinds.values())), curves)


def raw_of(cumulative: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Turn a cumulative curve back to a raw one: d = p ** (1 / 0.5) of its steps p."""
    # Printed numbers are rounded, and a step of nothing may come out below it.
    return np.maximum(np.diff(cumulative, prepend=0.0), 0.0) ** (1 / RELEASED_MU)


def by_key(released: ReleasedCurves, keys: Iterable[str]) -> dict[str, Curve]:
    """Find the curve of each key of a data set: by the last part of its path, without its ending.

    Raises:
        DataError: none fits, or a name fits several keys.
    """
    named: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        named[posixpath.basename(key)].append(key)
    found: dict[str, Curve] = {}
    for name, curve in released.curves.items():
        fitting = named.get(_key_of(name), [])
        if len(fitting) > 1:
            raise DataError(
                f"{name}: fits {', '.join(fitting[:3])}; whose curve is it? Their last parts must differ for "
                "an import; leave --import out to measure them"
            )
        found |= {key: curve for key in fitting}
    if not found:
        shown, there = ", ".join(list(released.curves)[:3]), ", ".join(list(named)[:3])
        raise DataError(f"not one of the {len(released.curves)} names ({shown}) is that of a sample here ({there})")
    return found


def _key_of(name: str) -> str:
    last = posixpath.basename(name.rstrip("/"))
    return posixpath.basename(key_from(posixpath.splitext(last)[0] if kind_of(last) else last))


def _read(path: str) -> dict[str, npt.NDArray[np.float64]]:
    try:
        content = parse_json(storage.read_bytes(path))
    except StorageError as error:
        raise DataError(f"{path}: can't be read ({error})") from error
    except ValueError as error:
        # The image script appends: a second run leaves two objects, of which either may be the right one.
        hint = "; a second run of the released script appends to the file: keep one of its objects"
        raise DataError(f"{path}: not JSON ({error}){hint if 'Extra data' in str(error) else ''}") from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: found {type(content).__name__}, allowed: an object {{video name: [numbers]}}")
    # A video of one frame has null there, and is measured like one that is not in the file.
    return {name: _numbers(path, name, values) for name, values in content.items() if values is not None}


def _numbers(path: str, name: str, values: object) -> npt.NDArray[np.float64]:
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.zeros((0, 0))
    if found.ndim != 1:
        raise DataError(f"{path}: {name}: found {str(values)[:60]}, allowed: a list of numbers")
    return found


def _all_cumulative(curves: Iterable[npt.NDArray[np.float64]]) -> bool:
    """Tell whether all curves of a file never fall and end with 1; those that hold no numbers say nothing."""
    said = [curve for curve in curves if curve.size and np.isfinite(curve).all()]
    return bool(said) and all((np.diff(curve) >= 0).all() and abs(curve[-1] - 1) <= ROUNDING for curve in said)

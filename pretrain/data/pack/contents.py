"""Contents of members, found by decoding all of each: before it is packed, and when shards are checked."""

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from pretrain.data.media import Kind, kind_of_ending
from pretrain.errors import SampleError
from pretrain.runtime.untrusted import SAMPLE_JSON_BYTES, parse_json

#: A sound may be this much shorter than its header says, as a share, before it counts as damaged.
SHORTER = 0.05


def describe(ending: str, data: bytes) -> dict[str, Any]:
    """Decode a member from beginning to end.

    Args:
        ending: of its name; says what it should be.
        data: its content.

    Returns:
        What it holds, as the sample's json says it: width and height of an image, say. Empty for unknown endings.

    Raises:
        SampleError: it is damaged, or something else than its ending says.
        DataError: what decodes it is not installed.
    """
    kind = kind_of_ending(ending)
    if kind is not None:
        return DESCRIBE[kind](data)
    if ending.rpartition(".")[2] == "json":
        try:
            parse_json(data, SAMPLE_JSON_BYTES)
        except ValueError as error:
            raise SampleError("damaged", f"not JSON: {error}") from error
    return {}


def _video(data: bytes) -> dict[str, Any]:
    from pretrain.data.pack.verify import sequential_signatures

    with tempfile.NamedTemporaryFile(suffix=".video") as file:
        file.write(data)
        file.flush()
        return {"frames": len(sequential_signatures(file.name))}


def _image(data: bytes) -> dict[str, Any]:
    from pretrain.data.decoders.image import decode_image

    _, height, width, _ = decode_image(data).shape
    return {"frames": 1, "width": width, "height": height}


def _sound(data: bytes) -> dict[str, Any]:
    from pretrain.data.decoders.sound import decode_sound, probe_sound

    # FFmpeg takes a cut WAV file for a shorter one. Those that were written to a pipe state 0 or the largest number.
    riff = int.from_bytes(data[4:8], "little") if data[:4] == b"RIFF" else 0
    if len(data) < riff + 8 and riff != 0xFFFFFFFF:
        raise SampleError("damaged", f"{len(data)} bytes, its header says {riff + 8}: the file is cut")
    stated = probe_sound(data)
    heard = decode_sound(data, stated.rate, min(stated.channels, 2))
    seconds = heard.shape[1] / stated.rate
    if stated.duration and seconds < (1 - SHORTER) * stated.duration - 0.1:
        raise SampleError(
            "damaged", f"{seconds:.2f} seconds decode, its header says {stated.duration:.2f}: the file is cut"
        )
    return {"rate": stated.rate, "channels": stated.channels, "codec": stated.codec, "duration": round(seconds, 6)}


def _array(data: bytes) -> dict[str, Any]:
    from pretrain.data.decoders.array import decode_arrays

    arrays = decode_arrays(data)
    facts: dict[str, Any] = {
        "arrays": {name: {"dtype": str(one.dtype), "shape": list(one.shape)} for name, one in arrays.items()}
    }
    # Not refused: NaN marks what is missing in some data. Said, because a loss that meets one is lost.
    floats = [one for one in arrays.values() if one.dtype.kind in "fc"]
    facts["nonfinite"] = sum(int(one.size - np.isfinite(one).sum()) for one in floats)
    return facts


def _raster(data: bytes) -> dict[str, Any]:
    from pretrain.data.decoders.geotiff import decode_raster, probe_raster

    stated = probe_raster(data)
    # Every pixel once: no header tells of a damaged tile.
    decode_raster(data)
    return {
        "bands": stated.bands, "height": stated.height, "width": stated.width, "dtype": stated.dtype,
        "crs": stated.crs, "transform": list(stated.transform),
        "nodata": None if stated.nodata is None else str(stated.nodata), "names": list(stated.names),
    }  # fmt: skip


def _text(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError("damaged", f"not a text in UTF-8: {error}") from error
    if not text.strip():
        raise SampleError("empty", "the text has no words")
    return {"characters": len(text)}


DESCRIBE: dict[Kind, Callable[[bytes], dict[str, Any]]] = {
    "video": _video,
    "image": _image,
    "sound": _sound,
    "array": _array,
    "raster": _raster,
    "text": _text,
}

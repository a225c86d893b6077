"""Names and JSON out of files that somebody else may have made: read within limits, and never led astray by them."""

import json
from collections.abc import Sequence
from typing import IO, Any

#: Longest JSON of one sample, bytes. Annotations of a film take kilobytes; a worker parses this many in a second.
SAMPLE_JSON_BYTES = 16 << 20


def parse_json(data: bytes | str, limit: int | None = None) -> Any:
    """Parse JSON.

    Args:
        data: the text.
        limit: its longest length that is read, in bytes; None: whatever was read already.

    Raises:
        ValueError: no JSON, too long, or nested too deep to be read.
    """
    if limit is not None and len(data) > limit:
        raise ValueError(f"{len(data)} bytes of JSON, at most {limit} are read")
    try:
        return json.loads(data)
    except RecursionError as error:
        # Not a ValueError by itself, so that it would pass every handler of damaged files and end the run.
        raise ValueError("JSON nested too deep to be read") from error


def name_bytes(name: str) -> bytes:
    """Give the bytes of a name of a disk or a tar, which Python holds with surrogates where they are not UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def name_text(data: bytes) -> str:
    """Give the name that some bytes are; the reverse of `name_bytes`."""
    return data.decode("utf-8", "surrogateescape")


def is_text(name: str) -> bool:
    """Tell whether a name is text in UTF-8, and not bytes of something else."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def inner_name(name: object) -> str:
    """Return the name of a file that must lie in the folder which lists it.

    Raises:
        ValueError: no text, or a path that leaves the folder.
    """
    if not isinstance(name, str) or "\0" in name or "\\" in name or "://" in name:
        raise ValueError(f"{name!r} is no name of a file in this folder")
    # By text, not by resolving: what lies on this disk must not decide what a list may name. An absolute name, and one
    # that ends with a slash, have an empty part.
    if not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise ValueError(f"{name!r} leads out of its folder; allowed are names of files in it")
    return name


def foreign_objects(file: IO[bytes] | str, allowed: Sequence[Any]) -> list[str]:
    """List what a file of torch holds beside tensors, plain values and the classes `allowed`; nothing of it is run.

    Returns:
        Full names, sorted; empty where the file is so damaged, or so old, that it has no list of names.
    """
    import torch  # here: JSON and names are read by commands that start without it

    try:
        with torch.serialization.safe_globals(list(allowed)):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # noqa: BLE001 - anything may be wrong with it, and only its names are asked for
        return []

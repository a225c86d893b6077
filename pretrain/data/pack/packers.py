"""Packing of an item of any kind: the packer of its kind, then what goes along. Runs in worker processes."""

import json
from collections.abc import Callable
from typing import Any

from pretrain.data.media import Kind
from pretrain.data.pack.companions import Companion, read_companion
from pretrain.data.pack.discover import Item
from pretrain.data.pack.options import Options
from pretrain.data.pack.originals import keep
from pretrain.data.pack.pack_as_is import pack_as_is
from pretrain.data.pack.pack_image import pack_image
from pretrain.data.pack.pack_video import pack_item
from pretrain.data.pack.packed import Packed, Rejected
from pretrain.errors import SampleError

#: (item, options, local folder for the sample's files) -> the sample, or why there is none.
Packer = Callable[[Item, Options, str], Packed | Rejected]

PACKERS: dict[Kind, Packer] = {
    "video": pack_item,
    "image": pack_image,
    "sound": pack_as_is,
    "array": pack_as_is,
    "raster": pack_as_is,
    "text": pack_as_is,
}


def pack_sample(item: Item, options: Options, folder: str) -> Packed | Rejected:
    """Make the sample of one item; its members end up as files in the local `folder`.

    Raises:
        DataError: the store does not answer, or what decodes this kind is not installed.
    """
    try:
        # Companions come first: they are small, and a video without its caption need not be encoded.
        companions = [(one, read_companion(one)) for one in item.companions]
        packed = PACKERS[item.kind](item, options, folder)
    except SampleError as error:
        return Rejected(item.name, item.path, error.reason, str(error).removeprefix(f"{error.reason}: "))
    if isinstance(packed, Rejected) or not companions:
        return packed
    return _joined(packed, companions, folder)


def _joined(packed: Packed, companions: list[tuple[Companion, bytes]], folder: str) -> Packed:
    """Join the sample with its companions: members of their own, but a json becomes `meta` in the sample's own json."""
    files, facts = dict(packed.files), dict(packed.facts)
    read = packed.bytes_read
    for companion, data in companions:
        read += len(data)
        if companion.ending == "json":
            facts["meta"] = _merged(json.loads(data), facts.get("meta", {}))
        else:
            files[companion.ending] = keep(data, companion.ending, folder)
    return Packed(files, facts, read)


def _merged(content: Any, meta: dict[str, Any]) -> dict[str, Any]:
    """Put what a companion json says under what the manifest says; a list is no set of facts, kept as `json`."""
    return (content if isinstance(content, dict) else {"json": content}) | meta

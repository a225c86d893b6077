"""From an item of any kind to its sample: the packer of its kind, then what goes along. Runs in worker processes."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from pretrain.data.media import Kind
from pretrain.data.pack.class_masks import check_mask, is_mask
from pretrain.data.pack.companions import Companion, read_companion
from pretrain.data.pack.discover import Item
from pretrain.data.pack.options import Options
from pretrain.data.pack.originals import keep
from pretrain.data.pack.pack_as_is import pack_as_is
from pretrain.data.pack.pack_image import pack_image
from pretrain.data.pack.pack_video import pack_item
from pretrain.data.pack.packed import Packed, Rejected
from pretrain.errors import SampleError
from pretrain.runtime.untrusted import SAMPLE_JSON_BYTES, parse_json

#: (item, options, local folder for the sample's files) -> the sample; SampleError where there is none.
Packer = Callable[[Item, Options, str], Packed]

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
        if item.kind == "image":
            _check_masks(packed, companions)
        return _join(packed, companions, folder) if companions else packed
    except SampleError as error:
        return Rejected(item.name, item.path, error.reason, str(error).removeprefix(f"{error.reason}: "))


def _check_masks(packed: Packed, companions: list[tuple[Companion, bytes]]) -> None:
    """Hold masks of classes against the picture as it is packed.

    Raises:
        SampleError: "mask" for one that does not fit, "decode".
    """
    try:
        for companion, data in companions:
            if is_mask(companion.ending):
                check_mask(data, packed.facts["width"], packed.facts["height"])
    except SampleError:
        packed.discard()
        raise


def _join(packed: Packed, companions: list[tuple[Companion, bytes]], folder: str) -> Packed:
    """Join a sample and its companions: members of their own, but a json goes into the sample's own, as `meta`.

    Raises:
        SampleError: "companion" where one would take the place of another member.
    """
    endings = [*packed.files, *(companion.ending for companion, _ in companions)]
    twice = [ending for ending, count in Counter(endings).items() if count > 1]
    if twice:
        packed.discard()
        detail = f"two files of the sample would be its member {twice[0]!r}; rename one, or leave it out of --with"
        raise SampleError("companion", detail)
    # Which member the json describes: readers could not tell an image from a mask of another format.
    files, facts = dict(packed.files), packed.facts | {"member": next(iter(packed.files))}
    read = packed.bytes_read
    for companion, data in companions:
        read += len(data)
        if companion.ending == "json":
            facts["meta"] = _merge_meta(parse_json(data, SAMPLE_JSON_BYTES), facts.get("meta", {}))
        else:
            files[companion.ending] = keep(data, companion.ending, folder)
    return Packed(files, facts, read)


def _merge_meta(content: Any, meta: dict[str, Any]) -> dict[str, Any]:
    """Put what a companion json says under what the manifest says; a list is no set of facts, and kept as `json`."""
    return (content if isinstance(content, dict) else {"json": content}) | meta

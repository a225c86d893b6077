"""One sound, array, raster or text: decoded once to see that it is sound, and kept byte for byte."""

import hashlib

from pretrain.data.media import extension_of
from pretrain.data.pack.contents import describe
from pretrain.data.pack.discover import Item
from pretrain.data.pack.options import Options
from pretrain.data.pack.originals import fetch_whole, keep
from pretrain.data.pack.packed import Packed
from pretrain.errors import SampleError


def pack_as_is(item: Item, options: Options, folder: str) -> Packed:
    """Make the sample of one file.

    Raises:
        SampleError: it can't be read or decoded, or, asked for as a raster, has no rows and columns.
    """
    data, ending = fetch_whole(item.path), extension_of(item.path)
    # Decoded to the end: a cut file is found now, not in an epoch of a long run.
    found = describe(ending, data)
    shapes = [one["shape"] for one in found.get("arrays", {}).values()]
    # An npy of one dimension decodes well, and would fail at every crop in training.
    if item.kind == "raster" and any(len(shape) not in (2, 3) for shape in shapes):
        raise SampleError("shape", f"shape {shapes[0]}; a raster is [height, width] or [bands, height, width]")
    facts = {
        "key": item.key,
        "label": item.label,
        "source": item.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        **found,
        "bytes": len(data),
        "reencoded": None,
    }
    facts |= {"meta": item.meta} if item.meta else {}
    return Packed({ending: keep(data, ending, folder)}, facts, len(data))

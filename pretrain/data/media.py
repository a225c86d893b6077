"""Kinds of files by the ending of their names, and the pixel statistics that published networks were trained with."""

import posixpath
from collections.abc import Iterable
from typing import Literal, get_args

#: What a sample mainly is. Boxes, labels and captions go beside it; a GeoTIFF or an array with bands is a raster.
Kind = Literal["video", "image", "sound", "array", "raster", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Last part of a member's name that makes its sample a video sample, and a file a video: what FFmpeg demuxes.
VIDEO_ENDINGS = frozenset("mp4 m4v mov avi mkv webm mpg mpeg vob ts mts m2ts wmv flv ogv 3gp".split())
#: What Pillow decodes. A .tif is a raster unless it is asked for as an image.
IMAGE_ENDINGS = frozenset("jpg jpeg png webp bmp gif ppm pgm".split())
SOUND_ENDINGS = frozenset("wav flac mp3 m4a aac ogg oga opus wma aif aiff".split())
TEXT_ENDINGS = frozenset("txt caption srt vtt".split())
ARRAY_ENDINGS = frozenset("npy npz safetensors h5 hdf5".split())
RASTER_ENDINGS = frozenset("tif tiff".split())
#: A class number or name of its own member, as foreign WebDataset shards have it.
LABEL_ENDING = "cls"
#: Name's last part of a member that holds a video's path or URL in the place of the video (pack.py --in-place).
LINK_ENDING = "link"
#: Of one beside it that tells what of that video is meant, and where in the file it lies.
SPAN_ENDING = "span"

ENDINGS: dict[Kind, frozenset[str]] = {
    "video": VIDEO_ENDINGS,
    "image": IMAGE_ENDINGS,
    "sound": SOUND_ENDINGS,
    "array": ARRAY_ENDINGS,
    "raster": RASTER_ENDINGS,
    "text": TEXT_ENDINGS,
}
#: What a kind takes besides, where it is asked for by name.
ALSO: dict[Kind, frozenset[str]] = {"image": RASTER_ENDINGS, "raster": frozenset({"npy"})}

#: ImageNet statistics of pixels in [0, 1], RGB.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def extension_of(name: str) -> str:
    """Return the last part of a file's or member's name, in lower case, without the dot."""
    return posixpath.splitext(name)[1].lstrip(".").lower()


def kind_of(name: str) -> Kind | None:
    """Tell a file's kind by the last part of its name; None for anything else, a json for example."""
    return kind_of_ending(extension_of(name))


def kind_of_ending(ending: str) -> Kind | None:
    """Tell a member's kind by its ending, all that follows the first dot of its name: "mp4" or "flow.npy"."""
    last = ending.rpartition(".")[2].lower()
    return next((kind for kind, endings in ENDINGS.items() if last in endings), None)


def main_member(endings: Iterable[str], stated: object) -> str | None:
    """Choose among members of a kind, by ending: the one that the sample's json states, else the first without a name
    ("png" and not "mask.png"), else the first; None without any."""
    return min(endings, key=lambda ending: (ending != stated, "." in ending), default=None)


def endings_of(kind: Kind) -> frozenset[str]:
    """Give the endings of all files that can be taken for one of `kind`."""
    return ENDINGS[kind] | ALSO.get(kind, frozenset())


def is_of_kind(name: str, kind: Kind) -> bool:
    """Tell whether a file can be taken for one of `kind`."""
    return extension_of(name) in endings_of(kind)


def plural_of(kinds: Iterable[Kind]) -> str:
    """Name several samples of these kinds: "videos", say, or "samples" where there are several kinds."""
    names = {f"{kind}s" for kind in kinds}
    return names.pop() if len(names) == 1 else "samples"

"""Discovery of what to pack: files of one kind (and frame folders) in folders, zip archives, lists and manifests."""

import functools
import logging
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pretrain.data.media import KINDS, VIDEO_ENDINGS, Kind, extension_of, is_of_kind, kind_of, plural_of
from pretrain.data.pack import originals, zip_source
from pretrain.data.pack.annotations import Row, annotated
from pretrain.data.pack.companions import Companion, beside, from_row
from pretrain.data.pack.lists import ListFormat, parse_list
from pretrain.data.pack.manifests import read_rows
from pretrain.data.time_segment import Segment
from pretrain.errors import RecipeError, SampleError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import is_text

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset("jpg jpeg png webp bmp ppm tif tiff".split())
LIST_EXTENSIONS = frozenset("csv txt lst list tsv json jsonl ndjson".split())
LabelRule = Literal["auto", "folder", "none"]
#: auto goes by the endings of what the sources hold.
AskedKind = Literal["auto", "video", "image", "sound", "array", "raster", "text"]


@dataclass(frozen=True)
class Item:
    """One sample to pack: a video, or a file of another kind.

    Attributes:
        path: URL or local path of the file or of the folder that holds a video's frames.
        name: the path as the user wrote it or as found below its source; keys derive from it.
        label: class number or name, None without.
        frames: (number of the first frame in the file names, how many), for frame folders; None takes all.
        is_folder: whether `path` is a folder of frames.
        meta: further columns of a manifest; they end up in the sample's json under "meta".
        key: key asked for by a manifest, or assigned by the plan.
        size: bytes of the original, 0 when it can't be found; decides the part that packs it.
        kind: what the sample mainly is.
        companions: further members of the sample.
        segment: the piece of the video that is meant, None for all of it.
        distinct: samples of the same pixels are told apart by their keys: keyframes of one short video, say.
    """

    path: str
    name: str
    label: int | str | None = None
    frames: tuple[int | None, int] | None = None
    is_folder: bool = False
    meta: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    size: int = 0
    kind: Kind = "video"
    companions: tuple[Companion, ...] = ()
    segment: Segment | None = None
    distinct: bool = False


@dataclass(frozen=True)
class _Wanted:
    """Choice of what to take of the sources."""

    data_root: str
    list_format: ListFormat
    labels: LabelRule
    kind: Kind | None
    companions: Sequence[str]


def gather(
    sources: list[str],
    data_root: str = "",
    list_format: ListFormat = "auto",
    labels: LabelRule = "auto",
    kind: AskedKind = "auto",
    companions: Sequence[str] = (),
) -> list[Item]:
    """Find every file of one kind in `sources`, in the order given; folders are searched at any depth, by name.

    Args:
        sources: folders, zip archives, files, list files or manifests; local paths or fsspec URLs.
        data_root: put in front of relative paths in list files and manifests: a folder, or a zip archive; "" = the list
            file's own folder.
        list_format: how to read the columns of an official list file.
        labels: "folder" takes a file's parent folder as its label, "auto" where there is one below the source.
        kind: what to take. auto: of a folder the videos and frame folders, and where there are none its sounds, else
            its arrays, else its rasters; of a zip archive the first kind in it; of a list what each path ends like.
            Texts, and images in folders, must be asked for: they are what lies beside others, and frames of videos.
        companions: what goes along with each, by ending or column (`companions.py`).

    Raises:
        RecipeError: a source does not exist, lines of a list are wrong, or the kinds differ: everything found, at once.
    """
    items: list[Item] = []
    problems: list[str] = []
    wanted = _Wanted(data_root, list_format, labels, None if kind == "auto" else kind, companions)
    for source in sources:
        try:
            items.extend(_one_source(source, wanted))
        except RecipeError as error:
            # Collected: all that is wrong is told before the first of many hours of packing.
            problems.extend(error.problems)
    problems += _odd_labels(items)
    if problems:
        raise RecipeError(problems)
    kinds = {item.kind for item in items}
    # Indexing leaves out what has none of its shard's kind (scan.py): of two kinds one would be lost.
    if len(kinds) > 1:
        found = " and ".join(plural_of([one]) for one in KINDS if one in kinds)
        raise RecipeError(f"{', '.join(sources)}: {found}; a data set has one kind of samples: choose one with --kind")
    return items


def _odd_labels(items: list[Item]) -> list[str]:
    """List the labels that are no text: as names of classes they would end whatever writes or prints them."""
    odd = {item.label: item for item in items if isinstance(item.label, str) and not is_text(item.label)}
    return [
        f"{item.path}: its label {item.label!r} is not in UTF-8; rename the folder (convmv -f latin1 -t utf-8 for "
        "example), name the class in a manifest, or pack with --no-labels"
        for item in odd.values()
    ]


def _one_source(source: str, wanted: _Wanted) -> Iterable[Item]:
    if storage.is_folder(source):
        return _from_folder(source, wanted)
    if not storage.exists(source):
        raise RecipeError(f"{source}: does not exist; give a folder, a video, a list file or a csv/jsonl manifest")
    if extension_of(source) in LIST_EXTENSIONS:
        return _from_list(source, wanted)
    if extension_of(source) == "zip":
        return _from_zip(source, wanted)
    if kind_of(source) is not None:
        item = Item(source, posixpath.basename(source), size=storage.size(source))
        return [_of_kind(replace(item, companions=beside(source, wanted.companions)), wanted.kind)]
    raise RecipeError(
        f"{source}: neither a video ({', '.join(sorted(VIDEO_ENDINGS))}), a file of another kind, a zip archive nor a "
        f"list ({', '.join(sorted(LIST_EXTENSIONS))}), going by its extension"
    )


def _from_folder(source: str, wanted: _Wanted) -> list[Item]:
    listing = storage.find_linked(source)
    place = functools.partial(storage.join, source)
    if wanted.kind in (None, "video"):
        items = list(_videos(listing, place, wanted))
        if items or wanted.kind == "video":
            return items
    # Never images by themselves: pictures in a folder have always been the frames of a video.
    return list(_files(listing, place, wanted, ("sound", "array", "raster")))


def _from_zip(source: str, wanted: _Wanted) -> list[Item]:
    """Take what the map beside an archive says, as Swin Transformer's zip mode has it, else all of the archive."""
    where = zip_source.map_of(source)
    if where is not None:
        return _from_list(where, replace(wanted, data_root=source))
    place = functools.partial(zip_source.entry_path, source)
    return list(_files(zip_source.find(source), place, wanted, ("video", "image", "sound", "array", "raster")))


def _files(
    listing: dict[str, int], place: Callable[[str], str], wanted: _Wanted, kinds: Sequence[Kind]
) -> Iterator[Item]:
    """Select files of the wanted kind, or else of the first of some kinds that is there."""
    # Hidden files end like media and are none: `._a.mp4`, which macOS leaves beside a.mp4, say.
    names = [name for name in listing if not posixpath.basename(name).startswith(".")]
    kind = wanted.kind or next((one for one in kinds if one in map(kind_of, names)), None)
    if kind is None:
        return
    for name in names:
        if kind_of(name) == kind or (wanted.kind and is_of_kind(name, kind)):
            path, label = place(name), _folder_label(posixpath.dirname(name), wanted.labels)
            companions = beside(path, wanted.companions, name)
            yield Item(path, name, label, size=listing[name], kind=kind, companions=companions)


def _videos(listing: dict[str, int], place: Callable[[str], str], wanted: _Wanted) -> Iterator[Item]:
    """Select the videos below a folder; a sub-folder that holds images and no video counts as one frame folder."""
    images: dict[str, int] = {}
    with_video: set[str] = set()
    for name, size in listing.items():
        parent, extension = posixpath.dirname(name), extension_of(name)
        if posixpath.basename(name).startswith("."):
            continue
        if extension in VIDEO_ENDINGS:
            with_video.add(parent)
            path = place(name)
            companions = beside(path, wanted.companions, name)
            yield Item(path, name, _folder_label(parent, wanted.labels), size=size, companions=companions)
        elif extension in IMAGE_EXTENSIONS and parent:
            images[parent] = images.get(parent, 0) + size
    for parent, size in images.items():
        if parent not in with_video:
            label = _folder_label(posixpath.dirname(parent), wanted.labels)
            path = place(parent)
            companions = beside(path, wanted.companions, parent)
            yield Item(path, parent, label, is_folder=True, size=size, companions=companions)


def _of_kind(item: Item, asked: Kind | None) -> Item:
    """Give an item its kind: the one asked for, or what its path ends like.

    Raises:
        RecipeError: it can't be of the kind that is asked for.
    """
    own: Kind = "video" if item.is_folder else kind_of(item.path) or "video"
    if item.segment is not None and (own != "video" or zip_source.is_entry(item.path)):
        raise RecipeError(f"{item.path}: start and end are for videos, and for those outside of zip archives")
    if asked is None or asked == own:
        return replace(item, kind=own)
    if item.is_folder or not is_of_kind(item.path, asked):
        raise RecipeError(f"{item.path}: not the ending of {asked} files, which --kind asks for")
    return replace(item, kind=asked)


def _folder_label(parent: str, labels: LabelRule) -> str | None:
    return posixpath.basename(parent) or None if labels != "none" else None


def _from_list(source: str, wanted: _Wanted) -> list[Item]:
    try:
        # -sig: a byte order mark, which spreadsheets write, would become part of the first column's name.
        text = storage.read_bytes(source).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{source}:{line}: not text in UTF-8 ({error.reason} {error.object[error.start]:#04x}); convert the list, "
            f"with iconv -f latin1 -t utf-8 for example, and files that are named so as well (convmv)"
        ) from error
    # A shell expands ~ only where a word begins with it: not in --data-root=~/videos, and not in a list.
    root = os.path.expanduser(wanted.data_root) or posixpath.dirname(source)
    rows = read_rows(source, text)
    if rows is not None and not rows:
        raise RecipeError(f"{source}: names no video; one a line is expected, in a csv below its header")
    if rows is None:
        lines = [_rooted(Item(**vars(line)), root) for line in parse_list(source, text, wanted.list_format)]
        return _completed(source, lines, root, wanted)
    return _completed(source, _manifest_items(source, annotated(rows, root), root), root, wanted)


def _completed(source: str, items: list[Item], root: str, wanted: _Wanted) -> list[Item]:
    """Give a list's items their kinds and their companions, which a manifest's further columns may name."""
    problems: list[str] = []
    completed: list[Item] = []
    rooted = functools.partial(_under, root)
    for item in items:
        try:
            meta = dict(item.meta)
            companions = from_row(meta, item.path, wanted.companions, rooted)
            completed.append(_of_kind(replace(item, meta=meta, companions=companions), wanted.kind))
        except RecipeError as error:
            problems += [f"{source}: {problem}" for problem in error.problems]
    if problems:
        raise RecipeError(problems)
    return completed


def _manifest_items(source: str, rows: list[Row], root: str) -> list[Item]:
    problems: list[str] = []
    items: list[Item] = []
    for number, row in rows:
        try:
            items.append(_rooted(_manifest_item(row), root))
        except ValueError as error:
            problems.append(f"{source}:{number}: {error}")
    if problems:
        raise RecipeError(problems)
    return items


def _manifest_item(row: dict[str, Any] | str) -> Item:
    if isinstance(row, str):
        raise ValueError(row)
    row = dict(row)
    path = row.pop("path", None)
    if not isinstance(path, str) or not path.strip():
        raise ValueError(
            "no path; columns are path, and optionally label, key, start, end, frames; others are kept as meta"
        )
    label, key = row.pop("label", None), row.pop("key", "")
    if isinstance(label, str) and label.lstrip("-").isdigit():
        label = int(label)
    start, end, total = (row.pop(name, None) for name in ("start", "end", "frames"))
    frames = None if total is None else (None if start is None else int(start), int(total))
    is_folder = frames is not None or kind_of(path) is None
    segment = None
    if end is not None or (start is not None and frames is None):
        if is_folder:
            raise ValueError("start and end in seconds are for video files; for pictures give start and frames")
        segment = Segment.checked(start, end)
    return Item(path.strip(), path.strip(), label, frames, is_folder, meta=row, key=str(key), segment=segment)


def _rooted(item: Item, root: str) -> Item:
    return replace(item, path=_under(root, item.path))


def _under(root: str, path: str) -> str:
    """Let a list's path start at `root` where it is relative; `root` may be a zip archive."""
    if path.startswith("~/"):
        return os.path.expanduser(path)
    if "://" in path or path.startswith("/") or not root:
        return path
    return zip_source.entry_path(root, path) if zip_source.is_archive(root) else storage.join(root, path)


def with_sizes(items: list[Item], threads: int = 16) -> list[Item]:
    """Fill in the sizes that listing a folder didn't give (files named by lists); 0 for what can't be found.

    Raises:
        DataError: the store does not answer: without its sizes the items would go to other parts.
    """
    from concurrent.futures import ThreadPoolExecutor

    def sized(item: Item) -> Item:
        if item.size:
            return item
        try:
            found = originals.folder_size(item.path) if item.is_folder else originals.size(item.path)
            return replace(item, size=found)
        except SampleError:
            return item

    # Threads, since each size is a question to the store.
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(sized, items))

"""What to pack: video files and frame folders found in folders, list files and manifests."""

import csv
import json
import logging
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pretrain.data.media import VIDEO_ENDINGS
from pretrain.data.pack.annotations import ID_COLUMN, annotated, database_rows
from pretrain.data.pack.lists import ListFormat, parse_list
from pretrain.data.time_segment import Segment
from pretrain.errors import RecipeError, StorageError
from pretrain.runtime import storage

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset("jpg jpeg png webp bmp ppm tif tiff".split())
LIST_EXTENSIONS = frozenset("csv txt lst list tsv json jsonl ndjson".split())
LabelRule = Literal["auto", "folder", "none"]


@dataclass(frozen=True)
class Item:
    """One video to pack.

    Attributes:
        path: URL or local path of the video file or of the folder that holds its frames.
        name: the path as the user wrote it or as found below its source; keys derive from it.
        label: class number or name, None without.
        frames: (number of the first frame in the file names, how many), for frame folders; None takes all.
        is_folder: whether `path` is a folder of frames.
        meta: further columns of a manifest; they end up in the sample's json under "meta".
        key: key asked for by a manifest, or assigned by the plan.
        size: bytes of the original, 0 when it can't be found; decides the part that packs it.
        segment: the piece of the video that is meant, None for all of it.
    """

    path: str
    name: str
    label: int | str | None = None
    frames: tuple[int | None, int] | None = None
    is_folder: bool = False
    meta: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    size: int = 0
    segment: Segment | None = None


def gather(
    sources: list[str], data_root: str = "", list_format: ListFormat = "auto", labels: LabelRule = "auto"
) -> list[Item]:
    """Every video named by `sources`, in the order given; folders are searched at any depth, by name.

    Args:
        sources: folders, video files, list files or manifests; local paths or fsspec URLs.
        data_root: put in front of relative paths in list files and manifests; "" = the list file's own folder.
        list_format: how to read the columns of an official list file.
        labels: "folder" takes a video's parent folder as its label, "auto" where there is one below the source.

    Raises:
        RecipeError: a source does not exist, or lines of a list are wrong: everything found, at once.
    """
    items: list[Item] = []
    problems: list[str] = []
    for source in sources:
        try:
            items.extend(_one_source(source, data_root, list_format, labels))
        except RecipeError as error:
            problems.extend(error.problems)
    if problems:
        raise RecipeError(problems)
    return items


def extension_of(path: str) -> str:
    """Lower-case extension of a path without the dot."""
    return posixpath.splitext(path)[1].lstrip(".").lower()


def _one_source(source: str, data_root: str, list_format: ListFormat, labels: LabelRule) -> Iterator[Item]:
    fs, path = storage.filesystem(source)
    if fs.isdir(path):
        return _from_folder(source, labels)
    if not fs.exists(path):
        raise RecipeError(f"{source}: does not exist; give a folder, a video, a list file or a csv/jsonl manifest")
    if extension_of(source) in VIDEO_ENDINGS:
        return iter([Item(source, posixpath.basename(source), size=storage.size(source))])
    if extension_of(source) in LIST_EXTENSIONS:
        return iter(_from_list(source, data_root, list_format))
    raise RecipeError(
        f"{source}: neither a video ({', '.join(sorted(VIDEO_ENDINGS))}) nor a list "
        f"({', '.join(sorted(LIST_EXTENSIONS))}), going by its extension"
    )


def _from_folder(source: str, labels: LabelRule) -> Iterator[Item]:
    """Videos below a folder; a sub-folder that holds images and no video counts as one frame folder."""
    images: dict[str, int] = {}
    with_video: set[str] = set()
    for name, size in storage.find(source).items():
        parent, extension = posixpath.dirname(name), extension_of(name)
        if posixpath.basename(name).startswith("."):
            continue
        if extension in VIDEO_ENDINGS:
            with_video.add(parent)
            yield Item(storage.join(source, name), name, _folder_label(parent, labels), size=size)
        elif extension in IMAGE_EXTENSIONS and parent:
            images[parent] = images.get(parent, 0) + size
    for parent, size in images.items():
        if parent not in with_video:
            label = _folder_label(posixpath.dirname(parent), labels)
            yield Item(storage.join(source, parent), parent, label, is_folder=True, size=size)


def _folder_label(parent: str, labels: LabelRule) -> str | None:
    return posixpath.basename(parent) or None if labels != "none" else None


def _from_list(source: str, data_root: str, list_format: ListFormat) -> list[Item]:
    try:
        text = storage.read_bytes(source).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{source}: not a text file in UTF-8 ({error})") from error
    root = data_root or posixpath.dirname(source)
    if extension_of(source) in ("jsonl", "ndjson"):
        rows = _jsonl_rows(source, text)
    elif extension_of(source) == "json":
        rows = database_rows(source, text)
    elif (header := _csv_header(text)) is not None:
        rows = _csv_rows(source, text, header)
    else:
        return [_rooted(Item(**vars(line)), root) for line in parse_list(source, text, list_format)]
    return _manifest_items(source, annotated(rows, root), root)


def _csv_header(text: str) -> str | None:
    """The delimiter when the first line is a header with a column for the video; official lists have no header."""
    first = text.split("\n", 1)[0].strip()
    return next((d for d in ",\t;" if {"path", ID_COLUMN} & {c.strip().strip('"') for c in first.split(d)}), None)


def _csv_rows(source: str, text: str, delimiter: str) -> list[tuple[int, dict[str, Any] | str]]:
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
    rows: list[tuple[int, dict[str, Any] | str]] = []
    for row in reader:
        wrong = None in row or None in row.values()
        fault = (
            f"{len(reader.fieldnames or ())} columns expected as in the header; quote values that hold {delimiter!r}"
        )
        rows.append((reader.line_num, fault if wrong else {k: v for k, v in row.items() if v != ""}))
    return rows


def _jsonl_rows(source: str, text: str) -> list[tuple[int, dict[str, Any] | str]]:
    rows: list[tuple[int, dict[str, Any] | str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                row = f"not JSON: {error}"
            rows.append((number, row if isinstance(row, (dict, str)) else "not a JSON object in one line"))
    return rows


def _manifest_items(source: str, rows: list[tuple[int, dict[str, Any] | str]], root: str) -> list[Item]:
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
    is_folder = frames is not None or extension_of(path) not in VIDEO_ENDINGS
    segment = None
    if end is not None or (start is not None and frames is None):
        if is_folder:
            raise ValueError("start and end in seconds are for video files; for pictures give start and frames")
        segment = Segment.checked(start, end)
    return Item(path.strip(), path.strip(), label, frames, is_folder, meta=row, key=str(key), segment=segment)


def _rooted(item: Item, root: str) -> Item:
    absolute = "://" in item.path or item.path.startswith("/")
    return item if absolute or not root else replace(item, path=storage.join(root, item.path))


def with_sizes(items: list[Item], threads: int = 16) -> list[Item]:
    """Fill in the sizes that listing a folder didn't give (files named by lists); 0 for what can't be found."""
    from concurrent.futures import ThreadPoolExecutor

    def sized(item: Item) -> Item:
        if item.size:
            return item
        try:
            found = storage.find(item.path).values() if item.is_folder else [storage.size(item.path)]
            return replace(item, size=sum(found))
        except StorageError:
            return item

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(sized, items))

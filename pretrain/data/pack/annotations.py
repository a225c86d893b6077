"""Annotation files of public data sets, which name videos by their id and pieces of them by seconds.

| file | columns or fields |
|---|---|
| csv of Kinetics | `label, youtube_id, time_start, time_end, split` |
| csv of HACS Clips | `classname, youtube_id, subset, start, end, label` (label 1 or -1: shows the class or not) |
| json of ActivityNet, HACS Segments and others | `database: {id: {subset, annotations: [{label, segment: [s, e]}]}}` |

They become rows of a manifest (discover.py). An id becomes the path of the file below the data root that is named so,
with any ending; or, where the pieces were cut out already, as Kinetics' downloaders do, of that piece, taken whole.
"""

import posixpath
from typing import Any

from pretrain.data.media import VIDEO_ENDINGS
from pretrain.errors import RecipeError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json

ID_COLUMN = "youtube_id"
Row = tuple[int, dict[str, Any] | str]


def database_rows(source: str, text: str) -> list[Row]:
    """Read an annotation file in ActivityNet's json: a row for each annotated segment, numbered in file order.

    Raises:
        RecipeError: another kind of json.
    """
    try:
        database = parse_json(text)["database"]
        rows: list[Row] = []
        for name, video in database.items():
            facts = {key: value for key, value in video.items() if isinstance(value, (str, int, float))}
            for one in video.get("annotations") or ():
                start, end = one["segment"]
                row = {**facts, ID_COLUMN: name, "start": start, "end": end, "label": one["label"]}
                rows.append((len(rows) + 1, row))
        return rows
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"{source}: not ActivityNet's json, database: {{id: {{annotations: [{{label, segment: [start, end]}}]}}}} "
            f"({type(error).__name__}: {error}); write a csv or jsonl with path, start, end and label"
        ) from error


def annotated(rows: list[Row], root: str) -> list[Row]:
    """Give rows a path, start and end in the place of their id and the columns' official names.

    Raises:
        StorageError: the folder can't be listed: ids that are not looked up would be missing one by one.
    """
    if not any(isinstance(row, dict) and ID_COLUMN in row and "path" not in row for _, row in rows):
        return rows
    files = _files(root)
    return [(number, row if isinstance(row, str) else _renamed(row, files)) for number, row in rows]


def _renamed(row: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
    row = dict(row)
    name = row.get(ID_COLUMN)
    if not name or "path" in row:
        return row
    for official, ours in (("time_start", "start"), ("time_end", "end")):
        if official in row:
            row[ours] = row.pop(official)
    if "classname" in row:
        # HACS' label says whether the class is shown (1 or -1); it must not become the class.
        row["shows_class"] = row.pop("label", None)
        row["label"] = row.pop("classname")
    piece = _piece(row)
    # Cut out already: the film's seconds would lie behind the end of the piece.
    if piece in files:
        del row["start"], row["end"]
        return row | {"path": files[piece]}
    # ActivityNet's videos are named v_<id>.
    return row | {"path": files.get(name) or files.get(f"v_{name}") or f"{name}.mp4"}


def _piece(row: dict[str, Any]) -> str | None:
    """Name the piece that a downloader of Kinetics has cut out: id_000010_000020."""
    try:
        start, end = float(row["start"]), float(row["end"])
    except (KeyError, TypeError, ValueError):
        return None
    whole = start.is_integer() and end.is_integer()
    return f"{row[ID_COLUMN]}_{int(start):06d}_{int(end):06d}" if whole else None


def _files(root: str) -> dict[str, str]:
    """List the paths of the videos below a folder, relative to it, by name without ending; none without a folder."""
    names = storage.find(root or ".")
    stems = ((posixpath.splitext(posixpath.basename(name)), name) for name in names)
    return {stem: name for (stem, ending), name in stems if ending.lstrip(".").lower() in VIDEO_ENDINGS}

"""Rows of manifests, csv with a header or jsonl, and of annotation files: what a list says, before it becomes items."""

import csv
import io

from pretrain.data.media import extension_of
from pretrain.data.pack.annotations import ID_COLUMN, Row, database_rows
from pretrain.data.pack.instance_annotations import holds_instances, instance_rows
from pretrain.runtime.untrusted import parse_json


def read_rows(source: str, text: str) -> list[Row] | None:
    """Read the rows of a manifest or annotation file; None for the text of an official list, which has no header.

    Args:
        source: name of the file; its ending tells jsonl and json.
        text: its content.

    Returns:
        Line numbers and columns by name; in the place of the columns what is wrong with the line.

    Raises:
        RecipeError: a json of another kind than annotations.
    """
    if extension_of(source) in ("jsonl", "ndjson"):
        return _jsonl_rows(text)
    if extension_of(source) == "json" and holds_instances(text):
        return instance_rows(source, text)
    if extension_of(source) == "json":
        return database_rows(source, text)
    delimiter = _csv_delimiter(text)
    return None if delimiter is None else _csv_rows(text, delimiter)


def _csv_delimiter(text: str) -> str | None:
    """Find the delimiter if the first line is a header with a column for the video."""
    first = text.split("\n", 1)[0].strip()
    return next((d for d in ",\t;" if {"path", ID_COLUMN} & {c.strip().strip('"') for c in first.split(d)}), None)


def _csv_rows(text: str, delimiter: str) -> list[Row]:
    # Not splitlines: a quoted value may hold line breaks.
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows: list[Row] = []
    for row in reader:
        # DictReader keeps surplus values under None, and fills missing ones with it.
        wrong = None in row or None in row.values()
        fault = (
            f"{len(reader.fieldnames or ())} columns expected as in the header; quote values that hold {delimiter!r}"
        )
        # An empty cell is no value: an empty `end` means the film's.
        rows.append((reader.line_num, fault if wrong else {k: v for k, v in row.items() if v != ""}))
    return rows


def _jsonl_rows(text: str) -> list[Row]:
    rows: list[Row] = []
    # Not splitlines, which takes U+2028 in a caption for the end of a line.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                row = f"not JSON: {error}"
            rows.append((number, row if isinstance(row, (dict, str)) else "not a JSON object in one line"))
    return rows

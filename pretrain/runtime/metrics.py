"""metrics.jsonl: one dictionary a step, each step once, also after kills and resumes."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_records(path: Path) -> Iterator[Record]:
    """Complete records of a .jsonl file. A last line cut by a kill is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def keep_records(path: Path, keep: Callable[[Record], bool]) -> None:
    """Drop the records that `keep` refuses, atomically: after a resume they are about to be made again."""
    if not path.exists():
        return
    kept = [record for record in read_records(path) if keep(record)]
    temporary = path.with_suffix(".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(_line(record) for record in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class JsonLines:
    """Appends records to a .jsonl file; each is one write, visible to readers at once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one record. Numbers that JSON can't express (nan, inf) become strings."""
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _line(record: Record) -> str:
    safe = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(safe, allow_nan=False) + "\n"

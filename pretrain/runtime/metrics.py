"""metrics.jsonl: one dictionary a step, each step once, also after kills and resumes."""

import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pretrain.runtime.disk import Tolerance

logger = logging.getLogger(__name__)

Record = dict[str, Any]

#: Records that are kept while a disk takes none.
MOST_WAITING = 100_000


def read_records(path: Path) -> Iterator[Record]:
    """Read complete records of a .jsonl file. A last line cut by a kill is left out."""
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
        # A rename may reach the disk before the content does; after a power cut the file would be empty.
        os.fsync(file.fileno())
    temporary.replace(path)


class JsonLines:
    """Appender of records to a .jsonl file; each is one write, visible to readers at once.

    Records that a full disk does not take wait in memory, up to `MOST_WAITING`, and are written when it takes them
    again: a run must not end because its losses can't be written down for a while.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._tolerate = Tolerance()

    def write(self, record: Record) -> None:
        """Append one record. Numbers that JSON can't express (nan, inf) become strings."""
        self._waiting.append(_line(record).encode())
        with self._tolerate(str(self._file.name)):
            self._drain()

    def close(self) -> None:
        """Close the file; records that still wait are lost, which is told."""
        with self._tolerate(str(self._file.name)):
            self._drain()
        if self._waiting:
            logger.warning("%s: the last %d records are lost", self._file.name, len(self._waiting))
        self._file.close()

    def _drain(self) -> None:
        while self._waiting:
            written = self._file.write(self._waiting[0])
            if written < len(self._waiting[0]):  # the disk took a part: the rest of this very line comes first
                self._waiting[0] = self._waiting[0][written:]
            else:
                self._waiting.popleft()


def _line(record: Record) -> str:
    safe = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(safe, allow_nan=False) + "\n"

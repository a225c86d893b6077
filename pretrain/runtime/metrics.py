"""metrics.jsonl: one dictionary a step, each step once, also after kills and resumes."""

import contextlib
import itertools
import json
import logging
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.runtime.disk import Tolerance
from pretrain.runtime.untrusted import parse_json

logger = logging.getLogger(__name__)

Record = dict[str, Any]

#: Damaged lines of a file that are told one by one.
WARNINGS = 5

#: Records that are kept while a disk takes none.
MOST_WAITING = 100_000


def read_records(path: Path, whole: Sequence[str] = ()) -> Iterator[Record]:
    """Read the complete records of a .jsonl file.

    A last line cut by a kill is left out. So are damaged ones, which are told with their numbers: after a power loss
    files hold NULs, and a run must not end because of what only records its past.

    Args:
        path: of the file; it need not exist.
        whole: keys that every record has, with whole numbers.
    """
    for _, record in _numbered(path, whole):
        if record is not None:
            yield record


def keep_records(path: Path, keep: Callable[[Record], bool], whole: Sequence[str] = ()) -> None:
    """Drop the records that `keep` refuses, atomically: after a resume they are about to be made again.

    A file with damaged lines is kept beside, as `<name>.damaged`.
    """
    if not path.exists():
        return
    numbered = list(_numbered(path, whole))
    temporary = path.with_suffix(".partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(_line(record) for _, record in numbered if record is not None and keep(record))
        file.flush()
        # A rename may reach the disk before the content does; after a power cut the file would be empty.
        os.fsync(file.fileno())
    if any(record is None for _, record in numbered):
        aside = unused_name(path.with_name(path.name + ".damaged"))
        path.rename(aside)
        logger.warning("%s: the damaged file is kept as %s", path, aside)
    temporary.replace(path)


def unused_name(path: Path) -> Path:
    """Return the path, or the first of `<path>.2`, `<path>.3` … that nothing has."""
    names = itertools.chain([path], (path.with_name(f"{path.name}.{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists())


def _numbered(path: Path, whole: Sequence[str]) -> Iterator[tuple[int, Record | None]]:
    """Read lines with their numbers; None and a warning for damaged ones."""
    if not path.exists():
        return
    damaged = 0
    # Bytes: a line that is no UTF-8 is one damaged line, not the end of reading.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                continue
            record = _record(line, whole)
            if record is None and (damaged := damaged + 1) <= WARNINGS:
                logger.warning("%s:%d: damaged line left out: %.80r", path, number, line)
            yield number, record
    if damaged > WARNINGS:
        logger.warning("%s: %d damaged lines left out", path, damaged)


def _record(line: bytes, whole: Sequence[str]) -> Record | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    fits = isinstance(record, dict) and all(type(record.get(key)) is int for key in whole)
    return record if fits else None


class JsonLines:
    """Appender of records to a .jsonl file; each is one write, visible to readers at once.

    Records that a full disk does not take wait in memory, up to `MOST_WAITING`, and are written when it takes them
    again: a run must not end because its losses can't be written down for a while.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Also for reading, which brings the lines back where the file is taken away.
        self._file = path.open("a+b", buffering=0)
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        # A kill has cut the last line: appended to it, the next record would be lost with it.
        if _cut(path):
            self._waiting.append(b"\n")
        self._tolerate = Tolerance()

    def write(self, record: Record) -> None:
        """Append one record. Numbers that JSON can't express (nan, inf) become strings."""
        self._waiting.append(_line(record).encode())
        with self._tolerate(str(self._file.name)):
            self._drain()

    def restore(self) -> None:
        """Write the file again, with all its lines, where somebody has deleted, renamed or replaced it.

        Raises:
            OSError: it can't be written; nothing has changed then.
        """
        path, own = Path(self._file.name), os.fstat(self._file.fileno())
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            if (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino):
                return
            path.rename(unused_name(path.with_name(path.name + ".other")))
        logger.error("%s was deleted, renamed or replaced; it is written again with all its lines", path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file.seek(0)
        temporary = path.with_suffix(".partial")
        with temporary.open("wb") as copy:
            shutil.copyfileobj(self._file, copy)
        temporary.replace(path)
        self._file.close()
        self._file = path.open("a+b", buffering=0)

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


def _cut(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _line(record: Record) -> str:
    safe = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(safe, allow_nan=False) + "\n"

"""The lock of a run folder on a file system without flock: numbered files, of which the highest one counts.

    .lease.000007    host, pid, kernel and start of its holder, who renews the file's time while it lives

Whoever finds the highest one without a sign of life takes over by creating the next number, which exactly one of many
can. The highest is never removed, or a slow process could take a number that has been used and believe to be alone.
Nothing but exclusive creation is asked of the file system: filelock's leases exchange two names, which Lustre and NFS
refuse.
"""

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout

from pretrain.runtime.heartbeats import FOLDER_NAME as HEARTBEATS
from pretrain.runtime.heartbeats import GONE_BEATS
from pretrain.runtime.signs_of_life import Holder, Signs, kernel, read_holder, started_at
from pretrain.runtime.terminal import SAY_S, briefly

logger = logging.getLogger(__name__)

#: Answers of flock where there is none: Lustre mounted without it, NFS without its lock daemon, others.
NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

#: Seconds between two looks of one that waits.
LOOK_S = 0.5

PREFIX = ".lease."


class Lease:
    """Lock with the interface of a FileLock.

    Args:
        root: Folder that it keeps to one process.
        beat_s: Seconds between two signs of life.
    """

    def __init__(self, root: Path, beat_s: float) -> None:
        self._root, self._beat_s = root, beat_s
        self._number, self._renewed = 0, 0.0
        # Open as long as it is held: a replaced folder may have a file of the same name, which is another process's.
        self._file = -1
        self._stop: threading.Event | None = None

    @property
    def path(self) -> Path:
        """The file that counts while this process has the folder."""
        return self._path(self._number)

    def acquire(self, timeout: float) -> None:
        """Take the folder, if need be from a holder that shows no sign of life.

        Raises:
            Timeout: a living process has it, or `timeout` is 0 and it can't be told at once.
        """
        signs: dict[Path, Signs] = {}
        began = time.monotonic()
        while True:
            number = self._newest()
            before = read_holder(self._path(number))
            occupant = self._occupant(number, before, signs)
            if occupant is None and self._take(number + 1):
                if number and not (before and before.released):
                    name = before or "somebody unknown"
                    logger.warning("%s: %s had it and gives no sign of life; taken over", self._root, name)
                return
            waited = time.monotonic() - began
            # A silent one is waited for until it has been silent for long enough, however long that takes.
            if occupant is not None and waited >= timeout and (timeout == 0 or occupant.beats):
                raise Timeout(f"{occupant.holder or 'unknown'}")
            time.sleep(min(LOOK_S, self._beat_s / 2))

    def release(self) -> None:
        """Give the folder back."""
        if self._stop is None:
            return
        self._stop.set()
        self._stop = None
        with contextlib.suppress(OSError):  # the disk is lost; silence tells as well
            os.ftruncate(self._file, 0)
            self._write(released=True)
        # Else the thread stands in a call on a disk that is gone, and would come back to another file of this number.
        self._thread.join(SAY_S)
        if not self._thread.is_alive():
            os.close(self._file)

    def check(self) -> None:
        """Leave this process where another one has taken the folder; to be called before anything is written.

        While signs of life are given nobody takes it, so the file system is asked only after a gap: a process that was
        suspended, or a disk that was away.
        """
        if self._stop is None or _uptime() - self._renewed < GONE_BEATS / 2 * self._beat_s:
            return
        with contextlib.suppress(OSError):  # taken away, which the next save finds, or the disk is still lost
            if self._lost():
                self._leave()

    def _occupant(self, number: int, holder: "Holder | None", signs: dict[Path, "Signs"]) -> "Signs | None":
        """Find who gives signs of life, or has not been silent for long enough; None where the folder is free."""
        places = [self._path(number)] if number and not (holder and holder.released) else []
        # A host whose mount has flock holds the folder without a lease; its heartbeat shows that all the same.
        beat = self._root / HEARTBEATS / "rank_00000.json"
        known = [(platform.node(), os.getpid())] + ([(holder.host, holder.pid)] if holder else [])
        if (writer := read_holder(beat)) and (writer.host, writer.pid) not in known:
            places.append(beat)
        for place in places:
            if place not in signs:
                signs[place] = Signs(place, self._root, self._beat_s)
            if not signs[place].dead():
                return signs[place]
        return None

    def _take(self, number: int) -> bool:
        try:
            self._file = os.open(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        self._write()
        if self._newest() != number:
            # It looked long ago: the number had been used and cleared away, and others have gone on from there.
            self._path(number).unlink(missing_ok=True)
            os.close(self._file)
            return False
        for older in self._numbers():
            if older < number:
                self._path(older).unlink(missing_ok=True)
        self._number, self._renewed, self._stop = number, _uptime(), threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(self._stop,), daemon=True, name="lease")
        self._thread.start()
        return True

    def _write(self, released: bool = False) -> None:
        holder = Holder(platform.node(), os.getpid(), kernel(), started_at(os.getpid()), self._beat_s, released)
        os.pwrite(self._file, (json.dumps(asdict(holder)) + "\n").encode(), 0)
        os.fsync(self._file)

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(self._beat_s):
            # A lost disk, or a folder that somebody took away, which the next save finds: neither ends the beats.
            with contextlib.suppress(OSError):
                if self._lost() and not stop.is_set():
                    self._leave()

    def _lost(self) -> bool:
        """Give a sign of life, unless somebody else has the folder by now, which is told."""
        own, newest = os.fstat(self._file), self._newest()
        if newest > self._number or (newest == self._number and not os.path.samestat(self.path.stat(), own)):
            return True
        os.utime(self._file)
        self._renewed = _uptime()
        return False

    def _leave(self) -> NoReturn:
        newest = self._path(self._newest())
        text = (
            f"{self._root}: this process gave no sign of life for a while (suspended, or its disk was away), and "
            f"{read_holder(newest) or newest} has taken the folder over. This process ends and writes nothing more"
        )
        # Not to the log, which lies in the folder; and not by an exception: what is cleaned up then is written there.
        briefly(lambda: print(text, file=sys.stderr, flush=True))
        os._exit(1)

    def _numbers(self) -> list[int]:
        names = [name.removeprefix(PREFIX) for name in os.listdir(self._root) if name.startswith(PREFIX)]
        return [int(name) for name in names if name.isascii() and name.isdigit()]

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _path(self, number: int) -> Path:
        return self._root / f"{PREFIX}{number:06d}"


@contextlib.contextmanager
def held(folder: Path, beat_s: float = 10.0) -> Iterator[None]:
    """Keep a folder to this process while the block runs; wait as long as a living process has it."""
    lock = FileLock(folder / ".lock") if has_flock(folder) else Lease(folder, beat_s)
    lock.acquire(timeout=math.inf)
    try:
        yield
    finally:
        lock.release()


def has_flock(folder: Path) -> bool:
    """Tell whether the folder's file system locks files.

    Raises:
        OSError: anything else is wrong with it.
    """
    # On a file of its own: a running process has the real one.
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".flock_") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            return False
    return True


def _uptime() -> float:
    # Goes on while the machine is suspended, unlike time.monotonic.
    return time.clock_gettime(time.CLOCK_BOOTTIME)

"""Signs of life: who has a folder or writes a heartbeat, and whether that process is gone.

On its own machine the process table tells; on others a file that it renews, by the clock of the file system.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pretrain.runtime.heartbeats import GONE_BEATS
from pretrain.runtime.untrusted import parse_json

#: Signs of life that a contender itself has seen missing before it believes the file system's clock on the others: on
#: some file systems times are those of the hosts, which differ.
SEEN_BEATS = 2


@dataclass(frozen=True)
class Holder:
    """A process that has, or had, a folder."""

    host: str
    pid: int
    kernel: str
    started: int
    beat_s: float
    released: bool = False

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}"


class Signs:
    """Signs of life in a file that its writer renews, as far as one who waits has seen them.

    Args:
        path: The file.
        root: Folder on the same file system, whose clock tells how old the last sign was when it was first looked at.
        beat_s: Seconds between two of them, where the file does not say.
    """

    def __init__(self, path: Path, root: Path, beat_s: float) -> None:
        self.path, self._beat_s = path, beat_s
        #: Whether it was renewed while it was looked at.
        self.beats = False
        self.holder = read_holder(path)
        self._stamp = _stamp(path)
        self._age_s = clock_of(root) - self._stamp[0] / 1e9 if self._stamp else 0.0
        self._since = time.monotonic()

    def dead(self) -> bool:
        """Look again; tell whether its writer is gone."""
        if self.holder is not None and self.holder.kernel == kernel():
            # Its own machine knows better than any clock, also of one that stands still.
            self.beats = started_at(self.holder.pid) == self.holder.started
            return not self.beats
        stamp = _stamp(self.path)
        if stamp != self._stamp:
            self._stamp, self.beats, self._age_s, self._since = stamp, True, 0.0, time.monotonic()
            self.holder = read_holder(self.path)
        beat_s = (self.holder and self.holder.beat_s) or self._beat_s
        watched = time.monotonic() - self._since
        return watched >= SEEN_BEATS * beat_s and max(0.0, self._age_s) + watched >= GONE_BEATS * beat_s


def read_holder(path: Path) -> Holder | None:
    """Read who renews a lease or writes a heartbeat; None where that can't be told."""
    try:
        content = parse_json(path.read_bytes())
        kernel_, started = str(content.get("kernel", "")), int(content.get("started", 0))
        beat_s, released = float(content.get("beat_s", 0.0)), content.get("released") is True
        return Holder(str(content["host"]), int(content["pid"]), kernel_, started, beat_s, released)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def kernel() -> str:
    """Name the running kernel, as of its boot, and the process numbers that are seen here: containers differ."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def started_at(pid: int) -> int:
    """Tell when a process of this machine was started, in ticks since the boot; -1 where there is none, or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return -1
    # The second field is the program's name, in brackets, and may hold anything.
    fields = stat.rpartition(")")[2].split()
    return -1 if fields[0] in "ZX" else int(fields[19])


def clock_of(folder: Path) -> float:
    """Read the clock of a file system, seconds: the time that it gives to a file written now."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock_") as file:
        file.write(b"\0")
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_mtime


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        # Opened, so that NFS asks its server instead of its cache.
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino

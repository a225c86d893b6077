"""The packing run: take up where the journal ends, pack in plan order, close shards, finish the part."""

import fcntl
import functools
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pretrain.data.index import ShardIndex
from pretrain.data.media import plural_of
from pretrain.data.pack import shard_writer as shards
from pretrain.data.pack.discover import Item
from pretrain.data.pack.options import Options
from pretrain.data.pack.pack_plan import WHOLE, Part, Plan
from pretrain.data.pack.packed import Packed, Rejected
from pretrain.data.pack.packers import pack_sample
from pretrain.data.pack.pool import OrderedPool
from pretrain.errors import DataError
from pretrain.runtime.untrusted import name_bytes

logger = logging.getLogger(__name__)

#: Called after every video with (items done, items of the part, bytes of originals read in this run).
Progress = Callable[[int, int, int], None]


@dataclass
class Report:
    """Result of a run; `index` is None while other parts are missing, `noun` says what to call the samples."""

    index: ShardIndex | None
    rejected: list[Rejected]
    packed: int
    resumed: int
    reencoded: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    noun: str = "videos"


def pack(
    plan: Plan,
    dest: str,
    options: Options,
    part: Part = WHOLE,
    workers: int = 0,
    overwrite: bool = False,
    progress: Progress = lambda done, total, read: None,
) -> Report:
    """Pack one part of a plan into the folder `dest` and, as the last part, write the index.

    Args:
        plan: what to pack.
        dest: folder, any fsspec URL.
        options: how; part of the fingerprint.
        part: which share of the plan.
        workers: encoding processes; 0 encodes in this one.
        overwrite: forget what an earlier packing left in `dest` (only without parts).
        progress: called after every video.

    Raises:
        DataError: `dest` holds another data set, another process packs this part, or nothing could be packed.
    """
    began = time.monotonic()
    fingerprint = plan.fingerprint(options.stated(plan.items[0].kind if plan.items else "video"))
    shards.refuse_foreign(dest)
    if overwrite:
        shards.remove_old(dest)
    with _work_folder(dest, part) as folder:
        done = shards.read_part(dest, part)
        if done is None or done.plan != fingerprint:
            packer = _Packer(plan, dest, options, part, fingerprint, folder, progress)
            packer.run(workers)
            report = packer.report
        else:
            report = Report(None, done.rejected, sum(one.samples for one in done.shards), len(plan.part(part)))
    merged = shards.merge(dest, part.count)
    if merged is not None:
        report.index, report.rejected = merged
    report.seconds = time.monotonic() - began
    report.noun = plural_of(item.kind for item in plan.items)
    return report


@contextmanager
def _work_folder(dest: str, part: Part) -> Iterator[str]:
    """Make an empty local folder that belongs to this part alone; deleted by the next run when this one fails."""
    name = hashlib.sha256(name_bytes(f"{os.path.abspath(dest)}\x1f{part}")).hexdigest()[:12]
    # With the user's number: the temporary folder is everyone's, and another user's files can't be deleted.
    folder = os.path.join(tempfile.gettempdir(), f"tubelet-pack-{os.getuid()}-{name}")
    with open(folder + ".lock", "w") as lock:
        try:
            # The kernel frees it at the end of the process, kill -9 included; a mere lock file would stay.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{dest}: another process on this machine is packing part {part.index}/{part.count}"
            ) from error
        except OSError as error:
            raise DataError(f"{folder} can't be locked ({error}); export TMPDIR=a folder on a local disk") from error
        shutil.rmtree(folder, ignore_errors=True)  # workers of a killed run may still write there for half a second
        os.makedirs(folder, exist_ok=True)
        yield tempfile.mkdtemp(dir=folder)
        shutil.rmtree(folder, ignore_errors=True)


def _crashed(item: Item) -> Packed | Rejected:
    return Rejected(item.name, item.path, "crash", "the process that decoded it died, twice")


class _Packer:
    """State of one part: the open shard, originals seen, rejected videos since the last shard."""

    def __init__(
        self, plan: Plan, dest: str, options: Options, part: Part, fingerprint: str, folder: str, progress: Progress
    ) -> None:
        self.dest, self.options, self.part, self.folder = dest, options, part, folder
        self.fingerprint, self.progress = fingerprint, progress
        self.items = plan.part(part)
        self.finished = shards.read_journal(dest, part, fingerprint)
        self.start = self.finished[-1].next if self.finished else 0
        self.seen = {sha256: name for entry in self.finished for sha256, name in entry.originals}
        self.bytes_read = 0
        self.file: shards.ShardFile | None = None
        self.entry = self._new_entry()
        # Told once: by one part for all, and not again after a restart.
        if not self.finished and part.index == 0:
            self.entry.rejected += [_repeated(item) for item in plan.repeated]
        self.report = Report(None, [], len(self.seen), self.start)

    def run(self, workers: int) -> None:
        call = functools.partial(pack_sample, options=self.options, folder=self.folder)
        pool: OrderedPool[Item, Packed | Rejected] = OrderedPool(call, _crashed, workers)
        todo = self.items[self.start :]
        for number, (item, result) in enumerate(zip(todo, pool.map(todo), strict=True), self.start + 1):
            self._take(item, result)
            self.entry.next = number
            if self.file is not None and self._full(self.file):
                self._close_shard()
            self.progress(number, len(self.items), self.bytes_read)
        self._close_shard()
        rejected = [one for entry in self.finished for one in entry.rejected] + self.entry.rejected
        written = [entry.shard for entry in self.finished if entry.shard is not None]
        shards.write_part(self.dest, self.part, shards.PartResult(self.fingerprint, written, rejected))
        self.report.rejected = rejected

    def _take(self, item: Item, result: Packed | Rejected) -> None:
        if isinstance(result, Packed):
            self.bytes_read += result.bytes_read
            sha256 = result.facts["sha256"] + (f" {item.key}" if item.distinct else "")
            # Also of shards that an earlier start has finished: the journal holds the hashes of their originals.
            if sha256 in self.seen:
                result.discard()
                result = Rejected(item.name, item.path, "duplicate", f"the same bytes as {self.seen[sha256]}")
        if isinstance(result, Rejected):
            logger.info("rejected %s: %s: %s", result.path, result.reason, result.detail)
            self.entry.rejected.append(result)
            return
        self.seen[sha256] = item.name
        self.entry.originals.append((sha256, item.name))
        self.report.packed += 1
        self.report.reencoded["kept" if result.facts["reencoded"] is None else "encoded"] += 1
        if self.file is None:
            self.file = shards.ShardFile(self.folder, shards.shard_name(self.part, len(self.finished)))
        self.file.add(result)

    def _full(self, file: shards.ShardFile) -> bool:
        limit = self.options.shard_samples
        return file.bytes >= self.options.shard_bytes or (limit is not None and file.samples >= limit)

    def _close_shard(self) -> None:
        if self.file is None:
            return
        # First the shard, then its entry: killed between the two, it does not count and is packed again.
        self.entry.shard = self.file.publish(self.dest)
        shards.write_entry(self.dest, self.entry)
        self.finished.append(self.entry)
        self.file, self.entry = None, self._new_entry()

    def _new_entry(self) -> shards.Entry:
        return shards.Entry(self.fingerprint, self.start, None)


def _repeated(item: Item) -> Rejected:
    return Rejected(item.name, item.path, "repeated", "named more than once by the sources")

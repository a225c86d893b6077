"""Motion curves of a data set's videos, measured once: many processes, resumable, a table beside each shard."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from pretrain.data.decoders import Decoder, open_video
from pretrain.data.fetch import SampleReader
from pretrain.data.index import Shard, ShardIndex, load_index
from pretrain.data.linked_video import StillImage
from pretrain.data.members import parse_sample
from pretrain.data.motion_tables import (
    Curve,
    MotionEntry,
    MotionFacts,
    MotionIndex,
    MotionTable,
    finished_table,
    motion_bytes,
    table_name,
    write_motion_index,
)
from pretrain.data.pack.pack_plan import WHOLE, Part
from pretrain.data.pack.pool import OrderedPool
from pretrain.errors import SampleError
from pretrain.runtime import storage
from pretrain.samples.motion import fitted, usable
from pretrain.samples.motion_curves import MotionMeasure, motion_curve

#: Called after every video with (videos done, videos of this run, bytes read).
Progress = Callable[[int, int, int], None]
DEADLINE_S = 300.0
#: Shards that are looked into for pictures: sets of both have either in front of some.
PEEKED = 8


@dataclass(frozen=True)
class Measuring:
    """How videos are measured.

    Attributes:
        facts: what tables will say of it.
        measure: of two frames; None: only curves that were imported are taken.
        decoder: library that decodes.
    """

    facts: MotionFacts
    measure: MotionMeasure | None
    decoder: Decoder = "pyav"


@dataclass(frozen=True)
class MotionTask:
    """One video: the data set's folder, shard and row, and the curve that a released file has of it."""

    url: str
    shard: int
    row: int
    imported: Curve | None = None


@dataclass(frozen=True)
class Measured:
    """Result of one video: its curve, or the reason why there is none."""

    curve: Curve | None
    reason: str = ""
    bytes: int = 0
    imported: bool = False


@dataclass
class MotionReport:
    """Result of a run; `index` is None while other parts are missing."""

    index: MotionIndex | None = None
    measured: int = 0
    imported: int = 0
    resumed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


def index_motion(
    url: str,
    measuring: Measuring,
    imported: Mapping[str, Curve] | None = None,
    part: Part = WHOLE,
    workers: int = 0,
    again: bool = False,
    progress: Progress = lambda done, total, read: None,
) -> MotionReport:
    """Measure the motion of all videos of a data set, or take it from released files, and write the tables.

    Args:
        url: folder with `index.json`, any fsspec URL.
        measuring: how.
        imported: curves by key; videos without one here, or whose number of frames it does not fit, are measured.
        part: shards of this run, every count-th; the last part to end writes `motion.json`.
        workers: measuring processes; 0: this one.
        again: measure shards that have a table already.
        progress: called after every video.

    Raises:
        DataError: no data set there, or its storage does not answer.
    """
    # Of an earlier call in this process: shards may have changed since.
    _reader.cache_clear()
    index, report = load_index(url), MotionReport()
    chosen = range(part.index, len(index.shards), part.count)
    waiting = [number for number in chosen if again or _finished(index, number, measuring) is None]
    report.resumed = sum(index.shards[number].samples for number in chosen if number not in set(waiting))
    total, done, read = sum(index.shards[number].samples for number in waiting), 0, 0
    measure = functools.partial(measure_video, measuring)
    pool: OrderedPool[MotionTask, Measured] = OrderedPool(measure, _crashed, workers)
    results = pool.map(_tasks(index, waiting, imported or {}))
    for number in waiting:
        found = []
        for _ in range(index.shards[number].samples):
            one = next(results)
            found.append(one)
            done, read = done + 1, read + one.bytes
            progress(done, total, read)
        report.imported += sum(one.imported for one in found)
        report.measured += sum(one.curve is not None and not one.imported for one in found)
        _write(url, index.shards[number], measuring.facts, found)
    report.index = _joined(index, measuring)
    return report


def holds_pictures(index: ShardIndex) -> bool:
    """Tell whether a data set is one of pictures: the first samples of its first shards are, all of them."""
    reader = SampleReader([index], None, DEADLINE_S, tables=1)
    first = [number for number, shard in enumerate(index.shards) if shard.samples][:PEEKED]
    return bool(first) and all(_is_picture(reader, shard) for shard in first)


def _is_picture(reader: SampleReader, shard: int) -> bool:
    try:
        return isinstance(parse_sample(reader.read(0, shard, 0)).footage(), StillImage)
    except SampleError:
        return False  # what it is instead is told of each sample


def measure_video(measuring: Measuring, task: MotionTask) -> Measured:
    """Read one video and measure its motion; what keeps it from that becomes the reason."""
    size = 0
    try:
        raw = _reader(task.url).read(0, task.shard, task.row)
        size = len(raw.data)
        members = parse_sample(raw)
        with open_video(members.footage(), measuring.decoder, members.stamps) as reader:
            frames = reader.num_frames
            if task.imported is not None and usable_for(task.imported, frames):
                return Measured(task.imported, "", size, imported=True)
            if measuring.measure is None:
                found = "no curve" if task.imported is None else f"a curve of {len(task.imported) + 1} frames"
                return Measured(None, f"import: {found} for its {frames} frames", size)
            curve = motion_curve(reader.in_turn(), measuring.measure, measuring.facts.short_side)
    except SampleError as error:
        return Measured(None, str(error), size)
    return Measured(curve, "", size)


def usable_for(curve: Curve, frames: int) -> bool:
    """Tell whether a curve of others can be used for a video: of one frame it is empty."""
    return fitted(len(curve), frames) and (usable(curve) or frames == 1)


@functools.lru_cache(maxsize=1)
def _reader(url: str) -> SampleReader:
    """Open a data set once in each process."""
    return SampleReader([load_index(url)], None, DEADLINE_S, tables=2)


def _tasks(index: ShardIndex, shards: list[int], imported: Mapping[str, Curve]) -> Iterator[MotionTask]:
    keys = _reader(index.url)
    for shard in shards:
        for row in range(index.shards[shard].samples):
            # Only where there are some: else the member tables of all shards would be read here for nothing.
            curve = imported.get(keys.key(0, shard, row)) if imported else None
            yield MotionTask(index.url, shard, row, curve)


def _crashed(task: MotionTask) -> Measured:
    return Measured(None, "crash: the process that decoded it died, twice")


def _finished(index: ShardIndex, number: int, measuring: Measuring) -> MotionEntry | None:
    shard = index.shards[number]
    found = finished_table(index.url, shard, measuring.facts)
    if found is None:
        return None
    table, sha256 = found
    keys = [_reader(index.url).key(0, number, row) if reason else "" for row, reason in enumerate(table.reasons)]
    missing = {key: reason for key, reason in zip(keys, table.reasons, strict=True) if reason}
    # A video of one frame has nothing to measure: that nothing moves in it says nothing.
    static = sum(curve is not None and len(curve) > 0 and not curve.any() for curve in table.curves)
    return MotionEntry(shard.name, shard.sha256, sha256, static, missing)


def _write(url: str, shard: Shard, facts: MotionFacts, found: list[Measured]) -> None:
    table = MotionTable(facts, shard.sha256, [one.curve for one in found], [one.reason for one in found])
    storage.write_bytes(storage.join(url, table_name(shard.name)), motion_bytes(table))


def _joined(index: ShardIndex, measuring: Measuring) -> MotionIndex | None:
    """Write `motion.json` of the tables of all shards; None while one is missing."""
    entries = []
    for number in range(len(index.shards)):
        entry = _finished(index, number, measuring)
        if entry is None:
            return None
        entries.append(entry)
    found = MotionIndex(measuring.facts, entries)
    write_motion_index(index.url, found)
    return found

"""Labels of samples and what they mean: class numbers, class names, several classes, or values to regress.

Labels lie in the samples' json files, or in members `cls`. Counting them needs one short read a sample, more where they
do not stand in front; the result is kept beside the shards in `labels.json`, under the fingerprint of the data.
"""

import functools
import io
import json
import logging
import posixpath
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from finetune.classification.class_files import is_number, misfits, read_names, spelt
from pretrain.data.fetch import read_ahead
from pretrain.data.index import ShardIndex, load_index, load_members
from pretrain.data.media import LABEL_ENDING
from pretrain.data.members import Members
from pretrain.errors import DataError, SampleError, StorageError, TubeletError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import SAMPLE_JSON_BYTES, is_text, parse_json

logger = logging.getLogger(__name__)

LABELS_NAME = "labels.json"
#: Read at once: enough for the json that our packer puts in front of the video.
HEAD_BYTES = 16384
#: A class with this many times fewer samples than the largest one is named in the report.
IMBALANCE = 10.0
SHOWN_CLASSES = 5

Task = Literal["single", "multi", "regression"]


@dataclass(frozen=True)
class LabelMap:
    """Map from the label in a sample's json to what the loss takes.

    Attributes:
        classes: number of outputs.
        names: class names in order; empty where labels are numbers.
        task: single: one class, multi: any number of classes, regression: one value an output.
    """

    classes: int
    names: tuple[str, ...] = ()
    task: Task = "single"

    def target(self, label: Any) -> np.ndarray:
        """Map a label: class number int64 [], classes as float32 [classes] of 0 and 1, or values float32 [classes].

        Raises:
            SampleError: "label" where the label is missing or none of the classes.
        """
        if label is None:
            raise SampleError("label", "the sample's json has no label")
        if self.task == "regression":
            return self._values(label)
        if self.task == "single":
            return np.array(self.number(label), dtype=np.int64)
        target = np.zeros(self.classes, dtype=np.float32)
        for one in label if isinstance(label, list) else [label]:
            target[self.number(one)] = 1
        return target

    def example(self) -> np.ndarray:
        """Make up a target as `target` gives them."""
        if self.task == "single":
            return np.array(0, dtype=np.int64)
        return np.zeros(self.classes, dtype=np.float32)

    def number(self, label: Any) -> int:
        """Tell the number of a class, given by it or by name.

        Raises:
            SampleError: "label" where there is no such class.
        """
        if isinstance(label, str):
            found = self._by_name.get(label, self._by_name.get(spelt(label)))
            if found is not None:
                return found
        # Numbers as text and as floats are numbers: json, csv and names of folders have them so.
        if not is_number(label) or not 0 <= int(label) < self.classes:
            among = f"none of the {len(self.names)} class names, and no" if self.names else "no"
            raise SampleError("label", f"{label!r} is {among} class from 0 to {self.classes - 1}")
        return int(label)

    @functools.cached_property
    def _by_name(self) -> dict[str, int]:
        return {spelt(name): number for number, name in enumerate(self.names)} | {
            name: number for number, name in enumerate(self.names)
        }

    def _values(self, label: Any) -> np.ndarray:
        try:
            values = np.array(label, dtype=np.float32).reshape(-1)
        except (TypeError, ValueError) as error:
            raise SampleError("label", f"{label!r} is no number or list of numbers") from error
        if len(values) != self.classes or not np.isfinite(values).all():
            raise SampleError("label", f"{label!r}: {self.classes} finite numbers are needed")
        return values


def open_labels(labels: str, shards: str, classes: int, task: Task) -> LabelMap:
    """Open the label map of a source.

    Args:
        labels: the source's `labels`: a file, "integer" or "auto".
        shards: folder of its training shards, looked through for "auto".
        classes: outputs of the model.
        task: what the labels are.

    Raises:
        DataError: labels, names and the number of outputs don't fit.
    """
    if task == "regression":
        return LabelMap(classes, (), task)
    where = f"the labels in {shards}"
    if labels == "auto":
        counts = count_labels(shards)
        # Sorted: all ranks, and every resume, must number the classes alike.
        names = tuple(sorted(label for label in counts if not is_number(label)))
        if names and len(names) < len(counts):
            numbers = len(counts) - len(names)
            raise DataError(f"{where}: {len(names)} names and {numbers} numbers; name a file of classes (labels)")
    else:
        names, counts = () if labels == "integer" else read_names(labels), None
    if odd := [name for name in names if not is_text(name)]:
        raise DataError(f"{where if labels == 'auto' else labels}: class {odd[0]!r} is no text in UTF-8; rename it")
    if names and len(names) != classes:
        raise DataError(
            f"{where if labels == 'auto' else labels}: {len(names)} class names, but model.classes={classes}; set "
            f"model.classes={len(names)}"
        )
    counts = _counted(shards) if counts is None else counts
    # At the start, and not sample by sample: a class that is never right may be few enough to pass for bad samples.
    if counts is not None and (found := misfits(counts, classes, names, where) or _unlabelled(counts, where)):
        raise DataError("\n".join(found))
    return LabelMap(classes, names, task)


def held_out_misfits(shards: str, labels: LabelMap) -> list[str]:
    """Compare the labels of validation or test shards with the classes that are trained; none where all fit."""
    counts = None if labels.task == "regression" else _counted(shards)
    where = f"the labels in {shards}, which is held out"
    return [] if counts is None else misfits(counts, labels.classes, labels.names, where) or _unlabelled(counts, where)


def _counted(shards: str) -> Counter[str] | None:
    """Count labels that need not be known; None where some of them can't be read."""
    try:
        return count_labels(shards)
    except DataError as error:
        logger.warning("%s: labels can't be compared with the classes at the start (%s)", shards, error)
        return None


def _unlabelled(counts: Counter[str], where: str) -> list[str]:
    """Say that there is nothing to train on."""
    if counts:
        return []
    return [
        f"{where}: no sample has one. Allowed are `label` in the samples' json and a member `{LABEL_ENDING}`; pack "
        "again from class folders or a list with labels, or choose other shards"
    ]


def count_labels(shards: str) -> Counter[str]:
    """Count how often each label occurs, numbers as text; from labels.json where it is up to date, else anew.

    Raises:
        DataError: no index, or a sample whose json is damaged.
    """
    known = known_counts(shards)
    if known is not None:
        return known
    index, where = load_index(shards), storage.join(shards, LABELS_NAME)
    logger.info("%s: counting the labels of %d samples", shards, index.samples)
    found = [label for label in _all_labels(index) if label not in (None, "")]
    if len(found) < index.samples:
        lack = "%s: %d of %d samples have no label, neither in their json nor in a member %s"
        logger.warning(lack, shards, index.samples - len(found), index.samples, LABEL_ENDING)
    counts = Counter(str(one) for label in found for one in (label if isinstance(label, list) else [label]))
    content = {"fingerprint": index.fingerprint, "counts": dict(sorted(counts.items()))}
    try:
        storage.write_bytes(where, json.dumps(content, indent=1).encode())
    except (StorageError, TubeletError, OSError) as error:
        logger.warning("%s can't be written, so labels are counted at every start (%s)", where, error)
    return counts


def known_counts(shards: str) -> Counter[str] | None:
    """Read the counts of labels.json, if it is there and belongs to these shards."""
    try:
        # Soon given up: without the file labels are only counted anew.
        known = parse_json(storage.read_bytes(storage.join(shards, LABELS_NAME), deadline_s=10))
        # Names of other shards would number the classes otherwise, with the same number of outputs.
        return Counter(known["counts"]) if known.get("fingerprint") == load_index(shards).fingerprint else None
    except (StorageError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _all_labels(index: ShardIndex) -> list[Any]:
    def read(place: tuple[str, str, int, int]) -> Any:
        shard, key, offset, size = place
        url = storage.join(index.url, shard)
        return read_label(RangeFile(url, offset, size), f"{url}: {key!r}")

    places = []
    for shard in index.shards:
        members = load_members(index.url, shard)
        rows = zip(members.keys, members.offsets.tolist(), members.sizes.tolist(), strict=True)
        places += [(shard.name, key, offset, size) for key, offset, size in rows]
    # Many at a time: reads this short are all waiting, and one after another a store's latency adds up.
    return [future.result() for _, future in read_ahead(places, read, depth=64)]


class RangeFile(io.RawIOBase):
    """A sample's range of a shard as a file, which is read where it is looked at.

    Args:
        url: the shard.
        begin: first byte of the sample.
        size: its bytes.
    """

    def __init__(self, url: str, begin: int, size: int) -> None:
        self.size = size
        self._url, self._begin, self._at = url, begin, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to another place."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read from the storage, no further than the sample goes."""
        begin = self._begin + self._at
        count = max(0, min(len(buffer), self.size - self._at))
        buffer[:count] = storage.read_bytes(self._url, begin, begin + count) if count else b""
        self._at += count
        return count


def read_label(sample: RangeFile, where: str) -> Any:
    """Find the label of a sample, as `Members.label` finds it, from header to header; None without.

    A json behind a large file is not read where the class stands in front.

    Raises:
        DataError: its json is damaged, or the range is no tar.
    """
    files: dict[str, bytes] = {}
    end = 0
    try:
        with tarfile.open(fileobj=io.BufferedReader(sample, HEAD_BYTES), mode="r:") as tar:
            for member in tar:
                ending = posixpath.basename(member.name).partition(".")[2].lower()
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if ending in ("json", LABEL_ENDING) and (file := tar.extractfile(member)):
                    files[ending] = file.read(SAMPLE_JSON_BYTES + 1)
                # Before the next header is asked for, which may be a read of its own.
                if end >= sample.size or _is_settled(files, end):
                    break
        if not end:
            raise tarfile.ReadError("no files in its place")
        return Members(files).label
    except (SampleError, tarfile.TarError) as error:
        raise DataError(f"{where}: no readable label ({error}); launch/pack.py --check finds all such") from error


def _is_settled(files: dict[str, bytes], end: int) -> bool:
    """Tell whether nothing behind a place in the sample is read for its label."""
    if "json" in files:
        return LABEL_ENDING in files or Members(files).label is not None
    return LABEL_ENDING in files and end > HEAD_BYTES


def imbalance_report(counts: Counter[str]) -> list[str]:
    """Report how unequal classes are: smallest, largest, entropy; the rare ones by name."""
    if not counts:
        return []
    ordered = counts.most_common()
    total, largest, smallest = sum(counts.values()), ordered[0], ordered[-1]
    shares = np.array([count / total for _, count in ordered])
    effective = float(np.exp(-(shares * np.log(shares)).sum()))
    lines = [
        f"{total} labels in {len(counts)} classes: largest {largest[0]} {largest[1]}, smallest {smallest[0]} "
        f"{smallest[1]} ({largest[1] / smallest[1]:.1f} to 1); as even as {effective:.1f} equal classes"
    ]
    rare = [name for name, count in ordered if count * IMBALANCE < largest[1]]
    if rare:
        shown = ", ".join(rare[-SHOWN_CLASSES:])
        lines.append(
            f"imbalanced: {len(rare)} classes have less than 1/{IMBALANCE:.0f} of the largest one's samples, such as "
            f"{shown}; look at mean_class_accuracy beside top1"
        )
    return lines


def class_names(labels: LabelMap) -> Sequence[str]:
    """Name every output."""
    return labels.names or [str(number) for number in range(labels.classes)]

"""Ledger of samples that can't be used: recorded one by one, counted by source and reason, stopped above a rate.

Workers replace a bad sample and send a record along with the micro-batch; the rank keeps the ledger.
"""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import DataError
from pretrain.runtime.disk import Tolerance

logger = logging.getLogger(__name__)

FOLDER_NAME = "bad_samples"


@dataclass(frozen=True)
class BadSample:
    """One unusable sample: attempt 0 is the sample of the order itself, attempt n its n-th substitute."""

    source: str
    shard: str
    key: str
    epoch: int
    position: int
    attempt: int
    reason: str
    detail: str


class BadSampleLedger:
    """Counts of what was tried and what was unusable, by source and reason; every record goes to the run folder.

    Args:
        run_dir: The run folder; nothing is written where it is None.
        sources: Names of the sources, in the recipe's order.
        rate: data.bad_rate, the share of unusable samples of a source above which the run stops.
        minimum: data.bad_minimum, unusable samples of a source below which the rate is not applied.
        rank: This rank, which has a file of its own: appends of several hosts to one file overwrite each other on NFS.
    """

    def __init__(
        self, run_dir: str | Path | None, sources: Iterable[str], rate: float, minimum: int, rank: int = 0
    ) -> None:
        self._path = None if run_dir is None else Path(run_dir) / FOLDER_NAME / f"rank_{rank:05d}.jsonl"
        self._sources = list(sources)
        self._rate, self._minimum = rate, minimum
        self._tolerate = Tolerance()
        self.tried: Counter[str] = Counter()
        self.bad: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._new: Counter[str] = Counter()

    def record(self, batch: dict[str, Any]) -> None:
        """Take note of a micro-batch of the stream."""
        # One view of each: a sample counts once, however many views were made of it.
        samples = batch["source"][batch["view"] == 0].tolist()
        self.tried.update(self._sources[source] for source in samples)
        records: list[BadSample] = batch["bad"]
        for bad in records:
            self._note(bad)
        self._write(records)

    def numbers(self) -> list[float]:
        """Count what ranks add up to judge together: samples tried, unusable ones, those since the last call; a source
        after the other."""
        rows = [(self.tried[name], self.bad.get(name, Counter()).total(), self._new[name]) for name in self._sources]
        self._new.clear()
        # Floats: they travel in the all-reduce of the step's metrics, so a good step needs no further collective.
        return [float(number) for row in rows for number in row]

    def judge(self, numbers: list[float]) -> DataError | None:
        """Build the error that stops the run: more samples of a source are unusable than allowed, one of them is new.

        Args:
            numbers: the sum of every rank's `numbers`.
        """
        for source, tried, bad, new in zip(self._sources, numbers[::3], numbers[1::3], numbers[2::3], strict=True):
            # Only at a new one: a run that is started again above the rate must get somewhere.
            if new and bad >= self._minimum and bad > self._rate * tried:
                return self._too_many(source, round(bad), round(tried))
        return None

    @property
    def total(self) -> int:
        """Unusable samples so far, all sources."""
        return sum(counts.total() for counts in self.bad.values())

    def state(self) -> dict[str, Any]:
        """Return the counts for a checkpoint as plain numbers; loading those of several ranks in turn adds them."""
        return {"tried": dict(self.tried), "bad": {source: dict(counts) for source, counts in self.bad.items()}}

    def reset(self, state: dict[str, Any]) -> None:
        """Go back to earlier counts."""
        self.tried.clear()
        self.bad.clear()
        self.load(state)

    def load(self, state: dict[str, Any]) -> None:
        """Add the counts of a checkpoint."""
        self.tried.update(state["tried"])
        for source, counts in state["bad"].items():
            self.bad[source].update(counts)

    def _note(self, bad: BadSample) -> None:
        counts = self.bad[bad.source]
        self.tried[bad.source] += 1
        self._new[bad.source] += 1
        counts[bad.reason] += 1
        # One line for each source and reason: a damaged shard would fill the log.
        if counts[bad.reason] == 1:
            logger.warning(
                "unusable sample replaced (%s; further ones only in %s): source %s, shard %s, key %s: %s",
                *(bad.reason, FOLDER_NAME, bad.source, bad.shard, bad.key, bad.detail),
            )

    def _too_many(self, source: str, bad: int, tried: int) -> DataError:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.bad[source].most_common(3)) or "none here"
        where = f"; keys and shards are in {self._path.parent}" if self._path else ""
        return DataError(
            f"source {source}: {bad} of {tried} samples unusable on all ranks ({bad / tried:.1%}, data.bad_rate allows "
            f"{self._rate:.1%}); most frequent reasons on this rank: {reasons}{where}. Repack the source "
            "(launch/pack.py --check finds what does not decode), or raise data.bad_rate"
        )

    def _write(self, records: list[BadSample]) -> None:
        if self._path is None or not records:
            return
        lines = "".join(json.dumps(asdict(bad)) + "\n" for bad in records)
        # A full disk costs these lines and not the run: the counts that decide are in memory.
        with self._tolerate(str(self._path)):
            self._append(lines)

    def _append(self, lines: str) -> None:
        assert self._path is not None
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(lines)

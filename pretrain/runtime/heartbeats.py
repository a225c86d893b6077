"""Small files in the run folder, readable by all ranks, that tell what every rank is doing.

    heartbeats/rank_00003.json    host, pid, step, phase, seconds in it, and a number that grows
    heartbeats/verdict_<start>.json   why this start was given up; whoever writes it first is believed by all

Files, not the process group: a rank that hangs in a collective can't take part in another one, and the store of the
process group ends with rank 0. Ages are compared by the number that grows and the reader's clock, since clocks of hosts
differ.
"""

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.runtime.activity import COLLECTIVE, awake, current
from pretrain.runtime.untrusted import parse_json

FOLDER_NAME = "heartbeats"

#: A rank whose beat has not changed for so many beats is gone, or its host is.
GONE_BEATS = 6


@dataclass(frozen=True)
class Beat:
    """Last word of one rank on itself: `number` grows, `phase_s` is how long it had been in its phase then."""

    start: str
    number: int
    rank: int
    host: str
    pid: int
    step: int
    phase: str
    phase_s: float
    written_at: str


@dataclass(frozen=True)
class Seen:
    """A rank's newest beat and how long ago this process first saw it, seconds."""

    beat: Beat
    age_s: float

    @property
    def idle_s(self) -> float:
        """Seconds since the rank entered its phase."""
        return self.beat.phase_s + self.age_s

    def __str__(self) -> str:
        beat = self.beat
        return (
            f"rank {beat.rank} (host {beat.host}, pid {beat.pid}): {beat.phase} of step {beat.step} "
            f"for {self.idle_s:.0f} s"
        )


class Heartbeats:
    """Writer of this rank's beats and reader of those of all.

    Args:
        folder: The run folder.
        start: Name of this start of the run, the same on all ranks; files of other starts are not looked at.
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(self, folder: Path, start: str, rank: int, world_size: int) -> None:
        self._folder = folder / FOLDER_NAME
        self._start, self._rank, self._world_size = start, rank, world_size
        self._number = 0
        self._first_seen: dict[int, tuple[int, float]] = {}
        self._began = awake()
        self._folder.mkdir(parents=True, exist_ok=True)

    def beat(self, step: int) -> None:
        """Say what this rank is doing; `step` is the one it works on."""
        self._number += 1
        moment = current()
        beat = Beat(
            *(self._start, self._number, self._rank, platform.node(), os.getpid(), step),
            *(moment.phase, round(moment.seconds, 1), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())),
        )
        path = self._path(self._rank)
        # Renamed into place: a reader on another host would else see half of the JSON, and miss the rank.
        temporary = path.with_suffix(".partial")
        try:
            temporary.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
        except FileNotFoundError:  # somebody took the run folder away; the next save makes it again and says so
            self._folder.mkdir(parents=True, exist_ok=True)
            return
        temporary.replace(path)

    def read(self) -> dict[int, Seen]:
        """Read the newest beat of every rank that has written one in this start."""
        found, now = {}, awake()
        for rank in range(self._world_size):
            content = _read(self._path(rank))
            if content is None or content.get("start") != self._start:
                continue
            try:
                beat = Beat(**content)
            except TypeError:  # damaged, which the rank's next beat mends
                continue
            number, seen_at = self._first_seen.get(rank, (-1, now))
            if beat.number != number:
                seen_at = now
                self._first_seen[rank] = (beat.number, now)
            found[rank] = Seen(beat, now - seen_at)
        return found

    def give_up(self, reason: str) -> bool:
        """Leave a verdict for all ranks and tell whether this rank was the first to."""
        try:
            # O_EXCL lets exactly one rank win: two verdicts would name two culprits and count one hang twice.
            descriptor = os.open(self._verdict, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"reason": reason, "rank": self._rank}, file)
        return True

    @property
    def given_up(self) -> bool:
        """True where some rank has left a verdict."""
        return self._verdict.exists()

    def clear_others(self) -> None:
        """Remove the files of earlier starts."""
        for path in self._folder.glob("*.json"):
            content = _read(path)
            # The own verdict stays: rank 0 may clear late, when a faster rank has already written why this start ends.
            if path != self._verdict and (content is None or content.get("start") != self._start):
                path.unlink(missing_ok=True)

    @property
    def _verdict(self) -> Path:
        return self._folder / f"verdict_{self._start}.json"

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"


def behind(seen: dict[int, Seen]) -> list[Seen]:
    """Find the ranks that the others wait for: of the lowest step, and not in a collective where others are.

    Those that have been in their phase for longest come first. Empty where all ranks wait in collectives of one step.
    """
    if not seen:
        return []
    lowest = min(one.beat.step for one in seen.values())
    slow = [one for one in seen.values() if one.beat.step == lowest]
    if len(slow) == len(seen):
        slow = [one for one in slow if one.beat.phase not in COLLECTIVE]
    return sorted(slow, key=lambda one: -one.idle_s)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = parse_json(path.read_bytes())
        return content if isinstance(content, dict) else None
    except (OSError, ValueError):
        # Not written yet, or replaced while it was read (ESTALE on NFS): the next look reads it.
        return None

"""Detections of persons that a test is given: looked for before training, since without them nothing is judged."""

import itertools
import logging
from dataclasses import dataclass

from pretrain.data.held_out import HeldOutRows, HeldOutSamples, HeldOutSet
from pretrain.data.members import Members
from pretrain.data.samples import Place
from pretrain.errors import DataError
from pretrain.samples.boxes import BoxSamples

logger = logging.getLogger(__name__)

#: Keyframes that are looked at before training for one that has a detector's box; the first nearly always has.
PEEKED = 100


def require_detections(sets: list[HeldOutSet], samples: BoxSamples, deadline_s: float) -> None:
    """Look before training for what a person detector has found: without it there would be nothing to judge.

    Raises:
        DataError: no keyframe has a detector's box that is judged; of more than `PEEKED` the first ones, none of which
            has any, are warned of.
    """
    # One after the other: nearly always the first says all.
    keyframes = HeldOutSamples(sets, Detected(samples), 0, 1, 1, deadline_s, readahead=1)
    # None: it can't be read, which the evaluation tells with its reason.
    if any(each.batch for each in itertools.islice(keyframes, PEEKED)):
        return
    error = no_detections(min(len(keyframes), PEEKED))
    if len(keyframes) <= PEEKED:
        raise error
    logger.warning("of the first ones: %s", error)


@dataclass(frozen=True)
class Detected(HeldOutRows[bool, bool]):
    """Whether keyframes have a detector's box; no video is decoded."""

    samples: BoxSamples

    def make(self, place: Place, key: str, members: Members) -> bool:
        return self.samples.has_detections(members)

    def collate(self, made: list[bool]) -> bool:
        return any(made)


def no_detections(keyframes: int) -> DataError:
    """Say that a person detector has found nobody."""
    return DataError(
        f"evaluation: none of {keyframes} held-out keyframes has a person detector's box with a score of "
        "input.min_score or more; pack them with --detections FILE, or judge the annotated boxes with "
        "objective.test_boxes=truth"
    )

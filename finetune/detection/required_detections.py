"""Detections of persons that a test is given: looked for before training, since without them nothing is judged."""

import itertools
import logging

from finetune.held_out_samples import HeldOutSamples, HeldOutSet
from pretrain.data.members import Members
from pretrain.errors import DataError, SampleError
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
    keyframes = HeldOutSamples(sets, samples, 0, 1, 1, deadline_s)
    if any(_has_detections(samples, each) for each in itertools.islice(keyframes.members(), PEEKED)):
        return
    error = no_detections(min(len(keyframes), PEEKED))
    if len(keyframes) <= PEEKED:
        raise error
    logger.warning("of the first ones: %s", error)


def _has_detections(samples: BoxSamples, members: Members | None) -> bool:
    try:
        return members is not None and samples.has_detections(members)
    except SampleError:
        return False  # told, with its reason, by the evaluation


def no_detections(keyframes: int) -> DataError:
    """Say that a person detector has found nobody."""
    return DataError(
        f"evaluation: none of {keyframes} held-out keyframes has a person detector's box with a score of "
        "input.min_score or more; pack them with --detections FILE, or judge the annotated boxes with "
        "objective.test_boxes=truth"
    )

"""Judgement of held-out keyframes by a detector while training: all ranks share them, each is judged once."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune.detection.actions import action_list, evaluated_outputs
from finetune.detection.answers import Detections, table_of, truth_of
from finetune.detection.required_detections import no_detections
from finetune.held_out_sets import held_out_sets, report_unreadable
from finetune.recipe import TuneRecipe
from pretrain.data.boxes.action_list import ActionList
from pretrain.data.boxes.keyframes import Key
from pretrain.data.held_out import HeldOutSamples, HeldOutSet, RowsWithoutChance, held_out_loader
from pretrain.data.samples import Batch
from pretrain.engine.transfers import to_device
from pretrain.errors import DataError
from pretrain.metrics.detection import FrameMap, frame_map
from pretrain.runtime.process_group import Ranks, gather_objects
from pretrain.samples.box_facts import time_text
from pretrain.samples.box_transforms import CONVENTIONS
from pretrain.samples.boxes import BoxSamples

logger = logging.getLogger(__name__)

#: Metric whose largest value makes a step the best one.
HEADLINE = "mAP"


@dataclass
class Judgement:
    """Answers to some keyframes beside what was annotated, one of each for a keyframe.

    Attributes:
        answers: of the detector.
        truth: of the annotation; scores are 1 for each label of a person.
        listed: (video, time) of keyframes that the annotation lists, also those with nobody on them.
        unreadable: `key: reason` of keyframes that are in no score.
    """

    answers: list[Detections] = field(default_factory=list)
    truth: list[Detections] = field(default_factory=list)
    listed: list[Key] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


class DetectionValidation:
    """Evaluation for the engine: frame-mAP on all sources' validation keyframes.

    Args:
        recipe: the run.
        ranks: this process among all; the keyframes are dealt out.
        samples: makes the clips.
    """

    best_by = HEADLINE

    def __init__(self, recipe: TuneRecipe, ranks: Ranks, samples: BoxSamples) -> None:
        self.every_epochs = recipe.evaluate.every_epochs
        self._recipe, self._ranks, self._samples = recipe, ranks, samples
        self._sets, self._actions = held_out_sets(recipe, test=False), action_list(recipe)

    def __call__(self, objective: Any) -> dict[str, float]:
        """Compute metrics in percent, equal on all ranks."""
        judged = judge(objective, self._recipe, self._ranks, self._sets, self._samples)
        found = score(judged, self._actions, self._recipe.objective.metric)
        return {HEADLINE: 100 * found.mean, "keyframes": float(len(judged.truth))}


def judge(objective: Any, recipe: TuneRecipe, ranks: Ranks, sets: list[HeldOutSet], samples: BoxSamples) -> Judgement:
    """Judge the keyframes of all sets. All ranks call it, with `objective` in evaluation mode, and get all of it.

    Raises:
        DataError: more unreadable keyframes than data.bad_rate allows, a keyframe that occurs twice, or no box of a
            person detector on any, where those are judged.
    """
    evaluate = recipe.evaluate
    rows = RowsWithoutChance(sets, samples)
    keyframes = HeldOutSamples(sets, rows, ranks.rank, ranks.world_size, evaluate.micro, recipe.data.deadline_s)
    mine, rules, passes = Judgement(), CONVENTIONS[recipe.input.convention], 0

    def batches() -> Iterator[Batch]:
        nonlocal passes
        for one in held_out_loader(keyframes, evaluate.workers):
            mine.unreadable += map(str, one.unreadable)
            if one.batch is None:
                continue
            batch = to_device(one.batch, ranks.device)
            truth = truth_of(batch, rules)
            mine.truth += truth
            mine.listed += [_key(kept) for kept in itertools.compress(truth, batch["annotated"].tolist())]
            passes += 1
            yield batch

    with objective.evaluated_weights(), torch.no_grad():
        # All at once: a detector with a memory describes every keyframe before it judges the first.
        mine.answers += objective.detect_all(batches())
        # With sharded weights every rank takes part in every forward pass, also one that has fewer keyframes.
        missing = keyframes.batches(evaluate.workers) - passes if recipe.zero.stage == 3 else 0
        for _ in range(missing):
            objective.detect(to_device(samples.example(1), ranks.device))
    parts = gather_objects(ranks, mine)
    judged = Judgement(*(list(itertools.chain.from_iterable(vars(part)[name] for part in parts))
                         for name in ("answers", "truth", "listed", "unreadable")))  # fmt: skip
    report_unreadable(judged.unreadable, len(judged.truth), recipe, "keyframes")
    if samples.detected and not any(len(one.boxes) for one in judged.answers):
        # A score of 0, of whatever model, would be taken for the model's.
        raise no_detections(len(judged.truth))
    return _in_order(judged)


def score(judged: Judgement, actions: ActionList, variant: str) -> FrameMap:
    """Compute frame-mAP at IoU 0.5 over the actions that count."""
    truth, found = table_of(judged.truth, truth=True), table_of(judged.answers)
    # A detector's keyframes that nobody annotated are left to the variant, which may ignore them.
    return frame_map(truth, found, evaluated_outputs(actions), variant, listed=judged.listed)


def _in_order(judged: Judgement) -> Judgement:
    """Sort by keyframe, so that nothing depends on how many ranks there were.

    Raises:
        DataError: a keyframe occurs twice: its persons would count twice.
    """
    twice = [key for key, count in Counter(map(_key, judged.truth)).items() if count > 1]
    if twice:
        video, time = twice[0]
        raise DataError(
            f"evaluation: {len(twice)} keyframes occur twice (the first is {video},{time_text(time)}); a keyframe may "
            "be in the held-out shards once: name each folder once, and pack a video's annotations together"
        )
    answers, truth = (sorted(part, key=_key) for part in (judged.answers, judged.truth))
    return Judgement(answers, truth, sorted(judged.listed), sorted(judged.unreadable))


def _key(one: Detections) -> Key:
    return one.video, one.time

"""End-to-end action detection: EVAD finds the persons on a keyframe and tells what they do (systems/evad.md).

The loss is the mean of all terms, each localisation head and decoder block having its own; see set_losses.py.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finetune.detection.answers import Detections, answers_of
from finetune.detection.detection_checks import check_judging
from finetune.detection.roi_head import pad_with_zeros
from finetune.detection.task import STATISTICS, DetectionTask
from finetune.evad.selection import select_persons
from finetune.evad.set_losses import mean_of_terms, set_losses
from finetune.evad.set_matching import AnnotatedPersons, assignment_problems
from finetune.recipe import TuneRecipe
from finetune.tuned import TunedObjective, build_tuned
from pretrain.data.samples import Batch
from pretrain.models.base import Detector
from pretrain.models.evad.context import ActorPredictions
from pretrain.models.evad.detector_weights import HEAD, export_detector, load_detector
from pretrain.models.pixels import PixelNormalization, unit_pixels
from pretrain.objectives.base import Export, Method, Output, Rule
from pretrain.runtime.collectives import mean
from pretrain.runtime.process_group import present_ranks
from pretrain.samples.box_transforms import CONVENTIONS
from pretrain.samples.boxes import BoxSamples

#: How a .pth file of the official layout is used.
OFFICIAL_USAGE = "usage: TRAIN.CHECKPOINT_FILE_PATH of the official EVAD code, or run.init_weights here"


@dataclass
class Config:
    """The loss of actions, and which persons are an answer."""

    name: str = "evad"
    """task: finetune/<name>/task.py"""
    action_weight: float = 12.0
    """weight of the actions' loss; published: 12 with ViT-B, 6 with ViT-L"""
    head_lr_scale: float = 8.0
    """factor on the learning rate of localisation heads and context decoder, which are new; pyramid and proposals have
    the encoder's rate"""
    person_threshold: float = 0.7
    """probability of being a person from which on a proposal is an answer; of a keyframe without any, all are"""
    pixels: Literal["imagenet", "slowfast", "alphaction"] = "slowfast"
    """statistics that pixels are normalised by"""
    metric: Literal["activitynet", "slowfast", "alphaction", "voc"] = "activitynet"
    """variant of frame-mAP that chooses the best step (published numbers: slowfast); the test reports AVA's three
    besides"""


class EVADTask(DetectionTask):
    """Training of a detector that finds the persons itself."""

    MODEL = Detector
    FINDS_PERSONS = True
    SECTIONS = ("ema", "evaluate", "start")

    def problems(self) -> list[str]:
        options, given = self.recipe.objective, self.recipe.input
        found = Method.problems(self) + assignment_problems() + check_judging(self.recipe)
        for key in ("action_weight", "head_lr_scale"):
            if not getattr(options, key) > 0:
                found.append(f"objective.{key}: found {getattr(options, key)}, allowed: more than 0")
        if not 0 <= options.person_threshold <= 1:
            found.append(f"objective.person_threshold: found {options.person_threshold}, allowed: from 0 to 1")
        queries = self.recipe.model.queries
        if given.max_boxes > queries:
            found.append(
                f"input.max_boxes: found {given.max_boxes}, allowed: up to model.queries={queries}; a proposal answers "
                "for one person"
            )
        return found

    def _samples(self) -> BoxSamples:
        return BoxSamples(self.recipe.input, self.recipe.run.seed, self.recipe.model.classes)

    def build(self) -> "EVADObjective":  # type: ignore[override]
        return EVADObjective(build_tuned(self.architecture, self.recipe), self.recipe, self.architecture)

    def _detect_of(self, objective: Any) -> Callable[[Batch], list[Detections]]:
        # Of a keyframe without persons the published answer is all proposals: nothing to draw into a video.
        return partial(objective.detect, empty=True)

    def exports(self, source: Path) -> dict[str, Export]:
        return super().exports(source) | {"evad": Export(_write_official, suffix=".pth")}


METHOD = EVADTask


def _write_official(objective: Any, dest: str) -> str:
    export_detector(objective.model, dest)
    return OFFICIAL_USAGE


class EVADObjective(TunedObjective):
    """A detector with the losses of a matched set.

    A batch is of samples/boxes.py.

    Args:
        model: forward(normalised video [B, T, H, W, 3], sizes [B, 2]) -> ActorPredictions.
        recipe: the run.
        architecture: of the model; it knows the layers.
    """

    def __init__(self, model: Any, recipe: TuneRecipe, architecture: Detector) -> None:
        super().__init__(model, recipe, architecture, PixelNormalization(*STATISTICS[recipe.objective.pixels]))

    def forward(self, batch: Batch) -> Output:
        found = self.predictions(batch)
        persons = AnnotatedPersons(batch["boxes"], batch["labels"], batch["counts"], batch["sizes"])
        device, total = batch["boxes"].device, float(len(batch["boxes"]))
        # A rank's share of all persons: ranks whose clips have few don't count more than others.
        share = mean(torch.full((), total, device=device), present_ranks(device)).clamp(min=1)
        terms = set_losses(found, persons, share, self.recipe.objective.action_weight)
        shown = {name: value.detach() for name, value in terms.items() if not name[-1].isdigit()}
        return Output(mean_of_terms(terms), shown)

    @torch.no_grad()
    def detect(self, batch: Batch, empty: bool = False) -> list[Detections]:
        """Find persons and their actions on the keyframes of a batch, which lies on the model's device.

        Args:
            batch: of samples/boxes.py.
            empty: a keyframe may be without an answer; officially all proposals are given then.
        """
        answer = select_persons(self.predictions(batch), batch["sizes"], self.recipe.objective.person_threshold, empty)
        rules = CONVENTIONS[self.recipe.input.convention]
        return answers_of(batch, answer.boxes.cpu().numpy(), answer.scores.cpu().numpy(), answer.counts, rules)

    def detect_all(self, batches: Iterable[Batch]) -> list[Detections]:
        """Find the persons of all keyframes that are this rank's; batches on the model's device."""
        return [answer for batch in batches for answer in self.detect(batch)]

    def predictions(self, batch: Batch) -> ActorPredictions:
        """Compute the model's predictions for a batch."""
        video = pad_with_zeros(self.normalization(unit_pixels(batch["video"])), batch["sizes"])
        found: ActorPredictions = self.model(video, batch["sizes"])
        return found

    def rule(self, name: str, shape: Iterable[int]) -> Rule:
        """Scale the rate of what is new, and that of the encoder's layers where there is a layer decay."""
        plain = super().rule(name, shape)
        if not name.removeprefix("model.").startswith(HEAD):
            return plain
        return Rule(plain.lr_scale * self.recipe.objective.head_lr_scale, plain.decays)

    def take_start(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Take over a detector, or a VideoMAE's encoder and what of its decoder has a place here."""
        load_detector(self.model, path, raw, self.recipe.start.head)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Give the clips as they are trained on."""
        return {"clips": batch["video"]}

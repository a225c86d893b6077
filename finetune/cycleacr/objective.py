"""CycleACR's loss, its memory from step to step, and its answers in the two phases of the official test."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune.cycleacr.grouped_loss import grouped_loss
from finetune.cycleacr.head_weights import load_start
from finetune.cycleacr.maps import time_map
from finetune.cycleacr.memory_bank import MemoryBank, SeenKeyframes, video_number
from finetune.detection.answers import Detections, answers_of
from finetune.detection.roi_head import extend_boxes_inclusive
from finetune.detection.task import DetectionObjective
from pretrain.checkpoint.rank_state import RankState
from pretrain.data.randomness import key_of
from pretrain.data.samples import Batch, Sample
from pretrain.models.base import MapsBackbone
from pretrain.models.cycleacr import Actors
from pretrain.models.dropout import ROW_KEYS
from pretrain.models.interaction import PersonPlaces
from pretrain.objectives.base import Output, Rule
from pretrain.runtime.collectives import gather_ragged, mean
from pretrain.runtime.process_group import Ranks, present_ranks
from pretrain.samples.box_transforms import CONVENTIONS
from pretrain.samples.boxes import BoxSamples

#: Entry of a batch: its keyframes as the memory knows them, on the host whatever becomes of the tensors.
MOMENTS = "moments"


class Moments(NamedTuple):
    """Keyframes of a batch, on the host: numbers of videos, seconds, and persons of each."""

    videos: list[int]
    seconds: list[int]
    counts: list[int]


class MomentSamples(BoxSamples):
    """Clips with boxes, and their `Moments`: the memory is asked for them before anything is computed."""

    def collate(self, samples: list[Sample]) -> Batch:
        batch = super().collate(samples)
        # A plain tuple of lists: batches travel between processes.
        return batch | {MOMENTS: tuple(moments_of(batch))}


def moments_of(batch: Batch) -> Moments:
    """Tell a batch's keyframes; waits for the device where `MomentSamples` has not told before."""
    if MOMENTS in batch:
        return Moments(*batch[MOMENTS])
    # Down, and never to the nearest: keyframes at 1.5 and 2.5 s would both be second 2, and one would be forgotten.
    seconds = [math.floor(time) for time in batch["times"].tolist()]
    return Moments([video_number(name) for name in batch["videos"]], seconds, batch["counts"].tolist())


@dataclass(frozen=True)
class _Pending:
    """A micro-batch on its way into the memory."""

    moments: Moments
    features: Tensor
    scores: Tensor
    loss: Tensor


@dataclass(frozen=True)
class _Judged:
    """A batch behind phase 0: what phase 1 and the answer need of it, on the host."""

    facts: dict[str, Any]
    moments: Moments
    actors: Actors


class CycleACRObjective(DetectionObjective):
    """A backbone with CycleACR's head, and the memory of what it has seen.

    Args:
        model: its `head` is a `CycleACRHead`.
        recipe: the run.
        architecture: of the model.
    """

    def __init__(self, model: Any, recipe: Any, architecture: Any) -> None:
        super().__init__(model, recipe, architecture)
        self.bank = self._new_bank()
        # Of the step before, which the penalty compares tags with; 0 at the first step: nothing is remembered then.
        self.last_loss = torch.zeros(1, dtype=torch.float64, device="cpu")
        self._step = 0
        self._pending: list[_Pending] = []
        self._judged = self._new_bank()

    def forward(self, batch: Batch) -> Output:
        moments, ranks = moments_of(batch), present_ranks(batch["video"].device)
        persons = PersonPlaces.of(batch["counts"], len(batch["boxes"]))
        # Before the backbone: what is exchanged with other ranks travels while it computes nothing yet.
        window = self._window(self.bank, moments, ranks)
        actors = self.actors(batch, batch["boxes"], persons)
        logits = self.classify(actors, persons, window, moments, batch["box_scores"])
        loss, metrics = self._loss(logits, batch["labels"], ranks)
        if self.training:
            kept = actors.features.detach().to(self.bank.dtype)
            self._pending.append(_Pending(moments, kept, batch["box_scores"], loss.detach()))
        metrics |= {"boxes": batch["counts"].sum().float(), "remembered": loss.new_tensor(float(len(self.bank)))}
        return Output(loss, metrics)

    def actors(self, batch: Batch, boxes: Tensor, persons: PersonPlaces) -> Actors:
        """Compute phase 0 of boxes [n, 4], which lie inside their frames."""
        actors: Actors = self.model.head.actors(self._maps(batch), boxes, persons)
        return actors

    def classify(
        self, actors: Actors, persons: PersonPlaces, window: Tensor, moments: Moments, scores: Tensor
    ) -> Tensor:
        """Compute phase 1: logits float32 [n, K].

        Args:
            actors: of phase 0.
            persons: their clips.
            window: rows of the memory for each clip [B, places, D]; those of the keyframe's own second are free.
            moments: of the batch.
            scores: of the persons' boxes [n], by which some are chosen where there are more than places.
        """
        options = self.recipe.objective.memory
        drawn = self._drawn(moments, scores.device)
        own = drawn if options.choice == "random" else scores
        # Fresh, but without gradient: it reaches persons of the same clip, and nothing that is remembered.
        fresh = persons.table(actors.features.detach(), options.max_per_second, own).to(window.dtype)
        first = options.past * options.max_per_second
        window = torch.cat((window[:, :first], fresh, window[:, first + options.max_per_second :]), dim=1)
        priority = drawn if self.recipe.objective.person_choice == "random" else scores
        # In float32: sigmoids of bfloat16 logits would be rounded to 8 bits.
        logits: Tensor = self.model.head.classify(actors, persons, window, priority).float()
        return logits

    def before_step(self, step: int, steps_per_epoch: int, total: int) -> None:
        super().before_step(step, steps_per_epoch, total)
        self._step = step
        # Of a step that was left out: its weights never came to be.
        self._pending.clear()

    def after_step(self) -> None:
        """Remember the persons of the step, tagged with its loss: the mean over all ranks' micro-batches."""
        super().after_step()
        if not self._pending:
            return
        ranks = present_ranks(self._pending[0].features.device)
        loss = float(mean(torch.stack([one.loss.double() for one in self._pending]).mean(), ranks))
        self.bank.put(SeenKeyframes.join([_seen(one, loss) for one in self._pending]), ranks)
        self.last_loss.fill_(loss)
        self._pending.clear()

    def rank_state(self) -> dict[str, RankState]:
        return {"memory": self.bank.state(), "last_loss": RankState(self.last_loss, "same_on_all")}

    @torch.no_grad()
    def detect(self, batch: Batch) -> list[Detections]:
        """Judge a batch of judged clips by what has been judged before and this batch itself, as a stream does.

        Keyframes must come in the order of time; with objective.memory.future=0 the answers are those of `detect_all`.
        """
        ranks = present_ranks(batch["video"].device)
        one = self._phase0(batch)
        self._judged.put(_seen_by(one, self._judged.dtype), ranks)
        return self._phase1(one, self._judged, ranks)

    def forget(self) -> None:
        """Begin a new stream."""
        self._judged.clear()

    @torch.no_grad()
    def detect_all(self, batches: Iterable[Batch]) -> list[Detections]:
        """Judge all batches of judged clips of this rank in two phases; all ranks call it.

        Phase 0 describes the persons of all keyframes, which makes a memory of its own; phase 1 judges them by it.
        """
        device = next(self.model.parameters()).device
        ranks, bank = present_ranks(device), self._new_bank()
        kept = [self._phase0(batch) for batch in batches]
        seen = [_seen_by(one, bank.dtype) for one in kept]
        bank.put(SeenKeyframes.join(seen or [self._nothing(bank)]), ranks)
        rounds = max(
            int(count) for part in gather_ragged(torch.tensor([len(kept)], device=device), ranks) for count in part
        )
        answers = []
        for number in range(rounds):
            # A rank that is done still takes part in what others ask its share of the memory for.
            if number < len(kept):
                answers += self._phase1(kept[number], bank, ranks)
            else:
                self._window(bank, Moments([], [], []), ranks, judged=True)
        return answers

    def rule(self, name: str, shape: Iterable[int]) -> Rule:
        """Scale rates as the recipe says: by layer, of the cycle and the instance interaction, and of biases."""
        options, plain = self.recipe.objective, name.removeprefix("model.")
        rule = super().rule(name, shape)
        scale, decays = rule.lr_scale, rule.decays
        if plain.startswith("head.feature_extractor.cycleacr_module."):
            scale *= options.head_scale
        # Officially by this part of the name, which tables of biases for places have as well.
        if "bias" in plain.rpartition(".")[2]:
            scale *= options.bias_scale
        return Rule(scale, decays and (options.decay_positions or "position" not in plain))

    def take_start(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Take over a backbone, or a whole CycleACR."""
        load_start(self.model, path, self.recipe.start.head, raw)

    def _maps(self, batch: Batch) -> list[Tensor]:
        video, frames = self.clips(batch), batch["video"].shape[1:4]
        if not isinstance(self.architecture, MapsBackbone):
            return [time_map(self.model, video, self.architecture.token_grid(*frames))]
        choices, starts = self.architecture.start_choices(), None
        if self.training and choices > 1:
            # By the row's key, so that it is the same on any number of ranks; without an engine by torch's generator.
            keys = batch.get(ROW_KEYS)
            starts = torch.randint(choices, (len(video),), device=video.device) if keys is None else keys % choices
        maps: list[Tensor] = self.model.forward_features(video, *([] if choices == 1 else [starts]))
        return maps

    def _loss(self, logits: Tensor, labels: Tensor, ranks: Ranks) -> tuple[Tensor, dict[str, Tensor]]:
        if self.recipe.objective.loss != "focal":
            return self.loss(logits, labels), {}
        boxes = mean(logits.new_tensor(float(len(logits))), ranks).clamp(min=1)
        found = grouped_loss(logits, labels, boxes)
        metrics = {f"loss_{name}": value.detach() for name, value in found.losses.items()}
        return found.total, metrics | {f"accuracy_{name}": value for name, value in found.accuracies.items()}

    def _window(self, bank: MemoryBank, moments: Moments, ranks: Ranks, judged: bool = False) -> Tensor:
        options = self.recipe.objective.memory
        videos, seconds = (torch.tensor(column, dtype=torch.int64) for column in moments[:2])
        if options.seconds == 1:
            # Only the keyframe's own second: nothing to ask other ranks for.
            return torch.zeros(len(videos), options.places, bank.dim, dtype=bank.dtype, device=ranks.device)
        penalized = self.training and options.penalty and not judged
        loss = float(self.last_loss) if penalized else None
        return bank.windows(videos, seconds, ranks, loss, self._step if self.training else 0)

    def _drawn(self, moments: Moments, device: torch.device) -> Tensor:
        """Draw a number for each person, by which a random subset is chosen; zeros where nothing is chosen so."""
        options, total = self.recipe.objective, sum(moments.counts)
        if "random" not in (options.person_choice, options.memory.choice):
            return torch.zeros(total, device=device)
        step, drawn = self._step if self.training else 0, torch.zeros(0)
        for video, second, count in zip(*moments, strict=True):
            seed = key_of(self.recipe.run.seed, step, video, second, "persons") >> 65
            drawn = torch.cat((drawn, torch.rand(count, generator=torch.Generator().manual_seed(seed))))
        return drawn.to(device)

    def _phase0(self, batch: Batch) -> _Judged:
        counts, boxes = batch["counts"], batch["boxes"]
        persons = PersonPlaces.of(counts, len(boxes))
        # For pooling alone: what is reported is the box that was given.
        extended = extend_boxes_inclusive(boxes, self.recipe.objective.extension, batch["sizes"][persons.clips])
        features, pooled = self.actors(batch, extended, persons)
        facts = {
            name: batch[name] for name in ("videos", "times", "sizes", "originals", "boxes", "box_scores", "counts")
        }
        on_host = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in facts.items()}
        return _Judged(on_host, moments_of(batch), Actors(features.cpu(), pooled.cpu()))

    def _phase1(self, one: _Judged, bank: MemoryBank, ranks: Ranks) -> list[Detections]:
        facts, device = one.facts, ranks.device
        window = self._window(bank, one.moments, ranks, judged=True)
        persons = PersonPlaces.of(facts["counts"].to(device), len(facts["boxes"]))
        actors, scores = Actors(*(value.to(device) for value in one.actors)), facts["box_scores"].to(device)
        found = self.probabilities(self.classify(actors, persons, window, one.moments, scores))
        if self.recipe.objective.detector_score:
            found = found * scores[:, None]
        rules = CONVENTIONS[self.recipe.input.convention]
        return answers_of(facts, facts["boxes"].numpy(), found.cpu().numpy(), list(one.moments.counts), rules)

    def _new_bank(self) -> MemoryBank:
        options = self.recipe.objective
        return MemoryBank(options.dim, options.memory, self.recipe.run.seed)

    def _nothing(self, bank: MemoryBank) -> SeenKeyframes:
        none = torch.zeros(0, dtype=torch.int64)
        return SeenKeyframes(
            none, none, none, none.double(), torch.zeros(0, bank.dim, dtype=bank.dtype), torch.zeros(0)
        )


def _seen(one: _Pending, loss: float) -> SeenKeyframes:
    return _keyframes(one.moments, one.features.cpu(), one.scores.cpu(), loss)


def _seen_by(one: _Judged, dtype: torch.dtype) -> SeenKeyframes:
    # Tags are of training; nothing is penalized by them here.
    return _keyframes(one.moments, one.actors.features.to(dtype), one.facts["box_scores"], 0.0)


def _keyframes(moments: Moments, features: Tensor, scores: Tensor, tag: float) -> SeenKeyframes:
    columns: Sequence[Tensor] = [torch.tensor(column, dtype=torch.int64) for column in moments]
    tags = torch.full((len(moments.counts),), tag, dtype=torch.float64)
    return SeenKeyframes(columns[0], columns[1], columns[2], tags, features, scores.float())

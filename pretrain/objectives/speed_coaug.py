"""Speed co-augmentation: what is seen and heard of a video at one speed finds its counterpart among all others.

"Speed Co-Augmentation for Unsupervised Audio-Visual Pre-training", arXiv 2309.13942, for which no code exists
(systems/speed_coaug.md says what is chosen here); encoders and vanilla baseline are AVID's. `model` is the video
encoder alone, so that its weights start a fine-tuning as they are. Shapes: B rows, D channels of embeddings.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pretrain.checkpoint.rank_state import RankState
from pretrain.data.samples import Batch
from pretrain.models.base import Classifier, Cost
from pretrain.models.classifier_weights import load_pretrained
from pretrain.models.formats import plain_state
from pretrain.models.pixels import PixelNormalization, unit_pixels
from pretrain.models.r2plus1d import renamed
from pretrain.models.resnet import count_products
from pretrain.models.sound_encoders import SoundEncoder, build_sound_encoder
from pretrain.models.weights import LoadReport, load_state, strip_wrappers
from pretrain.objectives.base import Export, Method, Rule, WholeBatchObjective, decays
from pretrain.objectives.contrast import LogitScale, normalized
from pretrain.objectives.speed_coaug_evaluation import HeldOutSounds, SpeedCoaugEvaluation
from pretrain.objectives.speed_coaug_loss import (
    FILE,
    HEARD,
    HEARD_KEY,
    SEEN,
    SEEN_KEY,
    SPEED,
    PairAffinity,
    PairLoss,
    PairTerms,
    pair_terms,
    queue_terms,
    within_loss,
)
from pretrain.recipe.schema import Recipe
from pretrain.runtime import storage
from pretrain.runtime.collectives import gather
from pretrain.runtime.gradient_cache import Embeddings
from pretrain.runtime.process_group import Ranks, present_ranks
from pretrain.samples import audio_video

#: Parts of the objective, and what they are called in a file of all of them.
TOWERS = {"model": "video_encoder", "audio_encoder": "audio_encoder", "video_head": "video_head",
          "audio_head": "audio_head", "affinity": "affinity", "scale": "scale"}  # fmt: skip
#: AVID's names of the parts that it has.
AVID = {"audio_model.": "audio_encoder.", "video_proj.projection.": "video_head.",
        "audio_proj.projection.": "audio_head."}  # fmt: skip


@dataclass
class Config:
    """The sound encoder, heads, and the loss."""

    name: str = "speed_coaug"
    """method: pretrain/objectives/<name>.py"""
    sound: SoundEncoder = field(default_factory=SoundEncoder)
    """encoder of spectrograms; that of videos is the recipe's model"""
    head: list[int] = field(default_factory=lambda: [512, 512, 128])
    """outputs of the layers of each encoder's head, ReLU between them; the last are what is compared"""
    loss: PairLoss = field(default_factory=PairLoss)
    """what is compared with what"""
    shared_batch_norm: bool = True
    """batch norms take their statistics of all ranks' rows: as many ranks as there are train alike; false: each of its
    own (AVID)"""
    decay_all: bool = True
    """weight decay is for norms and biases too (AVID: torch's Adam); false: for tensors of two or more dimensions"""
    held_out: HeldOutSounds = field(default_factory=HeldOutSounds)
    """retrieval while training"""


class SpeedCoaugMethod(Method):
    """Contrast of video and sound at two speeds."""

    INPUT = "audio_video"
    MODEL = Classifier
    recipe: Recipe

    @cached_property
    def features(self) -> int:
        """Channels of the video encoder's vector."""
        with torch.device("meta"):
            model: Any = self.architecture.build().eval()
            return int(model.forward_features(torch.empty(1, *self.recipe.input.size, 3)).shape[1])

    def problems(self) -> list[str]:
        recipe, options = self.recipe, self.recipe.objective
        if not isinstance(recipe.input, audio_video.Config):
            return [f"input.name={recipe.input.name}: objective speed_coaug takes audio_video"]
        found = [*super().problems(), *options.sound.problems("objective.sound")]
        found += options.loss.problems("objective.loss", recipe.input.views)
        if not options.head or min(options.head) < 1:
            found.append(f"objective.head: found {options.head}, allowed: outputs of one layer or more, each above 0")
        if (classes := getattr(recipe.model, "classes", 0)) != 0:
            found.append(f"model.classes: found {classes}, allowed: 0; nothing here trains a classifier")
        whole = self.architecture.full_precision or options.sound.kind == "conv2d"
        if whole and recipe.compute.dtype != "fp32":
            found.append(f"compute.dtype: found {recipe.compute.dtype}, allowed: fp32, batch norms' running statistics "
                         "lose small steps in 16 bits")  # fmt: skip
        return found + options.held_out.problems("objective.held_out")

    def warnings(self) -> list[str]:
        loss = self.recipe.objective.loss
        if self.recipe.input.views == 2 and loss.kind == "info_nce" and loss.same_file == "negative":
            return ["objective.loss.same_file=negative: the other speed of the same file as a hard negative is what "
                    "makes results worse than without speeds"]  # fmt: skip
        return []

    def samples(self) -> audio_video.AudioVideo:
        return audio_video.AudioVideo(self.recipe.input, self.recipe.run.seed)

    def build(self) -> "SpeedCoaugObjective":
        width = self.features
        model = self.architecture.build(self.recipe.compute.activation_checkpointing)
        return SpeedCoaugObjective(model, width, self.recipe, self.architecture)

    def cost(self) -> Cost:
        seen, options = self.architecture.cost(), self.recipe.objective
        with torch.device("meta"):
            encoder = build_sound_encoder(options.sound, self.recipe.input.sound_size)
            heard = count_products(encoder, torch.empty(1, *self.recipe.input.sound_size), lambda name: "sound encoder")
        return Cost(seen.macs | heard, seen.tokens)

    def evaluation(self, ranks: Ranks) -> SpeedCoaugEvaluation | None:
        held_out = self.recipe.objective.held_out
        return SpeedCoaugEvaluation(self.recipe, held_out, ranks) if held_out.every_epochs and held_out.any else None

    def exports(self, source: Path) -> dict[str, Export]:
        return super().exports(source) | {"towers": Export(_write_towers, suffix=".safetensors")}


METHOD = SpeedCoaugMethod


class SpeedCoaugObjective(WholeBatchObjective):
    """Two encoders with heads, compared over the global batch; a batch is as `AudioVideo` says.

    Args:
        model: video encoder, a Classifier without a head.
        features: channels of its vector.
        recipe: the run.
        architecture: of the model.
    """

    def __init__(self, model: Any, features: int, recipe: Recipe, architecture: Classifier) -> None:
        super().__init__()
        options: Config = recipe.objective
        self.model, self.architecture, self.options, self.views = model, architecture, options, recipe.input.views
        self.cross_rank_batch_norm = options.shared_batch_norm
        self.normalization = PixelNormalization()
        recompute: Any = recipe.compute.activation_checkpointing
        self.audio_encoder = build_sound_encoder(options.sound, recipe.input.sound_size, recompute)
        self.video_head = _head(features, options.head)
        self.audio_head = _head(options.sound.features, options.head)
        loss = options.loss
        self.affinity = PairAffinity(features, options.sound.features, loss.soft.dim) if loss.attends else None
        self.scale = LogitScale(loss.temperature) if loss.learnable else None
        sides = range(2 if loss.queues else 0)
        self.queues = [_first_queue(loss.soft.queue, options.head[-1], side) for side in sides]
        self._newest: list[Tensor] = []

    def embed(self, batch: Batch) -> Embeddings:
        seen, heard = self.encoded(batch["video"]), self.audio_encoder(batch["sound"])
        found = {SEEN: normalized(self.video_head(seen)), HEARD: normalized(self.audio_head(heard))}
        found |= {FILE: batch[FILE], SPEED: batch[SPEED]}
        if self.affinity is not None:
            found[SEEN_KEY], found[HEARD_KEY] = self.affinity(seen, heard)
        return found

    def compare(self, embeddings: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        options = self.options.loss
        ranks = present_ranks(embeddings[SEEN].device)
        scale: Tensor | float = 1 / options.temperature if self.scale is None else self.scale()
        terms = self._terms(embeddings, scale, ranks)
        loss = (terms.of_seen.mean() + terms.of_heard.mean()) / 2
        if options.within:
            loss = loss + options.within * within_loss(embeddings, options, scale, ranks)
        if options.scale_2tau:
            loss = loss * 2 / scale
        metrics = {"to_sound": terms.of_seen.mean(), "to_video": terms.of_heard.mean(),
                   "similarity": (embeddings[SEEN] * embeddings[HEARD]).sum(1).mean()}  # fmt: skip
        if terms.weights is not None:
            metrics["soft_weight"] = torch.stack([one.mean() for one in terms.weights]).mean()
        if isinstance(scale, Tensor):
            metrics["temperature"] = 1 / scale
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _terms(self, embeddings: Embeddings, scale: Tensor | float, ranks: Ranks) -> PairTerms:
        if not self.queues:
            return pair_terms(embeddings, self.options.loss, scale, ranks, self.views)
        # Gathered in each pass alike: what enters the queue waits for the update.
        self._newest = [gather(embeddings[name], ranks, self.views) for name in (SEEN, HEARD)]
        device = embeddings[SEEN].device
        queues = (self.queues[0].to(device), self.queues[1].to(device))
        return queue_terms(embeddings, queues, self.options.loss, scale, ranks, self.views)

    def after_step(self) -> None:
        for queue, newest in zip(self.queues, self._newest, strict=False):
            queue.copy_(torch.cat([newest.to(queue), queue])[: len(queue)])

    def rank_state(self) -> dict[str, RankState]:
        names = ("seen_queue", "heard_queue")
        return {name: RankState(queue, "same_on_all") for name, queue in zip(names, self.queues, strict=False)}

    def encoded(self, video: Tensor) -> Tensor:
        """Compute the video encoder's vectors [B, C] of clips uint8 [B, T, H, W, 3]."""
        vectors: Tensor = self.model.forward_features(self.normalization(unit_pixels(video)))
        return vectors

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        return self.encoded(batch["video"]).float()

    def rule(self, name: str, shape: Iterable[int]) -> Rule:
        own, shape = name.removeprefix("model."), tuple(shape)
        wanted = decays(name, shape) or (self.options.decay_all and len(shape) > 0)
        if own == name:
            return Rule(decays=wanted)
        return Rule(self.architecture.lr_scale(own), wanted and self.architecture.decays(own, shape))

    def load_pretrained(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Take over all towers, of AVID's files or an export of ours, or a video encoder alone."""
        state = strip_wrappers(raw)
        if not any(key.startswith(("video_model.", "video_encoder.")) for key in state):
            load_pretrained(self.model, path, raw=self.architecture.own_weights(raw))
            return
        parts = _from_avid(state) if any(key.startswith("video_model.") for key in state) else {
            f"{ours}.{key.removeprefix(f'{theirs}.')}": value
            for ours, theirs in TOWERS.items() for key, value in state.items() if key.startswith(f"{theirs}.")
        }  # fmt: skip
        fresh = ("affinity.*", "scale.*", "*.num_batches_tracked")
        load_state(self, parts, LoadReport(path, "AVID or both towers"), fresh, ("affinity.*", "scale.*"))

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Give the clips as the encoder sees them, at their speeds."""
        return {"seen": batch["video"]}


def _head(inputs: int, outputs: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in outputs:
        layers += [nn.Linear(inputs, size), nn.ReLU()]
        inputs = size
    return nn.Sequential(*layers[:-1])


def _first_queue(rows: int, dim: int, side: int) -> Tensor:
    drawn = torch.randn(rows, dim, generator=torch.Generator().manual_seed(side), device="cpu")
    return normalized(drawn)


def _from_avid(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring AVID's wrapper of both towers under the objective's names."""
    seen = renamed({key: value for key, value in state.items() if key.startswith("video_model.")}).state
    found = {f"model.{name}": value for name, value in seen.items()}
    for key, value in state.items():
        if not key.startswith("video_model."):
            theirs = next((one for one in AVID if key.startswith(one)), "")
            found[AVID.get(theirs, "") + key.removeprefix(theirs)] = value
    return found


def _write_towers(objective: Any, dest: str) -> str:
    names = TOWERS.items()
    state = {
        f"{theirs}.{key.removeprefix(f'{ours}.')}": value
        for ours, theirs in names for key, value in plain_state(objective).items() if key.startswith(f"{ours}.")
    }  # fmt: skip
    storage.write_bytes(dest, safetensors.torch.save(state, {"format": "pt"}))
    return ""

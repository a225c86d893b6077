"""SNCLR: contrast of two views in which the nearest past keys are positives too, each as far as it looks alike.

Ge et al., "Soft Neighbors are Positive Supporters in Contrastive Visual Representation Learning", ICLR 2023, arXiv
2303.17142; the released trainer is that of ViT-S, read at commit b95c7e5 (systems/snclr.md). An online encoder with
projector and predictor learns to find the keys of a momentum encoder among those of the global batch and their nearest
neighbours in a queue. Shapes: B samples of a rank with two views each, K neighbours, D channels compared.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.checkpoint.rank_state import RankState
from pretrain.data.samples import Batch, Samples
from pretrain.metrics.collapse import effective_rank, weight_entropy
from pretrain.models.averages import MomentumTeacher
from pretrain.models.base import Classifier, Cost
from pretrain.models.contrastive_heads import contrastive_head
from pretrain.models.formats import export_official
from pretrain.models.linear import Linear
from pretrain.models.pixels import PixelNormalization, unit_pixels
from pretrain.objectives.base import Export, Method, Rule, WholeBatchObjective, decays
from pretrain.objectives.contrast import file_numbers, info_nce, normalized
from pretrain.objectives.snclr_checks import feature_channels, option_problems, unusual
from pretrain.objectives.snclr_queue import KeyQueue, Neighbours
from pretrain.objectives.snclr_weights import load_released, write_released
from pretrain.recipe.rates import half_cosine
from pretrain.recipe.schema import Recipe
from pretrain.runtime.collectives import gather, own_rows
from pretrain.runtime.gradient_cache import Embeddings
from pretrain.runtime.process_group import present_ranks
from pretrain.samples.image_views import ImageViews

USAGE = """\
Fine-tune a ViT: `python launch/finetune.py --recipe deit_s run.init_weights=FOLDER`; judge it as it is:
`python launch/evaluate.py --recipe deit_s --method knn run.init_weights=FOLDER`."""


@dataclass
class Config:
    """The heads, the queue, and how far neighbours count."""

    name: str = "snclr"
    """method: pretrain/objectives/<name>.py"""
    dim: int = 256
    """channels that are compared"""
    hidden: int = 4096
    """channels inside projector and predictor"""
    projector_layers: int = 3
    """linear layers of the projector (MoCo v3: 3 behind a ViT, 2 behind a ResNet)"""
    predictor_norm: bool = True
    """batch norm behind the predictor (MoCo v3: behind a ViT alone)"""
    temperature: float = 0.2
    """divides similarities"""
    momentum: float = 0.99
    """share that the momentum encoder keeps at the first step; rises along half a cosine to 1"""
    momentum_rises: bool = True
    """false: `momentum` from start to end"""
    neighbours: int = 30
    """nearest past keys of each key that are positives too; 0: none, plain InfoNCE over the batch (MoCo v3)"""
    queue: int = 128000
    """past keys that are searched"""
    queue_of: Literal["all", "rank"] = "all"
    """all: keys of all ranks in one queue, the same training on any number of ranks; rank: each rank has a queue of
    this size of its own keys (released code)"""
    exclude_same_file: bool = False
    """whether past keys of the same picture or video are left out (released code: no)"""
    wait_for_queue: bool = False
    """whether neighbours count for nothing until the queue holds no random entry any more (released code: no)"""
    threshold: bool = False
    """whether neighbours count only where their positiveness is above the mean, 1 / neighbours"""
    form: Literal["code", "paper"] = "code"
    """code: sum of the logs of all positives, times 2 x temperature; paper: log of their sum"""
    attention: Literal["none", "linear"] = "none"
    """layer in front of both sides of the positiveness: none (code), or a linear one each (paper), which begins as the
    identity"""
    attention_scale: float = 1.0
    """divides the positiveness of every neighbour (paper's gamma, whose value is not published)"""
    decay: Literal["all", "matrices"] = "all"
    """parameters that decay: all (released code), or those of two or more dimensions (LARS)"""
    chunk: int | None = None
    """anchors whose similarities with all targets stand in memory at once; null: all of a rank"""
    key_rank: bool = True
    """effective rank of each step's keys in the log, a sign of collapse; the device is waited for"""


class SNCLRMethod(Method):
    """Contrast with soft neighbours."""

    INPUT = "image_views"
    MODEL = Classifier
    recipe: Recipe

    def problems(self) -> list[str]:
        return super().problems() or option_problems(self.recipe, self.architecture)

    def warnings(self) -> list[str]:
        return unusual(self.recipe)

    def samples(self) -> Samples:
        return ImageViews(self.recipe.input, self.recipe.run.seed)

    def build(self) -> "SNCLRObjective":
        model = self.architecture.build(self.recipe.compute.activation_checkpointing)
        # The second one runs without gradient: there is nothing to recompute for.
        return SNCLRObjective(model, self.architecture.build(), feature_channels(self.architecture), self.recipe)

    def cost(self) -> Cost:
        encoder, options = self.architecture.cost(), self.recipe.objective
        channels = feature_channels(self.architecture)
        head = float(_products(_projector_sizes(channels, options)))
        targets = self.recipe.batch.samples * (1 + options.neighbours) * options.dim
        once = {
            **{f"momentum {name}": count for name, count in encoder.macs.items()},
            "momentum projector": head,
            "neighbour search": float(options.queue * options.dim),
        }
        macs = {
            **encoder.macs,
            "projector": head,
            "predictor": float(_products([options.dim, options.hidden, options.dim])),
            "similarities": float(targets),
            # A step counts as three forward passes, and what has no backward pass is one of them.
            **{name: count / 3 for name, count in once.items()},
        }
        return Cost(macs, encoder.tokens)

    def exports(self, source: Path) -> dict[str, Export]:
        formats = super().exports(source)
        formats["safetensors"] = replace(formats["safetensors"], usage=USAGE)
        return formats | {
            "official": Export(_write_encoder, suffix=".pth"),
            "released": Export(write_released, suffix=".pth.tar"),
        }


METHOD = SNCLRMethod


class SNCLRObjective(WholeBatchObjective):
    """Two encoders, their heads and the queue.

    Args:
        model: encoder without a head, pixels to features [B, C].
        twin: built like it.
        channels: C.
        recipe: the run.

    A batch holds `video` uint8 [2B, T, H, W, 3], both views of a sample next to each other.
    """

    cross_rank_batch_norm = True

    def __init__(self, model: nn.Module, twin: nn.Module, channels: int, recipe: Recipe) -> None:
        super().__init__()
        self.options: Config = recipe.objective
        options, sizes = self.options, _projector_sizes(channels, recipe.objective)
        self.model: Any = model
        self.projector = contrastive_head(sizes)
        self.predictor = contrastive_head([options.dim, options.hidden, options.dim], options.predictor_norm)
        self.teacher = _following_all(model, twin)
        self.key_projector = MomentumTeacher(self.projector, contrastive_head(sizes))
        linear = options.attention == "linear"
        self.anchor_attention = Linear(options.dim, options.dim, bias=False, init=nn.init.eye_) if linear else None
        self.key_attention = Linear(options.dim, options.dim, bias=False, init=nn.init.eye_) if linear else None
        self.queue = KeyQueue(options.queue, options.dim, recipe.run.seed, options.queue_of == "rank")
        self.normalization = PixelNormalization()
        # As published a view's batch norms see this view alone; without any, both go through at once.
        self._views_apart = any(isinstance(part, _BatchNorm) for part in model.modules())
        self._momentum = options.momentum
        self._arrived: tuple[Tensor, Tensor] | None = None

    def embed(self, batch: Batch) -> Embeddings:
        pixels = self.normalization(unit_pixels(batch["video"]))
        return self.embed_pixels(pixels, self._files(batch).to(pixels.device))

    def embed_pixels(self, pixels: Tensor, files: Tensor) -> Embeddings:
        """Embed normalised views [2B, T, H, W, 3] of files [B]."""
        projections = [self.projector(view) for view in self._encoded(self.model, pixels)]
        predictions = [self.predictor(view) for view in projections]
        keys = [self.key_projector(view) for view in self._encoded(self.teacher, pixels)]
        named = {"prediction": predictions, "projection": projections, "key": keys}
        rows = {f"{name}_{view}": views[view].float() for name, views in named.items() for view in (0, 1)}
        return rows | {"file": files}

    def compare(self, embeddings: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        # Both searches before any key arrives: `after_step` puts those of this step in, once and after the update.
        found = [self.neighbours(embeddings[f"key_{view}"], embeddings["file"]) for view in (0, 1)]
        losses, metrics = [], []
        for view, other in ((0, 1), (1, 0)):
            loss, monitors = self.contrast(
                embeddings[f"prediction_{view}"], embeddings[f"projection_{view}"], embeddings[f"key_{other}"],
                found[other],
            )  # fmt: skip
            losses.append(loss.mean())
            metrics.append(monitors)
        if self.training:
            self._arrived = self._gathered(embeddings["key_1"]), self._gathered(embeddings["file"])
        monitors = {name: torch.stack([one[name] for one in metrics]).mean() for name in metrics[0]}
        if self.options.key_rank:
            monitors["key_rank"] = effective_rank(normalized(embeddings["key_1"]))
        return losses[0] + losses[1], monitors | {"queue_random": 1 - self.queue.past.float().mean()}

    def neighbours(self, keys: Tensor, files: Tensor) -> Neighbours:
        """Find the nearest past keys of keys [B, D]."""
        return self.queue.neighbours(keys, files, self.options.neighbours, self.options.exclude_same_file)

    def contrast(
        self, predictions: Tensor, projections: Tensor, keys: Tensor, found: Neighbours
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss [B] of anchors, and monitors.

        Args:
            predictions: of the anchors, [B, D].
            projections: of the anchors, [B, D]: what positiveness is computed of.
            keys: of the other views, [B, D].
            found: neighbours of the keys.
        """
        targets = normalized(torch.cat((keys[:, None], found.vectors), dim=1))
        positiveness = self.positiveness(projections, targets[:, 1:])
        monitors = _monitors(positiveness.detach(), found)
        weights = self.counted(positiveness, found)
        return self.losses(predictions, targets, weights), monitors

    def losses(self, predictions: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Compute the loss [B] of anchors whose keys and neighbours lie among those of all ranks' anchors.

        Args:
            predictions: of the anchors, [B, D].
            targets: their key and neighbours, normalised, [B, 1+K, D], without gradient.
            weights: of the neighbours, [B, K].
        """
        options, entries = self.options, targets.shape[1]
        ranks = present_ranks(targets.device)
        positives = own_rows(len(targets), ranks) * entries
        losses = info_nce(
            normalized(predictions),
            # Without gradient, so no rank owes another one anything.
            gather(targets, ranks).flatten(0, 1),
            positives,
            options.temperature,
            soft=positives[:, None] + torch.arange(1, entries, device=targets.device),
            weights=weights,
            form="sum_of_logs" if options.form == "code" else "log_of_sum",
            chunk=options.chunk,
        )
        return losses * (2 * options.temperature if options.form == "code" else 1)

    def positiveness(self, projections: Tensor, neighbours: Tensor) -> Tensor:
        """Compute how far each neighbour counts, with gradient: softmax over its own neighbours alone, [B, K].

        Args:
            projections: of the anchors, [B, D].
            neighbours: normalised, [B, K, D].
        """
        anchors = normalized(projections)
        if self.anchor_attention is not None and self.key_attention is not None:
            dtype = self.anchor_attention.weight.dtype
            anchors = self.anchor_attention(anchors.to(dtype)).float()
            neighbours = self.key_attention(neighbours.to(dtype)).float()
        return torch.einsum("bd,bkd->bk", anchors, neighbours).softmax(dim=1) / self.options.attention_scale

    def counted(self, positiveness: Tensor, found: Neighbours) -> Tensor:
        """Take out what must not count: below the threshold, of the same file, before the queue is full."""
        counts = found.allowed
        if self.options.threshold:
            # Strictly above, and not normalised again.
            counts = counts & (positiveness.detach() * self.options.attention_scale > 1 / counts.shape[1])
        if self.options.wait_for_queue:
            counts = counts & self.queue.past.all()
        return positiveness * counts

    def before_step(self, step: int, steps_per_epoch: int, total: int) -> None:
        # Of the step that follows: officially a step's first act is to average the weights that the last one left.
        progress = min(1.0, (step + 1) / total)
        rises = self.options.momentum_rises
        self._momentum = half_cosine(self.options.momentum, 1.0, progress) if rises else self.options.momentum

    def after_step(self) -> None:
        # Behind the update: a step that was left out leaves queue and momentum encoder as they were, too.
        if self._arrived is not None:
            self.queue.enqueue(*self._arrived)
            self._arrived = None
        self.follow(self._momentum)

    def follow(self, momentum: float) -> None:
        """Let the momentum encoder and its projector keep the share `momentum`, and take the rest from the others."""
        self.teacher.update(self.model, momentum)
        self.key_projector.update(self.projector, momentum)

    def restart_teacher(self) -> None:
        """Let the momentum encoder and its projector begin as the others are."""
        self.teacher.reset(self.model)
        self.key_projector.reset(self.projector)

    def rank_state(self) -> dict[str, RankState]:
        return self.queue.rank_state()

    def rule(self, name: str, shape: Iterable[int]) -> Rule:
        return Rule(decays=self.options.decay == "all" or decays(name, shape))

    def load_pretrained(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Take over an encoder in any layout, or all of a released checkpoint but its queue, which it doesn't hold."""
        load_released(self, path, raw)

    def features(self, batch: Batch) -> Tensor:
        features: Tensor = self.model(self.normalization(unit_pixels(batch["video"])))
        return features.float()

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        first, second = batch["video"].unflatten(0, (-1, 2)).unbind(1)
        return {"first view": first, "second view": second}

    def _encoded(self, encoder: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode both views of pixels [2B, T, H, W, 3]: features [B, C] of each."""
        if not self._views_apart:
            first, second = encoder(pixels).unflatten(0, (-1, 2)).unbind(1)
            return first, second
        first, second = (encoder(view) for view in pixels.unflatten(0, (-1, 2)).unbind(1))
        return first, second

    def _files(self, batch: Batch) -> Tensor:
        """Tell files by numbers where that matters: reading them waits for the device."""
        if not self.options.exclude_same_file:
            return torch.zeros(len(batch["video"]) // 2, dtype=torch.int64)
        return file_numbers(batch)[::2]

    def _gathered(self, rows: Tensor) -> Tensor:
        """Give the rows that go into this rank's queue."""
        return rows.detach() if self.queue.of_rank else gather(rows, present_ranks(rows.device))


def _following_all(model: nn.Module, twin: nn.Module) -> MomentumTeacher:
    """Build a momentum teacher whose frozen parameters follow too, as officially: loaded ones may differ."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    # A teacher averages what is trained when it is built.
    for parameter in frozen:
        parameter.requires_grad_(True)
    teacher = MomentumTeacher(model, twin)
    for parameter in frozen:
        parameter.requires_grad_(False)
    return teacher


def _monitors(positiveness: Tensor, found: Neighbours) -> dict[str, Tensor]:
    """Say how far neighbours count and how many of them are no past keys: scalars."""
    if not positiveness.shape[1]:
        return {}
    return {
        "positiveness_entropy": weight_entropy(positiveness).mean(),
        "positiveness_largest": positiveness.amax(1).mean(),
        "neighbours_random": found.random.float().mean(),
    }


def _projector_sizes(channels: int, options: Config) -> list[int]:
    return [channels, *[options.hidden] * (options.projector_layers - 1), options.dim]


def _products(sizes: list[int]) -> int:
    return sum(inputs * outputs for inputs, outputs in zip(sizes, sizes[1:], strict=False))


def _write_encoder(objective: Any, dest: str) -> str:
    export_official(objective.model, dest)
    return ""

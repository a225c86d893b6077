"""TagAlign: patches of a frozen CLIP learn to lie where texts about them lie, from captions and tags of captions.

Liu et al.: TagAlign: Improving Vision-Language Alignment with Multi-Tag Classification, arXiv 2312.14149
(systems/tagalign.md, sections 2, 3 and 5). Trained are the projector and two scales; both towers and the embeddings of
the tags are frozen. Shapes: B pictures, N patches, K tags, E channels of the space that images and texts share.
"""

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import MISSING
from torch import Tensor

from pretrain.data.media import MEAN, STD
from pretrain.data.samples import Batch
from pretrain.models import clip
from pretrain.models.base import Cost
from pretrain.models.clip_surgery import SurgeryTower, load_surgery
from pretrain.models.clip_weights import frozen_clip
from pretrain.models.frozen import Frozen
from pretrain.models.patch_projector import PatchProjector, PatchProjectorArchitecture, load_projector, to_official
from pretrain.models.pixels import PixelNormalization, unit_pixels
from pretrain.models.tag_embeddings import FLOOR, TagEmbeddings, frozen_tags
from pretrain.models.weight_files import read_raw
from pretrain.objectives.base import Export, Method, Rule, WholeBatchObjective, decays
from pretrain.objectives.contrast import LogitScale, both_directions, normalized
from pretrain.recipe.schema import Recipe
from pretrain.runtime import storage
from pretrain.runtime.collectives import Gradient
from pretrain.runtime.compiler import uncompiled
from pretrain.runtime.gradient_cache import Embeddings
from pretrain.runtime.process_group import present_ranks
from pretrain.samples import captioned

#: Probability below which a tag costs no more.
LEAST_PROBABILITY = 1e-8
#: Official names of the two scales, and ours.
SCALES = {"cl_loss.logit_scale": "contrast_scale", "ce_loss.logit_scale": "tag_scale"}
USAGE = "Masks of free-text queries: `python launch/segment.py PICTURE --weights FOLDER --query 'a cat' --query grass`."


@dataclass
class Towers:
    """The frozen CLIP; its sizes stand in model.clip."""

    weights: str = MISSING
    """file or folder (any URL) with both towers, in any layout, or hub:owner/name"""
    text_weights: str | None = None
    """file or folder with the text tower, where it lies elsewhere; null: weights"""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """format of their weights and activations"""


@dataclass
class Config:
    """The towers and the two losses."""

    name: str = "tagalign"
    """method: pretrain/objectives/<name>.py"""
    towers: Towers = field(default_factory=Towers)
    """the frozen CLIP"""
    contrast_weight: float = 1.0
    """weight of the contrast of pictures with captions; 0: without it"""
    tag_weight: float = 1.0
    """weight of the classification by tags; 0: without it, and input.tags may be null"""
    gradient: Gradient = "sum"
    """gradient through the gathered batch: sum, of the global loss (official here); official: own rows alone"""
    decay_scalars: bool = True
    """whether weight decay applies to gates and scales, which pulls scales to 1 slowly; published: true"""
    pixels: Literal["imagenet", "clip"] = "imagenet"
    """mean and deviation of pixels; published: ImageNet's, although CLIP was trained with others"""


class TagAlignMethod(Method):
    """Training of a projector beside a frozen CLIP."""

    INPUT = "captioned"
    MODEL = PatchProjectorArchitecture
    recipe: Recipe

    def problems(self) -> list[str]:
        recipe, options = self.recipe, self.recipe.objective
        if not isinstance(recipe.input, captioned.Config):
            return [f"input.name: found {recipe.input.name}, allowed: captioned"]
        if found := super().problems():
            return found
        full: Any = clip.resolve(recipe.model.clip)
        weights = {"contrast_weight": options.contrast_weight, "tag_weight": options.tag_weight}
        found = [
            f"objective.{name}: found {value:g}, allowed: 0 or more" for name, value in weights.items() if value < 0
        ]
        if not any(weights.values()):
            found.append("objective.contrast_weight=0, objective.tag_weight=0: nothing is learnt; allowed: one above 0")
        if options.tag_weight and recipe.input.tags is None:
            found.append("input.tags: found null, allowed with objective.tag_weight: a folder of launch/tag.py")
        if recipe.input.context > full.context:
            found.append(f"input.context: found {recipe.input.context}, allowed: at most {full.context} (model.clip)")
        if recipe.run.init_weights is None:
            found.append(
                "run.init_weights: found null, allowed: ${objective.towers.weights}, whose last norm and projection "
                "the projector begins with, or an earlier projector"
            )
        if (vocabulary := self.samples().vocabulary) > full.vocabulary:
            found.append(
                f"input.tokenizer={recipe.input.tokenizer}: {vocabulary} ids, the text tower has {full.vocabulary} "
                "(model.clip.vocabulary)"
            )
        return found

    def warnings(self) -> list[str]:
        found, options = [], self.recipe.objective
        if not options.tag_weight and self.recipe.input.tags is not None:
            found.append("input.tags has no effect on the loss: objective.tag_weight is 0; untagged pictures go")
        return found

    def samples(self) -> captioned.CaptionedPictures:
        return captioned.CaptionedPictures(self.recipe.input, self.recipe.run.seed)

    def build(self) -> "TagAlignObjective":
        return TagAlignObjective(self.architecture.build(), self.recipe)

    def cost(self) -> Cost:
        cost: Cost = self.architecture.cost()
        return cost

    def exports(self, source: Path) -> dict[str, Export]:
        return {
            "safetensors": Export(self._write_safetensors, USAGE),
            "official": Export(_write_official, suffix=".pth"),
        }

    def take_export(self, objective: Any, source: Path) -> None:
        objective.load_pretrained(str(source), read_raw(str(source)))


METHOD = TagAlignMethod


class TagAlignObjective(WholeBatchObjective):
    """Contrast of pictures with captions over the global batch, and classification of each picture by its tags.

    A batch holds `video` uint8 [B, 1, H, W, 3], `ids` int64 [B, L], `cut` [B], and `tags` int64 [B, most], -1: none.

    Args:
        model: the projector.
        recipe: the run.
    """

    def __init__(self, model: PatchProjector, recipe: Recipe) -> None:
        super().__init__()
        self.model: Any = model
        self.options: Config = recipe.objective
        options, config = self.options, recipe.model
        full: Any = clip.resolve(config.clip)
        means = (MEAN, STD) if options.pixels == "imagenet" else (clip.MEAN, clip.STD)
        self.normalization = PixelNormalization(*means)
        # A scale without a loss would be a parameter without gradient, which some ZeRO stages don't take.
        self.contrast_scale = LogitScale() if options.contrast_weight else None
        self.tag_scale = LogitScale() if options.tag_weight else None
        towers = options.towers
        self.images: Frozen[SurgeryTower] = Frozen(
            "objective.towers.weights", towers.weights, partial(SurgeryTower, config.clip, config.surgery_blocks),
            load_surgery, towers.dtype, name="image tower",
        )  # fmt: skip
        key = "objective.towers.text_weights" if towers.text_weights else "objective.towers.weights"
        self.texts: Frozen[Any] = frozen_clip(
            key, towers.text_weights or towers.weights, config.clip, clip.TextTower, towers.dtype
        )
        self.tags: Frozen[TagEmbeddings] | None = None
        if options.tag_weight:
            self.tags = frozen_tags(str(recipe.input.tags), recipe.input.tag_count, full.embedding)
        # Networks that are built on the way are nothing for the compiler.
        self._seen, self._read = uncompiled(self._ask_images), uncompiled(self._ask_texts)

    def embed(self, batch: Batch) -> Embeddings:
        images = normalized(self.pooled(self.pixels(batch["video"])), FLOOR)
        found = {"images": images, "cut": (batch["cut"] > 0).float()}
        if self.contrast_scale is not None:
            found["texts"] = normalized(self._read(batch["ids"]), FLOOR)
        if self.tags is not None and self.tag_scale is not None:
            cosines = self.tags.module(images.device)(images)  # as a module: a gradient flows through it
            found["tag_loss"] = tag_losses(cosines * self.tag_scale(), batch["tags"])
            found["untagged"] = (batch["tags"] < 0).all(dim=1).float()
        return found

    def compare(self, embeddings: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        options, images = self.options, embeddings["images"]
        loss, metrics = images.new_zeros(()), {"cut": embeddings["cut"].mean()}
        if self.contrast_scale is not None:
            scale = self.contrast_scale()
            sides = both_directions(images, embeddings["texts"], scale, present_ranks(images.device), options.gradient)
            contrast = (sides[0].mean() + sides[1].mean()) / 2
            loss = loss + options.contrast_weight * contrast
            metrics |= {"contrast": contrast.detach(), "contrast_scale": scale.detach()}
        if self.tag_scale is not None:
            tag = embeddings["tag_loss"].mean()
            loss = loss + options.tag_weight * tag
            metrics |= {"tag": tag.detach(), "tag_scale": self.tag_scale().detach()}
            metrics["untagged"] = embeddings["untagged"].mean()
        return loss, metrics

    def pixels(self, video: Tensor) -> Tensor:
        """Normalise clips of one frame [B, 1, H, W, 3]: images [B, 3, H, W]."""
        return self.normalization(unit_pixels(video))[:, 0].permute(0, 3, 1, 2)

    def pooled(self, images: Tensor) -> Tensor:
        """Compute the mean of the projected patches of images, [B, E]: not normalised, neither before nor after."""
        patches: Tensor = self._seen(images)
        mean: Tensor = self.model(patches, self.images.module().grid(*images.shape[2:])).float().mean(1)
        return mean

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        return self.pooled(self.pixels(batch["video"]))

    def rule(self, name: str, shape: Iterable[int]) -> Rule:
        if name.endswith((".gate", ".logit_scale")):
            return Rule(decays=self.options.decay_scalars)
        return Rule(decays=decays(name, shape))

    def load_pretrained(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Begin with CLIP's last norm and projection, or take over an earlier projector, official or our own."""
        load_projector(self.model, path, raw)
        for official, own in SCALES.items():
            module: Any = getattr(self, own)
            if official in raw and module is not None:
                with torch.no_grad():
                    module.logit_scale.copy_(raw[official].reshape(module.logit_scale.shape))

    def frozen_parts(self) -> Mapping[str, Frozen[Any]]:
        parts: dict[str, Frozen[Any]] = {"images": self.images, "texts": self.texts}
        return parts if self.tags is None else parts | {"tags": self.tags}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Give the pictures as they are trained on."""
        return {"picture": batch["video"]}

    def _ask_images(self, images: Tensor) -> Tensor:
        patches: Tensor = self.images(images, class_token=False)
        return patches

    def _ask_texts(self, ids: Tensor) -> Tensor:
        embeddings: Tensor = self.texts(ids)
        return embeddings


def tag_losses(logits: Tensor, tags: Tensor) -> Tensor:
    """Compute the soft cross entropy of each picture: its tags share the target alike, softmax over all tags.

    Args:
        logits: [B, K].
        tags: numbers int64 [B, most], each once; -1: none.

    Returns:
        [B]; 0 where a picture has no tag.
    """
    there = tags >= 0
    logs = logits.log_softmax(dim=1).clamp(min=math.log(LEAST_PROBABILITY))
    found = -logs.gather(1, tags.clamp(min=0)) * there
    return found.sum(1) / there.sum(1).clamp(min=1)


def _write_official(objective: Any, dest: str) -> str:
    state = to_official({name: value.detach().cpu() for name, value in objective.model.state_dict().items()})
    for official, own in SCALES.items():
        module = getattr(objective, own)
        if module is not None:
            state[official] = module.logit_scale.detach().cpu().reshape(())
    buffer = io.BytesIO()
    torch.save({"model": state}, buffer)
    storage.write_bytes(dest, buffer.getvalue())
    return "towers and tags are not in it; their loader takes them from elsewhere"

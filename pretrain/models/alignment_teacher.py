"""Teachers of an alignment: frozen image towers, a ViT of timm or CLIP's, asked for one vector or for all tokens."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import yaml
from omegaconf import MISSING
from torch import Tensor, nn

from pretrain.errors import RecipeError, WeightsError
from pretrain.models.clip import MEAN, STD, VisualTower, resolve
from pretrain.models.clip import Config as ClipConfig
from pretrain.models.clip_weights import load_clip
from pretrain.models.frozen import Frozen
from pretrain.models.initial_weights import read_weights
from pretrain.models.weights import LoadReport, load_state, strip_wrappers
from pretrain.runtime.vision_ops import ensure_torchvision

logger = logging.getLogger(__name__)

#: Of a recipe; names the weights.
KEY = "objective.teacher.weights"
#: timm's activations and ours.
ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu"}


@dataclass
class AlignmentTeacher:
    """Tower whose answers are learnt."""

    kind: Literal["timm", "clip"] = "timm"
    """timm: a ViT of timm with a class token (AugReg, DeiT, DINOv2); clip: a CLIP's image tower"""
    weights: str = MISSING
    """file, folder or run (any URL) with its weights, or hub:owner/name; of a CLIP in any layout"""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """format of its weights and activations"""
    architecture: str = "vit_base_patch16_224"
    """timm: name of the model, with a tag where that says how pixels are normalised; its head has model.classes"""
    arguments: list[str] = field(default_factory=list)
    """timm: further arguments of timm.create_model, as key=value (dynamic_img_size=true for images of other sizes)"""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """clip: its size, with text tower; `activation` has to be given where nothing beside the weights says it"""
    mean: list[float] | None = None
    """of red, green and blue, pixels in [0, 1], for teacher and student; null: as timm or CLIP has it"""
    std: list[float] | None = None
    """deviation of each"""


@dataclass(frozen=True)
class TowerFacts:
    """What a student has to agree with.

    Attributes:
        dim, depth, heads: of its blocks.
        norm_eps, activation: inside of them.
        outputs: of its head; 0: none.
        mean, std: of pixels in [0, 1].
        image_size: side of the images that it takes; None: any that its patches fit.
        patch_size: pixels.
        class_token: whether its answer is that of a class token.
    """

    dim: int
    depth: int
    heads: int
    norm_eps: float
    activation: str
    outputs: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int | None
    patch_size: int
    class_token: bool = True


class TimmTower(nn.Module):
    """A ViT of timm.

    Args:
        options: section of the recipe.
        classes: outputs of its head; 0: none.

    Raises:
        RecipeError: timm has none of that name, or does not know the arguments.
    """

    def __init__(self, options: AlignmentTeacher, classes: int) -> None:
        super().__init__()
        ensure_torchvision()
        import timm

        arguments = timm_arguments(options.arguments)
        try:
            self.vit: Any = timm.create_model(
                options.architecture, pretrained=False, **{"num_classes": classes, **arguments}
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise RecipeError(f"objective.teacher.architecture={options.architecture}: {error}") from error
        if not hasattr(self.vit, "blocks") or not hasattr(self.vit, "num_prefix_tokens"):
            raise RecipeError(f"objective.teacher.architecture={options.architecture}: no ViT of timm's plain kind")

    def forward(self, images: Tensor, pooled: bool = True) -> Tensor:
        """Compute features behind the norm of images [B, 3, H, W]: the class token's [B, C], or with those of all
        patches [B, 1+P, C]; register tokens are left out."""
        found: Tensor = self.vit.forward_features(images.to(self.vit.patch_embed.proj.weight.dtype))
        if pooled:
            return found[:, 0]
        return torch.cat((found[:, :1], found[:, self.vit.num_prefix_tokens :]), dim=1)

    def forward_head(self, features: Tensor) -> Tensor:
        """Compute logits [..., classes] of features [..., C]."""
        logits: Tensor = self.vit.head(features.to(self.vit.patch_embed.proj.weight.dtype))
        return logits

    def facts(self) -> TowerFacts:
        """Tell what a student has to agree with."""
        vit, block = self.vit, self.vit.blocks[0]
        activation = type(block.mlp.act).__name__
        return TowerFacts(
            dim=vit.embed_dim,
            depth=len(vit.blocks),
            heads=block.attn.num_heads,
            norm_eps=getattr(vit.norm, "eps", block.norm1.eps),
            activation=ACTIVATIONS.get(activation, activation),
            outputs=vit.num_classes,
            mean=tuple(vit.pretrained_cfg["mean"]),
            std=tuple(vit.pretrained_cfg["std"]),
            image_size=None if vit.dynamic_img_size else vit.patch_embed.img_size[0],
            patch_size=vit.patch_embed.patch_size[0],
            class_token=vit.global_pool == "token" and vit.cls_token is not None,
        )


class ClipTower(nn.Module):
    """CLIP's image tower.

    Args:
        options: section of the recipe.
    """

    def __init__(self, options: AlignmentTeacher) -> None:
        super().__init__()
        self.tower = VisualTower(options.clip)

    def forward(self, images: Tensor, pooled: bool = True) -> Tensor:
        """Compute features behind the norm, in front of the projection; see `TimmTower.forward`."""
        tokens = self.tower.forward_features(images).tokens
        found: Tensor = self.tower.norm(tokens[:, 0] if pooled else tokens)
        return found

    def forward_head(self, features: Tensor) -> Tensor:
        """Project features [..., C] to embeddings [..., E], not normalised."""
        embeddings: Tensor = self.tower.head(features.to(self.tower.norm.weight.dtype))
        return embeddings

    def facts(self) -> TowerFacts:
        """Tell what a student has to agree with."""
        full: Any = resolve(self.tower.config)
        return TowerFacts(
            full.dim, full.depth, full.heads, full.norm_eps, full.activation, full.embedding, MEAN, STD, None,
            full.patch_size,
        )  # fmt: skip


Tower = TimmTower | ClipTower


def tower_maker(options: AlignmentTeacher, classes: int) -> Callable[[], Tower]:
    """Give what builds a teacher.

    Args:
        options: section of the recipe.
        classes: of the student; a timm teacher's head has as many.
    """
    return partial(ClipTower, options) if options.kind == "clip" else partial(TimmTower, options, classes)


def facts_of(options: AlignmentTeacher, classes: int) -> TowerFacts:
    """Tell what a student has to agree with; takes no memory and no weights.

    Raises:
        RecipeError: there is no such tower.
    """
    with torch.device("meta"):
        return tower_maker(options, classes)().facts()


def frozen_teacher(options: AlignmentTeacher, classes: int) -> Frozen[Tower]:
    """Make a teacher of a run: loaded when it is first asked, outside of everything that is trained or saved."""
    return Frozen(KEY, options.weights, tower_maker(options, classes), fill_tower, options.dtype)


def fill_tower(tower: Tower, place: str) -> None:
    """Copy weights into a teacher, strictly.

    Raises:
        WeightsError: unreadable, of other sizes, or incomplete.
    """
    if isinstance(tower, ClipTower):
        load_clip(tower.tower, place)
        return
    state = strip_wrappers(read_weights(place))
    if not any(key.startswith("blocks.") for key in state):
        raise WeightsError(f"no ViT in timm's names; first keys: {', '.join([*state][:4])}")
    # DINOv2's own files hold the token that hides patches in its training, for which timm's ViT has no place.
    load_state(tower.vit, state, LoadReport(place, "timm"), allow_unexpected=("mask_token",))


def timm_arguments(words: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` words, values as in YAML.

    Raises:
        RecipeError: some is no such word.
    """
    wrong = [word for word in words if not word.partition("=")[0].isidentifier() or "=" not in word]
    if wrong:
        raise RecipeError(f"objective.teacher.arguments: found {', '.join(wrong)}, allowed: key=value")
    try:
        return {word.partition("=")[0]: yaml.safe_load(word.partition("=")[2]) for word in words}
    except yaml.YAMLError as error:
        raise RecipeError(f"objective.teacher.arguments: {error}") from error

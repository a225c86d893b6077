"""CLIP's image and text towers (Radford et al. 2021), the models of OpenAI, open_clip and Hugging Face, with our names.

    visual.embed.{proj,class_token,positions}  visual.norm_pre  visual.blocks.N  visual.norm  visual.head
    text.embed.{tokens,positions}                               text.blocks.N    text.norm    text.head    logit_scale

Blocks are those of pretrain/models/vit.py: `attn.qkv` is one matrix, so that another attention can be put together of
`attn.project`, `attn.mix` and `attn.proj` on the same weights. Every parameter belongs to a module that uses it in its
own call, so systems that walk over `embed`, `norm_pre`, `blocks`, `norm`, `head` themselves also run under ZeRO stage
3. Weights are read by pretrain/models/clip_weights.py. Shapes: B images or texts, N patches, L text tokens, C channels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import RecipeError
from pretrain.models.backbone import Backbone
from pretrain.models.cubes import Grid
from pretrain.models.encoder import block_macs, size_problems
from pretrain.models.linear import Linear
from pretrain.models.positions import stretch_class_table
from pretrain.models.recompute import Recompute, run_blocks
from pretrain.models.vit import Activation, Block

#: Mean and deviation of the images that the published models were trained on; channels in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
#: Initial logarithm of the temperature's inverse.
LOG_SCALE = math.log(1 / 0.07)


@dataclass
class Config:
    """CLIP's two towers: a size and what departs from it; null means: as the size has it, but for `end_id`.

    A part of the section of a method that has such towers; a recipe's `model:` is a single network.
    """

    name: str = "clip"
    """the towers' family; there is this one"""
    size: Literal["B/32", "B/16", "L/14", "H/14", "custom"] = "B/16"
    """published size; custom: every field below that is null must be given, but for end_id"""
    image_size: int = 224
    """side of the images that the position table is for, pixels"""
    patch_size: int | None = None
    """side of a patch, pixels"""
    dim: int | None = None
    """channels of the image tower"""
    depth: int | None = None
    """blocks of the image tower"""
    heads: int | None = None
    """attention heads of the image tower; no multiple of 64 channels in H/14"""
    embedding: int | None = None
    """channels of the space that images and texts share"""
    text_dim: int | None = None
    """channels of the text tower"""
    text_depth: int | None = None
    """blocks of the text tower"""
    text_heads: int | None = None
    """attention heads of the text tower"""
    activation: Literal["gelu", "quick_gelu"] | None = None
    """inside the MLPs: x sigmoid(1.702 x) or the exact GELU; null: quick_gelu, for H/14 gelu, where the weights' file
    says the same; most files don't say it: OpenAI, MetaCLIP and DFN need quick_gelu, LAION and DataComp gelu"""
    context: int = 77
    """longest text, tokens"""
    vocabulary: int = 49408
    """token ids"""
    end_id: int | None = None
    """token whose first place in a text gives its feature; null: the highest id in the text"""
    mlp_ratio: float = 4.0
    """hidden channels of an MLP = int(channels x mlp_ratio), both towers"""
    norm_eps: float = 1e-5
    """epsilon of every layer norm"""


#: What a size fixes, in this order (open_clip's model_configs).
PRESET_FIELDS = (
    "patch_size", "dim", "depth", "heads", "embedding", "text_dim", "text_depth", "text_heads", "activation",
)  # fmt: skip
PRESETS: dict[str, tuple[int | str, ...]] = {
    "B/32": (32, 768, 12, 12, 512, 512, 12, 8, "quick_gelu"),
    "B/16": (16, 768, 12, 12, 512, 512, 12, 8, "quick_gelu"),
    "L/14": (14, 1024, 24, 16, 768, 768, 12, 12, "quick_gelu"),
    "H/14": (14, 1280, 32, 16, 1024, 1024, 24, 16, "gelu"),
}


def resolve(config: Config) -> Config:
    """Fill every null of a configuration in from its size; `end_id` keeps its null."""
    defaults = dict(zip(PRESET_FIELDS, PRESETS.get(config.size, ()), strict=False))
    filled: dict[str, Any] = {key: value for key, value in defaults.items() if getattr(config, key) is None}
    return replace(config, **filled)


def check(config: Config, key: str = "model") -> list[str]:
    """List what keeps this model from being built.

    Args:
        config: a section of the recipe.
        key: its name there.
    """
    full = resolve(config)
    missing = [
        f"{key}.{name}: null, but {key}.size=custom has no default for it"
        for name in PRESET_FIELDS
        if getattr(full, name) is None
    ]
    if missing:
        return missing
    sizes = (*PRESET_FIELDS[:-1], "image_size", "context", "vocabulary", "mlp_ratio")
    if too_small := size_problems(full, sizes, key):
        return too_small
    problems = [
        f"{key}.{heads}={getattr(full, heads)}: does not divide {key}.{dim}={getattr(full, dim)}"
        for heads, dim in (("heads", "dim"), ("text_heads", "text_dim"))
        if getattr(full, dim) % getattr(full, heads)
    ]
    assert full.patch_size is not None  # filled in above
    if full.image_size % full.patch_size:
        problems.append(f"{key}.image_size={full.image_size}: not a multiple of {key}.patch_size={full.patch_size}")
    if full.end_id is not None and not 0 <= full.end_id < full.vocabulary:
        problems.append(f"{key}.end_id={full.end_id}: not among the {full.vocabulary} ids of {key}.vocabulary")
    return problems


def quick_gelu(x: Tensor) -> Tensor:
    """Compute x sigmoid(1.702 x): an approximation of GELU that OpenAI's weights were trained with and need."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Activation] = {"quick_gelu": quick_gelu, "gelu": F.gelu}

#: Makes the block of an index.
MakeBlock = Callable[[int], nn.Module]


class TowerFeatures(NamedTuple):
    """Tokens of a tower, before its last norm and projection."""

    tokens: Tensor
    """behind the last block, [B, 1+N, C] with the class token first, or [B, L, C]"""
    layers: tuple[Tensor, ...]
    """behind the blocks that were asked for, in the order asked"""


class PatchStem(nn.Module):
    """Patches without bias, the class token in front, learned positions added to all."""

    def __init__(self, dim: int, patch: int, image_size: int) -> None:
        super().__init__()
        side = image_size // patch
        self.patch, self.grid = patch, Grid(1, side, side)
        self.proj = nn.Conv2d(3, dim, patch, patch, bias=False)
        # Filled here, not by a walk over the model: zero.Init partitions a module as soon as its constructor returns.
        self.class_token = nn.Parameter(normal(torch.empty(dim), dim**-0.5))
        self.positions = nn.Parameter(normal(torch.empty(1 + self.grid.tokens, dim), dim**-0.5))

    def forward(self, images: Tensor) -> Tensor:
        """Embed images [B, 3, H, W] as tokens [B, 1+N, C]; for another size the table is stretched (bicubic).

        Raises:
            RecipeError: patches don't fit.
        """
        height, width = images.shape[2:]
        if height % self.patch or width % self.patch:
            raise RecipeError(f"images of {height}x{width}: patches of {self.patch} pixels don't fit")
        tokens = self.proj(images.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(len(images), 1, -1), tokens), dim=1)
        grid = Grid(1, height // self.patch, width // self.patch)
        return tokens + stretch_class_table(self.positions, self.grid, grid)


class TokenStem(nn.Module):
    """Embeddings of token ids, learned positions added."""

    def __init__(self, dim: int, vocabulary: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.tokens = TokenTable(vocabulary, dim)
        self.positions = nn.Parameter(normal(torch.empty(context, dim), 0.01))

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids int64 [B, L] as tokens [B, L, C].

        Raises:
            RecipeError: L is above the context.
        """
        length = ids.shape[1]
        if length > self.context:
            raise RecipeError(f"texts of {length} tokens: the text tower has positions for {self.context}")
        return self.tokens(ids) + self.positions[:length]


class TokenTable(nn.Embedding):
    """Embedding with CLIP's initialisation."""

    def reset_parameters(self) -> None:
        normal(self.weight, 0.02)


class VisualTower(Backbone):
    """CLIP's image tower: a ViT with a norm in front of its blocks.

    Args:
        config: sizes; the text tower's are not looked at.
        activation_checkpointing: recompute each block in the backward pass.
        make_block: another kind of block (index -> module on tokens [B, 1+N, C]) in place of `Block`.
    """

    def __init__(
        self, config: Config, activation_checkpointing: bool = False, make_block: MakeBlock | None = None
    ) -> None:
        full = _checked(config)
        super().__init__(full.dim, 1, activation_checkpointing)
        self.config = config
        self.embed = PatchStem(full.dim, full.patch_size, full.image_size)
        self.norm_pre = nn.LayerNorm(full.dim, eps=full.norm_eps)
        make_block = make_block or partial(_block, full, full.dim, full.heads, False)
        self.blocks = nn.ModuleList(make_block(index) for index in range(full.depth))
        self.norm = nn.LayerNorm(full.dim, eps=full.norm_eps)
        self.head = Linear(full.dim, full.embedding, bias=False, init=_fan_in_normal)

    def forward(self, images: Tensor) -> Tensor:
        """Embed normalised images [B, 3, H, W] (see MEAN, STD): [B, embedding], not normalised."""
        return self.forward_head(self.forward_features(images).tokens)

    def forward_features(self, images: Tensor, layers: Sequence[int] = ()) -> TowerFeatures:
        """Compute tokens behind the last block and behind the blocks `layers` (negative ones count from the end)."""
        x = self.norm_pre(self.embed(images))
        if not layers:
            return TowerFeatures(self.run(x).x, ())
        # Without this, single layers would silently come from a model without its prompts.
        if self.embeddings is not None or self.reorganisation is not None:
            raise RecipeError("tokens of single blocks were asked for; prompts and dropped tokens change their number")
        return run_and_keep(self.blocks, x, layers, self.activation_checkpointing)

    def forward_head(self, tokens: Tensor, pooled: bool = True) -> Tensor:
        """Apply `norm` and `head` to the class token, [B, embedding], or to all tokens, [B, 1+N, embedding]."""
        return self.head(self.norm(tokens[:, 0] if pooled else tokens))


class TextTower(nn.Module):
    """CLIP's text tower: causal attention, the feature is taken where the text ends.

    Args:
        config: sizes; the image tower's are not looked at.
        activation_checkpointing: recompute each block in the backward pass.
        make_block: another kind of block (index -> module on tokens [B, L, C]) in place of a causal `Block`.
    """

    def __init__(
        self, config: Config, activation_checkpointing: Recompute = False, make_block: MakeBlock | None = None
    ) -> None:
        full = _checked(config)
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embed = TokenStem(full.text_dim, full.vocabulary, full.context)
        make_block = make_block or partial(_block, full, full.text_dim, full.text_heads, True)
        self.blocks = nn.ModuleList(make_block(index) for index in range(full.text_depth))
        self.norm = nn.LayerNorm(full.text_dim, eps=full.norm_eps)
        self.head = Linear(full.text_dim, full.embedding, bias=False, init=_fan_in_normal)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed token ids int64 [B, L], L at most the context: [B, embedding], not normalised.

        What stands behind a text's end changes nothing, so any padding does.
        """
        return self.forward_head(self.forward_features(ids).tokens, ids)

    def forward_features(self, ids: Tensor, layers: Sequence[int] = ()) -> TowerFeatures:
        """Compute tokens behind the last block and behind the blocks `layers` (negative ones count from the end)."""
        return run_and_keep(self.blocks, self.embed(ids), layers, self.activation_checkpointing)

    def forward_head(self, tokens: Tensor, ids: Tensor | None = None) -> Tensor:
        """Apply `norm` and `head`: [B, embedding] at the ends of the texts `ids`, or without ids to all tokens."""
        if ids is not None:
            tokens = tokens[torch.arange(len(ids), device=ids.device), self.ends(ids)]
        return self.head(self.norm(tokens))

    def ends(self, ids: Tensor) -> Tensor:
        """Find the index [B] of the token that ends each text: the first `end_id`, or the first of the highest ids.

        A text without `end_id` ends at 0; samples/text.py gives every text one.
        """
        found = ids if self.config.end_id is None else (ids == self.config.end_id).int()
        return found.argmax(dim=-1)  # the first of equals: padding may be the end's id again


class Embeddings(NamedTuple):
    """Both towers' output, not normalised, and what multiplies their cosines."""

    images: Tensor
    """[B, embedding]"""
    texts: Tensor
    """[B', embedding]"""
    scale: Tensor
    """exp(logit_scale), a scalar"""


class CLIP(nn.Module):
    """Both towers and the learned temperature."""

    def __init__(self, config: Config, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.visual = VisualTower(config, activation_checkpointing)
        self.text = TextTower(config, activation_checkpointing)
        # One value, not a scalar: without ZeRO DeepSpeed 0.19 can't sum the gradient of a parameter without dimensions.
        self.logit_scale = nn.Parameter(torch.empty(1))
        nn.init.constant_(self.logit_scale, LOG_SCALE)

    def forward(self, images: Tensor, ids: Tensor) -> Embeddings:
        """Embed images [B, 3, H, W] and texts int64 [B', L]."""
        return Embeddings(self.visual(images), self.text(ids), self.logit_scale.exp().squeeze(0))


def run_and_keep(blocks: nn.ModuleList, x: Tensor, layers: Sequence[int], recompute: Recompute) -> TowerFeatures:
    """Apply all blocks to tokens [B, N, C]; keep what leaves the blocks `layers`.

    Raises:
        RecipeError: there is no such block.
    """
    wrong = [index for index in layers if not -len(blocks) <= index < len(blocks)]
    if wrong:
        raise RecipeError(f"layers {wrong}: this tower has blocks 0 to {len(blocks) - 1}")
    # Kept by index and given in the order asked: -1 and the last index are the same block.
    wanted = [index % len(blocks) for index in layers]
    kept: dict[int, Tensor] = {}
    for index, block in enumerate(blocks):
        x = run_blocks([block], x, recompute)
        if index in wanted:
            kept[index] = x
    return TowerFeatures(x, tuple(kept[index] for index in wanted))


def normal(weight: Tensor, std: float) -> Tensor:
    """Fill with normal numbers, in place."""
    return nn.init.normal_(weight, std=std)


def cost(config: Config) -> dict[str, float]:
    """Count multiply-accumulates of one image's and one text's forward pass, by part."""
    full = _checked(config)
    patches = (full.image_size // full.patch_size) ** 2
    return {
        "image tower: patches": float(3 * patches * full.patch_size**2 * full.dim),
        "image tower: blocks": float(full.depth * block_macs(1 + patches, full.dim, full.mlp_ratio)),
        "text tower: blocks": float(full.text_depth * block_macs(full.context, full.text_dim, full.mlp_ratio)),
        "projections": float((full.dim + full.text_dim) * full.embedding),
    }


def _checked(config: Config) -> Any:
    problems = check(config)
    if problems:
        raise RecipeError(problems)
    return resolve(config)


def _block(full: Any, dim: int, heads: int, causal: bool, index: int) -> Block:
    return Block(
        dim,
        heads,
        int(dim * full.mlp_ratio),
        full.norm_eps,
        bias="all",
        init=_fan_in_normal,
        activation=ACTIVATIONS[full.activation],
        causal=causal,
    )


def _fan_in_normal(weight: Tensor) -> Tensor:
    return normal(weight, weight.shape[1] ** -0.5)

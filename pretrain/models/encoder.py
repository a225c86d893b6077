"""Sizes and blocks common to the masked autoencoder and the classifier: one definition for both.

Sizes: systems/videomae.md section 2, from MCG-NJU/VideoMAE and OpenGVLab/VideoMAEv2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pretrain.models.dropout import drop_path_rates
from pretrain.models.linear import Initializer, xavier
from pretrain.models.vit import Block

#: What a size fixes of an encoder, and of the masked autoencoder's decoder.
ENCODER_FIELDS = ("patch_size", "dim", "depth", "heads", "mlp_ratio")
PRESET_FIELDS = (*ENCODER_FIELDS, "decoder_dim", "decoder_depth", "decoder_heads")
#: In the order of PRESET_FIELDS. Decoders as in V2; V1's L has depth 12, its H 640 channels too.
PRESETS: dict[str, tuple[int | float, ...]] = {
    "small": (16, 384, 12, 6, 4.0, 192, 4, 3),
    "base": (16, 768, 12, 12, 4.0, 384, 4, 6),
    "large": (16, 1024, 24, 16, 4.0, 512, 4, 8),
    "huge": (16, 1280, 32, 16, 4.0, 512, 4, 8),
    "giant": (14, 1408, 40, 16, 48 / 11, 512, 4, 8),
}


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of an encoder, nothing left open."""

    patch_size: int
    tubelet: int
    dim: int
    depth: int
    heads: int
    mlp_ratio: float

    @property
    def cube(self) -> int:
        """Elements of one cube, 3 x tubelet x patch^2."""
        return 3 * self.tubelet * self.patch_size**2

    @property
    def hidden(self) -> int:
        """Channels inside an MLP."""
        return int(self.dim * self.mlp_ratio)


def fill(config: Any, fields: Sequence[str]) -> Any:
    """Fill every null of a configuration in from its size; custom leaves them."""
    # Not strict: `custom` has no values, and `missing` names the fields that this leaves open.
    defaults = dict(zip(PRESET_FIELDS, PRESETS.get(config.size, ()), strict=False))
    return replace(config, **{key: value for key, value in defaults.items()
                              if key in fields and getattr(config, key) is None})  # fmt: skip


def missing(config: Any, fields: Sequence[str]) -> list[str]:
    """Name the fields that are still open in a filled configuration."""
    return [
        f"model.{key}: null, but model.size=custom has no default for it"
        for key in fields
        if getattr(config, key) is None
    ]


def attention_macs(tokens: int, dim: int) -> int:
    """Count multiply-accumulates of a block's attention: four projections, scores and their use."""
    return 4 * tokens * dim * dim + 2 * tokens * tokens * dim


def mlp_macs(tokens: int, dim: int, hidden: int) -> int:
    """Count multiply-accumulates of a block's MLP."""
    return 2 * tokens * dim * hidden


def block_macs(tokens: int, dim: int, mlp_ratio: float) -> int:
    """Count multiply-accumulates of a block; norms, softmax and activation functions are not counted."""
    return attention_macs(tokens, dim) + mlp_macs(tokens, dim, int(dim * mlp_ratio))


def size_problems(config: Any, fields: Sequence[str], section: str = "model") -> list[str]:
    """List sizes of a filled configuration that are 0 or less: such layers would be built, and compute nothing."""
    return [
        f"{section}.{key}: found {getattr(config, key)}, allowed: more than 0"
        for key in fields
        if getattr(config, key) <= 0
    ]


def build_blocks(
    config: Any,
    dim: int,
    depth: int,
    heads: int,
    hidden: int,
    *,
    init: Initializer = xavier,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> nn.ModuleList:
    """Stack blocks with the epsilon, attention, layer scale and stochastic depth of a configuration.

    Args:
        config: `norm_eps`, `cosine_attention`, `layer_scale`, `drop_path`.
        dim, depth, heads, hidden: sizes.
        init: of the weights.
        dropout, attention_dropout: rates, see `Block`.
    """
    rates = drop_path_rates(config.drop_path, depth)
    return nn.ModuleList(
        Block(
            dim,
            heads,
            hidden,
            config.norm_eps,
            config.cosine_attention,
            config.layer_scale,
            rate,
            dropout=dropout,
            attention_dropout=attention_dropout,
            init=init,
        )
        for rate in rates
    )

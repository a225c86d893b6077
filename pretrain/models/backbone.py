"""Base of every ViT here: a stack of blocks, prompts for it, and fewer tokens on the way.

Adapters and token reorganisation work on this class, so they fit every model that inherits from it.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pretrain.errors import RecipeError
from pretrain.models.keep_rates import Reorganisation, keep_rates
from pretrain.models.linear import Linear, truncated_normal
from pretrain.models.recompute import Recompute, run_blocks
from pretrain.models.token_reorganisation import Kind, TokenReorganisation, Tokens


class Backbone(nn.Module):
    """A ViT: `blocks` between an embedding and a head.

    Attributes:
        blocks: the transformer blocks.
        head: the classifier, see `build_head`.
        embeddings: slot for prompts [1, n, C]: one for each block, cut off behind it ("deep"), or a single one in front
            of the first block that stays until the last ("shallow").
        reorganisation: slot for token reorganisation.
        class_tokens: tokens in front of those of the input: 1 with a class token, else 0.
        dim: channels.
        activation_checkpointing: recompute each block in the backward pass.
    """

    blocks: nn.ModuleList
    head: nn.Module
    embeddings: "Prompts | None"
    reorganisation: TokenReorganisation | None

    def __init__(self, dim: int, class_tokens: int, activation_checkpointing: Recompute) -> None:
        super().__init__()
        self.dim = dim
        self.class_tokens = class_tokens
        self.activation_checkpointing = activation_checkpointing
        # A slot, not a wrapper, which would rename every parameter: official files would no longer fit.
        self.register_module("embeddings", None)
        self.reorganisation = None
        self._resting: TokenReorganisation | None = None

    def reorganise(self, config: Reorganisation, rates: Sequence[float] | None = None) -> None:
        """Drop tokens from now on; at a keep rate of 1 the model is the plain one again.

        Args:
            config: rates, blocks and fusing.
            rates: keep rate of every block, in place of the configuration's rate and blocks.
        """
        rates = keep_rates(config, len(self.blocks)) if rates is None else rates
        # Nothing is left in the slot: prompts, which `run` refuses beside a reorganisation, work again.
        if config.score == "added_class" and not self.class_tokens:
            raise RecipeError("tokens.score=added_class: this model was built without a class token; build it with one")
        kind: Kind = "keyframe" if config.score == "keyframe" else "class" if self.class_tokens else "received"
        self._resting = TokenReorganisation(rates, kind, config)
        self.reorganisation = None if all(rate == 1 for rate in rates) else self._resting

    def run(
        self,
        x: Tensor,
        slices: int = 1,
        keep_rate: float | Sequence[float] | None = None,
        counts: int | Sequence[int | None] | None = None,
    ) -> Tokens:
        """Run tokens [B, c+N, C] through all blocks; see `TokenReorganisation` for the other arguments."""
        # Counts act in any block, also where all rates are 1; a keep rate only in blocks that drop.
        reorganisation = self.reorganisation or (None if counts is None else self._resting)
        if reorganisation is None:
            if keep_rate is not None or counts is not None:
                raise RecipeError("a keep rate was given, but this model drops no tokens; call `reorganise` first")
            return Tokens(self._prompted(x))
        if self.embeddings is not None:
            raise RecipeError("prompts and token reorganisation exclude each other: a prompt has no score")
        return reorganisation.run(
            self.blocks, x, self.class_tokens, slices, keep_rate, counts, self.activation_checkpointing
        )

    def _prompted(self, x: Tensor) -> Tensor:
        if self.embeddings is None:
            return run_blocks(self.blocks, x, self.activation_checkpointing)
        if self.embeddings.count == 1:
            x = run_blocks(self.blocks, self.embeddings(x, 0), self.activation_checkpointing)
            return x[:, self.embeddings.tokens :]
        for index, block in enumerate(self.blocks):
            x = run_blocks([block], self.embeddings(x, index), self.activation_checkpointing)
            x = x[:, self.embeddings.tokens :]
        return x

    def mean_tokens(self, tokens: Tokens) -> Tensor:
        """Average [B, C] over all tokens but the class token."""
        x = tokens.x[:, self.class_tokens :]
        if self.reorganisation is None or not self.reorganisation.config.size_weighted or tokens.sizes is None:
            return x.mean(1)
        # In float32: a fused token may stand for more than 256 others, above which bfloat16 has no odd numbers.
        weight = tokens.sizes / tokens.sizes.sum(1, keepdim=True)
        return (x * weight[:, :, None].to(x.dtype)).sum(1)


class AddedClass(nn.Module):
    """A class token for a model that was pre-trained without one: learned, zero position code (systems/evit.md 6).

    A module of its own for the reason that `Prompts` are one.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(truncated_normal(torch.empty(1, 1, dim)))

    def forward(self, x: Tensor) -> Tensor:
        """Put the token in front of tokens [B, N, C]."""
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x), dim=1)


class Prompts(nn.Module):
    """Learned tokens [1, n, C], one tensor a block or a single one, named by their index.

    It puts them in place itself because ZeRO stage 3 gathers a module's parameters only where that module is called (an
    `nn.ParameterList` can't be called). Xavier-uniform over the three axes, as in the official AdaptFormer code.
    """

    def __init__(self, count: int, tokens: int, dim: int) -> None:
        super().__init__()
        self.count, self.tokens = count, tokens
        for index in range(count):
            drawn = nn.init.xavier_uniform_(torch.empty(1, tokens, dim))
            self.register_parameter(str(index), nn.Parameter(drawn))

    def forward(self, x: Tensor, index: int) -> Tensor:
        """Put the prompts of block `index` in front of tokens [B, N, C], before a class token too."""
        prompts = self.get_parameter(str(index))
        return torch.cat((prompts.expand(x.shape[0], -1, -1).to(x.dtype), x), dim=1)


def build_head(kind: str, dim: int, classes: int, scale: float) -> nn.Module:
    """Build a classifier head.

    Args:
        kind: `linear`: truncated normal of deviation 0.02 times `scale` (VideoMAE); `batch_norm`: batch norm without
            parameters, then a linear layer of deviation 0.01 (AdaptFormer). The latter's running statistics are
            buffers and belong to a task's weights.
        dim: channels of the features.
        classes: outputs; 0: the features themselves.
        scale: factor on the initial weight; small, so that training starts from even probabilities.
    """
    if classes == 0:
        return nn.Identity()
    if kind == "batch_norm":
        norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False)
        return nn.Sequential(norm, Linear(dim, classes, init=_probe_weight))
    return Linear(dim, classes, init=partial(_scaled_weight, scale=scale))


def _scaled_weight(weight: Tensor, scale: float) -> Tensor:
    return truncated_normal(weight).detach().mul_(scale)


def _probe_weight(weight: Tensor) -> Tensor:
    return nn.init.trunc_normal_(weight, std=0.01)


def layer_id(name: str, depth: int) -> int:
    """Tell a parameter's layer for layer-wise learning rates; lr scale = decay^(depth + 1 - id).

    0 for the embedding and whatever stands before the blocks, 1 to `depth` for blocks, `depth + 1` for norms and head
    (VideoMAEv2, optim_factory.get_num_layer_for_vit).
    """
    # Prompts and an added class token enter with the embedding; they would else be given the head's full rate.
    in_front = ("patch_embed.", "embeddings.", "added_class.")
    if name.startswith(in_front) or name in ("pos_embed", "cls_token", "mask_token"):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1

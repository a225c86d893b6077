"""Trainable parts themselves: bottleneck and low-rank update (prompts: pretrain/models/backbone.py).

Weights are initialised in constructors, after those of the backbone: the published video program draws its adapters
again after building them and so loses the zero start (systems/adaptformer.md section 3.5).
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.adapters import config
from pretrain.models.dropout import dropout_layer
from pretrain.models.linear import Linear, truncated_normal

#: Uniform within 1/sqrt(inputs), PyTorch's own for linear layers.
kaiming = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))


class AdaptMLP(nn.Module):
    """AdaptFormer's bottleneck, for the slot `Block.adaptmlp`; official parameter names.

    It is called with the residual stream behind attention (before norm2: the authors' code, not the paper's figure) and
    with the MLP's branch behind stochastic depth, and returns what replaces that branch.
    """

    adapter_layer_norm_before: nn.LayerNorm | None
    scale: nn.Parameter | None

    def __init__(self, dim: int, options: config.AdaptFormer) -> None:
        super().__init__()
        zero = options.init == "zero"
        self.form, self.norm_place, self.constant = options.form, options.norm, options.scale
        self.dropout = dropout_layer(options.dropout)
        self.down_proj = Linear(dim, options.bottleneck, init=kaiming if zero else truncated_normal)
        self.up_proj = Linear(options.bottleneck, dim, init=nn.init.zeros_ if zero else truncated_normal)
        # PyTorch's epsilon, 1e-5, unlike the backbone's.
        self.adapter_layer_norm_before = None if options.norm == "none" else nn.LayerNorm(dim)
        learned = {"none": 0, "scalar": 1, "channel": dim}[options.learned_scale]
        self.scale = nn.Parameter(torch.ones(learned)) if learned else None

    def forward(self, x: Tensor, changed: Tensor) -> Tensor:
        return changed + self.bottleneck(x if self.form == "parallel" else changed)

    def bottleneck(self, x: Tensor) -> Tensor:
        """Compute the scaled output for tokens [B, N, C], without a residual."""
        norm = self.adapter_layer_norm_before
        if norm is not None and self.norm_place == "in":
            x = norm(x)
        x = self.up_proj(self.dropout(F.relu(self.down_proj(x))))
        # The factor stays apart from the weights: in half precision a product would round twice.
        x = x * (self.constant if self.scale is None else self.scale)
        return norm(x) if norm is not None and self.norm_place == "out" else x


class LowRankUpdate(nn.Module):
    """Low-rank updates of row blocks of a linear layer, for the slot `Linear.update`; starts at zero.

    peft is not used: it wraps layers, which renames the backbone's parameters, and it updates the fused query, key and
    value matrix as one, with a common down projection. Here each of them has its own, and a merge is exact.

    Args:
        inputs: channels in.
        outputs: channels out, of all blocks together.
        blocks: names of the row blocks, equal in size: query, key, value of the fused matrix, or just one.
        chosen: blocks that are updated.
        options: rank, factor, dropout.
    """

    def __init__(
        self, inputs: int, outputs: int, blocks: tuple[str, ...], chosen: list[str], options: config.LowRank
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.rows = outputs // len(blocks)
        self.factor = options.alpha / options.rank
        self.dropout = dropout_layer(options.dropout)
        names = [block for block in blocks if block in chosen]
        self.down = nn.ModuleDict({name: Linear(inputs, options.rank, bias=False, init=kaiming) for name in names})
        self.up = nn.ModuleDict(
            {name: Linear(options.rank, self.rows, bias=False, init=nn.init.zeros_) for name in names}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        empty = x.new_zeros(()).expand(*x.shape[:-1], self.rows)
        parts = [self.up[name](self.down[name](x)) if name in self.down else empty for name in self.blocks]
        return self.factor * torch.cat(parts, dim=-1)

    @torch.no_grad()
    def weight(self) -> Tensor:
        """Compute the update as one matrix [outputs, inputs], float32."""
        down = {name: layer.get_parameter("weight").float() for name, layer in self.down.items()}
        up = {name: layer.get_parameter("weight").float() for name, layer in self.up.items()}
        nothing = torch.zeros_like(next(iter(down.values()))[:1]).expand(self.rows, -1)
        return self.factor * torch.cat([up[name] @ down[name] if name in up else nothing for name in self.blocks])

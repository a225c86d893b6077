"""Pieces of the joint space-time vision transformer of VideoMAE, with the official parameter names.

Weights are initialised inside the constructor of the module that owns them, because `deepspeed.zero.Init` partitions a
module's parameters as soon as that constructor returns: a later walk over the model would find empty tensors.
Shapes: B clips, N tokens, C channels, h heads, d = C/h.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

#: Cosine attention's scores are multiplied by at most 100 (official: clamp of the logarithm at 4.6052).
MAX_LOG_SCALE = 4.6052


class Linear(nn.Linear):
    """Linear layer with Xavier-uniform weight and zero bias."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class JointProjection(Linear):
    """Query, key and value projection [3C, C], drawn as one matrix; the bias comes from the attention that owns it."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, bias)


class CubeProjection(nn.Module):
    """Linear map of flattened cubes, held in the shape [C, 3, tubelet, p, p] of the official Conv3d, with its init."""

    def __init__(self, dim: int, tubelet: int, patch: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 3, tubelet, patch, patch))
        self.bias = nn.Parameter(torch.empty(dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(3 * tubelet * patch * patch)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, cubes: Tensor) -> Tensor:
        """Cubes [B, n, tubelet*p*p*3], channel fastest, to tokens [B, n, C]."""
        return F.linear(cubes, self.weight.permute(0, 2, 3, 4, 1).flatten(1), self.bias)


class CubeEmbedding(nn.Module):
    """Embeds any subset of a clip's cubes: the official convolution and then a gather, at a tenth of their cost."""

    def __init__(self, dim: int, tubelet: int, patch: int) -> None:
        super().__init__()
        self.proj = CubeProjection(dim, tubelet, patch)

    def forward(self, cubes: Tensor) -> Tensor:
        return self.proj(cubes)


class Attention(nn.Module):
    """Multi-head self-attention with query and value bias but none for keys (official `Attention`, `CosAttention`).

    Args:
        dim: channels, a multiple of `heads`.
        heads: attention heads.
        cosine: L2-normalise queries and keys and multiply scores by exp(min(scale, 4.6052)), `scale` [h, 1, 1] learned.
    """

    def __init__(self, dim: int, heads: int, cosine: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = JointProjection(dim)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0))) if cosine else None
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = self.qkv(x, bias).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.scale is None:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            query = F.normalize(query, dim=-1) * self.scale.clamp(max=MAX_LOG_SCALE).exp()
            mixed = F.scaled_dot_product_attention(query, F.normalize(key, dim=-1), value, scale=1.0)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; `gamma_1`, `gamma_2` exist only with layer scale.

    Args:
        dim: channels.
        heads: attention heads.
        hidden: channels inside the MLP.
        eps: epsilon of the layer norms.
        cosine: cosine attention.
        layer_scale: initial value of the branch scales; 0 leaves them out.
        drop_path: probability that a sample skips a residual branch while training.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, eps: float, cosine: bool, layer_scale: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, cosine)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden)
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale > 0 else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale > 0 else None
        self.drop_path = stochastic_depth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        attended, gamma_1, gamma_2 = self.attn(self.norm1(x)), self.gamma_1, self.gamma_2
        x = x + self.drop_path(attended if gamma_1 is None else gamma_1 * attended)
        changed = self.mlp(self.norm2(x))
        return x + self.drop_path(changed if gamma_2 is None else gamma_2 * changed)


def stochastic_depth(rate: float) -> nn.Module:
    """timm's per-sample DropPath, or the identity; timm is imported only where the rate asks for it."""
    if rate == 0:
        return nn.Identity()
    from pretrain.runtime.vision_ops import ensure_torchvision

    ensure_torchvision()
    from timm.layers import DropPath

    return DropPath(rate)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates rising linearly from 0 in the first block to `rate` in the last."""
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def run_blocks(blocks: nn.ModuleList, x: Tensor, recompute: bool) -> Tensor:
    """Apply blocks in order; with `recompute`, keep only each block's input for the backward pass."""
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = block(x)
    return x

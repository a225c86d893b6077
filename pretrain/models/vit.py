"""Pieces of the joint space-time vision transformer of VideoMAE, with the official parameter names.

Weights are initialised inside the constructor of the module that owns them, because `deepspeed.zero.Init` partitions a
module's parameters as soon as that constructor returns: a later walk over the model would find empty tensors.
Shapes: B clips, N tokens, C channels, h heads, d = C/h.

Fine-tuning attaches to a block through slots that hold nothing in pre-training: `Linear.update` (a low-rank update) and
`Block.adaptmlp` (a bottleneck beside or behind the MLP). Attaching so keeps every other parameter's official name.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.dropout import Dropout, dropout_layer, stochastic_depth
from pretrain.models.linear import Initializer, JointProjection, Linear, WidenedLinear, xavier

#: Cosine attention's scores are multiplied by at most 100 (official: clamp of the logarithm at 4.6052).
MAX_LOG_SCALE = 4.6052

#: Channels that rows of products are filled up to on an accelerator. Tensor cores read 16 bytes at a time: published
#: rates of bf16 products whose rows are not multiples of that are several times lower. ViT-g's decoder has 2,234.
ALIGNED = 16
#: Devices that gain nothing from it, and whose results stay as they are bit for bit.
UNALIGNED_DEVICES = ("cpu", "meta")

#: Rates tokens [B, N] by queries and keys [B, h, N, d], whose products are to be multiplied by the number.
Score = Callable[[Tensor, Tensor, float], Tensor]

#: Between the two linear layers of an MLP.
Activation = Callable[[Tensor], Tensor]


class Reduction(Protocol):
    """Removal of tokens inside a block, between attention and MLP."""

    def score(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """See `Score`."""

    def take(self, x: Tensor, score: Tensor) -> tuple[Tensor, Any]:
        """Return tokens [B, n, C] of the residual stream [B, N, C], and what the caller wants to know about them."""


class CubeProjection(nn.Module):
    """Linear map of flattened cubes, held in the shape [C, 3, tubelet, p, p] of the official Conv3d, with its init."""

    def __init__(self, dim: int, tubelet: int, patch: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 3, tubelet, patch, patch))
        self.bias = nn.Parameter(torch.empty(dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        # The bias of PyTorch's Conv3d, which the official embedding is and leaves as it is.
        bound = 1 / math.sqrt(3 * tubelet * patch * patch)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, cubes: Tensor) -> Tensor:
        """Project cubes [B, n, tubelet*p*p*3], channel fastest, to tokens [B, n, C]."""
        # Channels last, as cubes are cut; only the small weight is turned, not the pixels.
        return F.linear(cubes, self.weight.permute(0, 2, 3, 4, 1).flatten(1), self.bias)


class CubeEmbedding(nn.Module):
    """Embedding of any subset of a clip's cubes: official convolution and then a gather, at a tenth of their cost."""

    def __init__(self, dim: int, tubelet: int, patch: int) -> None:
        super().__init__()
        self.proj = CubeProjection(dim, tubelet, patch)

    def forward(self, cubes: Tensor) -> Tensor:
        return self.proj(cubes)


class Attention(nn.Module):
    """Multi-head self-attention (official `Attention`, `CosAttention`).

    Args:
        dim: channels, a multiple of `heads`.
        heads: attention heads.
        cosine: L2-normalise queries and keys and multiply scores by exp(min(scale, 4.6052)), `scale` [h, 1, 1] learned.
        bias: `query_value`: parameters `q_bias`, `v_bias` and none for keys (VideoMAE); `all`: `qkv.bias` (image ViTs).
        dropout: rate behind the output projection.
        attention_dropout: rate on attention weights, which are then written out: [B, h, N, N] while training.
        init: of the weights.
        causal: a token attends to itself and those before it (text).
        joint_init: of the joint projection [3C, C], where it does not begin like the other weights.

    `written_out` allows `written_out_attention` where it is faster; plans for accelerators turn it off for all.
    """

    written_out = True

    def __init__(
        self,
        dim: int,
        heads: int,
        cosine: bool = False,
        bias: Literal["query_value", "all"] = "query_value",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        init: Initializer = xavier,
        causal: bool = False,
        joint_init: Initializer | None = None,
    ) -> None:
        super().__init__()
        assert not (causal and attention_dropout), "attention with dropout is written out without a causal mask"
        self.heads = heads
        self.causal = causal
        self.attention_dropout = dropout_layer(attention_dropout)
        self.qkv = JointProjection(dim, bias == "all", joint_init or init)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if bias == "query_value" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if bias == "query_value" else None
        self.scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0))) if cosine else None
        self.proj = Linear(dim, dim, init=init)
        self.dropout = dropout_layer(dropout)

    def forward(self, x: Tensor, score: Score | None = None) -> Any:
        """Compute the output [B, N, C]; with `score` also its result [B, N] for this layer's queries and keys."""
        query, key, value = self.project(x)
        mixed = self.mix(query, key, value)
        return mixed if score is None else (mixed, score(query, key, self.score_scale or query.shape[-1] ** -0.5))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens [B, N, C] to queries, keys, values [B, h, N, d]; normalised, scaled with cosine attention."""
        batch, tokens, dim = x.shape
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            # Keys have none: it would add the same to all scores of a query, which softmax takes away again.
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = self.qkv(x, bias).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.scale is not None:
            # The learned scale goes into the queries: the fused kernel takes a number for `scale`, not a tensor.
            query = F.normalize(query, dim=-1) * self.scale.clamp(max=MAX_LOG_SCALE).exp()
            key = F.normalize(key, dim=-1)
        return query, key, value

    @property
    def score_scale(self) -> float | None:
        """Factor on products of queries and keys; None: d^-0.5."""
        return None if self.scale is None else 1.0

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mix values by attention to the output [B, N, C], of what `project` gave."""
        # The fused kernel draws from the rank's generator, not by position.
        drops = self.training and isinstance(self.attention_dropout, Dropout)
        # In bfloat16 on CPUs the fused kernel takes two to four times as long; it was 55 % of ViT-S's step.
        faster = self.written_out and query.device.type == "cpu" and query.dtype == torch.bfloat16
        if (drops or faster) and not self.causal:
            scale = self.score_scale or query.shape[-1] ** -0.5
            mixed = written_out_attention(query, key, value, scale, self.attention_dropout)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, scale=self.score_scale)
        return self.dropout(self.proj(mixed.transpose(1, 2).flatten(2)))


def written_out_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: nn.Module | None = None
) -> Tensor:
    """Compute dropout(softmax(scale * query key^T)) value by matrix products, scores kept for the backward pass.

    Two to four times as fast as torch's fused kernel on CPUs that multiply bfloat16 natively (bench/step.py), whose
    exponentials and sums it computes in float32 block by block; in float32 the fused one is as fast and keeps less.
    """
    weights = (query * scale @ key.transpose(-2, -1)).softmax(dim=-1)
    return (weights if dropout is None else dropout(weights)) @ value


class Mlp(nn.Module):
    """Linear, activation (exact GELU), Linear, dropout.

    On an accelerator a hidden width that is not aligned is filled up with channels of zero weight in and out: result,
    gradients and weights are those of the width itself.
    """

    def __init__(
        self, dim: int, hidden: int, dropout: float = 0.0, init: Initializer = xavier, activation: Activation = F.gelu
    ) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = WidenedLinear(dim, hidden, init=init)
        self.fc2 = WidenedLinear(hidden, dim, init=init)
        self.dropout = dropout_layer(dropout)

    def forward(self, x: Tensor) -> Tensor:
        more = self.surplus(x.device.type)
        return self.dropout(self.fc2(self.activation(self.fc1(x, outputs=more)), inputs=more))

    def surplus(self, device: str) -> int:
        """Count the channels that are added inside on a kind of device."""
        # Low-rank updates are made for the width itself.
        updated = self.fc1.update is not None or self.fc2.update is not None
        return 0 if updated or device in UNALIGNED_DEVICES else -self.fc1.out_features % ALIGNED


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
        bias: biases of the attention's projection, see `Attention`.
        dropout: rate behind both branches' last linear layer.
        attention_dropout: rate on attention weights.
        init: of the weights.
        activation: inside the MLP.
        causal: a token attends to itself and those before it.
        joint_init: of the attention's joint projection, see `Attention`.

    The slot `adaptmlp` takes a module called with the residual stream after attention and the MLP's branch, whose
    output replaces that branch.
    """

    adaptmlp: nn.Module | None

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        eps: float,
        cosine: bool = False,
        layer_scale: float = 0.0,
        drop_path: float = 0.0,
        *,
        bias: Literal["query_value", "all"] = "query_value",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        init: Initializer = xavier,
        activation: Activation = F.gelu,
        causal: bool = False,
        joint_init: Initializer | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, cosine, bias, dropout, attention_dropout, init, causal, joint_init)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden, dropout, init, activation)
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale > 0 else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale > 0 else None
        # Two layers: what a layer drops goes by its name, and each branch has a draw of its own.
        self.drop_path1, self.drop_path2 = stochastic_depth(drop_path), stochastic_depth(drop_path)
        self.register_module("adaptmlp", None)

    def forward(self, x: Tensor, reduction: Reduction | None = None) -> Any:
        """Transform tokens [B, N, C]; with `reduction` to fewer of them, and return what it has to say.

        The reduction is called in here, not by splitting the block outside: ZeRO stage 3 gathers a module's parameters
        when the module itself is called.
        """
        if reduction is None:
            return self._transform(self._attend(x, self.attn(self.norm1(x))))
        attended, score = self.attn(self.norm1(x), reduction.score)
        x, taken = reduction.take(self._attend(x, attended), score)
        return self._transform(x), taken

    def _attend(self, x: Tensor, attended: Tensor) -> Tensor:
        return x + self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)

    def _transform(self, x: Tensor) -> Tensor:
        changed = self.mlp(self.norm2(x))
        changed = self.drop_path2(changed if self.gamma_2 is None else self.gamma_2 * changed)
        return x + (changed if self.adaptmlp is None else self.adaptmlp(x, changed))

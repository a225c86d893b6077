"""A plain implementation of VideoMAE's maths, to compare with: what one writes before thinking of speed.

All cubes are embedded by a convolution and then gathered by a boolean mask, attention is written out, targets are made
for every cube. Same result as pretrain/objectives/videomae.py with the same weights (bench/step.py checks it).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.cubes import cut_cubes
from pretrain.models.videomae import VideoMAE
from pretrain.objectives.videomae import MEAN, STD, TARGET_EPS


class PlainVideoMAE(nn.Module):
    """Holds the parameters of one of our models, and computes the loss of a batch the plain way."""

    def __init__(self, model: VideoMAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: Tensor, hidden: Tensor, left_out: Tensor) -> Tensor:
        """Loss of normalised clips [B, 3, T, H, W]; `hidden`, `left_out` bool [B, N]: not seen, not reconstructed."""
        model, batch = self.model, len(video)
        with torch.no_grad():
            labels = plain_targets(video, model.shape.tubelet, model.shape.patch_size)
            labels = labels[~left_out].reshape(batch, -1, labels.shape[-1])
        embed = model.encoder.patch_embed.proj
        stride = (model.shape.tubelet, model.shape.patch_size, model.shape.patch_size)
        tokens = F.conv3d(video, embed.weight, embed.bias, stride).flatten(2).transpose(1, 2)
        every = torch.arange(tokens.shape[1]).expand(batch, -1)
        tokens = tokens + model.encoder.positions(every).to(tokens)
        tokens = tokens[~hidden].reshape(batch, -1, tokens.shape[-1])
        for block in model.encoder.blocks:
            tokens = plain_block(block, tokens)
        seen = model.encoder_to_decoder(model.encoder.norm(tokens))
        positions = model.decoder.positions(every).to(seen)
        at_seen = positions[~hidden].reshape(batch, -1, seen.shape[-1])
        at_asked = positions[~left_out].reshape(batch, -1, seen.shape[-1])
        tokens = torch.cat([seen + at_seen, model.mask_token + at_asked], dim=1)
        for block in model.decoder.blocks:
            tokens = plain_block(block, tokens)
        predicted = model.decoder.head(model.decoder.norm(tokens[:, -at_asked.shape[1] :]))
        errors = ((predicted - labels) ** 2).mean(dim=-1)
        counted = hidden[~left_out].reshape(batch, -1)
        return (errors * counted).sum() / counted.sum()


def plain_block(block: Any, x: Tensor) -> Tensor:
    """A transformer block with attention written out."""
    batch, count, dim = x.shape
    attention = block.attn
    bias = torch.cat((attention.q_bias, torch.zeros_like(attention.v_bias), attention.v_bias))
    qkv = F.linear(block.norm1(x), attention.qkv.weight, bias)
    query, key, value = qkv.reshape(batch, count, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    weights = (query * (dim // attention.heads) ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
    x = x + attention.proj((weights @ value).transpose(1, 2).reshape(batch, count, dim))
    return x + block.mlp(block.norm2(x))


def plain_targets(video: Tensor, tubelet: int, patch: int) -> Tensor:
    """Normalised cubes [B, N, D] of all tokens, from ImageNet-normalised clips [B, 3, T, H, W]."""
    shape = (1, 3, 1, 1, 1)
    pixels = video * torch.tensor(STD).view(shape) + torch.tensor(MEAN).view(shape)
    cubes = cut_cubes(pixels.permute(0, 2, 3, 4, 1), tubelet, patch).unflatten(-1, (-1, 3))
    centred = cubes - cubes.mean(dim=-2, keepdim=True)
    return (centred / (cubes.var(dim=-2, unbiased=True, keepdim=True).sqrt() + TARGET_EPS)).flatten(-2)

"""Adaptive mixing: samples decoded by two matrices that the token itself generates (systems/sparseformer.md, 2.8)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.linear import Linear, truncated_normal
from pretrain.models.sparseformer.regions import SmallNorm


class MatrixGenerator(Linear):
    """Last layer of the generator: its weight starts at zero, its bias with the matrices that all tokens begin with."""

    def __init__(self, inputs: int, channels: int, points: int, out_points: int) -> None:
        self.sizes = channels, points, out_points  # before the base class, whose constructor calls reset_parameters
        super().__init__(inputs, channels**2 + points * out_points)

    def reset_parameters(self) -> None:
        channels, points, out_points = self.sizes
        nn.init.zeros_(self.weight)
        matrices = torch.empty(channels, channels), torch.empty(points, out_points)
        with torch.no_grad():
            self.bias.copy_(torch.cat([nn.init.xavier_uniform_(one).flatten() for one in matrices]))


class AdaptiveMixing(nn.Module):
    """Mixing of samples over channels and over points.

    Args:
        dim: channels of tokens, D.
        channels: of samples, C.
        points: samples of a token, P.
        out_points: rows behind the mixing over points, Po.
        hidden: channels inside the generator.
        bias: add learned biases `m_beta` and `s_beta`, each in front of an activation; without them there is one
            activation, the last.
        eps: of the generator's layer norm.
    """

    m_beta: nn.Parameter | None
    s_beta: nn.Parameter | None

    def __init__(
        self, dim: int, channels: int, points: int, out_points: int, hidden: int, bias: bool, eps: float
    ) -> None:
        super().__init__()
        self.channels, self.points, self.out_points = channels, points, out_points
        self.parameter_generator = nn.Sequential(
            SmallNorm(dim, eps=eps),
            Linear(dim, hidden, init=truncated_normal),
            MatrixGenerator(hidden, channels, points, out_points),
        )
        self.m_beta = nn.Parameter(torch.zeros(channels)) if bias else None
        self.s_beta = nn.Parameter(torch.zeros(out_points)) if bias else None
        self.out_proj = Linear(out_points * channels, dim, init=truncated_normal)

    def forward(self, samples: Tensor, tokens: Tensor) -> Tensor:
        """Decode samples [B, N, P, C] for tokens [B, N, D]: [B, N, D]."""
        generated = self.parameter_generator(tokens)
        over_channels, over_points = generated.split([self.channels**2, self.points * self.out_points], dim=-1)
        mixed = samples.to(generated.dtype) @ over_channels.unflatten(-1, (self.channels, self.channels))
        if self.m_beta is not None:
            # The library's code without biases leaves the activation between the two out as well, and released
            # bootstrapped weights are of that code.
            mixed = F.gelu(mixed + self.m_beta)
        mixed = over_points.unflatten(-1, (self.out_points, self.points)) @ mixed
        mixed = F.gelu(mixed if self.s_beta is None else mixed + self.s_beta[:, None])
        decoded: Tensor = self.out_proj(mixed.flatten(2))
        return decoded

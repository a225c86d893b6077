"""SlowFast: two pathways of residual networks over time, maps of both (Feichtenhofer et al. 2019, arXiv 1812.03982).

As it is used under CycleACR and AlphAction (systems/cycleacr.md, 3; MCG-NJU/CycleACR,
alphaction/modeling/backbone/slowfast.py), whose names its parameters have: the last stage is dilated in place of a
stride, so maps have stride 16; batch norms are frozen; lateral convolutions stride over time; nothing is non-local.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import RecipeError
from pretrain.models.base import Cost, MapsBackbone, MapsShape, side_problems
from pretrain.models.recompute import Recompute, maybe_recompute

#: Residual blocks of each stage, by depth of the network.
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
#: Side of the pictures divided by that of the maps.
STRIDE = 16
#: Side of the stems' windows, pixels.
STEM_SIDE = 7
#: First frame of the slow pathway when nothing is drawn.
SLOW_START = 3
#: Frames that a lateral convolution sees, and its channels in multiples of the fast pathway's.
LATERAL_FRAMES, LATERAL_WIDTH = 5, 2
NORM_EPS = 1e-5


@dataclass
class Config:
    """SlowFast networks of bottleneck blocks."""

    name: str = "slowfast"
    """architecture: pretrain/models/<name>.py"""
    depth: int = 101
    """layers of each pathway: 50 or 101"""
    width: int = 64
    """channels behind the slow pathway's first convolution; 32 times as many leave it"""
    tau: int = 8
    """frames of a clip from one of the slow pathway to the next"""
    alpha: int = 4
    """frames of the fast pathway for each of the slow one"""
    beta: int = 8
    """channels of the slow pathway for each of the fast one"""
    classes: int = 80
    """actions that the task's head tells apart; the network itself has no head"""
    slow_jitter: bool = True
    """training: the slow pathway's first frame is drawn from the first tau, else it is the fourth as at the test"""


class FrozenNorm(nn.Module):
    """Batch norm whose statistics, scale and shift stay as they were loaded; they are buffers."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, NORM_EPS)


class Convolution(nn.Conv3d):
    """Convolution over time, height and width, padded to keep the size that strides leave; Kaiming-normal weight."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: Sequence[int],
        stride: Sequence[int] = (1, 1, 1),
        dilation: int = 1,
        bias: bool = False,
    ) -> None:
        time, height, width = kernel
        padding = (time // 2, height // 2 * dilation, width // 2 * dilation)
        steps, spread = (stride[0], stride[1], stride[2]), (1, dilation, dilation)
        super().__init__(inputs, outputs, (time, height, width), steps, padding, spread, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class NormedConvolution(nn.Module):
    """Convolution and frozen norm."""

    def __init__(self, inputs: int, outputs: int, kernel: Sequence[int], stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = Convolution(inputs, outputs, kernel, (1, stride, stride), dilation)
        self.bn = FrozenNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.bn(self.conv(x))
        return normed


class Bottleneck(nn.Module):
    """Three convolutions: over time, where the stage has it, over space, and to the outputs."""

    def __init__(self, inputs: int, inner: int, outputs: int, frames: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = NormedConvolution(inputs, inner, (frames, 1, 1))
        self.conv2 = NormedConvolution(inner, inner, (1, 3, 3), stride, dilation)
        self.conv3 = NormedConvolution(inner, outputs, (1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return last


class ResidualBlock(nn.Module):
    """A bottleneck beside a shortcut, which is a convolution in the first block of a stage."""

    shortcut: NormedConvolution | None

    def __init__(self, inputs: int, inner: int, outputs: int, frames: int, stride: int, dilation: int, first: bool):
        super().__init__()
        self.btnk = Bottleneck(inputs, inner, outputs, frames, stride, dilation)
        # In all first blocks, the dilated stage's too: it had a stride where it was pre-trained.
        self.shortcut = NormedConvolution(inputs, outputs, (1, 1, 1), stride) if first else None

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.btnk(x) + (x if self.shortcut is None else self.shortcut(x)))


class Stage(nn.Module):
    """Residual blocks `res_0`, `res_1`, ... of one width."""

    def __init__(self, blocks: int, inputs: int, inner: int, outputs: int, frames: int, stride: int, dilation: int):
        super().__init__()
        for index in range(blocks):
            first = index == 0
            sizes = (inputs if first else outputs, inner, outputs, frames, stride if first else 1, dilation, first)
            self.add_module(f"res_{index}", ResidualBlock(*sizes))

    def forward(self, x: Tensor, recompute: Recompute = False) -> Tensor:
        for block in self.children():
            x = maybe_recompute(recompute, block, x)
        return x


class Pathway(nn.Module):
    """One network: a convolution, a pooling, and four stages.

    Args:
        blocks: of each stage.
        width: channels of the first convolution.
        stem_frames: frames that it sees.
        stage_frames: frames that the first convolution of a block sees, in each stage.
        lateral: channels that join the inputs of each stage.
    """

    def __init__(
        self, blocks: Sequence[int], width: int, stem_frames: int, stage_frames: Sequence[int], lateral: Sequence[int]
    ) -> None:
        super().__init__()
        self.conv1 = Convolution(3, width, (stem_frames, STEM_SIDE, STEM_SIDE), (1, 2, 2))
        self.bn1 = FrozenNorm(width)
        self.widths = [width, *(4 * width * 2**stage for stage in range(4))]
        for stage, (inputs, outputs) in enumerate(pairwise(self.widths)):
            last = stage == 3
            sizes = (inputs + lateral[stage], outputs // 4, outputs, stage_frames[stage])
            # The last stage is dilated instead of strided: maps keep the stride of the one before.
            self.add_module(f"res_nl{stage + 1}", Stage(blocks[stage], *sizes, 2 if stage in (1, 2) else 1, 1 + last))

    def stem(self, x: Tensor) -> Tensor:
        """Compute what enters the first stage, without padding of the pooling."""
        return F.max_pool3d(F.relu(self.bn1(self.conv1(x))), (1, 3, 3), (1, 2, 2))

    def stages(self) -> list[nn.Module]:
        """List the stages."""
        return [self.get_submodule(f"res_nl{number}") for number in range(1, 5)]


class Lateral(nn.Module):
    """The fast pathway's channels for the slow one, at its frames."""

    def __init__(self, width: int, alpha: int) -> None:
        super().__init__()
        kernel, stride = (LATERAL_FRAMES, 1, 1), (alpha, 1, 1)
        self.conv = Convolution(width, LATERAL_WIDTH * width, kernel, stride, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        joined: Tensor = self.conv(x)
        return joined


class SlowFast(nn.Module):
    """Both pathways.

    Args:
        options: model section of the recipe.
        activation_checkpointing: recompute each residual block in the backward pass.

    Raises:
        RecipeError: it can't be built.
    """

    def __init__(self, options: Config, activation_checkpointing: Recompute = False) -> None:
        super().__init__()
        if found := problems_of_sizes(options):
            raise RecipeError(found)
        self.options, self.activation_checkpointing = options, activation_checkpointing
        blocks, fast = BLOCKS[options.depth], options.width // options.beta
        self.fast = Pathway(blocks, fast, 5, (3, 3, 3, 3), (0, 0, 0, 0))
        lateral = [LATERAL_WIDTH * width for width in self.fast.widths[:4]]
        self.slow = Pathway(blocks, options.width, 1, (1, 1, 3, 3), lateral)
        for stage, width in enumerate(self.fast.widths[:4]):
            # Below `fast`, as in the files.
            self.fast.add_module(f"Tconv{stage + 1}", Lateral(width, options.alpha))

    def forward(self, video: Tensor, starts: Tensor | None = None) -> list[Tensor]:
        """Compute maps; see `forward_features`."""
        return self.forward_features(video, starts)

    def forward_features(self, video: Tensor, starts: Tensor | None = None) -> list[Tensor]:
        """Compute the maps of both pathways.

        Args:
            video: normalised pixels of consecutive frames [B, T, H, W, 3].
            starts: first frame of each clip's slow pathway, int64 [B] below tau; None: the fourth.

        Returns:
            slow [B, 32 width, T/tau, H/16, W/16] and fast [B, 32 width/beta, T alpha/tau, H/16, W/16], about: the first
            pooling is not padded.
        """
        slow, fast = (self._laid_out(frames) for frames in split_pathways(video, self.options, starts))
        slow, fast = self.slow.stem(slow), self.fast.stem(fast)
        for number, (wide, thin) in enumerate(zip(self.slow.stages(), self.fast.stages(), strict=True), 1):
            joined = self.fast.get_submodule(f"Tconv{number}")(fast)
            slow = wide(torch.cat((slow, joined), dim=1), self.activation_checkpointing)
            fast = thin(fast, self.activation_checkpointing)
        return [slow, fast]

    def _laid_out(self, frames: Tensor) -> Tensor:
        return frames.permute(0, 4, 1, 2, 3).to(self.slow.conv1.weight.dtype)


def split_pathways(video: Tensor, options: Config, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Take the frames of each pathway from clips [B, T, H, W, 3]; the fast one begins with the first frame."""
    rows = torch.arange(len(video), device=video.device)[:, None]
    begin = rows.new_full((len(video), 1), min(SLOW_START, options.tau - 1)) if starts is None else starts[:, None]
    frames = torch.arange(0, video.shape[1], options.tau, device=video.device)
    return video[rows, begin + frames], video[:, :: options.tau // options.alpha]


def problems_of_sizes(options: Config) -> list[str]:
    """List what keeps the network from being built."""
    found = [
        f"model.{name}={getattr(options, name)}, allowed: 1 or more"
        for name in ("width", "tau", "alpha", "beta")
        if getattr(options, name) < 1
    ]
    if options.depth not in BLOCKS:
        found.append(f"model.depth={options.depth}, allowed: {', '.join(map(str, BLOCKS))}")
    if not found and options.tau % options.alpha:
        found.append(f"model.tau={options.tau}: no multiple of model.alpha={options.alpha}")
    if not found and options.width % options.beta:
        found.append(f"model.width={options.width}: no multiple of model.beta={options.beta}")
    return found


class SlowFastArchitecture(MapsBackbone):
    """SlowFast as a recipe describes it; its input is clips of consecutive frames."""

    def problems(self) -> list[str]:
        found, frames = problems_of_sizes(self.config), self.input.size[0]
        if not found and frames % self.config.tau:
            found.append(f"input.frames={frames}: no multiple of model.tau={self.config.tau}")
        if getattr(self.input, "stride", 1) != 1:
            found.append(f"input.stride={self.input.stride}, allowed with slowfast: 1, it takes frames itself")
        return found + side_problems(self.input.size, self.config.name, STEM_SIDE, "the stems' window")

    def build(self, activation_checkpointing: Recompute = False) -> SlowFast:
        return SlowFast(self.config, activation_checkpointing)

    def maps(self) -> MapsShape:
        config, frames = self.config, self.input.size[0]
        channels = 32 * config.width
        slow = frames // config.tau
        return MapsShape((channels, channels // config.beta), (slow, slow * config.alpha), 1 / STRIDE)

    def start_choices(self) -> int:
        return self.config.tau if self.config.slow_jitter else 1

    def cost(self) -> Cost:
        """Count what convolutions multiply, on tensors that take no memory."""
        macs = dict.fromkeys(("slow pathway", "fast pathway", "lateral connections"), 0.0)
        with torch.device("meta"):
            model, clip = self.build(), torch.empty(1, *self.input.size, 3)
        for name, layer in model.named_modules():
            if isinstance(layer, Convolution):
                part = "lateral connections" if "Tconv" in name else f"{name.partition('.')[0]} pathway"
                layer.register_forward_hook(_counting(macs, part))
        with torch.no_grad():
            model(clip)
        return Cost(macs)


def _counting(macs: dict[str, float], part: str) -> Callable[[Convolution, Any, Tensor], None]:
    def hook(layer: Convolution, _: Any, output: Tensor) -> None:
        macs[part] += float(output[0, 0].numel() * layer.weight.numel())

    return hook


ARCHITECTURE = SlowFastArchitecture

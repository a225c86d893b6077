"""Parts of residual networks of bottleneck blocks for single frames (He et al. 2015), which models over time build on.

Parameters are named as in torchvision below a block: conv1, bn1, ..., downsample.0, downsample.1.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Blocks of each stage, by depth of the network.
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
#: Outputs of a block for each channel inside of it.
EXPANSION = 4
#: Side of the stem's window, pixels.
STEM_WINDOW = 7


class FrameConvolution(nn.Conv2d):
    """Convolution padded to keep the size that strides leave; Kaiming-normal weight, a bias as torch begins it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = False, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, bias=bias, groups=groups)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


class FrameStem(nn.Module):
    """7x7 convolution, batch norm and pooling: a quarter of the size."""

    def __init__(self, inputs: int, width: int, bias: bool) -> None:
        super().__init__()
        self.conv = FrameConvolution(inputs, width, STEM_WINDOW, 2, bias)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Compute [N, width, H/4, W/4] of [N, inputs, H, W]."""
        return F.max_pool2d(F.relu(self.bn(self.conv(x))), 3, 2, 1)


class FrameBottleneck(nn.Module):
    """Three convolutions beside a shortcut; subclasses mix frames in one of two places.

    Args:
        inputs: channels that enter.
        planes: channels inside; 4 times as many leave.
        stride: of the 3x3 convolution.
        bias: whether convolutions have one.
    """

    downsample: nn.Module | None

    def __init__(self, inputs: int, planes: int, stride: int, bias: bool) -> None:
        super().__init__()
        outputs = EXPANSION * planes
        self.conv1, self.bn1 = FrameConvolution(inputs, planes, 1, bias=bias), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = FrameConvolution(planes, planes, 3, stride, bias), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = FrameConvolution(planes, outputs, 1, bias=bias), nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            shortcut = FrameConvolution(inputs, outputs, 1, stride, bias)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def entering(self, x: Tensor) -> Tensor:
        """Change what enters the first convolution, [N, inputs, H, W]; the shortcut has it as it is."""
        return x

    def between(self, x: Tensor) -> Tensor:
        """Change what enters the 3x3 convolution, [N, planes, H, W]."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(self.entering(x))))
        y = F.relu(self.bn2(self.conv2(self.between(y))))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class MakeBlock(Protocol):
    """Builds a block of so many inputs, channels inside, and stride."""

    def __call__(self, inputs: int, planes: int, stride: int, /) -> FrameBottleneck: ...


def build_stage(blocks: int, inputs: int, planes: int, stride: int, make: MakeBlock) -> nn.Sequential:
    """Stack the blocks of a stage, the first of which has the stride."""
    later = (make(EXPANSION * planes, planes, 1) for _ in range(blocks - 1))
    return nn.Sequential(make(inputs, planes, stride), *later)


def build_stages(width: int, blocks: Sequence[int], makes: Sequence[MakeBlock]) -> nn.ModuleList:
    """Build the stages of a network whose stem gives `width` channels, each with its own kind of block."""
    stages, inputs = nn.ModuleList(), width
    for stage, (count, make) in enumerate(zip(blocks, makes, strict=True)):
        planes = width * 2**stage
        stages.append(build_stage(count, inputs, planes, 1 if stage == 0 else 2, make))
        inputs = EXPANSION * planes
    return stages


def layer_of_stage(name: str, blocks: Sequence[int]) -> tuple[int, int]:
    """Tell the layer of a parameter of `stages.i.j`, `head` or what stands before them, and the last layer's number."""
    parts, last = name.split("."), sum(blocks) + 1
    if parts[0] == "stages":
        return sum(blocks[: int(parts[1])]) + int(parts[2]) + 1, last
    return (last if parts[0] == "head" else 0), last


def count_products(model: nn.Module, pixels: Tensor, part_of: Callable[[str], str]) -> dict[str, float]:
    """Count multiply-accumulates of a pass, on tensors that take no memory: convolutions and linear layers.

    Args:
        model: on the meta device.
        pixels: on the meta device, of one row.
        part_of: part of the model that a layer of this name is counted for.
    """
    macs: dict[str, float] = {}
    for name, layer in _products(model):
        layer.register_forward_hook(_counting(macs, part_of(name)))
    with torch.no_grad():
        model.eval()(pixels)
    return macs


def _products(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    yield from ((name, layer) for name, layer in model.named_modules() if isinstance(layer, kinds))


def _counting(macs: dict[str, float], part: str) -> Callable[[Any, Any, Tensor], None]:
    def hook(layer: Any, _: Any, output: Tensor) -> None:
        # Every output is a sum over what one of its weights' rows has.
        macs[part] = macs.get(part, 0.0) + float(output.numel() * layer.weight[0].numel())

    return hook


def stage_problems(options: Any, *sizes: str) -> list[str]:
    """List what keeps a network of four stages from being built: sizes below 1, `blocks`, `dropout`."""
    found = [
        f"model.{name}={getattr(options, name)}, allowed: 1 or more" for name in sizes if getattr(options, name) < 1
    ]
    if options.blocks is not None and (len(options.blocks) != 4 or min(options.blocks, default=0) < 1):
        found.append(f"model.blocks={options.blocks}, allowed: four numbers from 1")
    if not 0 <= options.dropout < 1:
        found.append(f"model.dropout={options.dropout}, allowed: a probability from 0 to below 1")
    return found

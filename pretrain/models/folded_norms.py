"""Batch norms that become part of the convolutions in front of them, for inference."""

import copy
from typing import Any, ClassVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class ConvolutionsBeforeNorms(nn.Module):
    """A module that says which of its norms stand right behind a convolution.

    Attributes:
        NORMS: names of a convolution and of its norm, in this module.
    """

    NORMS: ClassVar[tuple[tuple[str, str], ...]] = ()


def with_folded_norms(module: nn.Module) -> nn.Module:
    """Copy a module for inference, batch norms behind convolutions taken up by their weights and biases.

    Answers are the same but for rounding. Other norms stay: they depend on the picture.
    """
    folded = copy.deepcopy(module).eval()
    for part in [*folded.modules()]:
        if not isinstance(part, ConvolutionsBeforeNorms):
            continue
        for convolution, norm in part.NORMS:
            found: Any = part.get_submodule(norm)
            if isinstance(found, nn.BatchNorm2d):
                before: Any = part.get_submodule(convolution)
                part.set_submodule(convolution, fuse_conv_bn_eval(before, found))
                part.set_submodule(norm, nn.Identity())
    return folded

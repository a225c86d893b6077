"""Perceptrons behind an encoder that contrastive methods compare by, named as in MoCo v3's code (0, 1, 3, 4, ...)."""

from itertools import pairwise

from torch import nn


def contrastive_head(sizes: list[int], last_norm: bool = True) -> nn.Sequential:
    """Build linear layers without bias, with batch norm and ReLU between them.

    The linear layers begin as torch's do. Batch norms run in training mode on both sides of a momentum teacher.

    Args:
        sizes: channels that enter, those of hidden layers, those that leave.
        last_norm: a batch norm without parameters behind the last layer.
    """
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(sizes), start=2):
        layers.append(nn.Linear(inputs, outputs, bias=False))
        if number < len(sizes):
            layers += [nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm1d(outputs, affine=False))
    return nn.Sequential(*layers)

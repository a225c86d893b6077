"""Names of TDN's weights: released checkpoints and torchvision's ResNet in, released ones out.

Layouts: systems/tdn.md sections 3.3 and 9.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from pretrain.errors import WeightsError
from pretrain.models.official_names import Renamed

#: Stem of the released code that takes no part in a forward pass.
UNUSED = "base_model.conv1_temp."
#: Released names before a block, and ours.
PREFIXES = {
    "base_model.conv1.": "stem.conv.",
    "base_model.bn1.": "stem.bn.",
    "base_model.conv1_5.0.": "short_term.stem.conv.",
    "base_model.conv1_5.1.": "short_term.stem.bn.",
    "base_model.resnext_layer1.": "short_term.stage.",
    "base_model.layer1_bak.": "stages.0.",
    "base_model.layer2_bak.": "stages.1.",
    "base_model.layer3_bak.": "stages.2.",
    "base_model.layer4_bak.": "stages.3.",
    "base_model.fc.": "head.",
    "new_fc.": "head.",
}
#: The same inside a block.
PARTS = {
    ".mse.conv1.": ".long_term.squeeze.",
    ".mse.bn1.": ".long_term.squeeze_bn.",
    ".mse.conv2.": ".long_term.neighbour.",
    ".mse.conv3.": ".long_term.expand.",
    ".mse.bn3.": ".long_term.expand_bn.",
    ".mse.conv3_smallscale2.": ".long_term.coarse.",
    ".mse.bn3_smallscale2.": ".long_term.coarse_bn.",
    ".mse.conv3_smallscale4.": ".long_term.fine.",
    ".mse.bn3_smallscale4.": ".long_term.fine_bn.",
    ".shift.conv.": ".temporal.conv.",
}
#: What a residual network for pictures has nothing for.
NOT_IN_PICTURES = ("*.conv?.bias", "*.conv.bias", "*.downsample.0.bias", "short_term.stem.bn.*", "*.long_term.*",
                   "*.temporal.*", "head.*", "*.num_batches_tracked")  # fmt: skip


def renamed(state: Mapping[str, Tensor]) -> Renamed:
    """Bring weights under TDN's names: its own, those of a released checkpoint, or torchvision's ResNet-50 or 101.

    Raises:
        WeightsError: two classifiers in one file.
    """
    if any(key.startswith("base_model.") for key in state):
        return Renamed(_from_released(state), "released TDN", may_ignore=(f"{UNUSED}*",))
    if "conv1.weight" in state and any(key.startswith("layer1.0.") for key in state):
        return Renamed(_from_pictures(state), "torchvision ResNet", NOT_IN_PICTURES, ("fc.*", "short_term.*"))
    return Renamed(dict(state), "own")


def official_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the names of a released checkpoint, with `new_fc` as its head and zeros for the stem that nothing uses."""
    prefixes = {ours: theirs for theirs, ours in PREFIXES.items()}
    parts = {ours: theirs for theirs, ours in PARTS.items()}
    named = {_replaced(key, prefixes, parts): value for key, value in state.items()}
    weight = named["base_model.conv1.weight"]
    return named | {f"{UNUSED}weight": torch.zeros_like(weight), f"{UNUSED}bias": weight.new_zeros(len(weight))}


def _from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _replaced(key, PREFIXES, PARTS)
        if name in named:
            raise WeightsError(f"{key}: a second tensor for {name} in one file; delete one of them")
        named[name] = value
    return named


def _from_pictures(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take a network for pictures twice: as the main path, and its stem and first stage for differences."""
    first = state["conv1.weight"]
    named = {"short_term.stem.conv.weight": first.mean(1, keepdim=True).repeat(1, 12, 1, 1)}
    for key, value in state.items():
        stage = re.fullmatch(r"layer(\d)\.(.*)", key)
        if stage:
            named[f"stages.{int(stage[1]) - 1}.{stage[2]}"] = value
            if stage[1] == "1":
                named[f"short_term.stage.{stage[2]}"] = value
        else:
            named[re.sub(r"^bn1\.", "stem.bn.", re.sub(r"^conv1\.", "stem.conv.", key))] = value
    return named


def _replaced(key: str, prefixes: Mapping[str, str], parts: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if key.startswith(old):
            key = new + key.removeprefix(old)
            break
    for old, new in parts.items():
        key = key.replace(old, new)
    return key

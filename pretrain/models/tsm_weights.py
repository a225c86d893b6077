"""Names of TSM's weights: those of MMAction2, which MGSampler forks, of TSM's own code, and of torchvision's ResNet."""

import re
from collections.abc import Mapping

from torch import Tensor

from pretrain.errors import WeightsError
from pretrain.models.official_names import Renamed

#: Names of the three, without their prefixes, by pattern, and ours.
PATTERNS = (
    (r"^conv1\.(conv\.)?weight$", "stem.conv.weight"),
    (r"^(conv1\.bn|bn1)\.", "stem.bn."),
    (r"^stages\.(\d+\.\d+)\.conv(\d)\.(conv\.)?(net\.)?weight$", r"stages.\1.conv\2.weight"),
    (r"^stages\.(\d+\.\d+)\.conv(\d)\.bn\.", r"stages.\1.bn\2."),
    (r"\.downsample\.conv\.", ".downsample.0."),
    (r"\.downsample\.bn\.", ".downsample.1."),
)
#: Prefixes by layout, and what the classifier is called there.
LAYOUTS = {
    "MMAction2": ("backbone.", "cls_head.fc_cls."),
    "TSM": ("base_model.", "new_fc."),
    "torchvision ResNet": ("", None),
}


def renamed(state: Mapping[str, Tensor]) -> Renamed:
    """Bring weights under our TSM's names.

    Raises:
        WeightsError: two tensors for one of them.
    """
    layout = _layout_of(state)
    if layout is None:
        return Renamed(dict(state), "own")
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _own_name(key, layout)
        if name in named:
            raise WeightsError(f"{key}: a second tensor for {name} in one file; delete one of them")
        named[name] = value
    if layout == "torchvision ResNet":
        return Renamed(named, layout, ("head.*", "*.num_batches_tracked"), ("fc.*",))
    return Renamed(named, layout)


def official_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give MMAction2's names: every first convolution of a block lies inside of its shift, in `net`."""
    return {_official_name(key): value for key, value in state.items()}


def _layout_of(state: Mapping[str, Tensor]) -> str | None:
    for layout, (prefix, _) in LAYOUTS.items():
        if any(key.startswith(f"{prefix}layer1.0.") for key in state):
            return layout
    return None


def _own_name(key: str, layout: str) -> str:
    prefix, head = LAYOUTS[layout]
    if head is not None and key.startswith(head):
        return f"head.{key.removeprefix(head)}"
    name = key.removeprefix(prefix)
    # Where dropout is 0 TSM's code calls its classifier so.
    if layout == "TSM" and name.startswith("fc."):
        return f"head.{name.removeprefix('fc.')}"
    name = re.sub(r"^layer(\d)\.", lambda found: f"stages.{int(found[1]) - 1}.", name)
    for pattern, ours in PATTERNS:
        name = re.sub(pattern, ours, name)
    return name


def _official_name(key: str) -> str:
    if key.startswith("head."):
        return f"cls_head.fc_cls.{key.removeprefix('head.')}"
    key = re.sub(r"^stem\.(conv|bn)\.", r"conv1.\1.", key)
    key = re.sub(r"^stages\.(\d)\.", lambda found: f"layer{int(found[1]) + 1}.", key)
    key = re.sub(r"\.bn(\d)\.", r".conv\1.bn.", key)
    key = re.sub(r"(\.\d+\.conv\d)\.weight$", r"\1.conv.weight", key)
    key = re.sub(r"\.conv1\.conv\.weight$", ".conv1.conv.net.weight", key)
    key = re.sub(r"\.downsample\.0\.", ".downsample.conv.", key)
    return "backbone." + re.sub(r"\.downsample\.1\.", ".downsample.bn.", key)

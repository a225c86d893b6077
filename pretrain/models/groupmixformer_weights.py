"""Sizes of a GroupMixFormer from its weights: published names don't tell them.

The configuration named Large in the official repository has other sizes than the paper's table, and the released file's
are known from its tensors alone (systems/groupmixformer.md, section 3).
"""

import re
from collections.abc import Mapping

from torch import Tensor

from pretrain.errors import WeightsError
from pretrain.models.groupmixformer import SIZES, STAGES, Config, resolve

#: First and widest weight of a block, by stage and block.
HIDDEN = re.compile(r"groupmixformer_backbone\.(\d+)\.gma_stage\.(\d+)\.mlp\.fc1\.weight")


def config_of(state: Mapping[str, Tensor]) -> Config:
    """Read the model section that fits weights in official names; the published size where it is one's.

    Raises:
        WeightsError: they are no GroupMixFormer's.
    """
    blocks = {(int(found[1]), int(found[2])): state[key].shape for key in state if (found := HIDDEN.fullmatch(key))}
    stages = [[shape for (stage, _), shape in sorted(blocks.items()) if stage == index] for index in range(STAGES)]
    if not all(stages):
        raise WeightsError(f"no GroupMixFormer: weights of {sum(map(bool, stages))} stages found, needed: {STAGES}")
    dims, depths = [stage[0][1] for stage in stages], [len(stage) for stage in stages]
    ratios = [stage[0][0] / stage[0][1] for stage in stages]
    classes = len(state["head.bias"]) if "head.bias" in state else 0
    for size, (*published, _) in SIZES.items():
        if published == [dims, depths, ratios]:
            return Config(size=size, classes=classes)  # type: ignore[arg-type]
    return Config(size="custom", dims=dims, depths=depths, mlp_ratios=ratios, classes=classes, drop_path=0.0)


def check_fit(config: Config, state: Mapping[str, Tensor]) -> None:
    """Compare the sizes and norms of weights in official names with a recipe's.

    Raises:
        WeightsError: they are of another size, or of other norms; says with which recipe they fit.
    """
    if not any(HIDDEN.fullmatch(key) for key in state):
        return
    norm = "batch" if any(key.endswith("running_mean") for key in state) else "group"
    if norm != config.norm:
        raise WeightsError(f"weights to start from have {norm} norms, which {config.norm} norms can't replace: set "
                           f"model.norm={norm}")  # fmt: skip
    theirs, ours = resolve(config_of(state)), resolve(config)
    if (theirs.dims, theirs.depths, theirs.mlp_ratios) == (ours.dims, ours.depths, ours.mlp_ratios):
        return
    given = f"model.dims={theirs.dims} model.depths={theirs.depths} model.mlp_ratios={theirs.mlp_ratios}".replace(
        ", ", ","
    )
    raise WeightsError(f"weights to start from are of another size: set {given}")

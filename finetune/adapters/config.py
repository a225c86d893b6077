"""Recipe section `tune:`, which says what is trained."""

from dataclasses import dataclass, field
from typing import Literal

from pretrain.recipe.describe import suggestion

#: Linear layers of a block that a low-rank update can go to.
LORA_TARGETS = ("query", "key", "value", "proj", "fc1", "fc2")


@dataclass
class AdaptFormer:
    """A bottleneck in every block, beside or behind its MLP (Chen et al. 2022)."""

    bottleneck: int = 64
    """channels of the bottleneck"""
    form: Literal["parallel", "sequential"] = "parallel"
    """parallel: input is the residual stream before norm2; sequential: input is the MLP's branch"""
    norm: Literal["none", "in", "out"] = "none"
    """layer norm in front of the bottleneck, or behind it"""
    scale: float = 0.1
    """factor on the bottleneck's output, where it is constant"""
    learned_scale: Literal["none", "scalar", "channel"] = "none"
    """learn the factor instead, from 1: one for all, or one a channel (not published)"""
    dropout: float = 0.0
    """dropout rate inside the bottleneck (published image model: 0.1)"""
    init: Literal["zero", "released"] = "zero"
    """zero: starts as the frozen model; released: the published video program's, which does not"""


@dataclass
class Prompts:
    """Learned tokens (visual prompt tuning, Jia et al. 2022)."""

    tokens: int = 1
    """prompts of a block"""
    form: Literal["deep", "shallow"] = "deep"
    """deep: new ones in every block, cut off behind it; shallow: in front of the first block only"""


@dataclass
class LowRank:
    """Low-rank updates of linear layers (LoRA, Hu et al. 2021)."""

    rank: int = 8
    """rank of an update"""
    alpha: float = 16.0
    """an update is multiplied by alpha / rank"""
    dropout: float = 0.0
    """dropout rate on an update's input"""
    targets: list[str] = field(default_factory=lambda: ["query", "value"])
    """layers that get one: query, key, value, proj, fc1, fc2"""


@dataclass
class Tune:
    """Choice of the parameters that are trained. The head, and fc_norm where there is one, always are."""

    method: Literal["full", "linear", "adaptformer", "vpt", "lora", "bitfit"] = "full"
    """full: everything; linear: nothing else; bitfit: all biases; the others: what their section adds"""
    adaptformer: AdaptFormer = field(default_factory=AdaptFormer)
    """with method adaptformer"""
    vpt: Prompts = field(default_factory=Prompts)
    """with method vpt"""
    lora: LowRank = field(default_factory=LowRank)
    """with method lora"""


def check(tune: Tune) -> list[str]:
    """List what can't be built, whatever the model is."""
    bottleneck, vpt, lora = tune.adaptformer, tune.vpt, tune.lora
    sizes = {
        "adaptformer.bottleneck": bottleneck.bottleneck,
        "vpt.tokens": vpt.tokens,
        "lora.rank": lora.rank,
    }
    problems = [f"tune.{key}={size}: at least 1 is needed" for key, size in sizes.items() if size < 1]
    rates = {"adaptformer.dropout": bottleneck.dropout, "lora.dropout": lora.dropout}
    problems += [f"tune.{key}={rate}: a probability from 0 to below 1 is needed" for key, rate in rates.items()
                 if not 0 <= rate < 1]  # fmt: skip
    unknown = [target for target in lora.targets if target not in LORA_TARGETS]
    problems += [f"tune.lora.targets: no layer {name!r}{suggestion(name, list(LORA_TARGETS))}" for name in unknown]
    if not lora.targets:
        problems.append(f"tune.lora.targets: empty; choose of {', '.join(LORA_TARGETS)}")
    return problems

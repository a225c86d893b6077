"""Weights that CycleACR starts from: a backbone's, or a whole model's, released ones too (systems/cycleacr.md, 7).

Released names are ours behind prefixes: `backbone.` or nothing before the backbone's, `roi_heads.action.` where ours
are `head.`; their 1x1 convolutions have three axes of one element more. A released memory is not taken over: it is of
the training set, and a run fills its own.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from pretrain.errors import WeightsError
from pretrain.models import weights
from pretrain.models.backbone import Backbone
from pretrain.models.classifier_weights import classifier_state, load_pretrained
from pretrain.models.weights import LoadReport, load_state

#: Prefixes of the released head; `feature_extractor.` and `predictor.` are the names of the head by itself.
HEAD_PREFIXES = ("roi_heads.action.", "head.")
#: What classifiers of SlowFast and Video Swin have besides, counters of batch norms, which frozen ones don't keep, and
#: Video Swin's numbers of places, which are computed.
IGNORED = (
    "*.num_batches_tracked", "*.relative_position_index", "head.projection.*", "head.cls_head.*", "head.fc.*", "fc.*",
    "cls.*", "cls_head.*",
)  # fmt: skip


def load_start(
    model: nn.Module, path: str, head: Literal["match", "new"] = "match", raw: Mapping[str, Tensor] | None = None
) -> LoadReport:
    """Start a backbone with CycleACR's head from a checkpoint, with a report.

    Args:
        model: the backbone, its `head` a `CycleACRHead`; without adapters.
        path: file or folder.
        head: `match` takes the file's head where it is one of this kind, `new` never.
        raw: the weights, where the caller has read them.

    Raises:
        WeightsError: the backbone is incomplete, or the file's head is of another shape.
    """
    state = official_names(weights.official_state(raw if raw is not None else weights.read_raw(path)))
    own = {key for key in model.state_dict(keep_vars=True) if key.startswith("head.")}
    theirs = {key for key in state if key.startswith("head.")}
    takes = head == "match" and bool(theirs & own)
    if takes and (missing := sorted(own - theirs)):
        raise WeightsError(
            f"{path}: has a CycleACR head without {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}: set "
            "objective as it was trained (depth, instance_depth, position_codes, outputs), or start.head=new"
        )
    kept = {key: value for key, value in state.items() if takes or key not in theirs}
    if not isinstance(model, Backbone) or takes:
        return load_state(model, kept, LoadReport(path, "CycleACR"), [] if takes else ["head.*"], IGNORED)
    return load_pretrained(model, path, head="match", raw=kept, fresh_norm=True)  # type: ignore[arg-type]


def official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring released names to those of a backbone with CycleACR's head.

    Raises:
        WeightsError: two tensors of one name.
    """
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        prefix = next((one for one in HEAD_PREFIXES if key.startswith(one)), None)
        name = key if prefix is None else f"head.{key.removeprefix(prefix)}"
        if name in named:
            raise WeightsError(f"{key}: a second tensor for {name} in one file; delete one of them")
        named[name] = value
    return classifier_state(named)

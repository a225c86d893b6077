"""Layout of SNCLR's released trainer, in and out (systems/snclr.md, section 6).

Its `state_dict` holds `module.base_encoder.*`, `module.momentum_encoder.*` and `module.predictor.*`; the projector
takes the place of the encoder's head: `head.N` in a ViT, `fc.N` in a ResNet. It holds no queue.
"""

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.errors import WeightsError
from pretrain.models.formats import plain_state
from pretrain.models.official_names import OfficialNames
from pretrain.models.weights import LoadReport, load_state, official_state, strip_wrappers
from pretrain.runtime import storage

BASE, MOMENTUM, PREDICTOR = "base_encoder.", "momentum_encoder.", "predictor."
LAYOUT = "SNCLR"


def load_released(objective: Any, path: str, raw: Mapping[str, Tensor]) -> None:
    """Load a released checkpoint into an SNCLRObjective, or an encoder alone, from which the momentum encoder starts.

    Raises:
        WeightsError: weights are missing, unexpected or of another shape.
    """
    state = strip_wrappers(raw)
    if not any(key.startswith(BASE) for key in state):
        load_encoder(objective.model, path, state)
        objective.restart_teacher()
        return
    strangers = [key for key in state if not key.startswith((BASE, MOMENTUM, PREDICTOR))]
    if strangers:
        raise WeightsError(
            f"{path}: found {', '.join(strangers[:5])} beside {BASE}*, allowed: {MOMENTUM}* and {PREDICTOR}*"
        )
    _load_branch(objective.model, objective.projector, f"{path}: {BASE}*", _below(state, BASE))
    _load(objective.predictor, f"{path}: {PREDICTOR}*", _below(state, PREDICTOR))
    teacher, projector = objective.teacher.twin, objective.key_projector.twin
    _load_branch(teacher, projector, f"{path}: {MOMENTUM}*", _below(state, MOMENTUM))
    for teacher in (objective.teacher, objective.key_projector):
        teacher.average.reset(teacher.twin)


def load_encoder(model: nn.Module, path: str, state: Mapping[str, Tensor]) -> None:
    """Load an encoder in its own layout or its published one; a classifier's head has no place in it."""
    if isinstance(model, OfficialNames):
        own = model.from_official(state)
        report = LoadReport(path, own.layout)
        load_state(model, own.state, report, own.may_miss, (*own.may_ignore, "head.*"))
    else:
        load_state(model, official_state(state), LoadReport(path, "official"), allow_unexpected=("head.*",))


def write_released(objective: Any, dest: str) -> str:
    """Write a checkpoint as the released trainer does; its optimiser's and scaler's states are left out."""
    buffer = io.BytesIO()
    torch.save({"epoch": 0, "arch": LAYOUT, "state_dict": released_state(objective)}, buffer)
    storage.write_bytes(dest, buffer.getvalue())
    return ""


def released_state(objective: Any) -> dict[str, Tensor]:
    """Give the weights of an SNCLRObjective under the released names."""
    twins = objective.teacher.twin, objective.key_projector.twin
    named = {
        **_named(BASE, _branch(objective.model, objective.projector)),
        **_named(MOMENTUM, _branch(*twins)),
        **_named(PREDICTOR, plain_state(objective.predictor)),
    }
    return _named("module.", named)


def _load_branch(model: Any, projector: Any, path: str, state: Mapping[str, Tensor]) -> None:
    head = _head(model)
    load_encoder(model, path, {key: value for key, value in state.items() if not key.startswith(head)})
    _load(projector, f"{path}.{head}*", _below(state, head))


def _load(module: nn.Module, path: str, state: Mapping[str, Tensor]) -> None:
    load_state(module, state, LoadReport(path, LAYOUT))


def _branch(model: nn.Module, projector: nn.Module) -> dict[str, Tensor]:
    own = model.to_official() if isinstance(model, OfficialNames) else plain_state(model)
    return {**own, **_named(_head(model), plain_state(projector))}


def _head(model: nn.Module) -> str:
    """Tell what stands before the projector's names: torchvision's classifier is called fc."""
    return "fc." if isinstance(model, OfficialNames) else "head."


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _named(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}

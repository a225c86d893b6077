"""Import and export of EVAD's weights, in the official names (systems/evad.md sections 4 and 7).

A detector starts from a released one, from one of ours, or from a VideoMAE: pre-trained ones give encoder and, where
shapes are equal, the first blocks of the decoder; fine-tuned ones the encoder.
"""

import io
import logging
import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pretrain.models import weights
from pretrain.models.classifier_weights import classifier_state
from pretrain.models.evad.detector import EVAD
from pretrain.models.evad.localisation import NOTHING_WEIGHT
from pretrain.models.formats import plain_state
from pretrain.models.weights import LoadReport
from pretrain.runtime import storage

logger = logging.getLogger(__name__)

#: Prefix of everything that only a detector has.
HEAD = "det_head."
#: What a VideoMAE lacks of a detector.
NEW = (f"{HEAD}*", "fpn_*", "init_proposal_*")
#: What pre-trained and fine-tuned VideoMAEs have besides: of the decoder what has no place here, and classifiers.
LEFT_OUT = ("decoder.*", "encoder_to_decoder.*", "mask_token", "fc_norm.*", "head.*")
#: Buffer of the official loss, weights of person and no object; no parameter.
EMPTY_WEIGHT = "criterion.empty_weight"
#: Each decoder block's classifier of actions: as many rows as classes.
CLASSIFIERS = re.compile(r"det_head\.decoder\.blocks\.\d+\.action_logits\.(weight|bias)")


def load_detector(
    model: EVAD, path: str, raw: Mapping[str, Tensor], head: Literal["match", "new"] = "match"
) -> LoadReport:
    """Start a detector from weights, with a report.

    Args:
        model: the detector.
        path: that `raw` was read from, for the report.
        raw: weights of a detector or a VideoMAE, names as in the file.
        head: `match` takes a detector's classifiers of actions where their shapes fit, `new` never.

    Raises:
        WeightsError: the encoder is incomplete, or anything has another shape; nothing is loaded then.
    """
    state = weights.official_state(raw)
    report = LoadReport(path, weights.layout_of(raw))
    if any(key.startswith(HEAD) for key in state):
        return _load_whole(model, state, report, head)
    named = classifier_state(state)
    moved = _decoder_parts(model, named)
    if moved:
        logger.info("%s: %d tensors of the pre-training decoder begin the context decoder", path, len(moved))
    rest = {key: value for key, value in named.items() if f"{HEAD}{key}" not in moved}
    # Fine-tuned ones have fc_norm, of a mean, and no norm of the tokens: it starts at 1 and 0, as officially.
    allowed = (*NEW, "norm.*") if "norm.weight" not in rest else NEW
    return weights.load_state(model, rest | moved, report, allowed, LEFT_OUT)


def _load_whole(model: EVAD, state: Mapping[str, Tensor], report: LoadReport, head: str) -> LoadReport:
    own = _shapes(model)
    theirs = {key: tuple(value.shape) for key, value in state.items() if CLASSIFIERS.fullmatch(key)}
    fits = all(own.get(key) == shape for key, shape in theirs.items())
    if head == "match" and fits:
        return weights.load_state(model, state, report, (), (EMPTY_WEIGHT,))
    rows = sorted({shape[0] for shape in theirs.values()})
    why = "new ones are asked for" if head == "new" else f"the model has {model.config.classes} classes"
    logger.warning("%s: its classifiers of %s actions are left out: %s", report.source, rows, why)
    kept = {key: value for key, value in state.items() if key not in theirs}
    return weights.load_state(model, kept, report, tuple(theirs), (EMPTY_WEIGHT,))


def _decoder_parts(model: EVAD, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Find what of a pre-training decoder has a place here: equal names and shapes, VideoMAE-B's 4 blocks say."""
    own, parts = _shapes(model), ("decoder.", "encoder_to_decoder.")
    named = {f"{HEAD}{key}": value for key, value in state.items() if key.startswith(parts)}
    return {key: value for key, value in named.items() if own.get(key) == tuple(value.shape)}


def _shapes(model: EVAD) -> dict[str, tuple[int, ...]]:
    # keep_vars, for parameters that ZeRO stage 3 has partitioned; see weights.load_state.
    return {key: weights.full_shape(value) for key, value in model.state_dict(keep_vars=True).items()}


def export_detector(model: EVAD, dest: str) -> None:
    """Write a .pth file as the official code reads it: `model_state`, with the buffer that its loss has.

    Args:
        model: the detector, not partitioned.
        dest: file, any fsspec URL.
    """
    buffer = io.BytesIO()
    state = plain_state(model) | {EMPTY_WEIGHT: torch.tensor([1.0, NOTHING_WEIGHT])}
    torch.save({"model_state": state, "epoch": 0}, buffer)
    storage.write_bytes(dest, buffer.getvalue())

"""Adapter files: what a method has trained, a few megabytes, in safetensors; the frozen backbone stays elsewhere.

A file holds the trainable parameters and the statistics of the head's batch norm (without them evaluation is wrong),
and in its header the options of the method and a hash of the frozen backbone, so that it fits no other one unnoticed.
"""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass

import safetensors.torch
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from finetune.adapters.attach import apply_tuning, is_trained
from finetune.adapters.config import Tune
from pretrain.errors import RecipeError, WeightsError
from pretrain.models.backbone import Backbone, build_head
from pretrain.models.weights import LoadReport, load_state
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json

logger = logging.getLogger(__name__)

FORMAT = "tubelet-adapter-1"


@dataclass(frozen=True)
class AdapterFile:
    """Content of an adapter file."""

    tune: Tune
    backbone: str
    tensors: dict[str, Tensor]


def save_adapter(model: Backbone, tune: Tune, dest: str) -> None:
    """Write what `tune` trains, beside the options that build it again.

    Args:
        model: with its parts attached, not partitioned.
        tune: as given to `apply_tuning`.
        dest: file, any fsspec URL.

    Raises:
        RecipeError: method `full` trains everything; save the whole model.
        WeightsError: ZeRO stage 3 holds only a part of the weights here.
    """
    if tune.method == "full":
        raise RecipeError("tune.method=full trains everything: there is no adapter to save, save the model")
    _refuse_partitioned(model)
    header = {"format": FORMAT, "tune": json.dumps(asdict(tune)), "backbone": backbone_hash(model, tune.method)}
    content = safetensors.torch.save(adapter_state(model, tune.method), header)
    storage.write_bytes(dest, content)
    logger.info("%s: adapter of method %s, %.1f MB", dest, tune.method, len(content) / 1e6)


def adapter_state(model: nn.Module, method: str) -> dict[str, Tensor]:
    """Collect trained parameters and the head's statistics, on the CPU."""
    # Of the state, not of the parameters: a batch norm's statistics are buffers.
    kept = [name for name in model.state_dict() if is_trained(name, method)]
    state = model.state_dict()
    return {name: state[name].detach().cpu().contiguous() for name in kept}


def read_adapter(path: str) -> AdapterFile:
    """Read options and tensors of an adapter file.

    Raises:
        WeightsError: the file isn't one.
    """
    content = storage.read_bytes(path)
    try:
        tensors = safetensors.torch.load(content)
        # safetensors' own reader drops what a header says beside the tensors.
        size = int.from_bytes(content[:8], "little")
        header = parse_json(content[8 : 8 + size]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError) as error:
        raise WeightsError(f"{path}: not a safetensors file ({error})") from error
    if header.get("format") != FORMAT:
        raise WeightsError(f"{path}: no adapter file (its header says format {header.get('format')!r}, not {FORMAT})")
    # Through the schema: an option that this release does not know is an error, not passed over.
    try:
        tune = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Tune), parse_json(header["tune"])))
        assert isinstance(tune, Tune)
        return AdapterFile(tune, header["backbone"], tensors)
    except (KeyError, ValueError, OmegaConfBaseException) as error:
        told = str(error).splitlines()[0]
        raise WeightsError(f"{path}: its header can't be read ({told}); a newer release may have written it") from error


def load_adapter(model: Backbone, path: str, any_backbone: bool = False) -> Tune:
    """Put a saved adapter on a model that has its backbone's weights and no adapter yet; freeze the rest.

    The head is replaced by one with the file's classes.

    Args:
        any_backbone: don't compare the backbone with the one that the adapter was trained on.

    Raises:
        WeightsError: another backbone, tensors that don't fit, or a model partitioned by ZeRO stage 3.
    """
    _refuse_partitioned(model)
    file = read_adapter(path)
    model.head = head_of(file.tensors, model)
    apply_tuning(model, file.tune)
    found = backbone_hash(model, file.tune.method)
    if found != file.backbone and not any_backbone:
        raise WeightsError(
            f"{path}: trained on another backbone (hash {file.backbone[:12]}, this one has {found[:12]}); load the "
            "weights that it was trained from, or allow any backbone"
        )
    frozen = [name for name in model.state_dict() if not is_trained(name, file.tune.method)]
    # Only frozen weights may be missing: a trained one that stays as it was drawn would spoil the adapter silently.
    load_state(model, file.tensors, LoadReport(path, "adapter"), allow_missing=frozen)
    return file.tune


def head_of(tensors: dict[str, Tensor], model: Backbone) -> nn.Module:
    """Build an untrained head of the kind and the number of classes that an adapter's tensors have."""
    batch_norm = "head.1.weight" in tensors
    weight = tensors.get("head.1.weight" if batch_norm else "head.weight")
    classes = 0 if weight is None else len(weight)
    head = build_head("batch_norm" if batch_norm else "linear", model.dim, classes, scale=1.0)
    example = next(model.parameters())
    return head.to(example.device, example.dtype)


def _refuse_partitioned(model: nn.Module) -> None:
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise WeightsError("the model is partitioned by ZeRO stage 3: use a model built from consolidated weights")


@torch.no_grad()
def backbone_hash(model: nn.Module, method: str) -> str:
    """Compute the SHA-256 over names, shapes and values of what a method doesn't train.

    Values are rounded to bfloat16 first, so that a backbone cast to bfloat16 for training has the same hash.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        if not is_trained(name, method):
            # As int16, since NumPy has no bfloat16.
            rounded = value.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16)
            digest.update(f"{name}{list(value.shape)}".encode())
            digest.update(rounded.numpy().tobytes())
    return digest.hexdigest()

"""Frozen towers: networks that an objective asks and never trains, outside of everything that is trained or saved.

An objective keeps a `Frozen`, which is no module: so its network is no submodule, and neither the optimiser, gradients,
ZeRO nor checkpoints know it. A checkpoint notes the name and a hash of its weights instead (`frozen_notes`), and a
resume with others is refused (`check_frozen`).
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from pretrain.errors import CheckpointError, StorageError, WeightsError
from pretrain.models.weight_files import FOLDER_FILES, part_names
from pretrain.runtime import storage
from pretrain.runtime.dtypes import DTYPES
from pretrain.runtime.tensors import weights_digest

logger = logging.getLogger(__name__)

#: In front of `owner/name` or `owner/name@revision`: a model on the Hugging Face hub, which may be downloaded.
HUB = "hub:"
#: What is fetched from the hub beside weights.
CONFIGS = ("config.json", "open_clip_config.json")

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Footprint:
    """Memory of a frozen tower on each rank, without activations."""

    parameters: int
    bytes: float
    remark: str
    """for the dry run"""


class Frozen(Generic[M]):
    """A network with fixed weights, built once, when it is first asked or by `load`.

    Args:
        key: of the recipe that names the weights, for messages: `objective.teacher.weights`.
        weights: file or folder, any fsspec URL, or `hub:owner/name[@revision]`; see `locate`.
        build: makes the network; its draws change nobody else's.
        fill: copies weights from what `locate` gave into it, strictly.
        dtype: format of its weights and activations.
        name: for the log; default: the key's part before the last dot.
        noted: whether checkpoints hold its hash, for which it is loaded; false where something else compares it.
    """

    def __init__(
        self,
        key: str,
        weights: str,
        build: Callable[[], M],
        fill: Callable[[M, str], object],
        dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
        name: str | None = None,
        noted: bool = True,
    ) -> None:
        self.key, self.weights, self.dtype, self.noted = key, weights, dtype, noted
        self.name = name or key.split(".")[-2 if "." in key else 0]
        self._build, self._fill = build, fill
        self._model: M | None = None
        self._device = torch.device("cpu")
        self._digest = ""

    @torch.no_grad()
    def __call__(self, *inputs: Tensor, **options: Any) -> Any:
        """Compute the network's output for inputs, on the first one's device; no gradient."""
        return self.module(inputs[0].device)(*inputs, **options)

    def module(self, device: torch.device | str | None = None) -> M:
        """Return the network, loaded where it has not been, on `device` (null: where it is).

        Its parameters need no gradient, but one may flow through it to its inputs.
        """
        self.load()
        assert self._model is not None
        device = self._device if device is None else torch.device(device)
        if device != self._device:  # the objective's own .to() does not reach it
            self._model, self._device = self._model.to(device), device
        return self._model

    def load(self) -> None:
        """Build and fill the network, once.

        Raises:
            WeightsError: the weights are missing, unreadable, or don't fit; names the key.
        """
        if self._model is not None:
            return
        place = locate(self.key, self.weights)
        with apart():
            model = self._build()
            try:
                self._fill(model, place)
            except WeightsError as error:
                raise WeightsError(f"{self.key}={self.weights}: {error}") from error
            # Of the values that were read, before they are rounded: another dtype is no other tower.
            self._digest = weights_digest(model.state_dict())
            # Once is enough: the objective's .train() does not reach a network that is no submodule.
            self._model = model.requires_grad_(False).to(DTYPES[self.dtype]).eval()
        count = sum(parameter.numel() for parameter in model.parameters())
        logger.info("%s: %s parameters, frozen, in %s: %.2f GB on each rank",
                    self.name, f"{count:,}", self.dtype, count * DTYPES[self.dtype].itemsize / 1e9)  # fmt: skip

    def build_empty(self) -> None:
        """Build the network on the meta device: plans need its shapes alone, and run where no file is or memory."""
        self._model = self._build_on_meta().requires_grad_(False).to(DTYPES[self.dtype]).eval()

    @property
    def digest(self) -> str:
        """Hash of the weights' names and values, as read; loads the network."""
        self.load()
        return self._digest

    def footprint(self) -> Footprint:
        """Count the memory that the network will take; reads no weights."""
        model = self._build_on_meta()
        count = sum(parameter.numel() for parameter in model.parameters())
        held = sum(value.numel() * _itemsize(value, DTYPES[self.dtype]) for value in model.state_dict().values())
        return Footprint(count, float(held), f"{count:,} parameters in {self.dtype}: frozen, whole on each rank")

    def _build_on_meta(self) -> M:
        # No memory is taken: a plan may stand on a machine that the tower does not fit.
        with torch.device("meta"):
            return self._build()


def locate(key: str, weights: str) -> str:
    """Find the file or folder that a recipe's key names.

    Nothing is downloaded unless the name begins with `hub:`, and then only what was not fetched before: an earlier copy
    is used as it is (name a revision for another one).

    Args:
        key: of the recipe, for messages.
        weights: path, URL, or `hub:owner/name[@revision]`.

    Raises:
        WeightsError: nothing is there.
    """
    if weights.startswith(HUB):
        return _from_hub(key, weights)
    try:
        found = storage.exists(weights)
    except StorageError as error:
        raise WeightsError(f"{key}={weights}: {error}") from error
    if not found:
        raise WeightsError(
            f"{key}={weights}: no such file or folder. Give a file or folder with weights (any fsspec URL); for a "
            f"model on the Hugging Face hub write {key}={HUB}owner/name. Nothing is downloaded unasked"
        )
    return weights


def _from_hub(key: str, weights: str) -> str:
    """Fetch a hub model's best weights file and configuration into a local folder."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = weights.removeprefix(HUB).partition("@")

    def fetch(file: str, local: bool) -> str | None:
        try:
            return huggingface_hub.hf_hub_download(name, file, revision=revision or None, local_files_only=local)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and not local:
                raise  # no network: asking for the other files would take as long again for each
            return None

    try:
        # An earlier copy goes first: a run that is resumed years later reads the same, and clusters have no network.
        for local in (True, False):
            found = _snapshot(partial(fetch, local=local))
            if found is not None:
                return found
        reason = "it has no weights file"
    except LocalEntryNotFoundError:
        reason = "the hub can't be reached, and no earlier copy is here"
    except (HfHubHTTPError, HFValidationError) as error:
        reason = f"the hub refuses ({type(error).__name__})"
    raise WeightsError(
        f"{key}={weights}: {reason}. Names are {HUB}owner/name[@revision]. Where there is a network: "
        f"hf download {name}; then give the folder that it prints"
    )


def _snapshot(fetch: Callable[[str], str | None]) -> str | None:
    """Fetch a model's files one by one and return their folder; None where weights are missing or incomplete."""
    for file in CONFIGS:  # before the weights, so that these never lie there without
        fetch(file)
    found = next((path for path in map(fetch, FOLDER_FILES) if path), None)
    if found is not None and found.endswith(".index.json"):
        # Without one of its parts it is an interrupted download, which would fail only when it is read.
        if any(fetch(part) is None for part in part_names(found)):
            return None
    return None if found is None else storage.parent(found)


def frozen_notes(parts: Mapping[str, Frozen[Any]]) -> dict[str, dict[str, str]]:
    """Note for a checkpoint, in place of frozen weights, their name and hash (JSON); loads those not asked yet."""
    return {
        name: {"weights": part.weights, "digest": part.digest} for name, part in sorted(parts.items()) if part.noted
    }


def check_frozen(parts: Mapping[str, Frozen[Any]], noted: Mapping[str, Mapping[str, str]], where: str) -> None:
    """Refuse to go on with other frozen weights than a checkpoint was trained with; their place may have changed.

    Args:
        parts: of the objective, by name.
        noted: `frozen_notes` of the checkpoint.
        where: the checkpoint, for the message.

    Raises:
        CheckpointError: other weights, or parts that only one side has.
    """
    parts = {name: part for name, part in parts.items() if part.noted}
    lines = [f"{name}: noted there, not in this recipe" for name in sorted(noted.keys() - parts.keys())]
    lines += [f"{name}: in this recipe, not noted there" for name in sorted(parts.keys() - noted.keys())]
    for name in sorted(parts.keys() & noted.keys()):
        part, note = parts[name], noted[name]
        # By values, not by name: a file may move, and a hub name may be given other weights.
        if part.digest != note["digest"]:
            lines.append(
                f"{part.key}={part.weights} has the weights {part.digest}, the run was trained with {note['digest']} "
                f"(then {note['weights']})"
            )
    if lines:
        raise CheckpointError(
            "\n  - ".join([f"{where} was trained beside other frozen parts:", *lines])
            + "\nGive the same weights to continue, or another run.dir (or run.name) to start a new run"
        )


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Build as if nobody else was building: on the CPU, whole, and without a trace in the random numbers.

    `deepspeed.zero.Init`, in which large models are built, would shard a tower that no engine gathers again, and round
    its weights; a dry run's meta device would leave it empty.
    """
    # Not imported here: where nobody has imported it, no such context is active.
    partition = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if partition is not None:
        partition.shutdown_init_context()
    try:
        # The trained model's first weights must not depend on whether a tower was built before it.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            yield
    finally:
        if partition is not None:
            partition.restore_init_context()


def _itemsize(value: Tensor, dtype: torch.dtype) -> int:
    return dtype.itemsize if value.is_floating_point() else value.element_size()

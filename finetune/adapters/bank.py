"""Several adapters on one frozen backbone in one process."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.adapters.adapter_files import load_adapter
from finetune.adapters.attach import attached, detach, is_trained
from pretrain.errors import RecipeError
from pretrain.models.backbone import Backbone

#: Modules that belong to a task rather than to the backbone.
TASK_MODULES = ("head", "fc_norm", "added_class")


@dataclass
class _Task:
    """Parts of one adapter: modules in slots, and values that it writes over the backbone's (bitfit)."""

    method: str
    slots: list[tuple[nn.Module, str, nn.Module]]
    values: dict[str, Tensor]


class AdapterBank:
    """Adapters by name; `use` switches in the time of a few assignments, without copying the backbone.

    Args:
        model: with the backbone's weights and no adapter; its head is kept under the name "".
    """

    def __init__(self, model: Backbone) -> None:
        if any(True for _ in attached(model)):
            raise RecipeError("the model has an adapter already: a bank needs the plain backbone")
        self.model = model
        self.active = ""
        self._tasks = {"": self._capture("linear")}
        self._backbone = {
            name: value.detach().clone() for name, value in model.named_parameters() if is_trained(name, "bitfit")
        }  # biases are few; bitfit writes over them

    @property
    def names(self) -> list[str]:
        """Adapters that can be used."""
        return [name for name in self._tasks if name]

    def add(self, name: str, path: str, any_backbone: bool = False) -> None:
        """Read an adapter file (see `load_adapter`) and switch to it."""
        if not name or name in self._tasks:
            raise RecipeError(f"adapter name {name!r}: empty or taken; taken are {', '.join(self.names) or 'none'}")
        # From the plain model: an adapter on top of another is refused.
        self.use("")
        for module in TASK_MODULES:
            # Copies: loading writes into the modules that are there, and these belong to the plain model.
            setattr(self.model, module, copy.deepcopy(getattr(self.model, module, None)))
        try:
            tune = load_adapter(self.model, path, any_backbone)
        # Whatever fails: half an adapter on the model would be used by the next task.
        except Exception:
            detach(self.model)
            self._restore("")
            raise
        self._tasks[name] = self._capture(tune.method)
        self.active = name

    def use(self, name: str) -> None:
        """Switch to an adapter; "" is the plain model.

        Raises:
            RecipeError: no adapter of this name.
        """
        if name not in self._tasks:
            raise RecipeError(f"no adapter {name!r}; there is: {', '.join(self.names) or 'none'}")
        if name != self.active:
            # Captured anew: bitfit's values lie in the backbone itself, where they may have changed since.
            self._tasks[self.active] = self._capture(self._tasks[self.active].method)
            self._restore(name)

    @torch.no_grad()
    def _restore(self, name: str) -> None:
        task = self._tasks[name]
        detach(self.model)
        for owner, attribute, module in task.slots:
            setattr(owner, attribute, module)
        parameters = dict(self.model.named_parameters())
        for key, value in {**self._shared_biases(), **task.values}.items():
            parameters[key].copy_(value)
        self.active = name

    def _shared_biases(self) -> dict[str, Tensor]:
        return {key: value for key, value in self._backbone.items() if not is_trained(key, "linear")}

    def _capture(self, method: str) -> _Task:
        model = self.model
        slots = [(owner, name, getattr(owner, name)) for owner, name in attached(model)]
        slots += [
            (model, name, getattr(model, name)) for name in TASK_MODULES if getattr(model, name, None) is not None
        ]
        written = {
            name: value.detach().clone()
            for name, value in model.named_parameters()
            if method == "bitfit" and is_trained(name, "bitfit") and not is_trained(name, "linear")
        }
        return _Task(method, slots, written)

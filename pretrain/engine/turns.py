"""Several updates of one batch, each of parameters of its own: adversarial training, for example.

One DeepSpeed engine and one optimiser serve all turns, so checkpoints, resume and ZeRO stages are as usual. In a turn
the other parameters need no gradient, and the optimiser passes over their groups: AdamW would decay them, and its
moments would fade, also where the gradient is zero.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pretrain.errors import RecipeError
from pretrain.objectives.base import ALL, Objective, plain_name

#: Before the first turn: DeepSpeed steps once as it builds its wrapper, so that every group has its state.
EVERY = ""


@dataclass(frozen=True)
class Turn:
    """One update of a batch.

    Attributes:
        name: as in the objective's `turns`.
        others: parameters that other turns update; empty where there is one turn, of all.
    """

    name: str
    others: tuple[nn.Parameter, ...] = ()

    @contextlib.contextmanager
    def taken(self, objective: nn.Module, optimizer: Any = None) -> Iterator[None]:
        """Make passes of `objective`, and updates, those of this turn while this is open.

        Args:
            objective: whose turn it is.
            optimizer: of `in_turns`; None: nothing is updated.
        """
        if self.name == ALL and not self.others:
            yield
            return
        _set_turn(objective, optimizer, self.name, self.name)
        for parameter in self.others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            _set_turn(objective, optimizer, ALL, EVERY)
            # DeepSpeed stores what needs no gradient as frozen, and looks for just that when it loads: a checkpoint of
            # one turn could not be loaded in another.
            for parameter in self.others:
                parameter.requires_grad_(True)


def _set_turn(objective: Any, optimizer: Any, of_passes: str, of_updates: str) -> None:
    objective.turn = of_passes
    if optimizer is not None:
        optimizer.turn = of_updates


def turns_of(objective: Objective) -> list[Turn]:
    """Give an objective's turns with their parameters.

    Raises:
        RecipeError: a parameter's rule names a turn that the objective does not have, or a turn has no parameters.
    """
    members: dict[str, list[nn.Parameter]] = {name: [] for name in objective.turns}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        turn = objective.rule(plain_name(name), getattr(parameter, "ds_shape", parameter.shape)).turn
        if turn not in members:
            raise RecipeError(
                f"parameter {name}: its rule has turn={turn!r}, allowed: {', '.join(members)}, the turns of "
                f"{type(objective).__name__}"
            )
        members[turn].append(parameter)
    empty = [name for name, found in members.items() if not found]
    if empty and len(members) > 1:
        raise RecipeError(f"turns without a parameter to update: {', '.join(empty)}")
    return [Turn(name, tuple(_others(members, name))) for name in members]


def _others(members: dict[str, list[nn.Parameter]], name: str) -> Iterable[nn.Parameter]:
    return (parameter for other, found in members.items() if other != name for parameter in found)


def in_turns(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make an optimiser's `step` update the groups of the present turn only."""
    kind: Any = type(optimizer)

    class InTurns(kind):  # type: ignore[misc]
        """The optimiser, a turn at a time."""

        param_groups: list[dict[str, Any]]

        turn = EVERY

        def step(self, closure: Any = None) -> Any:
            every: list[dict[str, Any]] = self.param_groups
            # torch's step walks over `param_groups`; the rest must be there again for DeepSpeed and for checkpoints.
            self.param_groups = [group for group in every if self.turn in (EVERY, group["turn"])]
            try:
                return super().step(closure)
            finally:
                self.param_groups = every

    # Of the same layout, so the built optimiser can take it on: DeepSpeed asks for its type.
    optimizer.__class__ = InTurns
    return optimizer

"""Adversarial steps of a tiny objective in every ZeRO stage: python turns_program.py OUTPUT

Weights after each run, and the losses of each turn, by "stage format accumulation". test_turns.py takes the same steps
with two plain optimisers.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pretrain.objectives.base import Objective, Output, Rule, decays  # noqa: E402

RATES = (0.05, 0.1, 0.02)
LAYOUTS = [
    (0, "fp32", 1), (1, "fp32", 1), (2, "fp32", 1), (0, "fp32", 2), (1, "fp32", 2), (1, "bf16", 1), (3, "fp32", 1),
]  # fmt: skip
WORDS = "optim.name=adam optim.betas=[0.5,0.999] optim.weight_decay=0 optim.clip_grad=null".split()


class Adversarial(Objective):
    """A generator and a discriminator of vectors, biases that are not zero."""

    turns = ("discriminator", "generator")

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(7)
        self.model = nn.ModuleDict({"generator": nn.Linear(3, 5), "discriminator": nn.Linear(5, 1)})
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draws)

    def rule(self, name: str, shape: Iterable[int]) -> Rule:
        return Rule(decays=decays(name, shape), turn=name.split(".")[1], lr_scale=2.0 if "generator" in name else 1.0)

    def forward(self, batch: Any) -> Output:
        made = self.model["generator"](batch["noise"].to(self.model["generator"].weight.dtype))
        if self.turn == "discriminator":
            real = batch["real"].to(made.dtype)
            loss = (self.model["discriminator"](made) + 1).square().mean()
            loss = loss + (self.model["discriminator"](real) - 1).square().mean()
        else:
            loss = (self.model["discriminator"](made) - 1).square().mean()
        return Output(loss, {"made": made.detach().float().mean()})


def batch(step: int, micro: int) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(100 * step + micro)
    return {"noise": torch.randn(4, 3, generator=draws), "real": torch.randn(4, 5, generator=draws) + 1}


class Batches:
    """Micro-batches in their order, as the engine asks for them."""

    error = None

    def __init__(self, accumulation: int) -> None:
        self._places = [(step, micro) for step in range(len(RATES)) for micro in range(accumulation)]
        self.fetched = 0

    def __next__(self) -> dict[str, Any]:
        self.fetched += 1
        return batch(*self._places[self.fetched - 1])

    def source_of(self, step: int) -> str:
        return ""


def take_steps(stage: int, dtype: str, accumulation: int, ranks: Any) -> dict[str, Any]:
    """Weights and losses after three steps."""
    import math

    import deepspeed

    from pretrain.engine.deepspeed_config import deepspeed_config, unwrapped
    from pretrain.engine.optimiser import build_optimizer, forget_steps
    from pretrain.engine.step import StepInputs, train_step
    from pretrain.engine.turns import turns_of
    from pretrain.guards.step_guard import StepGuard
    from pretrain.recipe.load import load_recipe

    words = [*WORDS, f"zero.stage={stage}", f"compute.dtype={dtype}", f"batch.samples={4 * accumulation}"]
    recipe = load_recipe("demo", [*words, "batch.micro=4"])
    objective = Adversarial()
    turns = turns_of(objective)
    optimizer = build_optimizer(recipe, objective, torch.device("cpu"))
    config = deepspeed_config(recipe, accumulation, 26, on_cpu=True)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=dict(config))
    forget_steps(engine.basic_optimizer)
    ledger = SimpleNamespace(
        state=dict, record=lambda batch: None, numbers=lambda: [1.0, 0.0, 0.0], judge=lambda numbers: None
    )
    incidents = SimpleNamespace(begin=lambda step: None, begin_turn=lambda turn: None, note=lambda batch, loss: None)
    batches: Any = Batches(accumulation)
    inputs = StepInputs(
        engine=engine, turns=turns, cache=None, batches=batches, accumulation=accumulation,
        own_clip=math.inf if unwrapped(recipe) else None, ledger=ledger, ranks=ranks, seed=0,
        asked_to_stop=lambda: False, guard=StepGuard(recipe.guard), incidents=incidents,
    )  # fmt: skip
    results = [train_step(inputs, step, lr) for step, lr in enumerate(RATES)]
    found: dict[str, Tensor] = {}
    for key, parameter in objective.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            found[key] = parameter.detach().clone().float()
    losses = [(result.metrics["loss_discriminator"], result.metrics["loss_generator"]) for result in results]
    applied = [result.applied for result in results]
    return {"weights": found, "losses": losses, "applied": applied, "fetched": batches.fetched}


def main(output: str) -> None:
    from pretrain.runtime.process_group import join, leave

    ranks = join()
    found = {" ".join(map(str, layout)): take_steps(*layout, ranks) for layout in LAYOUTS}
    torch.save(found, output)
    leave(ranks)


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    main(sys.argv[1])

"""Adversarial steps of a tiny objective in every ZeRO stage; see tests/findings_program.py.

Findings are weights after each run, and the losses of each turn, by its `Layout`. test_turns.py takes the same steps
with two plain optimisers in one process.
"""

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.objectives.base import Objective, Output, Rule, decays
from pretrain.runtime.process_group import Ranks

RATES = (0.05, 0.1, 0.02)
SAMPLES = 4


class Layout(NamedTuple):
    """One run: how it is spread, and what befalls it."""

    stage: int
    dtype: str
    accumulation: int = 1
    clip: str = "null"
    """largest gradient norm of a turn, with SGD, whose steps follow the gradient's size"""
    bad: str = ""
    """turn whose loss is NaN in the second step, in the last micro-batch of the last rank"""

    def __str__(self) -> str:
        return " ".join(str(value) for value in self if value not in ("", "null"))


LAYOUTS = [
    *(Layout(stage, "fp32") for stage in range(4)),
    *(Layout(stage, "fp32", accumulation=2) for stage in (0, 1)),
    Layout(1, "bf16"),
    *(Layout(stage, "fp32", clip="0.8") for stage in range(4)),
    *(Layout(stage, "fp32", bad=turn) for stage in range(4) for turn in ("discriminator", "generator")),
    Layout(2, "fp32", accumulation=2, clip="0.8", bad="generator"),
    Layout(1, "bf16", bad="generator"),
]
WORDS = {
    "null": "optim.name=adam optim.betas=[0.5,0.999] optim.weight_decay=0",
    "0.8": "optim.name=sgd optim.momentum=0.9 optim.weight_decay=0",
}


class Adversarial(Objective):
    """A generator and a discriminator of vectors, biases that are not zero."""

    turns = ("discriminator", "generator")
    #: Forward passes, counted from 0, and whose loss is NaN.
    passes, bad_pass = 0, -1

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
        self.passes += 1
        if self.passes - 1 == self.bad_pass:
            loss = loss * math.nan
        return Output(loss, {"made": made.detach().float().mean()})


def batch(step: int, micro: int, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """A rank's rows of a micro-batch of SAMPLES."""
    draws = torch.Generator().manual_seed(100 * step + micro)
    whole = {"noise": torch.randn(SAMPLES, 3, generator=draws), "real": torch.randn(SAMPLES, 5, generator=draws) + 1}
    return {name: rows[rank::ranks] for name, rows in whole.items()}


class Batches:
    """A rank's micro-batches in their order, as the engine asks for them."""

    error = None

    def __init__(self, accumulation: int, ranks: Ranks) -> None:
        self._places = [(step, micro) for step in range(len(RATES)) for micro in range(accumulation)]
        self._ranks, self.fetched = ranks, 0

    def __next__(self) -> dict[str, Any]:
        self.fetched += 1
        return batch(*self._places[self.fetched - 1], self._ranks.rank, self._ranks.world_size)

    def source_of(self, step: int) -> str:
        return ""


def bad_pass(layout: Layout, ranks: Ranks) -> int:
    """Number of the forward pass that gives NaN on this rank; -1: none does."""
    if not layout.bad or ranks.rank < ranks.world_size - 1:
        return -1
    passes = layout.accumulation * (2 + 1 + Adversarial.turns.index(layout.bad))  # a step has two turns
    return passes - 1


def take_steps(layout: Layout, ranks: Ranks) -> dict[str, Any]:
    """Weights and losses after three steps."""
    import deepspeed

    from pretrain.engine.deepspeed_config import deepspeed_config, unwrapped
    from pretrain.engine.optimiser import build_optimizer, forget_steps
    from pretrain.engine.step import StepInputs, train_step
    from pretrain.engine.turns import turns_of
    from pretrain.guards.step_guard import StepGuard
    from pretrain.recipe.load import load_recipe

    words = [*WORDS[layout.clip].split(), f"zero.stage={layout.stage}", f"compute.dtype={layout.dtype}"]
    words += [f"optim.clip_grad={layout.clip}", f"batch.samples={SAMPLES * layout.accumulation}"]
    recipe = load_recipe("demo", [*words, f"batch.micro={SAMPLES // ranks.world_size}"])
    objective = Adversarial()
    objective.bad_pass = bad_pass(layout, ranks)
    turns = turns_of(objective)
    optimizer = build_optimizer(recipe, objective, torch.device("cpu"))
    config = deepspeed_config(recipe, layout.accumulation, 26, on_cpu=True)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=dict(config))
    forget_steps(engine.basic_optimizer)
    ledger = SimpleNamespace(
        state=dict, record=lambda batch: None, numbers=lambda: [1.0, 0.0, 0.0], judge=lambda numbers: None
    )
    incidents = SimpleNamespace(
        begin=lambda step: None,
        begin_turn=lambda turn: None,
        note=lambda batch, loss: None,
        look_at_gradients=lambda module: None,
    )
    batches: Any = Batches(layout.accumulation, ranks)
    inputs = StepInputs(
        engine=engine, turns=turns, cache=None, batches=batches, accumulation=layout.accumulation,
        own_clip=(recipe.optim.clip_grad or math.inf) if unwrapped(recipe) else None, ledger=ledger, ranks=ranks,
        seed=0, asked_to_stop=lambda: False, guard=StepGuard(recipe.guard), incidents=incidents,
    )  # fmt: skip
    results = [train_step(inputs, step, lr) for step, lr in enumerate(RATES)]
    found: dict[str, Tensor] = {}
    for key, parameter in objective.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=layout.stage == 3):
            found[key] = parameter.detach().clone().float()
    return {
        "weights": found,
        "losses": [[result.metrics.get(f"loss_{turn}", math.nan) for turn in objective.turns] for result in results],
        "applied": [result.applied for result in results],
        "norms": [result.grad_norm for result in results],
        "fetched": batches.fetched,
    }


def findings(ranks: Ranks) -> dict[str, Any]:
    # Stage 3 comes last, see test_ranks.py.
    return {str(layout): take_steps(layout, ranks) for layout in sorted(LAYOUTS, key=lambda one: one.stage == 3)}

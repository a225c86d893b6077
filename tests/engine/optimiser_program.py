"""Three steps of every optimiser, by DeepSpeed in every ZeRO stage, from a recipe; see tests/findings_program.py.

Findings are the weights after each run, by "optimiser stage format". test_optimisers.py takes the same steps without
DeepSpeed and in one process.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pretrain.objectives.base import Objective
from pretrain.runtime.process_group import Ranks

#: Learning rate of each step: none of them is the optimiser's own.
RATES = (0.05, 0.1, 0.02)
#: Optimiser: words of the recipe.
OPTIMISERS = {
    "adamw": "optim.name=adamw optim.betas=[0.8,0.95] optim.eps=1e-6 optim.weight_decay=0.3",
    "adam": "optim.name=adam optim.betas=[0.5,0.999] optim.weight_decay=0.3",
    "sgd": "optim.name=sgd optim.momentum=0.9 optim.weight_decay=0.3",
    "nesterov": "optim.name=sgd optim.momentum=0.8 optim.nesterov=true optim.weight_decay=0.3",
    "bare": "optim.name=sgd optim.momentum=0 optim.weight_decay=0",
    "lars": "optim.name=lars optim.momentum=0.9 optim.trust=0.02 optim.weight_decay=0.3",
}
#: ZeRO stage and number format.
LAYOUTS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16")]


def runs() -> list[tuple[str, int, str]]:
    """Every optimiser in every layout that it can work in. Stage 3 comes last, see test_ranks.py."""
    all_of_them = [(name, stage, dtype) for stage, dtype in LAYOUTS for name in OPTIMISERS]
    possible = [run for run in all_of_them if run[0] != "lars" or run[1] == 0]
    return sorted(possible, key=lambda run: run[1] == 3)


class Model(Objective):
    """Matrices, one of them zero, biases that are not, and odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3)
        self.late = nn.Linear(3, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        nn.init.zeros_(self.late.weight)

    def forward(self, batch: Any) -> Any:
        hidden = self.second(self.first(batch).tanh())
        return (hidden + self.late(hidden)).square().mean()


def batch(step: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(step))


def take_steps(name: str, stage: int, dtype: str, ranks: Ranks) -> dict[str, Tensor]:
    """The weights after three steps, in float32."""
    import deepspeed

    from pretrain.engine.deepspeed_config import deepspeed_config
    from pretrain.engine.optimiser import build_optimizer, forget_steps, set_lr
    from pretrain.recipe.load import load_recipe

    words = [*OPTIMISERS[name].split(), f"zero.stage={stage}", f"compute.dtype={dtype}", "optim.clip_grad=null"]
    recipe = load_recipe("demo", [*words, "batch.samples=4", f"batch.micro={4 // ranks.world_size}"])
    model = Model()
    config = deepspeed_config(recipe, 1, sum(parameter.numel() for parameter in model.parameters()), on_cpu=True)
    optimizer = build_optimizer(recipe, model, torch.device("cpu"))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))
    forget_steps(engine.basic_optimizer)
    for step, lr in enumerate(RATES):
        rows = batch(step)[ranks.rank :: ranks.world_size]
        engine.backward(engine(rows.to(next(engine.parameters()).dtype)))
        set_lr(engine.optimizer, lr)
        engine.step()
    found = {}
    for key, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            found[key] = parameter.detach().clone().float()
    return found


def findings(ranks: Ranks) -> dict[str, Any]:
    return {" ".join(map(str, run)): take_steps(*run, ranks) for run in runs()}

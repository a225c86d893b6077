"""SGD with momentum under every ZeRO stage: the same steps as torch's own, and the same after a resume."""

from typing import Any

import pytest

SGD = [
    "optim.name=sgd",
    "optim.base_lr=1",
    "optim.weight_decay=0.1",
    "schedule.warmup_epochs=0",
    "schedule.max_steps=6",
]
#: Run: overrides. The first is torch's optimiser as it is.
RUNS = {
    "plain": ["zero.stage=0"],
    "stage2": ["zero.stage=2"],
    "stage3": ["zero.stage=3"],
    "bf16": ["zero.stage=0", "compute.dtype=bf16"],
    "bf16_stage1": ["zero.stage=1", "compute.dtype=bf16"],
}
RESUMED = ("stage2", "bf16_stage1", "stage3")


@pytest.fixture(scope="module")
def runs(toy: Any) -> Any:
    """All of them in one set of processes, and some in two parts."""
    plan = {}
    # Stage 3 comes last, see test_ranks.py.
    for name in sorted(RUNS, key=lambda name: "stage3" in name):
        plan[f"sgd_{name}"] = {"overrides": [*SGD, *RUNS[name]]}
        if name in RESUMED:
            words = [*SGD, *RUNS[name], "checkpoint.every_steps=1", "schedule.max_steps=3"]
            plan[f"sgd_{name}_parts"] = {"overrides": words}
    codes = toy.drive(plan, ranks=2)
    again = {f"sgd_{name}_parts": {"overrides": [*SGD, *RUNS[name], "checkpoint.every_steps=1"]} for name in RESUMED}
    codes |= {f"{name} again": code for name, code in toy.drive(again, ranks=2).items()}
    assert set(codes.values()) == {0}, codes
    return toy


@pytest.mark.parametrize("name", ["stage2", "stage3"])
def test_stages_take_the_same_steps(runs: Any, name: str) -> None:
    assert runs.losses(f"sgd_{name}") == pytest.approx(runs.losses("sgd_plain"), rel=1e-4)


@pytest.mark.parametrize("name", ["bf16", "bf16_stage1"])
def test_bf16_is_close(runs: Any, name: str) -> None:
    assert runs.losses(f"sgd_{name}") == pytest.approx(runs.losses("sgd_plain"), rel=0.02)


@pytest.mark.parametrize("name", RESUMED)
def test_momentum_is_resumed(runs: Any, name: str) -> None:
    assert runs.losses(f"sgd_{name}_parts") == runs.losses(f"sgd_{name}")

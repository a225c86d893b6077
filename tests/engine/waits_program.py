"""Steps of a tiny run in every ZeRO stage under the detector of waits; see tests/findings_program.py.

Findings are the waits of a step, by place, of each layout.
"""

import math
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from pretrain.runtime.process_group import Ranks

#: ZeRO stage, number format, micro-batches of a step. Stage 3 comes last, see test_ranks.py.
LAYOUTS = [
    (0, "fp32", 1),
    (0, "fp32", 2),
    (0, "bf16", 1),
    (1, "fp32", 1),
    (1, "bf16", 1),
    (2, "bf16", 1),
    (3, "bf16", 1),
]
TINY = [
    "model.dim=32", "model.depth=1", "model.heads=2", "model.decoder_dim=32", "model.decoder_depth=1",
    "input.height=32", "input.width=32", "guard.spike=skip", "guard.window=4",
]  # fmt: skip


class Endless:
    """The same micro-batch again and again."""

    error = None

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __next__(self) -> Any:
        return dict(self.batch)

    def source_of(self, step: int) -> str:
        return ""


def waits_of(stage: int, dtype: str, accumulation: int, ranks: Ranks, folder: Path) -> dict[str, int]:
    """Waits of the third step: the first ones make states, and compare passes."""
    from pretrain.data.bad_samples import BadSampleLedger
    from pretrain.engine import agreement, step, transfers
    from pretrain.engine.build import build_engine
    from pretrain.engine.deepspeed_config import unwrapped
    from pretrain.guards.incidents import Incidents
    from pretrain.guards.step_guard import StepGuard
    from pretrain.objectives.base import method_of
    from pretrain.recipe.load import load_recipe
    from tests.engine.waits import DEVICE, HOST, Waits, tensors_in

    micro = 2
    words = [f"zero.stage={stage}", f"compute.dtype={dtype}", f"batch.micro={micro}"]
    words += [f"batch.samples={micro * ranks.world_size * accumulation}"]
    recipe = load_recipe("demo", [*TINY, *words])
    method = method_of(recipe)
    built = build_engine(method, ranks, accumulation)
    batch, module = method.example(micro), built.engine.module
    batches: Any = Endless(batch)
    inputs = step.StepInputs(
        engine=built.engine, turns=built.turns, cache=built.cache, batches=batches, accumulation=accumulation,
        own_clip=(recipe.optim.clip_grad or math.inf) if unwrapped(recipe) else None,
        ledger=BadSampleLedger(None, list(recipe.data.sources), 0.1, 10), ranks=ranks, seed=0,
        asked_to_stop=lambda: False, guard=StepGuard(recipe.guard), rows=built.rows,
        incidents=Incidents(folder, ranks, 0, list(recipe.data.sources)),
    )  # fmt: skip
    for number in range(2):
        step.train_step(inputs, number, 1e-3)
    waits = Waits(module)

    def on_device(host: Any, device: Any) -> Any:
        waits.mark(host, HOST)
        copied = {name: value.clone() if tensors_in(value) else value for name, value in host.items()}
        waits.mark(copied, DEVICE)
        return copied

    def sent(numbers: Any, device: Any) -> Any:
        copied = transfers.sent(numbers, device)
        waits.mark(copied, DEVICE)
        return copied

    with mock.patch.object(step, "on_device", on_device), mock.patch.object(agreement, "sent", sent), waits:
        result = step.train_step(inputs, 2, 1e-3)
    assert result.applied and 0 < result.grad_norm < math.inf
    return dict(waits.places)


def findings(ranks: Ranks) -> dict[Any, dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        return {layout: waits_of(*layout, ranks, Path(folder)) for layout in LAYOUTS}

"""What the host waits for in a step: our two reads, and what DeepSpeed's optimisers decide on the host."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.engine.step import poisoned
from pretrain.engine.transfers import Numbers
from pretrain.guards.step_guard import GuardState, StepGuard
from pretrain.recipe.schema import Guard
from tests.engine.waits import DEVICE, HOST, Waits
from tests.engine.waits_program import LAYOUTS

READ = "pretrain/engine/transfers.py:read"
#: Whether the norm is finite decides over an update, and DeepSpeed's optimisers ask for it on the host: once for the
#: step, and once more for each of the two parameter groups as they clip.
INVALID = "deepspeed/runtime/utils.py:is_invalid_grad_norm"
#: -1 is copied to the device, to stand for a norm that is not finite; by group.
MASKED = "deepspeed/runtime/utils.py:mask_nan_or_inf_with_val_inplace"
#: What DeepSpeed 0.19.8 waits for, by layout; where this fails with another version, docs/performance.md changes too.
OF_DEEPSPEED: dict[Any, dict[str, int]] = {
    (0, "fp32", 1): {},
    (0, "fp32", 2): {},
    # Without ZeRO, 16-bit gradients are looked at one parameter after the other: 36 of this model. Use ZeRO.
    (0, "bf16", 1): {
        "deepspeed/runtime/utils.py:has_overflow_serial": 36,
        "deepspeed/runtime/utils.py:get_weight_norm": 2,
    },
    (1, "fp32", 1): {INVALID: 3, MASKED: 2},
    # BF16_Optimizer has one norm for all groups; the largest norm is copied to the device to clip.
    (1, "bf16", 1): {INVALID: 1, MASKED: 1, "deepspeed/runtime/utils.py:clip_tensors_by_global_norm": 1},
    # bf16 gradients are looked at for overflow before their norm is taken.
    (2, "bf16", 1): {INVALID: 3, MASKED: 2, "deepspeed/runtime/zero/stage_1_and_2.py:has_overflow": 1},
    # torch.where copies -1 to the device, and so does what makes it; by group.
    (3, "bf16", 1): {INVALID: 1, "deepspeed/runtime/zero/stage3.py:get_grad_norm_direct": 4},
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_host_waits_twice_and_for_deepspeed(
    in_engines: Callable[[str], dict[tuple[int, int], Any]], layout: Any
) -> None:
    for found in in_engines("tests.engine.waits_program").values():
        places = found[layout]
        own = {place: count for place, count in places.items() if not place.startswith("deepspeed/")}
        # Of what ranks agree on, and of the norm, which DeepSpeed knows as a number already in 16 bit without ZeRO.
        assert own == {READ: 1 if layout[:2] == (0, "bf16") else 2}
        assert {place: count for place, count in places.items() if place not in own} == OF_DEEPSPEED[layout]


def reads() -> dict[str, Callable[[Any, Any, Any], Any]]:
    """What makes a host wait, of a weight on the device, a mask there, and rows of the host."""
    return {
        "float": lambda weight, mask, rows: float(weight.detach().sum()),
        "bool": lambda weight, mask, rows: bool((weight > 0).all()),
        "item": lambda weight, mask, rows: weight.sum().item(),
        "tolist": lambda weight, mask, rows: weight.double().tolist(),
        "cpu": lambda weight, mask, rows: weight.detach().cpu(),
        "numpy": lambda weight, mask, rows: weight.detach().numpy(),
        "nonzero": lambda weight, mask, rows: mask.nonzero(),
        "rows by a mask": lambda weight, mask, rows: weight[mask],
        "masked_select": lambda weight, mask, rows: weight.masked_select(mask),
        "unique": lambda weight, mask, rows: weight.unique(),
        "a list to the device": lambda weight, mask, rows: torch.tensor([1.0], device=weight.device),
        "where with a number": lambda weight, mask, rows: torch.where(mask, weight, 1.0),
        "rows that nobody sent": lambda weight, mask, rows: weight + rows,
        "a list that nobody sent": lambda weight, mask, rows: weight * torch.tensor([1.0, 2.0]),
        "in a backward pass": lambda weight, mask, rows: (weight.sum() * Reading.apply(weight).sum()).backward(),
    }


class Reading(torch.autograd.Function):
    """The identity, whose gradient is looked at by the host."""

    @staticmethod
    def forward(ctx: Any, value: Any) -> Any:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] if bool(gradients[0].isfinite().all()) else None


@pytest.mark.parametrize("name", reads())
def test_the_detector_sees(name: str) -> None:
    model = nn.Linear(2, 1, bias=False)
    waits, rows = Waits(model), torch.ones(2)
    waits.mark(rows, HOST)
    with waits:
        mask = model.weight.detach()[0] > 0
        reads()[name](model.weight[0], mask, rows)
    assert sum(waits.places.values()) == 1


def test_the_detector_passes_over() -> None:
    model = nn.Linear(2, 1)
    waits, rows, sent = Waits(model), torch.ones(3, 2), torch.ones(3, 2)
    waits.mark(rows, HOST)
    waits.mark(sent, DEVICE)
    with waits:
        rows.tolist(), bool(rows.any()), float(rows[rows > 0].sum())
        loss = (model(sent) * 2.0 + torch.zeros(3, 1)).square().mean()
        poisoned(loss, loss.detach() > 1e9).backward()
        model.weight.grad = model.weight.grad.masked_fill(~model.weight.grad.isfinite(), 0.0)
    assert not waits.places


def test_device_and_host_draw_the_same_line() -> None:
    """Losses next to the limit: one that only one of them took for a spike would be an update that is told wrongly."""
    draws = torch.Generator().manual_seed(1)
    for _ in range(50):
        losses = (2 + torch.rand(20, generator=draws, dtype=torch.float64)).tolist()
        limit = StepGuard(Guard(window=20, z=5.0, spike="skip"), GuardState({"": losses})).limit()
        for loss in (limit.loss, math.nextafter(limit.loss, 9.0), math.nextafter(limit.loss, 0.0), math.nan):
            seen = torch.tensor(loss, dtype=torch.float64) > limit.loss
            assert bool(seen) == (limit.spike(loss) is not None)
            gradient = torch.ones((), requires_grad=True)
            poisoned(gradient * 3.0, seen).backward()
            assert gradient.grad is not None and bool(gradient.grad.isnan()) == bool(seen)


@pytest.mark.parametrize("value", (2.5, -3e38, 0.0, math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_a_finite_loss_stays_bit_for_bit(value: float, dtype: torch.dtype) -> None:
    leaf = torch.tensor(value, dtype=dtype, requires_grad=True)
    loss = poisoned(leaf)
    loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    if leaf.isfinite():
        assert loss.item() == leaf.item() and leaf.grad.item() == 1.0
    else:
        assert loss.isnan() and leaf.grad.isnan()


def test_numbers_are_those_of_their_time() -> None:
    values = torch.tensor([1.5, math.inf])
    numbers = Numbers(values)
    values.zero_()
    assert numbers.read() == [1.5, math.inf] and Numbers(torch.tensor(2.0)).read() == [2.0]

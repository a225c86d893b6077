"""Every ZeRO stage, number format, way of recomputing and way of building, three steps each; and a GPU's curve."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.gpu_session.session import Rows, Session, forget, made_up
from pretrain.engine.build import build_engine
from pretrain.engine.optimiser import build_optimizer, set_lr
from pretrain.engine.prefetch import on_device
from pretrain.objectives.base import method_of
from pretrain.runtime.process_group import Ranks

STEPS, CURVE_STEPS = 3, 200
#: Large enough for kernels of a real model, small enough for forty starts.
SIZES = ("model.size=custom", "model.dim=256", "model.depth=3", "model.heads=4", "model.mlp_ratio=4",
         "model.decoder_dim=128", "model.decoder_depth=2", "model.decoder_heads=2", "input.views=1",
         "model.patch_size=16")  # fmt: skip
MICRO = 2
#: Largest error of a right gradient, by rounding (TF32 too). Ranks that sum nothing are 12 % off, a wrong layer 44 %.
RIGHT = {"fp32": 5e-3, "bf16": 3e-2}


@dataclass(frozen=True)
class Case:
    """A layout of the matrix."""

    stage: int
    dtype: str
    recompute: str
    init: str

    @property
    def overrides(self) -> tuple[str, ...]:
        """What it changes of the recipe."""
        return (
            f"zero.stage={self.stage}", f"compute.dtype={self.dtype}", f"zero.init={self.init}",
            f"compute.activation_checkpointing={self.recompute}",
        )  # fmt: skip


def cases() -> list[Case]:
    """List all layouts; stage 3 comes last, and there what keeps all: DeepSpeed's linear stays for what follows."""
    found = [
        Case(stage, dtype, recompute, init)
        for stage in range(4)
        for dtype in ("fp32", "bf16")
        for recompute in ("true", "selective", "false")
        for init in (("never", "always") if stage == 3 else ("never",))
    ]
    return sorted(found, key=lambda case: (case.stage == 3, case.stage == 3 and case.recompute == "false"))


def stages(session: Session, ranks: Ranks) -> dict[str, Rows]:
    """Take three steps in each layout, and compare its first gradient, over all ranks, with float32 autograd's."""
    words = (*SIZES, f"batch.micro={MICRO}", f"batch.samples={MICRO * ranks.world_size}", "optim.clip_grad=1")
    weights = session.folder / "weights.pth"
    wanted = _plain_gradient(session, words, weights, ranks)
    rows = []
    for case in cases():
        row: dict[str, Any] = vars(case) | {"ranks": ranks.world_size}
        row |= _judged(session, (*words, f"run.init_weights={weights}", *case.overrides), wanted, ranks)
        # NaN is not below any limit.
        rows.append(row | {"right": bool(row.get("finite")) and row["gradient's error"] < RIGHT[case.dtype]})
        forget(ranks.device)
    return {f"{STEPS} steps of each layout; gradient's relative error against float32 autograd": rows}


def _judged(session: Session, words: tuple[str, ...], wanted: dict[str, Tensor], ranks: Ranks) -> dict[str, Any]:
    """Train, and say what came out; a layout that fails has the reason in its row."""
    try:
        gradient, losses = _steps(session, words, ranks)
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0][:100]}
    total = math.sqrt(sum(float(one.square().sum()) for one in wanted.values()))
    off = math.sqrt(sum(float((gradient[name].cpu() - one).square().sum()) for name, one in wanted.items()))
    finite = all(map(math.isfinite, losses))
    return {"gradient's error": off / total, "losses": ", ".join(f"{one:.4f}" for one in losses), "finite": finite}


def _steps(session: Session, words: tuple[str, ...], ranks: Ranks) -> tuple[dict[str, Tensor], list[float]]:
    from deepspeed.utils import safe_get_full_grad

    method = method_of(session.recipe("vit_b_dual", *words))
    built = build_engine(method, ranks, 1)
    # Each rank has another, or ranks that sum nothing would seem right.
    batch = on_device(made_up(method, MICRO, ranks.rank), ranks.device)
    gradient: dict[str, Tensor] = {}
    losses = []
    for _ in range(STEPS):
        loss = built.engine(batch).loss
        built.engine.backward(loss)
        if not gradient:
            found = {name: safe_get_full_grad(one) for name, one in built.engine.module.named_parameters()}
            gradient = {name: one.detach().float().clone() for name, one in found.items() if one is not None}
        set_lr(built.engine.optimizer, 1e-4)
        built.engine.step()
        losses.append(float(loss.detach()))
    built.engine.destroy()
    return gradient, losses


def _plain_gradient(session: Session, words: tuple[str, ...], weights: Path, ranks: Ranks) -> dict[str, Tensor]:
    """Compute the gradient that all must have, and write the weights that all begin with."""
    method = method_of(session.recipe("vit_b_dual", *words, "compute.dtype=fp32"))
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    objective = method.build()
    _move_from_start(objective.model)
    if ranks.first:
        torch.save(objective.model.state_dict(), weights)
    dist.barrier()
    objective.to(ranks.device)
    for rank in range(ranks.world_size):
        loss = objective(on_device(made_up(method, MICRO, rank), ranks.device)).loss
        (loss / ranks.world_size).backward()
    return {name: one.grad.float().cpu() for name, one in objective.named_parameters() if one.grad is not None}


def _move_from_start(module: torch.nn.Module) -> None:
    """Move weights away from their start: with zero biases, wrong gradients look right."""
    generator = torch.Generator().manual_seed(0)
    for value in module.parameters():
        value.data += 0.3 * value[0].numel() ** -0.5 * torch.randn(value.shape, generator=generator)


def curve(session: Session) -> dict[str, Rows]:
    """Train the same small model on the CPU in float32 and here in bf16, and compare the losses."""
    steps = 12 if session.toy else CURVE_STEPS
    cpu, here = (list(_losses(session, device, dtype, steps)) for device, dtype in (
        (torch.device("cpu"), torch.float32), (session.device, torch.bfloat16)))  # fmt: skip
    shown = range(0, steps, max(1, steps // 10))
    rows = [
        {"step": step, "float32, CPU": cpu[step], "bf16, here": here[step],
         "relative difference": abs(here[step] / cpu[step] - 1)} for step in shown
    ]  # fmt: skip
    differences = sorted(abs(one / other - 1) for one, other in zip(here, cpu, strict=True))
    summary = [{"steps": steps, "median difference": differences[steps // 2], "largest": differences[-1]}]
    return {"losses": rows, "all steps": summary}


def _losses(session: Session, device: torch.device, dtype: torch.dtype, steps: int) -> Iterator[float]:
    """Train on four batches in turn, as the engine does in bf16: float32 weights are the optimiser's."""
    method = method_of(session.recipe("vit_b_dual", *SIZES, "optim.base_lr=1e-3"))
    torch.manual_seed(0)
    masters = method.build().to(device)
    torch.manual_seed(0)
    model = method.build().to(device, dtype)
    batches = [on_device(made_up(method, 4, seed), device) for seed in range(4)]
    optimizer = build_optimizer(method.recipe, masters, device)
    set_lr(optimizer, 1e-3)
    pairs = list(zip(masters.parameters(), model.parameters(), strict=True))
    for step in range(steps):
        loss = model(batches[step % 4]).loss
        loss.backward()
        for master, value in pairs:
            master.grad = None if value.grad is None else value.grad.float()
            value.grad = None
        optimizer.step()
        with torch.no_grad():
            for master, value in pairs:
                value.copy_(master)
        yield float(loss.detach())

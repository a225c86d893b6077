"""Batch norm over one, two and four gloo ranks beside torch's on the whole batch; see tests/findings_program.py."""

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.errors import TrainingError
from pretrain.models.cross_rank_batch_norm import convert_batch_norm
from pretrain.runtime.process_group import Ranks
from pretrain.runtime.vision_ops import ensure_torchvision

ensure_torchvision()
from timm.layers.norm_act import BatchNormAct2d  # noqa: E402

ROWS = 12
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(3), (3,)),
    "1d with length": (lambda: nn.BatchNorm1d(3), (3, 5)),
    "2d": (lambda: nn.BatchNorm2d(3), (3, 5, 2)),
    "3d": (lambda: nn.BatchNorm3d(3), (3, 2, 3, 2)),
    "cumulative": (lambda: nn.BatchNorm1d(3, momentum=None), (3,)),
    "without weights": (lambda: nn.BatchNorm2d(3, affine=False, momentum=0.3, eps=1e-3), (3, 5, 2)),
    "without statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (3, 5, 2)),
    "inside": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), (3, 5, 2)),
    "timm": (lambda: BatchNormAct2d(3, act_layer=nn.LeakyReLU, inplace=False), (3, 5, 2)),
}


def build(make: Callable[[], nn.Module], kind: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    module = make()
    with torch.no_grad():
        for value in module.parameters():
            value.add_(torch.linspace(-0.4, 0.6, value.numel()).view_as(value))
    return module.to(kind)


def batch(shape: tuple[int, ...], step: int, offset: float = 1.0) -> Tensor:
    """[ROWS, *shape]; with a large offset a mean of squares less a squared mean would cancel."""
    made = torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return made * 2 + torch.tensor([0.5, offset, -2.0]).view(1, 3, *[1] * (len(shape) - 1))


def own(rows: Tensor, ranks: Ranks, uneven: bool) -> Tensor:
    """This rank's share: every n-th row, or parts of other sizes with an empty one among them."""
    if not uneven:
        return rows[ranks.rank :: ranks.world_size]
    return rows.split({1: [12], 2: [11, 1], 4: [5, 0, 6, 1]}[ranks.world_size])[ranks.rank]


def objective(output: Tensor, weight: Tensor) -> Tensor:
    """A sum over rows whose gradient differs from row to row."""
    return (output * weight).tanh().sum() / ROWS


def differences(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    ranks: Ranks,
    uneven: bool,
    kind: torch.dtype,
    offset: float,
) -> dict[str, float]:
    """Largest difference to torch's module on all rows in outputs, gradients, statistics, and afterwards in eval."""
    whole = build(make, kind)
    parts = convert_batch_norm(copy.deepcopy(whole), ranks)
    assert list(parts.state_dict()) == list(whole.state_dict())
    found: dict[str, float] = {}

    def compare(name: str, first: Tensor, second: Tensor) -> None:
        assert first.dtype == second.dtype and first.shape == second.shape, name
        largest = float((first - second).abs().max()) if first.numel() else 0.0
        found[name] = max(found.get(name, 0.0), largest)

    for step in range(3):
        rows = batch(shape, step, offset).to(kind)
        weight = torch.linspace(0.2, 1.0, rows.numel(), dtype=kind).view_as(rows)
        inputs, own_inputs = rows.clone().requires_grad_(), own(rows, ranks, uneven).clone().requires_grad_()
        expected, output = whole(inputs), parts(own_inputs)
        compare("output", output, own(expected, ranks, uneven))
        objective(expected, weight).backward()
        # The mean over ranks of what they return is the loss of all rows.
        (objective(output, own(weight, ranks, uneven)) * ranks.world_size).backward()
        compare("input gradient", own_inputs.grad / ranks.world_size, own(inputs.grad, ranks, uneven))
    for (name, value), right in zip(parts.named_parameters(), whole.parameters(), strict=True):
        if ranks.world_size > 1:
            dist.all_reduce(value.grad)
        compare(f"gradient of {name}", value.grad / ranks.world_size, right.grad)
    for (name, value), right in zip(parts.named_buffers(), whole.buffers(), strict=True):
        compare(name, value, right)
    parts.eval(), whole.eval()
    if ranks.rank == 0:  # alone: a collective in eval would wait for the others
        rows = batch(shape, 9, offset).to(kind)
        compare("eval", parts(rows), whole(rows))
    return found


def in_bfloat16(ranks: Ranks) -> dict[str, float]:
    """A bf16 model: outputs like torch's, statistics neither rounded by the model's cast nor by the update."""
    module = convert_batch_norm(build(lambda: nn.BatchNorm1d(3, momentum=0.001), torch.float32), ranks).bfloat16()
    whole = build(lambda: nn.BatchNorm1d(3, momentum=0.001), torch.float32)
    found = {"output": 0.0}
    for step in range(20):
        rows = batch((3,), step).bfloat16()
        expected, output = whole(rows.float()), module(own(rows, ranks, False))
        assert output.dtype == torch.bfloat16
        found["output"] = max(found["output"], float((output.float() - own(expected, ranks, False)).abs().max()))
    if ranks.world_size > 1:
        found["mean"] = float((module.running_mean - whole.running_mean).abs().max())
        found["variance"] = float((module.running_var - whole.running_var).abs().max())
        module.eval(), whole.eval()
        found["eval"] = float((module(rows).float() - whole(rows.float())).abs().max())
    return found


class Own(nn.BatchNorm1d):
    """A class whose forward pass a conversion would lose."""


def refusals(ranks: Ranks) -> list[str]:
    found = []
    for call in (
        lambda: convert_batch_norm(nn.Sequential(nn.Linear(2, 2), Own(2)), ranks),
        lambda: convert_batch_norm(nn.BatchNorm1d(3), ranks)(torch.zeros(2, 4)),
        lambda: convert_batch_norm(nn.BatchNorm1d(3), ranks)(torch.zeros(1 - min(ranks.rank, 1), 3)),
    ):
        try:
            call()
        except TrainingError as error:
            found.append(str(error))
    return found


def findings(ranks: Ranks) -> dict[str, object]:
    """The largest differences by case, in one world."""
    found: dict[str, object] = {
        f"{name}{' uneven' * uneven} {kind} {offset:g}": differences(make, shape, ranks, uneven, kind, offset)
        for name, (make, shape) in CASES.items()
        for uneven in (False, True)
        for kind, offset in ((torch.float32, 1.0), (torch.float32, 3000.0), (torch.float64, 1.0))
    }
    found["bf16"] = in_bfloat16(ranks)
    return found | ({"refusals": refusals(ranks)} if ranks.world_size > 1 else {})

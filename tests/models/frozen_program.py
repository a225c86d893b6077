"""Two steps of an objective with two frozen towers in DeepSpeed engines; see tests/findings_program.py.

Findings are what each side holds, by ZeRO stage, and where the weights lay.
"""

import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.models.clip import CLIP, Config, TextTower, VisualTower
from pretrain.models.clip_weights import frozen_clip
from pretrain.models.frozen import frozen_notes
from pretrain.runtime.process_group import Ranks, from_first

STAGES = (1, 3)
SIZES: dict[str, Any] = {
    "size": "custom", "image_size": 16, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "embedding": 12,
    "text_dim": 16, "text_depth": 1, "text_heads": 2, "context": 6, "vocabulary": 20, "activation": "gelu",
}  # fmt: skip
CONFIG = Config(**SIZES)


def state_of(seed: int) -> dict[str, Tensor]:
    """Weights of both towers."""
    torch.manual_seed(seed)
    return {name: torch.randn_like(value) / 5 for name, value in CLIP(CONFIG).state_dict().items()}


def given() -> tuple[Tensor, Tensor]:
    """Images and token ids of a micro-batch, the same on all ranks."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return images, torch.tensor([[1, 4, 19, 0, 0, 0], [1, 7, 9, 2, 19, 0]])


def settings(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }


class Student(nn.Module):
    """A linear map of pixels that learns what a frozen image tower says; a text tower is asked beside it."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        # One is loaded while DeepSpeed shards what is built around it, the other with the first step.
        self.eager = frozen_clip("objective.teacher.weights", weights, CONFIG, VisualTower, dtype="fp32")
        self.eager.load()
        self.lazy = frozen_clip("objective.text.weights", weights, CONFIG, TextTower, dtype="fp32")
        self.model = nn.Linear(3 * 16 * 16, 12)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wanted, read = self.eager(images), self.lazy(ids)
        found = self.model(images.flatten(1).to(self.model.weight.dtype)).float()
        return ((found - wanted - read) ** 2).mean(), wanted, read


def train(stage: int, weights: str, folder: Path) -> dict[str, Any]:
    """Build, train, save, and compare."""
    import deepspeed

    if stage == 3:
        with deepspeed.zero.Init(config_dict_or_path=settings(stage)):
            objective = Student(weights)
            sharded = nn.Linear(2, 2)
        assert sharded.weight.numel() == 0, "building goes on as before"
    else:
        objective = Student(weights)
    engine, optimizer, *_ = deepspeed.initialize(
        model=objective, model_parameters=list(objective.parameters()), config=settings(stage)
    )
    losses, outputs = [], []
    for _ in range(2):
        loss, *said = engine(*given())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        outputs.append(said)
    engine.save_checkpoint(str(folder), tag="last")
    tower = objective.eager.module()
    optimised = optimizer.fp16_groups if stage == 3 else optimizer.bit16_groups
    return {
        "losses": losses,
        "outputs": outputs,
        "parameters": [name for name, _ in engine.module.named_parameters()],
        "state": list(engine.module.state_dict()),
        "optimised": sum(getattr(value, "ds_numel", value.numel()) for group in optimised for value in group),
        "held": [type(value).__name__ for value in tower.parameters()][0],
        "sharded": any(hasattr(value, "ds_id") for value in tower.parameters()),
        "dtypes": sorted({str(value.dtype) for value in tower.parameters()}),
        "gradients": any(value.requires_grad or value.grad is not None for value in tower.parameters()),
        "training": tower.training,
        "notes": frozen_notes({"teacher": objective.eager, "text": objective.lazy}),
        "files": {path.name: _numbers(path) for path in sorted((folder / "last").glob("*.pt"))},
    }


def findings(ranks: Ranks) -> dict[Any, Any]:
    with tempfile.TemporaryDirectory() as own:
        folder = Path(from_first(ranks, own))
        weights = str(folder / "towers.safetensors")
        if ranks.first:
            safetensors.torch.save_file(state_of(0), weights)
        dist.barrier()
        found = {stage: train(stage, weights, folder / str(stage)) for stage in STAGES}
        dist.barrier()  # the folder goes with its rank
    return found | {"weights": weights}


def _numbers(path: Path) -> int:
    """Numbers in the largest tensor of a file; a tower's tables are larger than all of the student."""
    found: list[int] = []

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value.numel())
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            walk(inner)

    walk(torch.load(path, weights_only=False))
    return max(found, default=0)

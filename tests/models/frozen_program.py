"""Two steps of an objective with two frozen towers under DeepSpeed; prints what each side holds, as JSON.

python frozen_program.py WEIGHTS FOLDER STAGE
"""

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from pretrain.models.clip import Config, TextTower, VisualTower
from pretrain.models.clip_weights import frozen_clip
from pretrain.models.frozen import frozen_notes
from pretrain.runtime.process_group import join

WEIGHTS, FOLDER, STAGE = sys.argv[1], sys.argv[2], int(sys.argv[3])
SIZES: dict[str, Any] = {
    "size": "custom", "image_size": 16, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "embedding": 12,
    "text_dim": 16, "text_depth": 1, "text_heads": 2, "context": 6, "vocabulary": 20, "activation": "gelu",
}  # fmt: skip
SETTINGS = {
    "train_micro_batch_size_per_gpu": 2,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": STAGE, "stage3_param_persistence_threshold": 0},
    "zero_force_ds_cpu_optimizer": False,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
}


class Student(nn.Module):
    """A linear map of pixels that learns what a frozen image tower says; a text tower is asked beside it."""

    def __init__(self) -> None:
        super().__init__()
        config = Config(**SIZES)
        # One is loaded while DeepSpeed shards what is built around it, the other with the first step.
        self.eager = frozen_clip("objective.teacher.weights", WEIGHTS, config, VisualTower, dtype="fp32")
        self.eager.load()
        self.lazy = frozen_clip("objective.text.weights", WEIGHTS, config, TextTower, dtype="fp32")
        self.model = nn.Linear(3 * 16 * 16, 12)

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wanted, read = self.eager(images), self.lazy(ids)
        found = self.model(images.flatten(1).to(self.model.weight.dtype)).float()
        return ((found - wanted - read) ** 2).mean(), wanted, read


def main() -> None:
    """Train, save, compare."""
    join()
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    ids = torch.tensor([[1, 4, 19, 0, 0, 0], [1, 7, 9, 2, 19, 0]])
    if STAGE == 3:
        with deepspeed.zero.Init(config_dict_or_path=SETTINGS):
            objective = Student()
            sharded = nn.Linear(2, 2)
        assert sharded.weight.numel() == 0, "building goes on as before"
    else:
        objective = Student()
    engine, optimizer, *_ = deepspeed.initialize(
        model=objective, model_parameters=list(objective.parameters()), config=SETTINGS
    )
    losses, outputs = [], []
    for _ in range(2):
        loss, *said = engine(images, ids)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        outputs.append([value.tolist() for value in said])
    engine.save_checkpoint(FOLDER, tag="last")
    tower = objective.eager.module()
    print("FOUND", json.dumps({
        "losses": losses,
        "outputs": outputs,
        "parameters": [name for name, _ in engine.module.named_parameters()],
        "state": list(engine.module.state_dict()),
        "optimised": sum(getattr(p, "ds_numel", p.numel()) for group in optimizer.bit16_groups for p in group)
        if STAGE != 3 else sum(p.ds_numel for group in optimizer.fp16_groups for p in group),
        "held": [type(value).__name__ for value in tower.parameters()][0],
        "sharded": any(hasattr(value, "ds_id") for value in tower.parameters()),
        "dtypes": sorted({str(value.dtype) for value in tower.parameters()}),
        "gradients": any(value.requires_grad or value.grad is not None for value in tower.parameters()),
        "training": tower.training,
        "notes": frozen_notes({"teacher": objective.eager, "text": objective.lazy}),
        "files": {path.name: _numbers(path) for path in sorted(Path(FOLDER, "last").glob("*.pt"))},
    }))  # fmt: skip


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


if __name__ == "__main__":
    main()

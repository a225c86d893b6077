"""One training step of AdaptFormer's cases as launch/finetune.py takes it: recipe, task, engine, optimiser.

    python adaptformer_program.py OUT CASE [CASE ...]

Each CASE is a folder with meta.json. OUT gets, by case, loss, gradients of what is trained, buffers, by their names.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.recipe import TuneRecipe, load_tune_recipe
from pretrain.data.media import MEAN, STD
from pretrain.engine.build import build_engine
from pretrain.engine.step import StepInputs, train_step
from pretrain.guards.step_guard import StepGuard
from pretrain.models.classifier_weights import fuse_projections
from pretrain.models.weights import LoadReport, load_state
from pretrain.objectives.base import method_of
from pretrain.runtime.process_group import Ranks, join, leave

#: Plain descent with a rate at which rounding of the weights takes nothing from the gradients: a power of two.
RATE = 2.0**12
RECIPE: dict[str, Any] = {
    "objective": {"name": "classification", "smoothing": 0},
    "augment": {"mixup": 0, "cutmix": 0},
    "input": {"views": 1},
    "optim": {"name": "sgd", "momentum": 0, "weight_decay": 0, "layer_decay": 1, "clip_grad": None},
    "compute": {"dtype": "fp32"},
    "zero": {"stage": 0},
}


def recipe_of(meta: dict[str, Any], state: dict[str, Tensor], clips: int, path: Path) -> TuneRecipe:
    """The recipe of a case, written to `path`."""
    dims, tuning = meta["dims"], meta["tuning_config"]
    size = {"frames": dims.get("frames", 1), "height": dims["img"], "width": dims["img"]}
    model = {
        "patch_size": dims["patch"], "dim": dims["dim"], "depth": dims["depth"], "heads": dims["heads"],
        "mlp_ratio": len(state["blocks.0.fc1.bias"]) / dims["dim"], "classes": dims["nc"], "head": "batch_norm",
        "drop_path": 0,
    }  # fmt: skip
    mean = "fc_norm.weight" in state
    if "frames" in dims:
        model |= {"name": "classifier", "size": "custom", "tubelet": dims["tub"], "positions": "rebuild"}
        model["pooling"] = "mean" if mean else "token0"
    else:
        model |= {"name": "image_vit", "image_size": dims["img"], "pooling": "mean" if mean else "class"}
    changes = {"model": model, "tune": tune_of(tuning), "batch": {"samples": clips, "micro": clips}}
    path.write_text(json.dumps(RECIPE | changes | {"input": RECIPE["input"] | size}))
    return load_tune_recipe(str(path))


def tune_of(tuning: dict[str, Any]) -> dict[str, Any]:
    """The recipe's section for the official options."""
    if tuning["vpt_on"]:
        return {"method": "vpt", "vpt": {"tokens": tuning["vpt_num"]}}
    if not tuning["ffn_adapt"]:
        return {"method": "linear"}
    options = {
        "bottleneck": tuning["ffn_num"],
        "form": tuning["ffn_option"],
        "norm": tuning["ffn_adapter_layernorm_option"],
    }
    factor = tuning["ffn_adapter_scalar"]
    scale = {"learned_scale": "scalar"} if factor == "learnable_scalar" else {"scale": float(factor)}
    return {"method": "adaptformer", "adaptformer": options | scale}


def batch_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The case's clips as pixels that the task's normalisation turns into them."""
    x = tensors["x"] if tensors["x"].dim() == 5 else tensors["x"].unsqueeze(2)
    pixels = x.movedim(1, -1).double() * torch.tensor(STD).double() + torch.tensor(MEAN).double()
    return {"video": pixels.float(), "target": tensors["label"].long()}


class Once:
    """The one micro-batch of a step."""

    error = None

    def __init__(self, batch: dict[str, Any]) -> None:
        self._batch = batch

    def __next__(self) -> dict[str, Any]:
        return self._batch

    def source_of(self, step: int) -> str:
        return ""


def take_step(folder: Path, out: Path, ranks: Ranks) -> dict[str, Tensor]:
    meta, state = json.loads((folder / "meta.json").read_text()), load_file(folder / "weights.safetensors")
    batch = batch_of(load_file(folder / "io.safetensors"))
    recipe = recipe_of(meta, state, len(batch["target"]), out.with_suffix(".yaml"))
    built = build_engine(method_of(recipe), ranks, accumulation=1)
    model = built.engine.module.model
    load_state(model, fuse_projections(state), LoadReport(str(folder), "AdaptFormer"))
    ledger: Any = SimpleNamespace(
        state=dict, record=lambda batch: None, numbers=lambda: [1.0, 0.0, 0.0], judge=lambda numbers: None
    )
    incidents: Any = SimpleNamespace(
        begin=lambda step: None, begin_turn=lambda turn: None, note=lambda batch, loss: None
    )
    batches: Any = Once(batch)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    result = train_step(
        StepInputs(
            engine=built.engine, turns=built.turns, cache=None, batches=batches, accumulation=1, own_clip=float("inf"),
            ledger=ledger, ranks=ranks, seed=0, asked_to_stop=lambda: False, guard=StepGuard(recipe.guard),
            incidents=incidents, rows=built.rows,
        ),
        0,
        RATE,
    )  # fmt: skip
    assert result.applied
    changed = {name: (before[name] - value.detach()) / RATE for name, value in model.named_parameters()}
    gradients = {f"grad.{name}": value for name, value in changed.items() if value.any()}
    buffers = {f"after.{name}": value for name, value in model.named_buffers()}
    return {"loss_train": torch.tensor(result.metrics["loss"])} | gradients | buffers


if __name__ == "__main__":
    world = join()
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    torch.save({folder: take_step(Path(folder), out, world) for folder in sys.argv[2:]}, out)
    leave(world)

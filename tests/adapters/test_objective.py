"""Adapters and dropped tokens under the fine-tuning objective: the recipe's keys reach the model."""

import torch

from finetune.classification.task import ClassificationObjective
from finetune.recipe import load_tune_recipe
from pretrain.models.classifier_weights import classifier_state
from pretrain.models.initial_weights import read_weights
from pretrain.models.videomae import Config, VideoMAE
from pretrain.objectives.base import method_of
from pretrain.plan.dry_run import dry_run

TINY = [
    *("model.dim=24", "model.patch_size=16", "model.depth=4", "model.heads=3"),
    *("input.frames=4", "input.height=32", "input.width=32"),
]


def objective(*overrides: str) -> ClassificationObjective:
    torch.manual_seed(0)
    found = method_of(load_tune_recipe("demo_finetune", [*TINY, *overrides])).build()
    assert isinstance(found, ClassificationObjective)
    return found


def batch() -> dict[str, torch.Tensor]:
    video = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {"video": video, "target": torch.tensor([3, 5])}


def test_method_of_the_recipe_is_trained() -> None:
    found = objective("tune.method=adaptformer", "tune.adaptformer.bottleneck=4", "model.head=batch_norm")
    found(batch()).loss.backward()
    trained = {name for name, value in found.named_parameters() if value.grad is not None}
    assert trained == {name for name, value in found.named_parameters() if value.requires_grad}
    assert any(".adaptmlp." in name for name in trained) and not any(".qkv." in name for name in trained)


def test_adapters_survive_loading_a_pretrained_encoder(tmp_path) -> None:
    found = objective("tune.method=vpt", "tune.vpt.tokens=2")
    shape = {"size": "custom", "patch_size": 16, "dim": 24, "depth": 4, "heads": 3, "mlp_ratio": 4}
    source = VideoMAE(Config(**shape, decoder_dim=16, decoder_depth=1, decoder_heads=2), 4, 32, 32)
    torch.save({"model": source.state_dict()}, tmp_path / "encoder.pth")
    path = str(tmp_path / "encoder.pth")
    found.load_pretrained(path, read_weights(path))
    for name, value in classifier_state(source.state_dict()).items():
        if name.startswith("blocks."):
            assert torch.equal(found.model.state_dict()[name], value)
    assert found.model.embeddings is not None
    trained = [name for name, value in found.model.named_parameters() if value.requires_grad]
    assert trained == [name for name in trained if name.startswith(("embeddings.", "head.", "fc_norm."))]


def test_keep_rate_follows_its_schedule() -> None:
    found = objective("model.tokens.keep_rate=0.5", "model.tokens.start_epoch=1", "model.tokens.shrink_epochs=2")
    rates = []
    for step in (0, 9, 10, 20, 30):
        found.before_step(step, steps_per_epoch=10, total=40)
        assert torch.isfinite(found(batch()).loss)
        rates.append(found.model.reorganisation.rate)
    assert rates[:3] == [1, 1, 1] and abs(rates[3] - 0.75) < 1e-9 and rates[4] == 0.5
    objective().before_step(0, 10, 40)


def test_dry_run_counts_a_frozen_giant_as_weights_only() -> None:
    """2 bytes a frozen parameter in bf16; gradients and optimiser states of the adapter alone."""
    giant = ["model.size=giant", "model.patch_size=14", "input.height=224", "input.width=224", "model.head=batch_norm"]
    giant += ["input.frames=16", "model.pretrain_frames=16", "batch.samples=12", "batch.ranks=2"]
    giant += [f"model.{key}=null" for key in ("dim", "depth", "heads", "mlp_ratio")]
    giant += ["model.pretrain_height=224", "model.pretrain_width=224", "optim.layer_decay=1", "compute.dtype=bf16"]
    recipe = load_tune_recipe("demo_finetune", [*giant, "tune.method=adaptformer"])
    rows = {row[0].strip(): row for section in dry_run(method_of(recipe)) for row in section.rows}
    assert rows["trained"][1] == f"{7_267_840 + 2 * 1408 + 1408 * 27 + 27:,}"
    assert (rows["frozen weights"][1], rows["trained weights"][1]) == ("2.02 GB", "14.6 MB")
    assert rows["gradients"][1] == "29.2 MB" and rows["optimiser"][1] == "43.9 MB"
    full = {
        row[0].strip(): row
        for section in dry_run(method_of(load_tune_recipe("demo_finetune", giant)))
        for row in section.rows
    }
    assert "trained" not in full and full["gradients"][1] == "4.05 GB"

"""Mixing, losses, averaged weights, layer-wise rates, by their properties; tests/parity has the official numbers."""

import numpy as np
import pytest
import torch

from finetune.classification.mixing import Mixing, mix_seeds
from finetune.classification.task import ClassificationObjective
from finetune.recipe import Augment, TuneRecipe, load_tune_recipe
from pretrain.engine.optimiser import parameter_groups, set_lr
from pretrain.models.classifier import VideoClassifier
from pretrain.objectives.base import method_of

#: A small network.
SMALL = [
    *("model.depth=3", "model.dim=48", "model.heads=4", "model.patch_size=8", "model.classes=7"),
    *("input.frames=16", "input.height=32", "input.width=32", "model.positions=rebuild", "model.drop_path=0"),
]


def objective(*words: str) -> ClassificationObjective:
    return build(load_tune_recipe("demo_finetune", [*SMALL, *words]))


def build(recipe: TuneRecipe) -> ClassificationObjective:
    torch.manual_seed(0)
    found = method_of(recipe).build()
    assert isinstance(found, ClassificationObjective)
    return found


def test_cutmix_cuts_rows_and_columns_of_all_frames() -> None:
    torch.manual_seed(1)
    mixing = Mixing(Augment(mixup=0, cutmix=1.0), 2, 0.0)
    for _ in range(10):
        video = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1).expand(2, 4, 20, 30, 3).clone()
        mixed, soft = mixing(video, torch.tensor([0, 1]))
        assert (mixed == mixed[:, :1, :, :, :1]).all(), "the same box in all frames and channels"
        share = mixed[0, 0, :, :, 0].mean().item()
        assert soft[0].tolist() == pytest.approx([1 - share, share]), "target weights are the areas"


def test_mixing_follows_torch_and_leaves_numpy_alone() -> None:
    mixing = Mixing(Augment(), 3, 0.1)
    video, labels = torch.rand(4, 2, 8, 8, 3), torch.tensor([0, 1, 2, 0])

    def mixed(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        np.random.seed(0)
        result = mixing(video.clone(), labels)[0]
        assert np.random.rand() == np.random.RandomState(0).rand()
        return result

    assert torch.equal(mixed(5), mixed(5)) and not torch.equal(mixed(5), mixed(6))


def test_neighbouring_videos_are_mixed_in_a_micro_batch_of_any_even_size() -> None:
    """Two views each; the first eight positions share a draw, the next ones have another."""
    mixing, places = Mixing(Augment(), 3, 0.1), [(1, position) for position in range(4, 16)]
    video, labels = torch.rand(24, 2, 12, 16, 3), torch.arange(24) % 3
    whole, soft = mixing(video, labels, mix_seeds(7, places))
    parts = [mixing(video[2 * at : 2 * at + 4], labels[2 * at : 2 * at + 4], mix_seeds(7, places[at : at + 2]))
             for at in range(0, 12, 2)]  # fmt: skip
    assert torch.equal(whole, torch.cat([part for part, _ in parts]))
    assert torch.equal(soft, torch.cat([part for _, part in parts]))
    seeds = mix_seeds(7, places)
    assert [seeds.count(seed) for seed in seeds] == [2, 2, 4, 4, 4, 4]
    assert set(mix_seeds(8, places)) & set(seeds) == set() == set(mix_seeds(7, [(0, 4), (0, 5)])) & set(seeds)
    assert len(mix_seeds(7, places[:3])) == 1, "an odd micro-batch is one group"


def test_rates_of_layers_reach_the_optimizer() -> None:
    module = objective("optim.layer_decay=0.75")
    optimizer = torch.optim.AdamW(parameter_groups(module, 0.05))  # type: ignore[arg-type]
    set_lr(optimizer, 2.0)
    assert {group["lr"] for group in optimizer.param_groups} == {2.0 * 0.75**n for n in range(5)}
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert rates[id(module.model.patch_embed.proj.weight)] < rates[id(module.model.blocks[2].mlp.fc1.weight)]


def test_regression_and_multi_label_heads_learn() -> None:
    for task, target in (("regression", torch.tensor([[0.5, -1.0], [1.0, 2.0]])), ("multi", torch.eye(2))):
        module = objective(f"objective.task={task}", "model.classes=2", "objective.smoothing=0").train()
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(0)
        batch = {"video": torch.randint(0, 255, (2, 16, 32, 32, 3), dtype=torch.uint8, generator=generator),
                 "target": target}  # fmt: skip
        losses = []
        for _ in range(12):
            loss = module(batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        assert losses[-1] < 0.6 * losses[0], task


def test_averages_are_evaluated() -> None:
    module = objective("ema.decay=0.9", "model.head_init_scale=1").eval()
    video = torch.randint(0, 255, (1, 16, 32, 32, 3), dtype=torch.uint8)
    with module.evaluated_weights():
        before = module.predict(video)
    with torch.no_grad():
        module.model.head.weight.zero_()
    assert module.predict(video).abs().max() < 1e-6
    with module.evaluated_weights():
        assert torch.equal(module.predict(video), before)
    assert isinstance(module.model, VideoClassifier)

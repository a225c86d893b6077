"""A training step of pictures against timm on the same draws: mixing, loss, stochastic depth, decay, averages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from finetune.classification.mixing import MIX_SEEDS, numpy_seeded
from finetune.classification.task import ClassificationObjective
from finetune.recipe import load_tune_recipe
from pretrain.data.media import MEAN, STD
from pretrain.models.averages import WeightAverage
from pretrain.models.dropout import DropPath, drop_path_rates
from pretrain.objectives.base import decays, method_of
from pretrain.runtime.vision_ops import ensure_torchvision

ensure_torchvision()
from timm.data.mixup import Mixup  # noqa: E402
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy  # noqa: E402
from timm.models import VisionTransformer  # noqa: E402
from timm.models.vision_transformer import calculate_drop_path_rates  # noqa: E402
from timm.optim import param_groups_weight_decay  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402

RECIPE = """\
model: {name: image_vit, image_size: 16, patch_size: 8, dim: 24, depth: 4, heads: 3, mlp_ratio: 2, classes: 5,
        drop_path: 0.4}
objective: {name: classification}
input: {name: picture, height: 16, width: 16}
data: {sources: {toy: {shards: nowhere}}}
evaluate: {clips: 1, crops: 1}
"""


@pytest.fixture
def objective(tmp_path: Path) -> ClassificationObjective:
    path = tmp_path / "toy.yaml"
    path.write_text(RECIPE)
    torch.manual_seed(0)
    found = method_of(load_tune_recipe(str(path))).build()
    assert isinstance(found, ClassificationObjective)
    for value in found.model.parameters():
        torch.nn.init.normal_(value, std=0.2)
    return found


def timms(objective: ClassificationObjective) -> VisionTransformer:
    """timm's ViT with the same weights, whose names are the same."""
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=4, num_heads=3, mlp_ratio=2, num_classes=5, drop_path_rate=0.4
    )
    model.load_state_dict(objective.model.state_dict(), strict=True)
    return model


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    video = torch.randint(256, (6, 1, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return {"video": video, "target": torch.tensor([0, 4, 2, 1, 3, 3])}


def normalised(video: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] as timm's loader gives them."""
    pixels = video[:, 0].permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@pytest.fixture
def same_paths(objective: ClassificationObjective, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """timm's stochastic depth drops what ours has dropped, branch by branch."""
    kept: list[Tensor] = []
    for module in objective.model.modules():
        if isinstance(module, DropPath):
            module.register_forward_hook(
                lambda _module, inputs, output: kept.append(output.detach().flatten(1).abs().sum(1) > 0)
            )
    monkeypatch.setattr(Tensor, "bernoulli_", lambda empty, _rate: empty.copy_(kept.pop(0).view(empty.shape)))
    yield kept
    assert not kept, "as many branches"


def test_a_step_is_timms(objective: ClassificationObjective, same_paths: list[Tensor]) -> None:
    model, taken, kinds = timms(objective).train(), batch(), set()
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    for seed in range(6):
        objective.zero_grad()
        model.zero_grad()
        found = objective.train()(taken | {MIX_SEEDS: [seed]}).loss
        assert len(same_paths) == 6 and not all(keep.all() for keep in same_paths), "block 0 drops nothing"
        found.backward()
        with numpy_seeded(seed):
            pictures, soft = mixup(normalised(taken["video"]), taken["target"])
        wanted = SoftTargetCrossEntropy()(model(pictures), soft)
        wanted.backward()
        kinds.add(torch.equal(pictures[:, :, 0, 0], normalised(taken["video"])[:, :, 0, 0]))
        assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        for name, value in objective.model.named_parameters():
            assert_close(value.grad, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)
    assert kinds == {True, False}, "boxes that leave the corner, and shares of everything"


def test_mixed_pictures_and_targets_are_timms_to_the_bit(objective: ClassificationObjective) -> None:
    video, target = torch.randn(8, 1, 12, 20, 3), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    assert objective.mixing is not None
    for seed in range(10):
        mixed, soft = objective.mixing(video.clone(), target, [seed])
        with numpy_seeded(seed):
            wanted, targets = mixup(video[:, 0].permute(0, 3, 1, 2).contiguous(), target)
        assert torch.equal(mixed[:, 0].permute(0, 3, 1, 2), wanted) and torch.equal(soft, targets)


def test_smoothing_without_mixing_is_timms(objective: ClassificationObjective) -> None:
    logits, target = torch.randn(6, 5), batch()["target"]
    found = objective._loss(logits, objective._soft(target))
    assert_close(found, LabelSmoothingCrossEntropy(0.1)(logits, target))


def test_averages_are_timms_to_the_bit(objective: ClassificationObjective) -> None:
    model, average = objective.model, WeightAverage(objective.model, 0.99)
    timm = ModelEmaV3(model, decay=0.99)
    for step in range(5):
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(step)), alpha=0.1)
        average.update(model)
        timm.update(model)
    with average.applied(model):
        for name, value in model.named_parameters():
            assert torch.equal(value, timm.module.get_parameter(name)), name


def test_weight_decay_spares_what_timm_spares(objective: ClassificationObjective) -> None:
    model = timms(objective)
    spared, decaying = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert (spared["weight_decay"], decaying["weight_decay"]) == (0, 0.05)
    wanted = {id(value) for value in decaying["params"]}
    for name, value in model.named_parameters():
        assert decays(name, value.shape) == (id(value) in wanted), name


@pytest.mark.parametrize(("rate", "depth"), [(0.1, 12), (0.4, 1), (0.0, 5)])
def test_rates_of_stochastic_depth_rise_as_timms(rate: float, depth: int) -> None:
    np.testing.assert_allclose(drop_path_rates(rate, depth), calculate_drop_path_rates(rate, depth), atol=1e-7)

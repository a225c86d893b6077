"""Parts of the plain detector: losses by hand, maps with dropped tokens, sizes, padding, starts, adapters."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from finetune.detection.losses import binary_loss, focal_binary_loss, grouped_focal_loss, softmax_loss
from finetune.detection.roi_head import clip_of_box, extend_boxes_inclusive, feature_map, pad_with_zeros
from finetune.detection.task import DetectionObjective
from finetune.recipe import load_tune_recipe
from pretrain.errors import RecipeError, WeightsError
from pretrain.models.initial_weights import read_weights
from pretrain.objectives.base import method_of, problems_of

RECIPE = """\
model: {name: classifier, size: custom, patch_size: 8, dim: 24, depth: 3, heads: 2, mlp_ratio: 2, classes: 4,
        drop_path: 0, pooling: token0, head_init_scale: 1, pretrain_frames: 4, pretrain_height: 16, pretrain_width: 16}
objective: {name: detection}
input: {frames: 4, short_side: 24, crop: random, crop_size: 24, pad: 8}
data: {sources: {toy: {shards: nowhere}}}
"""
IMAGES = """\
model: {name: image_vit, patch_size: 8, dim: 24, depth: 2, heads: 2, mlp_ratio: 2, classes: 4}
objective: {name: detection}
input: {frames: 1, short_side: 24, crop: random, crop_size: 24, pad: 8}
data: {sources: {toy: {shards: nowhere}}}
"""


def built(tmp_path: Path, *words: str, text: str = RECIPE) -> tuple[DetectionObjective, dict[str, Any]]:
    """An objective in evaluation mode, and a made-up batch of two clips."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    method = method_of(load_tune_recipe(str(path), list(words)))
    assert problems_of(method) == []
    torch.manual_seed(0)
    objective = method.build()
    assert isinstance(objective, DetectionObjective)
    return objective.eval(), method.example(2)


def test_losses_are_sums_over_boxes() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 80), (torch.rand(5, 80) < 0.1).float()
    every = F.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(binary_loss(logits, labels), every * 5)
    one = torch.eye(80)[[3, 7, 0, 9, 79]]
    one[1] = 0  # of nobody
    wanted = F.cross_entropy(logits[[0, 2, 3, 4]], torch.tensor([3, 0, 9, 79]), reduction="sum")
    torch.testing.assert_close(softmax_loss(logits, one), wanted)
    assert float(binary_loss(logits[:0], labels[:0])) == float(softmax_loss(logits[:0], one[:0])) == 0


def test_focal_losses_of_the_groups() -> None:
    """Written out box by box and class by class (systems/cycleacr.md section 4)."""
    torch.manual_seed(1)
    logits, labels = torch.randn(3, 80).double(), (torch.rand(3, 80) < 0.2).double()
    labels[1, :14] = 0  # no pose: the first counts
    total = 0.0
    for row, given in zip(logits, labels, strict=True):
        right = int(given[:14].argmax())
        share = float(row[:14].softmax(0)[right])
        total += 1.2 * (1 - share) ** 2 * -np.log(share)
        for group, weight in ((slice(14, 63), 49), (slice(63, 80), 17)):
            shares = torch.where(given[group] > 0, row[group].sigmoid(), 1 - row[group].sigmoid())
            total += weight * float(((1 - shares) ** 2 * -shares.log()).mean())
    assert float(grouped_focal_loss(logits, labels)) == pytest.approx(total, rel=1e-9)
    assert float(focal_binary_loss(logits[:0], labels[:0])) == 0
    assert float(grouped_focal_loss(logits[:0], labels[:0])) == 0


def test_boxes_grow_or_shrink_inside_their_frames() -> None:
    boxes, sizes = torch.tensor([[10.0, 10, 29, 19], [0, 0, 39, 29]]), torch.tensor([[30, 40], [30, 40]])
    assert extend_boxes_inclusive(boxes, (0.1, 0.2), sizes).tolist() == [[9, 9, 30, 20], [0, 0, 39, 29]]
    assert extend_boxes_inclusive(boxes, (-0.1, -0.2), sizes)[0].tolist() == [11, 11, 28, 18]
    assert clip_of_box(torch.tensor([2, 0, 1]), 3).tolist() == [0, 0, 2]


def test_padding_is_zero_behind_the_normalisation(tmp_path: Path) -> None:
    objective, batch = built(tmp_path)
    batch["sizes"] = torch.tensor([[24, 24], [16, 20]])
    clips = objective.clips(batch)
    assert (clips[1, :, 16:] == 0).all() and (clips[1, :, :, 20:] == 0).all()
    black = (0 - objective.normalization.mean) / objective.normalization.std
    assert (clips[1, :, :16, :20] != 0).any() and (black < -1).all(), "black pixels are no zeros"
    assert torch.equal(clips[0], objective.normalization(batch["video"][0].float() / 255))
    whole = torch.ones(1, 2, 4, 4, 3)
    assert torch.equal(pad_with_zeros(whole, torch.tensor([[4, 4]])), whole)


def test_any_size_and_the_built_one_to_the_bit(tmp_path: Path) -> None:
    objective, batch = built(tmp_path)
    model, video = objective.model, torch.randn(2, 4, 24, 24, 3)
    torch.manual_seed(0)
    other = method_of(load_tune_recipe(str(tmp_path / "recipe.yaml"), ["input.crop=none"])).build().model
    other.load_state_dict(model.state_dict())
    assert other.eval().grid != model.grid
    with torch.no_grad():
        assert torch.equal(model(video), other(video)), "built for whole frames, given the size of crops"
        wide = torch.randn(1, 4, 24, 48, 3)
        assert other._size() == (4, 24, 48) and torch.equal(model(wide), other(wide))
        assert torch.equal(model(wide), other(wide)), "also from the table that is kept"
    model.varies = False
    with pytest.raises(RecipeError, match=r"clips of \(4, 24, 48\)"):
        model(wide)


def test_the_last_sizes_are_kept(tmp_path: Path) -> None:
    model = built(tmp_path)[0].model
    with torch.no_grad():
        for columns in range(4, 16):
            model(torch.zeros(1, 4, 8, 8 * columns, 3))
    assert len(model.positions._others) == 8
    # The count of weights does not know them, nor does a checkpoint.
    assert not any("positions" in name for name in model.state_dict())


@pytest.mark.parametrize("fuse", ["true", "false"])
def test_dropped_tokens_leave_a_map_of_the_others(tmp_path: Path, fuse: str) -> None:
    words = ["model.tokens.keep_rate=0.5", "model.tokens.blocks=[0,1]", f"model.tokens.fuse={fuse}"]
    objective, _ = built(tmp_path, *words)
    model, video = objective.model, torch.randn(2, 4, 24, 24, 3)
    grid = objective.architecture.token_grid(4, 24, 24)
    with torch.no_grad():
        found = feature_map(model, video, grid)
        tokens = model.encode(video)
        x = model.normed(tokens.x)
    assert tokens.origin.shape[1] < grid.tokens
    for clip in range(2):
        left = [(int(place), x[clip, row]) for row, place in enumerate(tokens.origin[clip]) if place >= 0]
        others, sizes = x[clip][tokens.origin[clip] < 0], tokens.sizes[clip][tokens.origin[clip] < 0]
        # The first block's fused token may be kept by the second one.
        fused = (others * sizes[:, None]).sum(0) / sizes.sum() if fuse == "true" else x[clip].mean(0)
        for place in range(9):
            own = [token for origin, token in left if origin % 9 == place]
            wanted = torch.stack(own).mean(0) if own else fused
            torch.testing.assert_close(found[clip, :, place // 3, place % 3], wanted)


def test_a_map_without_dropping_is_the_mean_over_time(tmp_path: Path) -> None:
    objective, _ = built(tmp_path)
    video, grid = torch.randn(2, 4, 24, 24, 3), objective.architecture.token_grid(4, 24, 24)
    with torch.no_grad():
        tokens = objective.model.forward_features(video, pooled=False)
        found = feature_map(objective.model, video, grid)
        objective.model.reorganise(objective.recipe.model.tokens, [0.999999, 1, 1])  # the other way, nothing dropped
    torch.testing.assert_close(found[1, :, 2, 1], tokens[1].unflatten(0, (2, 3, 3))[:, 2, 1].mean(0))


def test_any_classifier_is_a_backbone(tmp_path: Path) -> None:
    """An image ViT: class token in front, clips of one frame."""
    objective, batch = built(tmp_path, text=IMAGES)
    loss = objective.train()(batch).loss
    loss.backward()
    assert loss.isfinite() and objective.model.head.weight.grad.abs().sum() > 0
    assert [one.scores.shape for one in objective.detect(batch)] == [(3, 4), (3, 4)]


def test_a_model_without_a_grid_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain.models import image_vit
    from pretrain.models.base import Classifier

    monkeypatch.setattr(image_vit.ImageViTArchitecture, "token_grid", Classifier.token_grid)
    path = tmp_path / "recipe.yaml"
    path.write_text(IMAGES)
    problems = problems_of(method_of(load_tune_recipe(str(path))))
    assert len(problems) == 1 and "model.name=image_vit: has no tokens on a grid" in problems[0]


@pytest.mark.parametrize("method", ["linear", "adaptformer", "vpt", "lora", "bitfit"])
def test_adapters_train_and_the_rest_does_not(tmp_path: Path, method: str) -> None:
    objective, batch = built(tmp_path, f"tune.method={method}")
    objective.train()(batch).loss.backward()
    trained = {name for name, value in objective.model.named_parameters() if value.requires_grad}
    assert {"head.weight", "head.bias"} <= trained < {name for name, _ in objective.model.named_parameters()}
    for name, value in objective.model.named_parameters():
        assert (value.grad is not None) == (name in trained), name


def saved(tmp_path: Path, state: dict[str, torch.Tensor], container: str) -> str:
    path = tmp_path / "weights.pth"
    torch.save({container: state}, path)
    return str(path)


@pytest.mark.parametrize("container", ["model", "module"])
def test_released_detectors_start_whole(tmp_path: Path, container: str) -> None:
    objective, batch = built(tmp_path)
    path = saved(tmp_path, dict(objective.model.state_dict()), container)
    other, _ = built(tmp_path, "run.seed=1")
    for value in other.model.parameters():
        torch.nn.init.normal_(value)
    other.load_pretrained(path, read_weights(path))
    one, two = (each.detect(batch)[0].scores for each in (objective, other))
    assert np.array_equal(one, two)


def test_a_fine_tuned_classifier_starts_all_but_its_norm_and_head(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objective, _ = built(tmp_path)
    state = {name: torch.randn_like(value) for name, value in objective.model.state_dict().items()}
    state |= {f"fc_norm.{part}": state.pop(f"norm.{part}") for part in ("weight", "bias")}
    state |= {"head.weight": torch.randn(400, 24), "head.bias": torch.randn(400)}
    head = objective.model.head.weight.detach().clone()
    path = saved(tmp_path, state, "module")
    with caplog.at_level(logging.WARNING):
        objective.load_pretrained(path, read_weights(path))
    assert "fc_norm is left out" in caplog.text and "head" in caplog.text
    own = objective.model.state_dict()
    assert (own["norm.weight"] == 1).all() and (own["norm.bias"] == 0).all() and torch.equal(own["head.weight"], head)
    assert torch.equal(own["blocks.2.mlp.fc2.weight"], state["blocks.2.mlp.fc2.weight"])


def test_a_pre_trained_encoder_brings_its_norm(tmp_path: Path) -> None:
    objective, _ = built(tmp_path)
    state = {f"encoder.{name}": torch.randn_like(value) for name, value in objective.model.state_dict().items()
             if not name.startswith("head.")}  # fmt: skip
    path = saved(tmp_path, state | {"mask_token": torch.zeros(1, 1, 8)}, "model")
    objective.load_pretrained(path, read_weights(path))
    assert torch.equal(objective.model.norm.weight, state["encoder.norm.weight"])
    del state["encoder.blocks.1.norm1.bias"]
    path = saved(tmp_path, state, "model")
    with pytest.raises(WeightsError, match="missing: blocks.1.norm1.bias"):
        objective.load_pretrained(path, read_weights(path))


def test_layers_have_their_rates(tmp_path: Path) -> None:
    """d^(L + 1 - i): embedding 0, block k k + 1, norm and head the full rate; biases and norms don't decay."""
    objective, _ = built(tmp_path, "optim.layer_decay=0.5")
    rules = {name: objective.rule(name, value.shape) for name, value in objective.named_parameters()}
    assert (
        rules["model.patch_embed.proj.weight"].lr_scale == 0.5**4 and rules["model.blocks.2.norm1.bias"].lr_scale == 0.5
    )
    assert rules["model.norm.weight"].lr_scale == rules["model.head.weight"].lr_scale == 1
    assert rules["model.head.weight"].decays and not rules["model.blocks.0.attn.q_bias"].decays


@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_answers_are_probabilities_times_the_detectors_score(tmp_path: Path, loss: str) -> None:
    words = [f"objective.loss={loss}", "objective.extension=[0,0]", "input.convention=continuous"]
    objective, batch = built(tmp_path, *words)
    batch["box_scores"] = torch.full((6,), 0.5)
    logits = objective.logits(batch, extend_boxes_inclusive(batch["boxes"], (0, 0), batch["sizes"].repeat(3, 1)))
    wanted = (logits.softmax(1) if loss == "softmax" else logits.sigmoid()) / 2
    answers = objective.detect(batch)
    found = torch.cat([torch.from_numpy(one.scores) for one in answers])
    torch.testing.assert_close(found, wanted.detach())
    np.testing.assert_allclose(answers[0].boxes, batch["boxes"][:3] / 24, rtol=1e-5)
    assert [one.time for one in answers] == [0, 1] and answers[0].video == "made_up"
    kept = built(tmp_path, *words, "objective.detector_score=false")[0].detect(batch)[0].scores
    np.testing.assert_allclose(kept, answers[0].scores * 2, rtol=1e-5)


def test_a_clip_without_boxes_has_an_empty_answer_and_no_loss(tmp_path: Path) -> None:
    objective, batch = built(tmp_path)
    batch |= {"counts": torch.tensor([0, 3])} | {name: batch[name][3:] for name in ("boxes", "labels", "box_scores")}
    assert [len(one.boxes) for one in objective.detect(batch)] == [0, 3]
    batch |= {"counts": torch.tensor([0, 0])} | {name: batch[name][3:] for name in ("boxes", "labels", "box_scores")}
    loss = objective(batch).loss
    loss.backward()
    assert float(loss.detach()) == 0 and float(objective.model.patch_embed.proj.weight.grad.abs().sum()) == 0
    assert [len(one.boxes) for one in objective.detect(batch)] == [0, 0]

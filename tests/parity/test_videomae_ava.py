"""The plain VideoMAE detector: tokens, boxes, scores, loss and gradients beside the official ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.detection.roi_head import clip_of_box, extend_boxes_inclusive, feature_map, pool_boxes
from finetune.detection.task import DetectionObjective
from finetune.recipe import load_tune_recipe
from pretrain.models.initial_weights import read_weights
from pretrain.models.roi_align import roi_align
from pretrain.objectives.base import method_of, problems_of

KINDS = ("videomae_ava",)


class Official(DetectionObjective):
    """Given clips that are normalised already."""

    def clips(self, batch: dict[str, Any]) -> Tensor:
        clips: Tensor = batch["video"]
        return clips


@pytest.fixture
def objective(case) -> Official:  # noqa: ANN001
    sizes, (height, width) = case.meta["config"], case.meta["config"]["hw"]
    assert (sizes["roi_align_aligned"], sizes["sampling_ratio"]) == (False, 0)
    model = {
        "size": "custom", "dim": sizes["dim"], "depth": sizes["vdepth"], "heads": sizes["heads"], "drop_path": 0,
        "mlp_ratio": sizes["mlp_ratio"], "patch_size": sizes["patch"], "tubelet": sizes["tubelet"],
        "classes": sizes["num_classes"], "pretrain_frames": sizes["frames"], "pretrain_height": sizes["img"],
        "pretrain_width": sizes["img"],
    }  # fmt: skip
    # Built for the square of pre-training: the clips of the case are of another size.
    words = [f"model.{key}={value}" for key, value in model.items()] + [
        f"input.frames={sizes['frames']}", f"input.crop_size={sizes['img']}", f"input.pad={sizes['patch']}",
        f"objective.extension={sizes['test_extend_scale']}", f"input.short_side={max(height, width)}",
    ]  # fmt: skip
    recipe = load_tune_recipe("vit_b_ava", words)
    method = method_of(recipe)
    assert not problems_of(method)
    built = Official(method.build().model, recipe, method.architecture)
    built.load_pretrained(case.weights, read_weights(case.weights))
    return built.eval()


def batch_of(case: Any, boxes: str) -> dict[str, Any]:
    tensors, config = case.tensors(), case.meta["config"]
    each = [tensors[f"{boxes}{clip}"] for clip in range(len(config["nb"]))]
    video = (tensors["video"].float() / 32).permute(0, 2, 3, 4, 1)
    sizes = torch.tensor([config["hw"]] * len(video))
    return {"video": video, "boxes": torch.cat(each), "counts": torch.tensor([len(one) for one in each]),
            "sizes": sizes, "originals": sizes, "videos": ["clip"] * len(each),
            "times": torch.arange(len(each)).double()}  # fmt: skip


def joined(case: Any, name: str) -> Tensor:
    tensors = case.tensors()
    return torch.cat([tensors[f"{name}{clip}"] for clip in range(len(case.meta["config"]["nb"]))])


def test_answers(case, objective: Official) -> None:  # noqa: ANN001
    expected, config = case.tensors(), case.meta["config"]
    near = {key: case.meta["tolerance"][key] for key in ("rtol", "atol")}
    batch = batch_of(case, "eval.boxes") | {"box_scores": joined(case, "eval.det_scores").flatten()}
    grid = objective.architecture.token_grid(*batch["video"].shape[1:4])
    with torch.no_grad():
        torch.testing.assert_close(
            objective.model.forward_features(batch["video"], pooled=False), expected["eval.tokens"], **near
        )
        features = feature_map(objective.model, batch["video"], grid)
        torch.testing.assert_close(features, expected["eval.time_mean"], **near)
        clips = clip_of_box(batch["counts"], len(batch["boxes"]))
        scale = tuple(config["test_extend_scale"])
        boxes = extend_boxes_inclusive(batch["boxes"], scale, batch["sizes"][clips])
        torch.testing.assert_close(boxes, joined(case, "eval.proposals"), **near)
        aligned = roi_align(features, boxes, clips, config["pooler_resolution"], config["pooler_scale"], within=True)
        torch.testing.assert_close(aligned, expected["eval.roi_aligned"], **near)
        pooled = pool_boxes(features, boxes, clips, config["pooler_scale"], config["pooler_resolution"])
        torch.testing.assert_close(pooled, expected["eval.roi_pooled"], **near)
        torch.testing.assert_close(objective.logits(batch, boxes), expected["eval.logits"], **near)
    answers = objective.detect(batch)
    scores = torch.cat([torch.from_numpy(one.scores) for one in answers])
    torch.testing.assert_close(scores, expected["eval.scores"], **near)
    assert [len(one.boxes) for one in answers] == config["nb"]


def test_loss_and_gradients(case, objective: Official) -> None:  # noqa: ANN001
    expected, near = case.tensors(), case.meta["tolerance"]
    batch = batch_of(case, "train.proposals") | {"labels": joined(case, "train.labels").float()}
    logits = objective.logits(batch, batch["boxes"])
    torch.testing.assert_close(logits, expected["train.logits"], rtol=near["rtol"], atol=near["atol"])
    loss = objective(batch).loss
    torch.testing.assert_close(loss, expected["train.loss"], rtol=near["rtol"], atol=near["atol"])
    loss.backward()
    parameters = dict(objective.model.named_parameters())
    names = [name.removeprefix("train.grad.") for name in expected if name.startswith("train.grad.")]
    assert names
    for name in names:
        wanted = expected[f"train.grad.{name}"]
        found = parameters[name].grad
        assert found is not None
        difference = float((found - wanted).norm() / wanted.norm())
        assert difference < near["grad_rtol"], (name, difference)

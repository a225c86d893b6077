"""Official VideoMAE V2 fine-tuning around the network: targets, mixing, losses, parameter groups, merging of views."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from finetune.classification.mixing import Mixing
from finetune.classification.predictions import Predictions, scores
from finetune.classification.task import ClassificationObjective, ClassificationTask, soft_cross_entropy
from finetune.recipe import Augment, load_tune_recipe
from pretrain.engine.optimiser import parameter_groups

KINDS = ("videomae_v2_finetune",)


def objective(case) -> ClassificationObjective:
    """The objective of a recipe that says what meta.json says."""
    config = case.meta["config"]
    height, width = config["img"] if isinstance(config["img"], list) else (config["img"], config["img"])
    values = {
        "model": {"depth": config["edp"], "dim": config["ed"], "heads": config["eh"], "patch_size": config["p"],
                  "mlp_ratio": config["mlp"], "classes": config["nc"], "layer_scale": config.get("iv", 0.0),
                  "positions": "rebuild"},
        "input": {"frames": config["T"], "height": height, "width": width},
        "objective": {"smoothing": config["smoothing"]},
        "optim": {"layer_decay": config["layer_decay"], "weight_decay": config["wd"]},
    }  # fmt: skip
    words = [f"{section}.{key}={value}" for section, entries in values.items() for key, value in entries.items()]
    return ClassificationTask(load_tune_recipe("demo_finetune", words)).build()


def test_losses(case) -> None:
    tensors, tolerance = case.tensors(), case.tolerance("outputs")
    logits, labels = tensors["logits"], tensors["labels"].long()
    module = objective(case)
    assert_close(
        soft_cross_entropy(logits, tensors["soft_targets"]), tensors["loss_soft_target"].reshape(()), **tolerance
    )
    assert_close(module._loss(logits, module._soft(labels)), tensors["loss_label_smoothing"].reshape(()), **tolerance)
    module.smoothing = 0.0
    assert_close(module._loss(logits, module._soft(labels)), tensors["loss_cross_entropy"].reshape(()), **tolerance)
    assert_close(F.cross_entropy(logits, labels), tensors["loss_cross_entropy"].reshape(()), **tolerance)


def test_mixup(case) -> None:
    """With the drawn weight given: pixels and soft targets of a batch mixed with its reverse."""
    tensors, config = case.tensors(), case.meta["config"]
    mixing = Mixing(Augment(mixup=0.8, cutmix=0), config["nc"], config["smoothing"])
    mixing._mixup._params_per_batch = lambda: (config["lam"], False)
    mixed, soft = mixing(tensors["video"].permute(0, 2, 3, 4, 1), tensors["labels"].long())
    frames = tensors["mixup_pixels"].shape[2]
    assert_close(soft, tensors["soft_targets"], **case.tolerance("outputs"))
    found = mixed.permute(0, 4, 1, 2, 3)[:, :, :frames]
    assert_close(found, tensors["mixup_pixels"], **case.tolerance("outputs"))


def test_groups_of_the_optimizer(case) -> None:
    official = {
        name: (group["weight_decay"], group["lr_scale"])
        for group in case.meta["param_groups"].values()
        for name in group["params"]
    }
    module = objective(case)
    names = {id(parameter): name.removeprefix("model.") for name, parameter in module.named_parameters()}
    ours = {
        names[id(parameter)]: (group["weight_decay"], group["lr_scale"])
        for group in parameter_groups(module, case.meta["config"]["wd"])
        for parameter in group["params"]  # type: ignore[attr-defined]
    }
    assert ours == {name: (decay, pytest.approx(scale)) for name, (decay, scale) in official.items()}


def test_views_are_merged(case) -> None:
    tensors, meta = case.tensors(), case.meta
    targets = tensors["view_labels"].long().numpy()
    keys = [f"video {number}" for number in range(len(targets))]
    names = [str(number) for number in range(meta["config"]["nc"])]
    predictions = Predictions("single", names, keys, targets, tensors["view_logits"].numpy())
    assert predictions.logits.shape[1] == np.prod(meta["config"]["views"])
    assert_close(torch.from_numpy(predictions.merged), tensors["view_merged_prob"], **case.tolerance("outputs"))
    found = scores(predictions)
    assert (found["top1"], found["top5"]) == pytest.approx((meta["merged_top1"], meta["merged_top5"]))

"""Official VideoMAE V2 classifier: activations, logits, gradients, layer-wise groups, learning rates."""

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from pretrain.engine.schedules import Schedule
from pretrain.models.classifier import Config, VideoClassifier, layer_id
from pretrain.models.classifier_weights import load_pretrained
from pretrain.models.dropout import drop_path_rates
from pretrain.objectives.base import decays

KINDS = ("videomae_v2_finetune",)


def build(case) -> VideoClassifier:
    """The model that meta.json and the weights describe, with the case's weights."""
    config, names = case.meta["config"], load_file(case.weights)
    height, width = config["img"] if isinstance(config["img"], list) else (config["img"], config["img"])
    model = VideoClassifier(
        Config(
            size="custom",
            patch_size=config["p"],
            tubelet=names["patch_embed.proj.weight"].shape[2],
            dim=config["ed"],
            depth=config["edp"],
            heads=config["eh"],
            mlp_ratio=config["mlp"],
            classes=config["nc"],
            pooling="mean" if "fc_norm.weight" in names else "token0",
            cosine_attention="blocks.0.attn.scale" in names,
            layer_scale=config.get("iv", 0.0),
            drop_path=0.0,
            positions="rebuild",
        ),
        config["T"],
        height,
        width,
    )
    report = load_pretrained(model, case.weights)
    assert not report.missing and not report.unexpected
    return model


def record(model: VideoClassifier) -> dict[str, Tensor]:
    """A dictionary that the next forward pass fills with activations under the names of the cases."""
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _module, _inputs, output: kept.__setitem__(name, output.detach()))

    keep(model.patch_embed, "patch_embed")
    model.blocks[0].register_forward_pre_hook(lambda _module, inputs: kept.__setitem__("tokens", inputs[0].detach()))
    for index, block in enumerate(model.blocks):
        keep(block, f"block{index}")
    keep(model.blocks[-1], "last_block")
    return kept


def test_activations_and_gradients(case) -> None:
    tensors, model = case.tensors(), build(case)
    near, kept = case.tolerance("outputs"), record(model)
    video = tensors["video"].movedim(1, -1)
    logits = model(video)
    kept |= {"logits": logits.detach(), "features": model.forward_features(video).detach()}
    kept["pos_embed"] = model.positions.table.reshape(tensors["pos_embed"].shape)
    for name in {"patch_embed", "tokens", "block0", "last_block", "features", "logits", "pos_embed"}:
        assert_close(kept[name], tensors[name], **near, msg=lambda text, name=name: f"{name}: {text}")
    loss = F.cross_entropy(logits, tensors["soft_targets"])
    assert_close(loss.detach(), tensors["loss_soft_target"], **near)
    loss.backward()
    gradients = {f"grad.{name}": value.grad for name, value in model.named_parameters()}
    assert set(gradients) == {name for name in tensors if name.startswith("grad.")}
    near = case.tolerance("gradients")
    for name, value in gradients.items():
        assert_close(value, tensors[name], **near, msg=lambda text, name=name: f"{name}: {text}")
    norm = torch.stack([value.norm() for value in gradients.values()]).norm()
    assert_close(norm, tensors["grad_norm"].reshape(()), **near)


def test_dense_features_and_activation_checkpointing(case) -> None:
    """What the cases' own names don't cover: the last block's tokens as dense features, recomputed blocks."""
    tensors, model = case.tensors(), build(case)
    video = tensors["video"].movedim(1, -1)
    dense = model.forward_features(video, pooled=False)
    assert_close(dense.detach(), tensors["last_block"], **case.tolerance("outputs"))
    model.activation_checkpointing = True
    F.cross_entropy(model(video), tensors["soft_targets"]).backward()
    found, name = model.patch_embed.proj.weight.grad, "grad.patch_embed.proj.weight"
    assert_close(found, tensors[name], **case.tolerance("gradients"))


def test_layer_wise_groups(case) -> None:
    config, model = case.meta["config"], build(case)
    groups = case.meta["param_groups"]
    assert sorted(name for group in groups.values() for name in group["params"]) == sorted(
        name for name, _ in model.named_parameters()
    )
    shapes = {name: value.shape for name, value in model.named_parameters()}
    for group in groups.values():
        for name in group["params"]:
            assert decays(name, shapes[name]) == (group["weight_decay"] > 0), name
            exponent = config["edp"] + 1 - layer_id(name, config["edp"])
            assert abs(config["layer_decay"] ** exponent - group["lr_scale"]) < 1e-12, name


def test_learning_rates(case) -> None:
    sched, official = case.meta["config"]["sched"], case.tensors()["lr_schedule"]
    per_epoch = sched["niter_per_ep"]
    total, warmup = sched["epochs"] * per_epoch, sched["warmup_epochs"] * per_epoch
    schedule = Schedule(per_epoch, total, total, warmup, sched["base_value"], sched["final_value"])
    assert_close(torch.tensor([schedule.lr(step) for step in range(total)]), official, rtol=1e-6, atol=1e-12)


def test_drop_path_rates(case) -> None:
    example = case.meta["drop_path_rates_example"]
    assert_close(drop_path_rates(example["rate"], case.meta["config"]["edp"]), example["per_block"])

"""Official VideoMAE V1 and V2 pre-training: activations, predictions, targets, losses, gradients, masks."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pretrain.models.cubes import cut_cubes, take_tokens
from pretrain.models.videomae import Config, VideoMAE
from pretrain.models.weights import load_weights
from pretrain.objectives.videomae import MEAN, STD, VideoMAEObjective, weighted_mean
from pretrain.samples.masks import MaskPlan, running_cell_maps

KINDS = ("videomae_v1_pretrain", "videomae_v2_pretrain", "videomae_v2_pretrain_cosattn")


def build(case) -> VideoMAE:
    """The model that meta.json describes, with the case's weights."""
    config = case.meta["config"]
    height, width = image_size(config)
    model = VideoMAE(
        Config(
            size="custom",
            patch_size=config["p"],
            tubelet=config["tubelet"],
            dim=config["ed"],
            depth=config["edp"],
            heads=config["eh"],
            mlp_ratio=config["mlp"],
            decoder_dim=config["dd"],
            decoder_depth=config["ddp"],
            decoder_heads=config["dh"],
            cosine_attention=config.get("cos", False),
            layer_scale=config["iv"],
            norm_eps=config["norm_eps"],
        ),
        config.get("T", config.get("frames")),
        height,
        width,
    )
    load_weights(model, case.weights)
    # Cosine attention multiplies scores by up to 100 and so the last bit of the embedding, which another order of
    # summation changes, to the tolerance of these float32 cases. In float64 only the case's own rounding is left.
    return model.double() if model.config.cosine_attention else model


def image_size(config: dict) -> tuple[int, int]:
    image = config["img"]
    return (image, image) if isinstance(image, int) else tuple(image)


def rows(mask: Tensor, value: int) -> Tensor:
    """Tokens where a mask [B, N] has `value`, [B, n]; every sample must have the same number."""
    found = [torch.nonzero(row == value)[:, 0] for row in mask]
    assert len({len(index) for index in found}) == 1
    return torch.stack(found)


def batch_of(tensors: dict[str, Tensor], decoder_mask: Tensor | None) -> dict[str, Tensor]:
    """The batch that an objective takes, pixels in [0, 1]; V1 cases have no decoder mask."""
    hidden = tensors["enc_mask"]
    targets = rows(1 - hidden if decoder_mask is None else decoder_mask, 0)
    video = tensors["video"].movedim(1, -1) * torch.tensor(STD) + torch.tensor(MEAN)
    weight = hidden.float().gather(1, targets)
    return {"video": video, "visible": rows(hidden, 0), "targets": targets, "weight": weight}


def record(model: VideoMAE) -> dict[str, Tensor]:
    """A dictionary that the next forward pass fills with activations under the names of the cases."""
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _module, _inputs, output: kept.__setitem__(name, output.detach()))

    def keep_input(module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda _module, inputs: kept.__setitem__(name, inputs[0].detach()))

    keep_input(model.encoder.blocks[0], "enc.visible_tokens")
    keep(model.encoder.blocks[0].attn, "enc.block0.attn")
    for index, block in enumerate(model.encoder.blocks):
        keep(block, f"enc.block{index}")
    keep(model.encoder, "enc.out")
    keep(model.encoder_to_decoder, "enc_to_dec")
    keep_input(model.decoder, "dec.input")
    keep(model.decoder.blocks[-1], "dec.last_block")
    keep(model, "pred")
    return kept


def test_activations_and_gradients(case) -> None:
    tensors, model = case.tensors(), build(case)
    objective = VideoMAEObjective(model)
    batch, kept = batch_of(tensors, tensors.get("dec_mask")), record(model)
    loss = objective(batch).loss
    loss.backward()
    near = case.tolerance("outputs")
    for name, value in kept.items():
        if name in tensors:
            assert_close(value.float(), tensors[name], **near, msg=lambda text, name=name: f"{name}: {text}")
    known = {"enc.patch_embed", "enc.visible_tokens", *kept}
    unknown = {name for name in tensors if name.startswith(("enc.", "dec.")) and name not in known}
    assert not unknown, f"activations that this test does not compare: {unknown}"
    assert_close(loss.detach(), tensors["loss"], **near)
    gradients = {f"grad.{name}": value.grad.float() for name, value in model.named_parameters()}
    assert set(gradients) == {name for name in tensors if name.startswith("grad.")}
    for name, value in gradients.items():
        assert_close(value, tensors[name], **case.tolerance("gradients"), msg=lambda text, name=name: f"{name}: {text}")
    norm = torch.stack([value.norm() for value in gradients.values()]).norm()
    assert_close(norm, tensors["grad_norm"].reshape(()), **case.tolerance("gradients"))


def test_embedding_and_positions(case) -> None:
    tensors, model = case.tensors(), build(case)
    near = case.tolerance("outputs")
    config = case.meta["config"]
    cubes = cut_cubes(tensors["video"].movedim(1, -1), config["tubelet"], config["p"])
    embedded = model.float().encoder.patch_embed(cubes).detach()
    assert_close(embedded, tensors["enc.patch_embed"], **near)
    for name, part in (("pos_embed_encoder", model.encoder), ("pos_embed_decoder", model.decoder)):
        assert_close(part.positions.table, tensors[name].reshape(part.positions.table.shape), **near)


def test_targets_and_losses(case) -> None:
    tensors, model = case.tensors(), build(case)
    near = case.tolerance("outputs")
    config = case.meta["config"]
    batch = batch_of(tensors, tensors.get("dec_mask"))
    pixels = take_tokens(cut_cubes(batch["video"], config["tubelet"], config["p"]), batch["targets"])
    labels = VideoMAEObjective(model).target(pixels)
    assert_close(labels, tensors["labels"], **near)
    raw = VideoMAEObjective(model, normalize_targets=False)(batch).loss
    assert_close(raw.detach(), tensors["loss_raw_pixels"], **near)
    if "loss_weight" in tensors:
        assert_close(batch["weight"], tensors["loss_weight"].float())
        errors = (tensors["pred"] - labels).square().mean(-1)
        everything = weighted_mean(errors, torch.ones_like(batch["weight"]))
        assert_close(everything, tensors["loss_all_decoder_tokens"], **near)


def test_other_decoder_ratios(case) -> None:
    tensors, model = case.tensors(), build(case)
    tags = [name.removeprefix("dec_mask") for name in tensors if name.startswith("dec_mask@")]
    if not tags:
        pytest.skip(f"{case.name} has no other decoder ratios")
    for tag in tags:
        kept = record(model)
        loss = VideoMAEObjective(model)(batch_of(tensors, tensors[f"dec_mask{tag}"])).loss.detach()
        assert_close(loss, tensors[f"loss{tag}"], **case.tolerance("outputs"))
        tail = tensors[f"pred_tail{tag}"]
        assert_close(kept["pred"][:, -tail.shape[1] :].float(), tail, **case.tolerance("outputs"))


def test_running_cell_maps(case) -> None:
    maps = {name.split("_")[-1]: value for name, value in case.tensors().items() if name.startswith("run_cell_maps")}
    if not maps:
        pytest.skip(f"{case.name} has no running-cell maps")
    config = case.meta["config"]
    height, width = (side // config["p"] for side in image_size(config))
    time = config["T"] // config["tubelet"]
    for ratio, official in maps.items():
        assert np.array_equal(running_cell_maps(time, height, width, float(ratio)), official.numpy())


def test_masks_are_ones_that_we_could_draw(case) -> None:
    """The counts of the official masks are those that a plan states, and their tubes are tubes."""
    tensors, config = case.tensors(), case.meta["config"]
    height, width = (side // config["p"] for side in image_size(config))
    time = config.get("T", config.get("frames")) // config["tubelet"]
    decoder = "running_cell" if config.get("dratio") else "none"
    plan = MaskPlan(time, height, width, config["ratio"], decoder, config.get("dratio", 0.0))
    batch = batch_of(tensors, tensors.get("dec_mask"))
    assert (plan.visible, plan.targets) == (batch["visible"].shape[1], batch["targets"].shape[1])
    assert (tensors["enc_mask"].unflatten(1, (time, -1)) == tensors["enc_mask"][:, None, : height * width]).all()
    assert plan.problems() == []

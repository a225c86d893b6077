"""Hugging Face VideoMAE pre-training: its weights give its outputs in our model, at its epsilons and at ours."""

import torch
from torch.testing import assert_close

from pretrain.models.cubes import cut_cubes, take_tokens
from pretrain.models.huggingface import DECODER_NORM_EPS
from pretrain.models.videomae import Config, VideoMAE
from pretrain.models.weights import load_weights
from pretrain.objectives.videomae import MEAN, STD, VideoMAEObjective

KINDS = ("videomae_hf_pretrain",)


def build(case, norm_eps: float, decoder_norm_eps: float) -> VideoMAE:
    """The model that the case's Hugging Face configuration describes, with its weights."""
    config = case.meta["hf_config"]
    model = VideoMAE(
        Config(
            size="custom",
            patch_size=config["patch_size"],
            tubelet=config["tubelet_size"],
            dim=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            mlp_ratio=config["intermediate_size"] / config["hidden_size"],
            decoder_dim=config["decoder_hidden_size"],
            decoder_depth=config["decoder_num_hidden_layers"],
            decoder_heads=config["decoder_num_attention_heads"],
            norm_eps=norm_eps,
            decoder_norm_eps=decoder_norm_eps,
        ),
        config["num_frames"],
        config["image_size"],
        config["image_size"],
    )
    load_weights(model, case.weights)
    return model


def run(case, model: VideoMAE) -> dict[str, torch.Tensor]:
    """Features, predictions and loss on the case's video."""
    tensors = case.tensors()
    hidden = tensors["enc_mask"]
    index = {value: torch.stack([torch.nonzero(row == value)[:, 0] for row in hidden]) for value in (0, 1)}
    video = tensors["video"].movedim(1, -1)
    cubes = cut_cubes(video, model.shape.tubelet, model.shape.patch_size)
    objective = VideoMAEObjective(model, case.meta["hf_config"]["norm_pix_loss"])
    batch = {"video": video * torch.tensor(STD) + torch.tensor(MEAN), "visible": index[0], "targets": index[1]}
    with torch.no_grad():
        return {
            "features": model.encoder(take_tokens(cubes, index[0]), index[0]),
            "predictions": model(take_tokens(cubes, index[0]), index[0], index[1]),
            "loss": objective(batch | {"weight": torch.ones(index[1].shape)}).loss,
        }


def test_at_its_own_epsilons(case) -> None:
    tensors, near = case.tensors(), case.tolerance("outputs")
    found = run(case, build(case, case.meta["hf_config"]["layer_norm_eps"], DECODER_NORM_EPS))
    assert_close(found["features"], tensors["hf_encoder_out"], **near)
    assert_close(found["predictions"], tensors["hf_logits"], **near)
    assert_close(found["loss"], tensors["hf_loss"], **near)


def test_at_official_epsilons(case) -> None:
    tensors, near = case.tensors(), case.tolerance("outputs")
    found = run(case, build(case, 1e-6, 1e-6))
    assert_close(found["predictions"], tensors["official_pred"], **near)
    assert_close(found["predictions"], tensors["hf_logits_eps1e6"], **near)
    assert_close(found["loss"], tensors["hf_loss_eps1e6"], **near)

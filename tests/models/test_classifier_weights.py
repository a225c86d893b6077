"""Checkpoints into the classifier: pre-trained and fine-tuned, every layout, head conversion, refusals."""

import json

import pytest
import torch
from safetensors.torch import save_file

from pretrain.errors import WeightsError
from pretrain.models.classifier import Config, VideoClassifier
from pretrain.models.classifier_weights import load_pretrained, map_head, read_label_map, split_projections
from pretrain.models.huggingface import from_official
from pretrain.models.image_vit import Config as ImageConfig
from pretrain.models.image_vit import ImageViT
from pretrain.models.videomae import Config as PretrainConfig
from pretrain.models.videomae import VideoMAE

SIZES = {"size": "custom", "patch_size": 4, "dim": 24, "depth": 2, "heads": 3, "mlp_ratio": 2.0, "drop_path": 0.0}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def normal(model: torch.nn.Module, seed: int) -> None:
    """Every parameter random, so that a lost one shows."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.1, generator=generator)


@pytest.fixture
def pretrained() -> VideoMAE:
    model = VideoMAE(PretrainConfig(**SIZES, **DECODER), 4, 16, 16)
    normal(model, 0)
    return model


def classifier(seed: int = 1, **options) -> VideoClassifier:
    model = VideoClassifier(Config(**(SIZES | {"classes": 5, "positions": "rebuild"} | options)), 4, 16, 16)
    normal(model, seed)
    return model


def clips() -> torch.Tensor:
    return torch.randn(2, 4, 16, 16, 3, generator=torch.Generator().manual_seed(2))


def dense_of(pretrained: VideoMAE) -> torch.Tensor:
    """What the pre-trained encoder makes of all cubes, before its norm."""
    from pretrain.models.cubes import cut_cubes
    from pretrain.models.recompute import run_blocks

    encoder, cubes = pretrained.encoder, cut_cubes(clips(), 2, 4)
    tokens = encoder.patch_embed(cubes) + encoder.positions.table
    return run_blocks(encoder.blocks, tokens, False)


WRAPPERS = {
    "plain": lambda state: state,
    "official": lambda state: {"model": state, "epoch": 3},
    "compiled": lambda state: {"model": {f"_orig_mod.{key}": value for key, value in state.items()}},
    "deepspeed": lambda state: {"module": {f"module.{key}": value for key, value in state.items()}},
    "objective": lambda state: {f"model.{key}": value for key, value in state.items()},
    "backbone": lambda state: {f"backbone.{k.removeprefix('encoder.')}": v for k, v in state.items()
                               if k.startswith("encoder.")},
    "hugging face": from_official,
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPERS)
def test_pretrained_encoder_in_every_layout(name: str, pretrained: VideoMAE, tmp_path) -> None:
    torch.save(WRAPPERS[name](pretrained.state_dict()), tmp_path / "checkpoint.pth")
    model = classifier()
    head, fc_norm = model.head.weight.clone(), model.fc_norm.weight.clone()
    report = load_pretrained(model, str(tmp_path / "checkpoint.pth"))
    assert torch.equal(model.forward_features(clips(), pooled=False), dense_of(pretrained))
    assert set(report.missing) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert {"norm.weight", "norm.bias"} <= set(report.unexpected)
    assert torch.equal(model.head.weight, head) and torch.equal(model.fc_norm.weight, fc_norm)


def test_fate_of_the_encoders_norm(pretrained: VideoMAE, tmp_path) -> None:
    torch.save(pretrained.state_dict(), tmp_path / "checkpoint.pth")
    mean, token0 = classifier(), classifier(pooling="token0")
    load_pretrained(mean, str(tmp_path / "checkpoint.pth"), encoder_norm="fc_norm")
    load_pretrained(token0, str(tmp_path / "checkpoint.pth"))
    for norm in (mean.fc_norm, token0.norm):
        assert torch.equal(norm.weight, pretrained.encoder.norm.weight)


def test_fine_tuned_model_round_trip(tmp_path) -> None:
    source = classifier(0)
    for name, state in (("own", source.state_dict()), ("adaptformer", split_projections(source.state_dict()))):
        save_file(state, tmp_path / f"{name}.safetensors")
        model = classifier()
        report = load_pretrained(model, str(tmp_path / f"{name}.safetensors"))
        assert not report.missing and not report.unexpected
        assert torch.equal(model(clips()), source(clips()))


def test_batch_norm_statistics_are_loaded(tmp_path) -> None:
    source = classifier(0, head="batch_norm").train()
    source(clips())
    save_file(source.state_dict(), tmp_path / "probe.safetensors")
    model = classifier(head="batch_norm")
    load_pretrained(model, str(tmp_path / "probe.safetensors"))
    assert torch.equal(model.eval()(clips()), source.eval()(clips()))


def test_head_of_other_classes_is_left_out_or_mapped(tmp_path) -> None:
    source, path = classifier(0, classes=9), str(tmp_path / "nine.safetensors")
    save_file(source.state_dict(), path)
    model = classifier()
    head = model.head.weight.clone()
    report = load_pretrained(model, path)
    assert torch.equal(model.head.weight, head) and set(report.missing) == {"head.weight", "head.bias"}
    (tmp_path / "map.json").write_text(json.dumps([8, 0, 3, 5, 1]))
    load_pretrained(model, path, label_map=read_label_map(str(tmp_path / "map.json")))
    assert torch.equal(model(clips()), source(clips())[:, [8, 0, 3, 5, 1]])
    again = classifier(0)
    load_pretrained(again, path, head="new")
    assert not torch.equal(again.head.weight[0], source.head.weight[8])


@pytest.mark.parametrize("lost", ["patch_embed.proj.bias", "blocks.1.attn.q_bias", "fc_norm.weight"])
def test_incomplete_fine_tuned_model_is_refused(lost: str, tmp_path) -> None:
    state = classifier(0).state_dict()
    del state[lost]
    save_file(state, tmp_path / "lost.safetensors")
    model = classifier()
    before = model(clips())
    with pytest.raises(WeightsError, match=lost):
        load_pretrained(model, str(tmp_path / "lost.safetensors"))
    assert torch.equal(model(clips()), before)


def test_another_size_is_refused(tmp_path) -> None:
    save_file(classifier(0, dim=48).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(WeightsError, match="48"):
        load_pretrained(classifier(), str(tmp_path / "wide.safetensors"))


def test_heads_that_weights_do_not_show_are_read_from_config_json(pretrained: VideoMAE, tmp_path) -> None:
    save_file(from_official(pretrained.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    with pytest.raises(WeightsError, match="num_attention_heads=4, the model has 3"):
        load_pretrained(classifier(), str(tmp_path))
    with pytest.raises(WeightsError, match="num_attention_heads=4, the model has 3"):
        load_pretrained(classifier(), str(tmp_path / "model.safetensors"))


def test_a_config_json_says_nothing_of_an_image_model(tmp_path) -> None:
    model = ImageViT(ImageConfig("image_vit", 16, 4, 24, 1, 3, 2.0, 5))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    load_pretrained(model, str(tmp_path))


@pytest.mark.parametrize(
    ("text", "problem"),
    [("[1, 2, 1]", "twice"), ("[]", "from 0"), ("[-1]", "from 0"), ("[1, 'a']", "not a list"), ("one", "not a list")],
)
def test_wrong_label_maps(text: str, problem: str, tmp_path) -> None:
    (tmp_path / "map").write_text(text)
    with pytest.raises(WeightsError, match=problem):
        read_label_map(str(tmp_path / "map"))


def test_label_map_as_lines_and_out_of_range(tmp_path) -> None:
    (tmp_path / "map.txt").write_text("4\n0\n2\n")
    assert read_label_map(str(tmp_path / "map.txt")) == [4, 0, 2]
    with pytest.raises(WeightsError, match="class 4; the checkpoint's head has 4"):
        map_head({"head.weight": torch.zeros(4, 2), "head.bias": torch.zeros(4)}, [4, 0])
    with pytest.raises(WeightsError, match="no head"):
        map_head({}, [0])

"""R(2+1)D-18 and Conv2D-10: sizes, the maths of AVID's code written out, weights under its names."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from pretrain.errors import RecipeError, WeightsError
from pretrain.models.classifier_weights import load_pretrained
from pretrain.models.r2plus1d import ARCHITECTURE, Config, R2Plus1D
from pretrain.models.sound_encoders import ConvolutionalSoundEncoder, SoundEncoder, build_sound_encoder
from pretrain.samples import augmented_clip, segments


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Statistics and scales as trained networks have them."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.mul_(1 + 0.2 * torch.rand(value.shape, generator=rng)).add_(
                    0.02 * torch.rand(value.shape, generator=rng)
                )
    return module.eval()


def build(**options: int) -> R2Plus1D:
    torch.manual_seed(0)
    model = shaken(R2Plus1D(Config(width=8, blocks=[1, 2, 1, 1], **options)))  # type: ignore[arg-type]
    assert isinstance(model, R2Plus1D)
    return model


def normed(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.batch_norm(x, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))


def official_features(state: dict[str, Tensor], clips: Tensor) -> Tensor:
    """What AVID's code computes, by its names: clips [B, 3, T, H, W]."""
    x = F.conv3d(clips, state["conv1.0.weight"], None, (1, 2, 2), (1, 3, 3))
    x = F.max_pool3d(F.relu(normed(state, "conv1.1", x)), (1, 3, 3), (1, 2, 2), (0, 1, 1))
    for stage, block in ((2, 0), (3, 0), (3, 1), (4, 0), (5, 0)):
        own, stride = f"conv{stage}x.{block}", 2 if stage > 2 and block == 0 else 1
        y = F.conv3d(x, state[f"{own}.spt_conv1.weight"], None, (1, stride, stride), (0, 1, 1))
        y = F.relu(normed(state, f"{own}.spt_bn1", y))
        y = F.relu(normed(state, f"{own}.tmp_bn1", F.conv3d(y, state[f"{own}.tmp_conv1.weight"], None, (stride, 1, 1),
                                                            (1, 0, 0))))  # fmt: skip
        y = F.relu(normed(state, f"{own}.spt_bn2", F.conv3d(y, state[f"{own}.spt_conv2.weight"], None, 1, (0, 1, 1))))
        y = F.conv3d(y, state[f"{own}.tmp_conv2.weight"], None, 1, (1, 0, 0))
        if f"{own}.res_conv.weight" in state:
            x = F.conv3d(x, state[f"{own}.res_conv.weight"], None, stride)
        x = F.relu(normed(state, f"{own}.out_bn", x + y))
    return x.amax((2, 3, 4))


def test_published_sizes() -> None:
    """As AVID's networks count: 15,379,136 and 4,725,696 parameters, 512 features each."""
    with torch.device("meta"):
        seen, heard = R2Plus1D(Config(classes=0)), ConvolutionalSoundEncoder(64)
        assert seen.eval().forward_features(torch.empty(1, 8, 224, 224, 3)).shape == (1, 512)
        assert heard.eval()(torch.empty(1, 200, 257)).shape == (1, 512)
    counts = [sum(value.numel() for value in one.parameters()) for one in (seen, heard)]
    assert counts == [15_379_136, 4_725_696] and SoundEncoder().features == 512


@torch.no_grad()
def test_features_are_the_official_ones() -> None:
    model, clips = build(classes=3), torch.randn(2, 7, 40, 33, 3, generator=torch.Generator().manual_seed(1))
    found = model.forward_features(clips)
    assert_close(found, official_features(model.to_official(), clips.permute(0, 4, 1, 2, 3)), rtol=1e-4, atol=1e-5)
    tokens = model.forward_features(clips, pooled=False)
    assert tokens.shape == (2, 1 * 2 * 2, 64) and torch.equal(tokens.amax(1), found)
    assert_close(model(clips), found @ model.head.weight.t() + model.head.bias)


@torch.no_grad()
def test_weights_of_every_layout_come_in() -> None:
    theirs, clips = build(classes=3), torch.randn(1, 4, 32, 32, 3)
    official = theirs.to_official()
    tuned = theirs.official_file()["model"]
    assert {"module.feature_extractor.conv1.1.running_var", "module.feature_extractor.conv3x.0.res_conv.weight",
            "module.classifier.bias"} <= set(tuned)  # fmt: skip
    names = ("audio_model.conv1.0.weight", "video_proj.projection.0.bias")
    beside = {f"module.{name}": torch.zeros(1) for name in names}
    plain = {key: value for key, value in official.items() if not key.startswith("classifier.")}
    files = {
        "AVID": tuned,
        "pre-trained": {f"module.video_model.{key}": value for key, value in plain.items()} | beside,
        "own": theirs.state_dict(),
        "both towers": {f"video_encoder.{key}": value for key, value in theirs.state_dict().items()},
    }
    for kind, raw in files.items():
        ours = build(classes=3)
        for value in ours.parameters():
            value.fill_(0.5)
        load_pretrained(ours, "file.pth", raw=raw)  # type: ignore[arg-type]
        assert_close(ours.forward_features(clips), theirs.forward_features(clips), rtol=0, atol=0)
        assert torch.equal(ours.head.weight, theirs.head.weight) is (kind != "pre-trained")
    del tuned["module.feature_extractor.conv4x.0.tmp_conv1.weight"]
    with pytest.raises(WeightsError, match=r"missing: stages\.2\.0\.time1\.weight"):
        load_pretrained(build(classes=3), "file.pth", raw=tuned)  # type: ignore[arg-type]


@torch.no_grad()
def test_sound_encoders() -> None:
    """Silence and padding are the same, wherever a patch ends; positions are told apart."""
    torch.manual_seed(0)
    vit = build_sound_encoder(SoundEncoder(kind="vit", dim=16, depth=1, heads=2, patch_size=8), (20, 17)).eval()
    spectrogram = torch.randn(2, 20, 17)
    assert vit(spectrogram).shape == (2, 16) and vit.grid == (3, 3)
    padded = F.pad(spectrogram, (0, 7, 0, 4))
    assert_close(vit(padded), vit(spectrogram))
    assert float((vit(padded.roll(8, 1)) - vit(padded)).abs().max()) > 1e-4
    convolutions = shaken(build_sound_encoder(SoundEncoder(width=4), (20, 17)))
    assert_close(convolutions(spectrogram)[1:], convolutions(spectrogram[1:]))


def test_what_cannot_be_built() -> None:
    for options, told in (({"classes": -1}, "model.classes"), ({"dropout": 1.0}, "model.dropout"),
                          ({"blocks": [1]}, "four numbers"), ({"width": 0}, "model.width=0")):  # fmt: skip
        with pytest.raises(RecipeError, match=told):
            R2Plus1D(Config(**options))  # type: ignore[arg-type]
    (found,) = ARCHITECTURE(Config(), segments.Config()).problems()
    assert "input.window=5, allowed with model.name=r2plus1d: 1" in found
    architecture = ARCHITECTURE(Config(), augmented_clip.Config(frames=8))
    assert architecture.problems() == [] and architecture.layer_of("stages.3.1.bn.bias") == (8, 9)
    assert architecture.cost().macs["network"] > 1e10

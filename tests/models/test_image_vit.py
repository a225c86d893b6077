"""The image ViT as a classifier: what its kind promises, and what it is not given."""

from typing import Any

import pytest
import torch

from pretrain.errors import RecipeError
from pretrain.models.image_vit import Config, ImageViT, ImageViTArchitecture, check
from pretrain.models.keep_rates import Reorganisation
from pretrain.samples.picture import Config as PictureConfig


@pytest.fixture
def model() -> ImageViT:
    torch.manual_seed(0)
    return ImageViT(Config("image_vit", 16, 8, 24, 2, 3, 2.0, classes=5)).eval()


def test_the_head_turns_features_into_logits(model: ImageViT) -> None:
    clips = torch.randn(2, 1, 16, 24, 3)
    logits = model.forward_head(model.forward_features(clips))
    assert logits.shape == (2, 5) and torch.equal(logits, model(clips))
    assert torch.equal(logits, model(clips[:, 0].permute(0, 3, 1, 2))), "pictures with channels first"


def test_clips_of_several_frames_are_refused(model: ImageViT) -> None:
    with pytest.raises(RecipeError, match="clips of 2 frames: image_vit takes single pictures"):
        model(torch.randn(2, 2, 16, 24, 3))


#: GMACs of DeiT-S and DeiT-B by keep rate, fused and not: systems/evit.md section 2.2.
GMACS = {
    1.0: ((4.60, 4.60), (17.56, 17.56)),
    0.9: ((4.02, 3.99), (15.40, 15.27)),
    0.8: ((3.48, 3.44), (13.33, 13.20)),
    0.7: ((3.03, 3.00), (11.61, 11.49)),
    0.6: ((2.64, 2.61), (10.09, 9.98)),
    0.5: ((2.31, 2.28), (8.82, 8.72)),
}


def gmacs(dim: int, tokens: Reorganisation, size: int = 224) -> float:
    config = Config(dim=dim, heads=dim // 64, image_size=size, tokens=tokens)
    cost = ImageViTArchitecture(config, PictureConfig(height=size, width=size)).cost()
    return round(sum(cost.macs.values()) / 1e9, 2)


@pytest.mark.parametrize("rate", GMACS)
def test_cost_at_the_published_keep_rates(rate: float) -> None:
    for dim, expected in zip((384, 768), GMACS[rate], strict=True):
        assert tuple(gmacs(dim, Reorganisation(rate, fuse=fuse)) for fuse in (True, False)) == expected
    larger = {0.7: (272, 4.56), 0.6: (288, 4.50), 0.5: (304, 4.44)}
    if rate in larger:
        assert gmacs(384, Reorganisation(rate), larger[rate][0]) == larger[rate][1]


def test_the_recipe_drops_tokens() -> None:
    config = Config("image_vit", 32, 8, 24, 4, 3, 2.0, classes=5, tokens=Reorganisation(0.5))
    tokens = ImageViT(config).encode(torch.randn(2, 1, 32, 32, 3))
    assert [step.block for step in tokens.steps] == [1, 2, 3] and tokens.x.shape[1] == 1 + 4
    assert ImageViT(Config("image_vit", 16, 8, 24, 4, 3, 2.0, classes=5)).reorganisation is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep_rate": 0.0}, "model.tokens: keep_rate=0.0"),
        ({"score": "keyframe"}, "model.tokens.score=keyframe: for videos alone"),
        ({"per_frame": True}, "model.tokens.per_frame=True: for videos alone"),
    ],
)
def test_what_tokens_of_pictures_can_not_do(options: dict[str, Any], expected: str) -> None:
    (problem,) = check(Config(tokens=Reorganisation(**options)))
    assert problem.startswith(expected)

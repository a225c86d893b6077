"""The image ViT as a classifier: what its kind promises, and what it is not given."""

import pytest
import torch

from pretrain.errors import RecipeError
from pretrain.models.image_vit import Config, ImageViT


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

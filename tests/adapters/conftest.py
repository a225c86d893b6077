"""Tiny models that take adapters."""

from collections.abc import Callable

import pytest
import torch

from pretrain.models.backbone import Backbone
from pretrain.models.classifier import Config, VideoClassifier
from pretrain.models.image_vit import Config as ImageConfig
from pretrain.models.image_vit import ImageViT


def video_model(classes: int = 3, head: str = "batch_norm", seed: int = 0) -> VideoClassifier:
    torch.manual_seed(seed)
    sizes = {"patch_size": 8, "dim": 24, "depth": 2, "heads": 2, "mlp_ratio": 2.0, "drop_path": 0.0}
    config = Config(size="custom", classes=classes, head=head, positions="rebuild", **sizes)
    return randomised(VideoClassifier(config, 4, 16, 16), seed)


def image_model(classes: int = 3, head: str = "batch_norm", seed: int = 0) -> ImageViT:
    torch.manual_seed(seed)
    return randomised(ImageViT(ImageConfig("image_vit", 16, 8, 24, 2, 2, 2.0, classes, head=head)), seed)


def randomised(model: Backbone, seed: int) -> Backbone:
    """With random biases and norms too, so that no term is trivially zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(params=["video", "image"])
def make(request: pytest.FixtureRequest) -> Callable[..., Backbone]:
    """Builds a tiny model, the same one for the same seed."""
    return {"video": video_model, "image": image_model}[request.param]


@pytest.fixture
def example() -> Callable[[Backbone], torch.Tensor]:
    """An input for such a model."""

    def of(model: Backbone) -> torch.Tensor:
        shape = (4, 4, 16, 16, 3) if isinstance(model, VideoClassifier) else (4, 3, 16, 16)
        return torch.randn(shape, generator=torch.Generator().manual_seed(7))

    return of

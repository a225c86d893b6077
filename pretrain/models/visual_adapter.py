"""A student in the place of a CLIP's image tower, with the interface that open_clip's models expect there."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from pretrain.errors import RecipeError
from pretrain.models.clip import MEAN, STD, VisualTower
from pretrain.models.sparseformer.sparseformer_model import SparseFormer
from pretrain.runtime.vision_ops import ensure_torchvision


class Sight(NamedTuple):
    """All that a tower has to say about images."""

    embedding: Tensor
    """[B, E]"""
    tokens: Tensor
    """behind the last norm, the class token first, [B, 1+N, D]"""
    regions: Tensor | None
    """where each latent token looked last, float32 [B, N, 4] as shares of width and height; None: a ViT's don't move"""


class VisualAdapter(nn.Module):
    """Image tower for open_clip: `clip.visual = VisualAdapter(student, 224)`; also of the teacher itself.

    Args:
        model: SparseFormer with a head, or CLIP's image tower.
        image_size: side of its images, pixels.
        mean, std: of their channels in [0, 1].
        output_tokens: answer with (embedding, tokens), as open_clip's towers do where this is set.

    Attributes:
        output_dim: channels of the embedding.
        preprocess_cfg: what open_clip makes its transforms of.

    Raises:
        RecipeError: the model has no head.
    """

    def __init__(
        self,
        model: SparseFormer | VisualTower,
        image_size: int,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        output_tokens: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model.head, nn.Linear):
            raise RecipeError("model.classes=0: without a head there is no embedding; take one with a projection")
        self.model = model
        self.output_dim = model.head.out_features
        # Names of open_clip's towers, which its factory and its trainer read.
        self.image_size = (image_size, image_size)
        self.image_mean, self.image_std = tuple(mean), tuple(std)
        self.preprocess_cfg: dict[str, Any] = {
            "size": self.image_size, "mode": "RGB", "mean": self.image_mean, "std": self.image_std,
            "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
        }  # fmt: skip
        self.output_tokens = output_tokens

    def forward(self, images: Tensor) -> Any:
        """Embed normalised images [B, 3, H, W]: [B, E], not normalised; with `output_tokens` also tokens [B, N, D]."""
        if not self.output_tokens:
            return self.model(images)
        sight = self.look(images)
        return sight.embedding, sight.tokens[:, 1:]

    def look(self, images: Tensor) -> Sight:
        """Embed normalised images [B, 3, H, W], with all tokens, and where they looked."""
        if isinstance(self.model, VisualTower):
            found, regions = self.model.norm(self.model.forward_features(images).tokens), None
        else:
            before, regions = self.model.encode(images)
            found = self.model.norm(before)
        return Sight(self.model.head(found[:, 0]), found, regions)

    def transforms(self, is_train: bool = False) -> Any:
        """Make open_clip's transforms for these images, PIL -> [3, H, W]."""
        ensure_torchvision()
        from open_clip.transform import PreprocessCfg, image_transform_v2

        return image_transform_v2(PreprocessCfg(**self.preprocess_cfg), is_train=is_train)

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze all of it, as open_clip's `lock_image_tower` asks.

        Raises:
            RecipeError: some groups are to be left out, which a SparseFormer does not have.
        """
        if unlocked_groups:
            raise RecipeError(f"unlocked_groups={unlocked_groups}: this tower is locked as a whole; allowed: 0")
        self.requires_grad_(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass."""
        self.model.activation_checkpointing = enable

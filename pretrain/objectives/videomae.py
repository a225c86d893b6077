"""VideoMAE V1 and V2: regress the pixels of hidden cubes (systems/videomae.md sections 4 and 5).

V1 is `decoder_mask: none`, which reconstructs every hidden token; V2 reconstructs the tokens that a running-cell mask
leaves, and counts those that the encoder did not see. The loss of a micro-batch is the sum over counted tokens divided
by their number; micro-batches and ranks are then averaged equally, as officially. That is exactly the mean over the
whole batch where T' is a multiple of 4 or `decoder_mask` is none or frame; else counts differ slightly by sample.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.models.cubes import complement, cut_cubes, grid_of, join_cubes, take_tokens
from pretrain.objectives.base import Batch, Objective, Output, ViewTensors
from pretrain.samples.masks import MaskPlan, draw

#: ImageNet statistics of pixels in [0, 1], RGB.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
#: Added to the standard deviation of a cube, not to its variance.
TARGET_EPS = 1e-6
#: Brightest value of a reconstruction picture, as in the official visualisation.
PICTURE_MAX = 0.996
GREY = 0.5


@dataclass
class Config:
    """Masking and targets."""

    name: str = "videomae"
    """method: pretrain/objectives/<name>.py"""
    mask_ratio: float = 0.9
    """share of spatial positions hidden from the encoder, in all time slices alike (tube)"""
    decoder_mask: Literal["running_cell", "frame", "random", "none"] = "running_cell"
    """tokens that the decoder leaves out; none: it reconstructs all hidden ones (VideoMAE V1)"""
    decoder_mask_ratio: float = 0.5
    """share of tokens that the decoder mask leaves out; running_cell: 0.25, 0.5 or 0.75; unused with none"""
    normalize_targets: bool = True
    """regress pixels normalised by their cube's mean and deviation per channel; false: pixels in [0, 1]"""
    skip_visible_mask_tokens: bool = False
    """leave out mask tokens that lie where the encoder sees; less work, but not the published method"""


def check(recipe: Any) -> list[str]:
    """What in the recipe this method can't work with."""
    data = recipe.data
    if "targets" not in inspect.signature(_model_file(recipe).cost).parameters:
        return [
            f"model.name={recipe.model.name}: does not reconstruct cubes; use videomae, or another masked autoencoder"
        ]
    problems: list[str] = _model_file(recipe).check(recipe.model, data.frames, data.height, data.width)
    return problems or mask_plan(recipe).problems()


def warnings(recipe: Any) -> list[str]:
    """Options of this method that have no effect in the recipe."""
    options = recipe.objective
    if options.decoder_mask == "none" and options.decoder_mask_ratio != Config.decoder_mask_ratio:
        return [f"objective.decoder_mask_ratio={options.decoder_mask_ratio:g} has no effect: decoder_mask is none"]
    return []


def view_tensors(recipe: Any) -> ViewTensors:
    """Draws `visible`, `targets` and `weight` of one view; picklable, because data workers are spawned."""
    return functools.partial(_draw_view, mask_plan(recipe))


def _draw_view(plan: MaskPlan, generator: Callable[[str], np.random.Generator]) -> dict[str, np.ndarray]:
    return dict(draw(plan, generator("encoder_mask"), generator("decoder_mask")))


def build(recipe: Any) -> "VideoMAEObjective":
    """The model of the recipe with this loss around it."""
    data = recipe.data
    model = _model_file(recipe).build(
        recipe.model, data.frames, data.height, data.width, recipe.compute.activation_checkpointing
    )
    return VideoMAEObjective(model, recipe.objective.normalize_targets)


def cost(recipe: Any) -> dict[str, float]:
    """Multiply-accumulates of one clip's forward pass, by part; parts named `skipped: ...` are not executed."""
    plan = mask_plan(recipe)
    parts: dict[str, float] = _model_file(recipe).cost(recipe.model, _grid(recipe), plan.visible, plan.targets)
    return parts


def tokens_per_clip(recipe: Any) -> dict[str, int]:
    """Tokens of a clip: all, seen by the encoder, reconstructed by the decoder."""
    plan = mask_plan(recipe)
    return {"all": plan.tokens, "visible": plan.visible, "reconstructed": plan.targets}


def mask_plan(recipe: Any) -> MaskPlan:
    """How this recipe masks a clip."""
    grid, options = _grid(recipe), recipe.objective
    return MaskPlan(
        grid.time,
        grid.height,
        grid.width,
        ratio=options.mask_ratio,
        decoder=options.decoder_mask,
        decoder_ratio=options.decoder_mask_ratio,
        skip_visible=options.skip_visible_mask_tokens,
    )


def _model_file(recipe: Any) -> Any:
    return importlib.import_module(f"pretrain.models.{recipe.model.name}")


def _grid(recipe: Any) -> Any:
    model = _model_file(recipe).resolve(recipe.model)
    data = recipe.data
    return grid_of(data.frames, data.height, data.width, model.tubelet, model.patch_size)


class PixelNormalization(nn.Module):
    """ImageNet normalisation of pixels in [0, 1] with channels last; stays float32 when the model is cast."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        # From NumPy: deepspeed.zero.Init rounds what torch's constructors make to the weights' type.
        self.register_buffer("mean", torch.from_numpy(np.array(MEAN, np.float32)), persistent=False)
        self.register_buffer("std", torch.from_numpy(np.array(STD, np.float32)), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.mean = torch.from_numpy(np.array(MEAN, np.float32)).to(self.mean.device)
        self.std = torch.from_numpy(np.array(STD, np.float32)).to(self.std.device)
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Flattened cubes [..., n*3], channel fastest, to the same shape."""
        return ((pixels.unflatten(-1, (-1, 3)) - self.mean) / self.std).flatten(-2)


class VideoMAEObjective(Objective):
    """Masked autoencoding of pixels.

    Args:
        model: module with `grid`, `shape.tubelet`, `shape.patch_size` and forward(cubes, visible, targets), as
            pretrain/models/videomae.py.
        normalize_targets: regress pixels normalised within each cube and channel.

    A batch holds `video` [B, T, H, W, 3], uint8 or float in [0, 1]; `visible` int64 [B, Nv]; `targets` int64 [B, M] and
    `weight` float32 [B, M], 1 where a target counts in the loss.
    """

    def __init__(self, model: nn.Module, normalize_targets: bool = True) -> None:
        super().__init__()
        self.model: Any = model
        self.normalize_targets = normalize_targets
        self.normalization = PixelNormalization()

    def forward(self, batch: Batch) -> Output:
        cubes, weight = self._cubes(batch), batch["weight"]
        predicted = self._predict(cubes, batch["visible"], batch["targets"])
        target, mean_color_error = self._target(unit_pixels(take_tokens(cubes, batch["targets"])))
        # The same numbers as square().mean(), whose gradient takes three passes over all pixels instead of one.
        errors = functional.mse_loss(predicted, target, reduction="none").sum(-1) / target.shape[-1]
        loss = weighted_mean(errors, weight)
        metrics = {"loss": loss.detach(), "mean_color_loss": weighted_mean(mean_color_error, weight)}
        return Output(loss, metrics)

    def target(self, pixels: Tensor) -> Tensor:
        """What the prediction should equal, float32, for pixels [B, M, cube] in [0, 1]."""
        return self._target(pixels)[0]

    @torch.no_grad()
    def _target(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Also the squared error per token [B, M] of predicting each cube's own mean colour."""
        cubes = CenteredCubes.of(pixels)
        if not self.normalize_targets:
            return pixels, cubes.variance.mean((-2, -1))
        error = (cubes.variance / cubes.scale.square()).mean((-2, -1))
        return cubes.pixels.div_(cubes.scale).flatten(-2), error

    @torch.no_grad()
    def reconstruction_errors(self, batch: Batch) -> dict[str, Tensor]:
        """Root mean squared errors of counted tokens in pixel units, 1 = black to white.

        Keys: `model`, its reconstruction; `masked_input`, the grey of the masked picture; `mean_color`, the mean colour
        of the pixels that the encoder sees; `cube_mean_color`, each cube's own mean colour. With normalised targets the
        reconstruction is given the true mean and deviation of each cube: `cube_mean_color` is then what it must beat.
        """
        cubes, weight = self._cubes(batch), batch["weight"]
        truth = unit_pixels(take_tokens(cubes, batch["targets"]))
        seen = unit_pixels(take_tokens(cubes, batch["visible"])).unflatten(-1, (-1, 3))
        shaped = truth.unflatten(-1, (-1, 3))
        guesses = {
            "model": self._pixels(self._predict(cubes, batch["visible"], batch["targets"]), truth),
            "masked_input": torch.full_like(truth, GREY),
            "mean_color": seen.mean(dim=(1, 2), keepdim=True).expand_as(shaped).flatten(-2),
            "cube_mean_color": shaped.mean(-2, keepdim=True).expand_as(shaped).flatten(-2),
        }
        return {
            name: weighted_mean((guess - truth).square().mean(-1), weight).sqrt() for name, guess in guesses.items()
        }

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Original, masked and reconstructed videos, uint8 [B, T, H, W, 3].

        All hidden tokens are predicted, those that a decoder mask would leave out too. With normalised targets,
        contrast and brightness of each cube come from the original (official visualisation).
        """
        cubes, visible = self._cubes(batch), batch["visible"]
        hidden = complement(visible, cubes.shape[1])
        original = unit_pixels(cubes)
        truth = take_tokens(original, hidden)
        predicted = self._pixels(self._predict(cubes, visible, hidden), truth)
        rows = hidden[:, :, None].expand_as(truth)
        filled = {
            "original": original,
            "masked": original.scatter(1, rows, torch.full_like(truth, GREY)),
            "reconstructed": original.scatter(1, rows, predicted),
        }
        return {name: self._to_video(value) for name, value in filled.items()}

    @torch.no_grad()
    def features(self, video: Tensor) -> Tensor:
        """Mean over all tokens of the encoder's output, none hidden: float32 [B, C] of clips uint8 [B, T, H, W, 3]."""
        cubes = self._cubes({"video": video})
        every = torch.arange(cubes.shape[1], device=cubes.device).expand(len(cubes), -1)
        seen = self.normalization(unit_pixels(cubes)).to(self.model.mask_token.dtype)
        encoded: Tensor = self.model.encoder(seen, every)
        return encoded.float().mean(1)

    def _cubes(self, batch: Batch) -> Tensor:
        return cut_cubes(batch["video"], self.model.shape.tubelet, self.model.shape.patch_size)

    def _predict(self, cubes: Tensor, visible: Tensor, asked: Tensor) -> Tensor:
        """Float32 predictions at `asked`; only visible cubes are made float and embedded."""
        seen = self.normalization(unit_pixels(take_tokens(cubes, visible)))
        predicted: Tensor = self.model(seen, visible, asked)
        return predicted.float()

    def _pixels(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Predictions as pixels, with the true cube statistics where targets are normalised."""
        if self.normalize_targets:
            cubes = CenteredCubes.of(truth)
            predicted = (predicted.unflatten(-1, (-1, 3)) * cubes.scale + cubes.mean).flatten(-2)
        return predicted.clamp(0, PICTURE_MAX)

    def _to_video(self, cubes: Tensor) -> Tensor:
        shape = self.model.shape
        video = join_cubes(cubes, self.model.grid, shape.tubelet, shape.patch_size)
        return (video * 255).round().to(torch.uint8)


def unit_pixels(cubes: Tensor) -> Tensor:
    """Pixels as float32 in [0, 1]: uint8 divided by 255, floating types taken as they are."""
    return cubes.float().div_(255) if cubes.dtype == torch.uint8 else cubes.float()


class CenteredCubes(NamedTuple):
    """Cubes less their mean, and what they are normalised by; [B, M, n, 3] and [B, M, 1, 3], channels apart."""

    pixels: Tensor
    mean: Tensor
    #: The mean square of `pixels`.
    variance: Tensor
    #: Unbiased deviation + 1e-6.
    scale: Tensor

    @classmethod
    def of(cls, pixels: Tensor) -> "CenteredCubes":
        """Of cubes [B, M, n*3].

        In two passes: torch.var_mean over an axis that is not the last takes four times as long on CPUs.
        """
        shaped = pixels.unflatten(-1, (-1, 3))
        count = shaped.shape[-2]
        mean = shaped.mean(-2, keepdim=True)
        centered = shaped - mean
        squares = centered.square().sum(-2, keepdim=True)
        return cls(centered, mean, squares / count, (squares / (count - 1)).sqrt() + TARGET_EPS)


def weighted_mean(errors: Tensor, weight: Tensor) -> Tensor:
    """sum(errors * weight) / sum(weight) over a micro-batch, both [B, M]."""
    return (errors * weight).sum() / weight.sum()

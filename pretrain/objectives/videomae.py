"""VideoMAE V1 and V2: regress the pixels of hidden cubes (systems/videomae.md sections 4 and 5).

V1 is `decoder_mask: none`, which reconstructs every hidden token; V2 reconstructs the tokens that a running-cell mask
leaves, and counts those that the encoder did not see. The loss of a micro-batch is the sum over counted tokens divided
by their number; micro-batches and ranks are then averaged equally, as officially. That is exactly the mean over the
whole batch where T' is a multiple of 4 or `decoder_mask` is none or frame; else counts differ slightly by sample.
"""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.data.media import MEAN, STD
from pretrain.data.randomness import generator
from pretrain.data.samples import Batch, Draw
from pretrain.models.base import Cost, MaskedAutoencoder
from pretrain.models.cubes import complement, cut_cubes, join_cubes, take_tokens
from pretrain.models.formats import export_huggingface, export_official
from pretrain.models.huggingface import processor_configs
from pretrain.models.pixels import PixelNormalization, unit_pixels
from pretrain.objectives.base import Export, Method, Objective, Output
from pretrain.runtime import storage
from pretrain.samples.clip import ClipSamples
from pretrain.samples.masks import MaskPlan, draw

#: Added to the standard deviation of a cube, not to its variance.
TARGET_EPS = 1e-6
#: Brightest value of a reconstruction picture, as in the official visualisation.
PICTURE_MAX = 0.996
GREY = 0.5
USAGE = """\
Fine-tune: `python launch/finetune.py --recipe RECIPE run.init_weights=FOLDER`; look at reconstructions:
`python launch/reconstruct.py FOLDER SHARDS`."""
USAGE_HUGGINGFACE = "`transformers.VideoMAEForPreTraining.from_pretrained(FOLDER)`"


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


class VideoMAEMethod(Method):
    """Masked autoencoding of pixels."""

    MODEL = MaskedAutoencoder

    def problems(self) -> list[str]:
        return super().problems() or self.mask_plan().problems() + self.health_problems()

    def health_problems(self) -> list[str]:
        """Say what keeps the health block from judging features; methods with `features` of their own override it."""
        if self.recipe.health.shards is None or self.architecture.encodes:
            return []
        return [
            f"health.shards: model.name={self.recipe.model.name} does not encode clips of which nothing is hidden; set "
            "health.shards=null, or take a model whose architecture has `encodes = True`"
        ]

    def warnings(self) -> list[str]:
        options = self.recipe.objective
        if options.decoder_mask == "none" and options.decoder_mask_ratio != Config.decoder_mask_ratio:
            return [f"objective.decoder_mask_ratio={options.decoder_mask_ratio:g} has no effect: decoder_mask is none"]
        return []

    def samples(self) -> ClipSamples:
        draws = functools.partial(_draw_view, self.mask_plan())
        return ClipSamples(self.recipe.input, self.recipe.run.seed, draws)

    def build(self) -> "VideoMAEObjective":
        model = self.architecture.build(self.recipe.compute.activation_checkpointing)
        return VideoMAEObjective(model, self.recipe.objective.normalize_targets)

    def cost(self) -> Cost:
        plan = self.mask_plan()
        # Counted on a mask that was drawn: how many targets the encoder sees is a result of both masks.
        drawn = _draw_view(plan, functools.partial(generator, self.recipe.run.seed, 0, 0, 0))
        tokens = {
            "all": plan.tokens,
            "visible": plan.visible,
            "reconstructed": plan.targets,
            "counted": int(np.count_nonzero(drawn["weight"])),
        }
        return Cost(self.architecture.cost(plan.visible, plan.targets), tokens)

    def exports(self, source: Path) -> dict[str, Export]:
        formats = super().exports(source)
        formats["safetensors"] = replace(formats["safetensors"], usage=USAGE)
        if self.architecture.videomae_layouts:
            # Only for such architectures: another model's names would be read as VideoMAE's, and fit nothing.
            formats["official"] = Export(_write_official)
            formats["huggingface"] = Export(self._write_huggingface, USAGE_HUGGINGFACE, library="transformers")
        return formats

    def mask_plan(self) -> MaskPlan:
        """Give the mask plan of a clip."""
        grid, options = self.architecture.grid, self.recipe.objective
        return MaskPlan(
            grid.time,
            grid.height,
            grid.width,
            ratio=options.mask_ratio,
            decoder=options.decoder_mask,
            decoder_ratio=options.decoder_mask_ratio,
            skip_visible=options.skip_visible_mask_tokens,
        )

    def _write_huggingface(self, objective: Any, dest: str) -> str:
        export_huggingface(objective.model, dest, objective.normalize_targets)
        # Height and width alike: `export_huggingface` has refused clips that are not square.
        size = self.recipe.input.height
        for name, content in processor_configs(size, size, MEAN, STD).items():
            storage.write_bytes(storage.join(dest, name), json.dumps(content, indent=2).encode())
        return ""


METHOD = VideoMAEMethod


def _write_official(objective: Any, dest: str) -> str:
    export_official(objective.model, dest)
    return ""


def _draw_view(plan: MaskPlan, drawn_for: Draw) -> dict[str, np.ndarray]:
    """Draw `visible`, `targets` and `weight` of one view; a module's function, because data workers are spawned."""
    return dict(draw(plan, drawn_for("encoder_mask"), drawn_for("decoder_mask")))


class VideoMAEObjective(Objective):
    """Masked autoencoding of pixels.

    Args:
        model: module with `grid`, `shape.tubelet`, `shape.patch_size` and forward(cubes, visible, targets), as
            pretrain/models/videomae.py.
        normalize_targets: regress pixels normalised within each cube and channel.

    A batch holds `video` [B, T, H, W, 3], uint8 or float in [0, 1]; `visible` int64 [B, Nv]; `targets` int64 [B, M] and
    `weight` float32 [B, M], 1 where a target counts in the loss.
    """

    # Passes over pixels: element-wise, so that compiled they are read and written once.
    COMPILED = ("_seen", "_compare")

    def __init__(self, model: nn.Module, normalize_targets: bool = True) -> None:
        super().__init__()
        self.model: Any = model
        self.normalize_targets = normalize_targets
        self.normalization = PixelNormalization()

    def forward(self, batch: Batch) -> Output:
        cubes = self._cubes(batch)
        predicted = self._predict(cubes, batch["visible"], batch["targets"])
        loss, mean_color_loss = self._compare(predicted, cubes, batch["targets"], batch["weight"])
        return Output(loss, {"loss": loss.detach(), "mean_color_loss": mean_color_loss})

    def _compare(self, predicted: Tensor, cubes: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss, and that of predicting each cube's mean colour."""
        target, mean_color_error = self._target(unit_pixels(take_tokens(cubes, targets)))
        # The same numbers as square().mean(), whose gradient takes three passes over all pixels instead of one.
        errors = functional.mse_loss(predicted, target, reduction="none").sum(-1) / target.shape[-1]
        return weighted_mean(errors, weight), weighted_mean(mean_color_error, weight)

    def target(self, pixels: Tensor) -> Tensor:
        """Compute what the prediction should equal, float32, for pixels [B, M, cube] in [0, 1]."""
        return self._target(pixels)[0]

    @torch.no_grad()
    def _target(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute also the squared error per token [B, M] of predicting each cube's own mean colour."""
        cubes = CenteredCubes.of(pixels)
        if not self.normalize_targets:
            return pixels, cubes.variance.mean((-2, -1))
        error = (cubes.variance / cubes.scale.square()).mean((-2, -1))
        # In place: the tensor is `of`'s own, and each further pass over all hidden pixels costs time in the step.
        return cubes.pixels.div_(cubes.scale).flatten(-2), error

    @torch.no_grad()
    def reconstruction_errors(self, batch: Batch) -> dict[str, Tensor]:
        """Compute root mean squared errors of counted tokens in pixel units, 1 = black to white.

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
        """Draw original, masked and reconstructed videos, uint8 [B, T, H, W, 3].

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
    def features(self, batch: Batch) -> Tensor:
        """Average the encoder's output over all tokens, none hidden: float32 [B, C] of `video` [B, T, H, W, 3]."""
        cubes = self._cubes(batch)
        every = torch.arange(cubes.shape[1], device=cubes.device).expand(len(cubes), -1)
        # The encoder is called by itself here, so the cast that the whole model makes is made here.
        seen = self.normalization(unit_pixels(cubes)).to(self.model.mask_token.dtype)
        encoded: Tensor = self.model.encoder(seen, every)
        return encoded.float().mean(1)

    def _cubes(self, batch: Batch) -> Tensor:
        return cut_cubes(batch["video"], self.model.shape.tubelet, self.model.shape.patch_size)

    def _predict(self, cubes: Tensor, visible: Tensor, asked: Tensor) -> Tensor:
        """Predict at `asked`, float32; only visible cubes are made float and embedded."""
        predicted: Tensor = self.model(self._seen(cubes, visible), visible, asked)
        # The loss in float32: squares of bfloat16 predictions would be summed with 8 bits.
        return predicted.float()

    def _seen(self, cubes: Tensor, visible: Tensor) -> Tensor:
        """Take the pixels of visible cubes, normalised."""
        normalised: Tensor = self.normalization(unit_pixels(take_tokens(cubes, visible)))
        return normalised

    def _pixels(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Turn predictions into pixels, with the true cube statistics where targets are normalised."""
        if self.normalize_targets:
            cubes = CenteredCubes.of(truth)
            predicted = (predicted.unflatten(-1, (-1, 3)) * cubes.scale + cubes.mean).flatten(-2)
        # uint8 would wrap around: a reconstruction a little above white would be shown black.
        return predicted.clamp(0, PICTURE_MAX)

    def _to_video(self, cubes: Tensor) -> Tensor:
        shape = self.model.shape
        video = join_cubes(cubes, self.model.grid, shape.tubelet, shape.patch_size)
        return (video * 255).round().to(torch.uint8)


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
        """Centre and measure cubes [B, M, n*3].

        In two passes: torch.var_mean over an axis that is not the last takes four times as long on CPUs.
        """
        shaped = pixels.unflatten(-1, (-1, 3))
        count = shaped.shape[-2]
        mean = shaped.mean(-2, keepdim=True)
        centered = shaped - mean
        squares = centered.square().sum(-2, keepdim=True)
        return cls(centered, mean, squares / count, (squares / (count - 1)).sqrt() + TARGET_EPS)


def weighted_mean(errors: Tensor, weight: Tensor) -> Tensor:
    """Compute sum(errors * weight) / sum(weight) over a micro-batch, both [B, M]."""
    return (errors * weight).sum() / weight.sum()

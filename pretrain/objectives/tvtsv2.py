"""TVTSv2: clips and their texts are contrasted, and texts of a narrated clip are put in the order of time.

Zeng, Ge, et al.: TVTSv2, arXiv 2305.14173; systems/tvtsv2.md, section 4; TencentARC/TVTS @ 290a63e, folder v2. Starts
from a CLIP, of whose text tower only the last blocks and what surrounds them are trained. Shapes: B clips, K texts of a
clip in the order of time, E channels of the shared space.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.samples import Batch
from pretrain.models.base import Cost
from pretrain.models.pixels import PixelNormalization, unit_pixels
from pretrain.models.tvtsv2 import TVTSv2, TVTSv2Architecture, patches_of, resolved
from pretrain.models.tvtsv2_weights import load_tvtsv2, write_official
from pretrain.models.weight_files import read_raw
from pretrain.objectives.base import Export, Method, Objective, Rule, WholeBatchObjective
from pretrain.objectives.contrast import both_directions, normalized
from pretrain.objectives.tvtsv2_checks import input_problems, text_blocks, tvtsv2_problems, tvtsv2_warnings
from pretrain.objectives.tvtsv2_evaluation import HeldOutClips, VideoTextEvaluation
from pretrain.recipe.schema import Recipe
from pretrain.runtime.collectives import Gradient
from pretrain.runtime.gradient_cache import Embeddings
from pretrain.runtime.process_group import Ranks, present_ranks
from pretrain.samples.narrated import NarratedClips

#: Least length that embeddings are divided by.
EPS = 1e-8
#: Parts of names of what no CLIP has, which is trained at the full rate; the temporal table is not among them.
NEW = ("timeattn.", "norm3.", "sorting.")
USAGE = """\
Features, retrieval, recognition: `python launch/video_text.py --help`; classify: `python launch/finetune.py --recipe
vit_b16_tvtsv2_linear_k400 run.init_weights=FOLDER`; go on: `run.init_weights=FOLDER` of another run."""


@dataclass
class Config:
    """The two losses, and what of the CLIP is trained."""

    name: str = "tvtsv2"
    """method: pretrain/objectives/<name>.py"""
    mask_ratio: float = 0.5
    """share of a frame's patches that are hidden, the same ones in all frames"""
    temperature: float = 0.05
    """divides cosines of clips and texts; not learned"""
    sort_weight: float = 2.0
    """factor on the cross entropy of the texts' places"""
    contrastive_grad: Literal["sum", "official"] = "sum"
    """gradient of the contrast: sum: that of one large batch; official: 1 / ranks of it, as the published code's gather
    gives, while sorting keeps its full size"""
    tune_text_blocks: int | None = None
    """last blocks of the text tower that are trained, beside embeddings, norm, projection; null: the last quarter"""
    clip_lr_scale: float = 1e-3
    """factor on the learning rate of all that comes from the CLIP, and of the temporal table"""
    held_out: HeldOutClips = field(default_factory=HeldOutClips)
    """measures while training"""


class TVTSv2Method(Method):
    """Contrast with texts and transcript sorting."""

    INPUT = "narrated"
    MODEL = TVTSv2Architecture
    recipe: Recipe

    def problems(self) -> list[str]:
        wrong = input_problems(self.recipe)
        return wrong or super().problems() or tvtsv2_problems(self.recipe)

    def warnings(self) -> list[str]:
        return tvtsv2_warnings(self.recipe)

    def samples(self) -> NarratedClips:
        return NarratedClips(self.recipe.input, self.recipe.run.seed, (self._patches, self._kept))

    def build(self) -> "TVTSv2Objective":
        model = self.architecture.build(self.recipe.compute.activation_checkpointing)
        return TVTSv2Objective(model, self.recipe)

    def cost(self) -> Cost:
        texts = self.recipe.input.segments if self.recipe.input.narrated else 1
        cost: Cost = self.architecture.cost(self._kept, texts)
        return cost

    def evaluation(self, ranks: Ranks) -> VideoTextEvaluation | None:
        if self.recipe.objective.held_out.shards is None:
            return None
        return VideoTextEvaluation(self.recipe, ranks)

    def exports(self, source: Path) -> dict[str, Export]:
        formats = super().exports(source)
        formats["safetensors"] = replace(formats["safetensors"], usage=USAGE)
        return formats | {"official": Export(_write_inference, suffix=".pth")}

    def take_export(self, objective: Objective, source: Path) -> None:
        objective.load_pretrained(str(source), read_raw(str(source)))

    @property
    def _patches(self) -> int:
        return patches_of(resolved(self.recipe.model), self.recipe.input.size)

    @property
    def _kept(self) -> int:
        # As the official code counts: 256 x (1 - 0.7) is 76.8 there, and 76 are kept.
        return int(self._patches * (1 - self.recipe.objective.mask_ratio))


METHOD = TVTSv2Method


class PairLosses(NamedTuple):
    """Both losses of a batch.

    Attributes:
        total: their sum, a scalar.
        contrast: of both directions together.
        sorting: `sort`, the weighted loss, `placed`, the share of the texts whose place is right, and `sorted`, that of
            the clips of which all are; empty where clips have one text.
    """

    total: Tensor
    contrast: Tensor
    sorting: dict[str, Tensor]


class TVTSv2Objective(WholeBatchObjective):
    """CLIP for clips, with a head that sorts texts.

    Args:
        model: the towers and the head.
        recipe: the run.

    A batch holds `video` uint8 [B, T, H, W, 3], `ids` [B, K, L], `cut` [B], and `visible` [B, n] where patches are
    hidden; see NarratedClips.
    """

    def __init__(self, model: TVTSv2, recipe: Recipe) -> None:
        super().__init__()
        self.model: Any = model
        self.options: Config = recipe.objective
        # ImageNet's statistics, not CLIP's, although the weights are a CLIP's.
        self.normalization = PixelNormalization()
        depth = len(model.text.blocks)
        # By the module, not by a name: the video tower has blocks of the same numbers.
        for block in list(model.text.blocks)[: depth - text_blocks(self.options.tune_text_blocks, depth)]:
            # Parameters alone: a gradient flows through them to the embeddings in front, which are trained.
            block.requires_grad_(False)

    def embed(self, batch: Batch) -> Embeddings:
        model, ids = self.model, batch["ids"]
        tokens = model.visual.forward_features(self._pixels(batch), visible=batch.get("visible")).tokens
        texts = model.text(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
        # Clips with one text have nothing to sort: two tokens are enough for the head to have been called.
        seen = model.visual.sorted_by(tokens if ids.shape[1] > 1 else tokens[:, :2])
        # Detached: sorting would else teach the text tower to write down what is easily sorted.
        order = model.sorting(seen, texts.detach())
        return {"video": model.visual.forward_head(tokens), "text": texts.mean(1), "order": order, "cut": batch["cut"]}

    def compare(self, embeddings: Embeddings) -> tuple[Tensor, dict[str, Tensor]]:
        video, text = embeddings["video"], embeddings["text"]
        options = self.options
        found = compare_batch(
            video, text, embeddings["order"], options.temperature, options.sort_weight, options.contrastive_grad
        )
        metrics = {"contrast": found.contrast, "cut": embeddings["cut"].float().mean(), **found.sorting}
        metrics["similarity"] = F.cosine_similarity(video.float(), text.float(), dim=-1).mean()
        return found.total, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        features: Tensor = self.model.visual(self._pixels(batch))
        return features.float()

    def rule(self, name: str, shape: Iterable[int]) -> Rule:
        scale = 1.0 if any(part in name for part in NEW) else self.options.clip_lr_scale
        # As published: positions and class token do decay.
        return Rule(scale, decays=not (name.endswith(".bias") or "norm" in name))

    def load_pretrained(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Start from a CLIP in any layout, from a released TVTSv2, or from an earlier run."""
        load_tvtsv2(self.model, path, raw)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Give the clips as the tower sees them, before patches are hidden."""
        return {"clip": batch["video"]}

    def _pixels(self, batch: Batch) -> Tensor:
        pixels: Tensor = self.normalization(unit_pixels(batch["video"]))
        return pixels


def compare_batch(
    video: Tensor,
    text: Tensor,
    order: Tensor,
    temperature: float = 0.05,
    sort_weight: float = 2.0,
    gradient: Gradient = "sum",
) -> PairLosses:
    """Compute the losses over the global batch.

    Args:
        video: embeddings [B, E] of this rank's clips, not normalised.
        text: means of each clip's texts [B, E], not normalised.
        order: logits [B, K, places] of each text's place; with K = 1 there is nothing to sort.
        temperature: divides cosines.
        sort_weight: factor on the mean cross entropy of places.
        gradient: of the gather, see `both_directions`.
    """
    pairs = normalized(video, EPS), normalized(text, EPS)
    of_video, of_text = both_directions(*pairs, 1 / temperature, present_ranks(video.device), gradient)
    # The sum of both directions, not CLIP's mean.
    contrast, order = of_video.mean() + of_text.mean(), order.float()
    count = order.shape[1]
    if count == 1:
        # Part of the loss all the same: what has no gradient keeps that of the step before under ZeRO stage 3.
        return PairLosses(contrast + 0 * order.sum(), contrast, {})
    # The head can't tell which text stands where, so they need not be shuffled.
    places = torch.arange(count, device=order.device).expand(len(order), -1)
    sort = sort_weight * F.cross_entropy(order.flatten(0, 1), places.flatten())
    right = (order.argmax(-1) == places).float()
    sorting = {"sort": sort, "placed": right.mean(), "sorted": right.prod(1).mean()}
    return PairLosses(contrast + sort, contrast, sorting)


def _write_inference(objective: Any, dest: str) -> str:
    write_official(objective.model, dest)
    return "the official inference model; its class has no sorting head, which stays behind"

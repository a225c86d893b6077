"""Bootstrapping: a SparseFormer made of a ViT's last blocks learns, without labels, to answer as the whole ViT does.

Gao, Tong, Wang, Shou: Bootstrapping SparseFormers from Vision Foundation Models, arXiv 2312.01987; the trainer was
never released (systems/sparseformer_bootstrap.md, section 5, says what is chosen here). Teacher and student see one
crop, each at its own size. What looks is trained, and the first of the inherited blocks; the others are frozen,
gradients flow through them. Shapes: B pictures, N latent tokens, P patches of the teacher, E channels compared.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.samples import Batch
from pretrain.models.alignment_teacher import AlignmentTeacher, Tower, facts_of, frozen_teacher
from pretrain.models.base import Cost
from pretrain.models.formats import export_official
from pretrain.models.frozen import Frozen
from pretrain.models.pixels import PixelNormalization, unit_pixels
from pretrain.models.sparseformer import ARCHITECTURE
from pretrain.models.sparseformer.architecture import SparseFormerArchitecture
from pretrain.models.sparseformer.inheritance import PARTS, inheriting_places, load_inherited
from pretrain.models.sparseformer.sparseformer_model import SparseFormer
from pretrain.models.weight_files import read_raw
from pretrain.models.weights import LoadReport, load_state
from pretrain.objectives.base import Export, Method, Objective, Output, Rule, decays
from pretrain.objectives.bootstrap_checks import (
    agreement_problems,
    held_out_problems,
    option_problems,
    projects,
    unusual,
)
from pretrain.objectives.bootstrap_evaluation import BootstrapEvaluation
from pretrain.objectives.zero_shot import Sentences
from pretrain.recipe.schema import Recipe
from pretrain.runtime.compiler import uncompiled
from pretrain.runtime.process_group import Ranks
from pretrain.samples.shared_crop import SECOND, SharedCrops

#: Names that only a SparseFormer's weights have, in any of its layouts.
STUDENT_MARKS = ("initial_roi.weight", "token_roi.weight", "token_roi_cc.weight")
USAGE = """\
Classify or fine-tune: `python launch/finetune.py --recipe RECIPE run.init_weights=FOLDER`; beside the teacher:
`python launch/zero_shot.py FOLDER SHARDS`; in open_clip: `pretrain.trained.visual_tower.visual_tower(FOLDER)`."""


@dataclass
class HeldOutPictures:
    """Pictures that student and teacher are compared on while training."""

    shards: str | None = None
    """folder (any fsspec URL) of held-out pictures; null: no comparison"""
    every_epochs: float = 1
    """epochs between two comparisons; fractions are allowed"""
    micro: int = 64
    """pictures in one forward pass of one rank"""
    labels: bool = False
    """whether they have labels, class numbers or zero_shot.class_names: then top-1 of student and teacher, by the
    inherited head or zero-shot, and the best step is chosen by it; false: by the similarity to the teacher"""
    zero_shot: Sentences = field(default_factory=Sentences)
    """classes in words, for a CLIP"""


@dataclass
class Config:
    """The teacher, what of its answers is learnt, and by which parameters."""

    name: str = "bootstrap"
    """method: pretrain/objectives/<name>.py"""
    loss: Literal["cosine", "ln_mse", "mse"] = "cosine"
    """cosine: 1 - cosine of the two vectors; ln_mse: mean square difference behind a layer norm without parameters;
    mse: of the vectors as they are"""
    align: Literal["features", "embedding"] | None = None
    """features: behind the last norm; embedding: behind the head (a CLIP's projection); null: as the teacher's kind is
    used, timm: features, clip: embedding"""
    tokens: Literal["class", "all"] = "class"
    """class: the class token is compared; all: also each latent token, with the teacher's patches pooled to as many"""
    tune_blocks: int = 4
    """inherited blocks that are trained, counted from the first; the others are frozen, as are norm and head"""
    tuned_lr_scale: float = 0.1
    """factor on their learning rate"""
    teacher: AlignmentTeacher = field(default_factory=AlignmentTeacher)
    """whose answers are learnt"""
    held_out: HeldOutPictures = field(default_factory=HeldOutPictures)
    """comparison while training"""


class BootstrapMethod(Method):
    """Bootstrapping of a SparseFormer from a ViT."""

    INPUT = "shared_crop"
    MODEL = ARCHITECTURE
    recipe: Recipe

    def problems(self) -> list[str]:
        found = super().problems() or option_problems(self.recipe)
        if found:
            return found
        facts = facts_of(self.recipe.objective.teacher, self.architecture.resolve(self.recipe.model).classes or 0)
        return agreement_problems(self.recipe, facts) + held_out_problems(self.recipe)

    def warnings(self) -> list[str]:
        facts = facts_of(self.recipe.objective.teacher, self.architecture.resolve(self.recipe.model).classes or 0)
        return unusual(self.recipe, facts)

    def samples(self) -> SharedCrops:
        return SharedCrops(self.recipe.input, self.recipe.run.seed)

    def build(self) -> "BootstrapObjective":
        model = self.architecture.build(self.recipe.compute.activation_checkpointing)
        return BootstrapObjective(model, self.recipe, self.architecture)

    def cost(self) -> Cost:
        cost: Cost = self.architecture.cost()
        return cost

    def evaluation(self, ranks: Ranks) -> BootstrapEvaluation | None:
        if self.recipe.objective.held_out.shards is None:
            return None
        return BootstrapEvaluation(self.recipe, self.samples(), ranks)

    def exports(self, source: Path) -> dict[str, Export]:
        formats = super().exports(source)
        formats["safetensors"] = replace(formats["safetensors"], usage=USAGE)
        return formats | {"official": Export(_write_official, suffix=".pth")}

    def take_export(self, objective: Objective, source: Path) -> None:
        objective.load_pretrained(str(source), read_raw(str(source)))


METHOD = BootstrapMethod


class Answers(NamedTuple):
    """Student and teacher about the same pictures.

    Attributes:
        student, teacher: what is compared, float32 [B, E], or [B, 1+N, E] with all tokens.
        features: of the student's class token behind the norm, [B, D].
        teacher_features: of the teacher's, [B, D].
    """

    student: Tensor
    teacher: Tensor
    features: Tensor
    teacher_features: Tensor


class BootstrapObjective(Objective):
    """A SparseFormer that is aligned with a frozen ViT.

    Args:
        model: of the bootstrapped form.
        recipe: the run.
        architecture: of the model.

    A batch holds `video` uint8 [B, 1, H, W, 3] and, where the teacher takes another size, `second` [B, 1, S, S, 3].
    """

    def __init__(self, model: SparseFormer, recipe: Recipe, architecture: SparseFormerArchitecture) -> None:
        super().__init__()
        self.model: Any = model
        self.architecture, self.options = architecture, recipe.objective
        teacher: AlignmentTeacher = recipe.objective.teacher
        classes = model.config.classes or 0
        facts = facts_of(teacher, classes)
        self.normalization = PixelNormalization(teacher.mean or facts.mean, teacher.std or facts.std)
        self.teacher: Frozen[Tower] = frozen_teacher(teacher, classes)
        # A network that is built on the way is nothing for the compiler.
        self._ask = uncompiled(self._ask_teacher)
        self.projects = projects(recipe)
        inherited = [f"layers.{place}.{part}" for place in inheriting_places(model.config) for part in PARTS]
        count = self.options.tune_blocks * len(PARTS)
        self._tuned, frozen = tuple(inherited[:count]), (*inherited[count:], "norm.", "head.")
        for name, value in model.named_parameters():
            if name.startswith(frozen):
                # Parameters alone: gradients flow through them to what looks.
                value.requires_grad_(False)

    def forward(self, batch: Batch) -> Output:
        loss, alike = (one.mean() for one in self.compared(self.answers(batch)))
        return Output(loss, {"alignment": loss.detach(), "similarity": alike.detach()})

    def compared(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Compute loss and cosine, whatever the loss is, of what is compared, both [B] or [B, 1+N]."""
        return (
            alignment(answers.student, answers.teacher, self.options.loss),
            F.cosine_similarity(answers.student.detach(), answers.teacher, dim=-1),
        )

    def answers(self, batch: Batch) -> Answers:
        """Ask student and teacher about the same pictures."""
        every = self.options.tokens == "all"
        found = self.model.forward_features(self._normalized(batch["video"]), pooled=not every)
        wanted = self._ask(self._normalized(batch[SECOND if SECOND in batch else "video"]), not every)
        features, teacher_features = (found[:, 0], wanted[:, 0]) if every else (found, wanted)
        if every:
            wanted = torch.cat((wanted[:, :1], pooled_patches(wanted[:, 1:], found.shape[1] - 1)), dim=1)
        if self.projects:
            found, wanted = self.model.forward_head(found), self.teacher_head(wanted)
        return Answers(found.float(), wanted.float(), features, teacher_features)

    @torch.no_grad()
    def teacher_head(self, features: Tensor) -> Tensor:
        """Compute the teacher's logits or embeddings [..., K] of its features [..., D]."""
        tower: Any = self.teacher.module(features.device)
        outputs: Tensor = tower.forward_head(features)
        return outputs

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        features: Tensor = self.model.forward_features(self._normalized(batch["video"]))
        return features.float()

    def rule(self, name: str, shape: Iterable[int]) -> Rule:
        own, shape = name.removeprefix("model."), tuple(shape)
        scale = self.options.tuned_lr_scale if own.startswith(self._tuned) and self._tuned else 1.0
        return Rule(
            scale * self.architecture.lr_scale(own), decays(name, shape) and self.architecture.decays(own, shape)
        )

    def load_pretrained(self, path: str, raw: Mapping[str, Tensor]) -> None:
        """Take over a ViT's last blocks, norm and head; or all of an earlier student."""
        if any(key.endswith(STUDENT_MARKS) for key in raw):
            load_state(self.model, self.architecture.own_weights(raw), LoadReport(path, "SparseFormer"))
        else:
            load_inherited(self.model, path, raw)

    def frozen_parts(self) -> Mapping[str, Frozen[Any]]:
        return {"teacher": self.teacher}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Give the crops as student and teacher see them."""
        return {"student": batch["video"]}

    def _ask_teacher(self, pixels: Tensor, pooled: bool) -> Tensor:
        answer: Tensor = self.teacher(pixels[:, 0].permute(0, 3, 1, 2), pooled=pooled)
        return answer

    def _normalized(self, video: Tensor) -> Tensor:
        normalized: Tensor = self.normalization(unit_pixels(video))
        return normalized


def alignment(student: Tensor, teacher: Tensor, loss: str) -> Tensor:
    """Compare vectors [B, ..., E], float32: the loss of each, [B, ...]."""
    if loss == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    if loss == "ln_mse":
        student, teacher = (F.layer_norm(one, one.shape[-1:]) for one in (student, teacher))
    return (student - teacher).square().mean(-1)


def pooled_patches(patches: Tensor, tokens: int) -> Tensor:
    """Pool a teacher's patches to as many as a student has tokens, each where that token's region begins.

    Regions begin on a square grid, x with the slow index; tokens that it leaves over look at the whole picture.

    Args:
        patches: [B, P, C] of a square grid, row by row.
        tokens: N.

    Returns:
        [B, N, C].
    """
    side, root = math.isqrt(patches.shape[1]), math.isqrt(tokens)
    maps = patches.transpose(1, 2).unflatten(-1, (side, side)).float()
    cells = F.adaptive_avg_pool2d(maps, root).transpose(-2, -1).flatten(2).transpose(1, 2)
    whole = maps.mean((-2, -1))[:, None].expand(-1, tokens - root**2, -1)
    return torch.cat((cells, whole), dim=1).to(patches.dtype)


def _write_official(objective: Any, dest: str) -> str:
    export_official(objective.model, dest)
    return ""

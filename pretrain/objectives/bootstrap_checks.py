"""What keeps a bootstrapping recipe from working, and what in it is likely not meant."""

from collections.abc import Iterator
from typing import Any

from pretrain.models.alignment_teacher import TowerFacts
from pretrain.models.sparseformer import sparseformer_config as sizes
from pretrain.models.sparseformer.inheritance import inheriting_places
from pretrain.models.sparseformer.sparseformer_config import HEAD_DIM
from pretrain.recipe.schema import Recipe
from pretrain.samples import shared_crop


def projects(recipe: Recipe) -> bool:
    """Tell whether answers are compared behind the head."""
    options = recipe.objective
    return bool((options.align or ("embedding" if options.teacher.kind == "clip" else "features")) == "embedding")


def option_problems(recipe: Recipe) -> list[str]:
    """List what is wrong whatever the teacher is."""
    options, full = recipe.objective, sizes.resolve(recipe.model)
    found = []
    if not isinstance(recipe.input, shared_crop.Config):
        found.append(f"input.name: found {recipe.input.name}, allowed: shared_crop")
    if full.form != "bootstrapped":
        found.append(f"model.form: found {full.form}, allowed: bootstrapped, whose last units are a ViT's blocks")
    if full.video:
        found.append("model.video: found true, allowed: false; teachers are of images, and weights are inflated later")
    if found:
        return found
    if recipe.run.init_weights is None:
        found.append(
            "run.init_weights: found null, allowed: ${objective.teacher.weights}, whose blocks the student inherits, "
            "or an earlier student"
        )
    inherited = len(inheriting_places(recipe.model))
    if not 0 <= options.tune_blocks <= inherited:
        found.append(f"objective.tune_blocks: found {options.tune_blocks}, allowed: 0 to {inherited}, the inherited")
    if options.tuned_lr_scale <= 0:
        found.append(f"objective.tuned_lr_scale: found {options.tuned_lr_scale:g}, allowed: more than 0")
    teacher = options.teacher
    for name in ("mean", "std"):
        values = getattr(teacher, name)
        if values is not None and (len(values) != 3 or (name == "std" and min(values) <= 0)):
            found.append(f"objective.teacher.{name}: found {list(values)}, allowed: three numbers, deviations above 0")
    return found


def agreement_problems(recipe: Recipe, facts: TowerFacts) -> list[str]:
    """List in what a student can't be made of this teacher's blocks."""
    full, inherited = sizes.resolve(recipe.model), len(inheriting_places(recipe.model))
    found = [
        f"{key}: found {value}, allowed: {wanted}, the teacher's {what}"
        for key, value, wanted, what in _pairs(full, facts)
        if value != wanted
    ]
    if inherited > facts.depth:
        found.append(f"model.depth: {inherited} inherited units, but the teacher has {facts.depth} blocks")
    if facts.dim != facts.heads * HEAD_DIM:
        found.append(
            f"objective.teacher: {facts.heads} heads of {facts.dim // facts.heads} channels; a SparseFormer's have "
            f"{HEAD_DIM}"
        )
    if not facts.class_token:
        found.append("objective.teacher: pools its tokens by a mean or by attention; allowed: a class token")
    return found + _size_problems(recipe, facts) + _head_problems(recipe, full, facts)


def _pairs(full: sizes.Config, facts: TowerFacts) -> Iterator[tuple[str, Any, Any, str]]:
    yield "model.dim", full.dim, facts.dim, "channels"
    yield "model.activation", full.activation, facts.activation, "activation"


def _size_problems(recipe: Recipe, facts: TowerFacts) -> list[str]:
    size = recipe.input.second_size or recipe.input.height
    if facts.image_size not in (None, size):
        return [
            f"input.second_size: found {size}, allowed: {facts.image_size}, the teacher's; for other sizes "
            "objective.teacher.arguments=[dynamic_img_size=true]"
        ]
    if size % facts.patch_size:
        return [f"input.second_size: found {size}, allowed: a multiple of {facts.patch_size}, the teacher's patches"]
    return []


def _head_problems(recipe: Recipe, full: sizes.Config, facts: TowerFacts) -> list[str]:
    options, found = recipe.objective, []
    if full.classes and full.classes != facts.outputs:
        found.append(f"model.classes: found {full.classes}, allowed: {facts.outputs}, the teacher's outputs, or 0")
    if options.teacher.kind == "clip" and full.classes and full.head_bias:
        found.append("model.head_bias: found true, allowed: false; a CLIP's projection has none")
    if not full.classes and projects(recipe):
        found.append("objective.align: answers behind the head are compared, but model.classes=0 leaves it out")
    return found


def held_out_problems(recipe: Recipe) -> list[str]:
    """List what keeps student and teacher from being compared on held-out pictures."""
    options, full = recipe.objective.held_out, sizes.resolve(recipe.model)
    found = [
        f"objective.held_out.{name}: found {getattr(options, name)}, allowed: more than 0"
        for name in ("every_epochs", "micro")
        if getattr(options, name) <= 0
    ]
    speaks = options.zero_shot.class_names is not None
    if options.labels and not full.classes:
        found.append("objective.held_out.labels: found true, but model.classes=0 leaves out the head that classifies")
    clip = recipe.objective.teacher.kind == "clip"
    if speaks and not (clip or options.zero_shot.text_weights):
        found.append(
            "objective.held_out.zero_shot.class_names: needs a text tower; set objective.teacher.kind=clip or "
            "objective.held_out.zero_shot.text_weights"
        )
    if options.labels and clip and not speaks:
        found.append(
            "objective.held_out.zero_shot.class_names: found null, allowed with labels and a CLIP: imagenet or a file, "
            "since its outputs are no classes"
        )
    return found


def unusual(recipe: Recipe, facts: TowerFacts) -> list[str]:
    """List options that have no effect, or are likely not meant."""
    options, full, found = recipe.objective, sizes.resolve(recipe.model), []
    if full.norm_eps != facts.norm_eps:
        found.append(
            f"model.norm_eps={full.norm_eps:g}, the teacher's blocks were trained with {facts.norm_eps:g}; set it, "
            "unless you go on with released weights, which have 1e-5"
        )
    held_out = options.held_out
    if held_out.zero_shot.class_names is not None and not held_out.labels:
        found.append("objective.held_out.zero_shot has no effect: objective.held_out.labels is false")
    if held_out.labels and held_out.shards is None:
        found.append("objective.held_out.labels has no effect: objective.held_out.shards is null")
    return found

"""What keeps a recipe of TVTSv2 from working, and what in it is likely not meant."""

from typing import Any

from pretrain.models.tvtsv2 import patches_of, resolved
from pretrain.recipe.schema import Recipe
from pretrain.samples import narrated


def text_blocks(asked: int | None, depth: int) -> int:
    """Count the blocks of the text tower that are trained: by default the last quarter."""
    return depth // 4 if asked is None else asked


def input_problems(recipe: Recipe) -> list[str]:
    """Say where the recipe has another kind of sample."""
    if isinstance(recipe.input, narrated.Config):
        return []
    return [f"input.name: found {recipe.input.name}, allowed: narrated"]


def tvtsv2_problems(recipe: Recipe) -> list[str]:
    """List what is wrong in objective, input and data beside the model."""
    options, full = recipe.objective, resolved(recipe.model)
    found = [
        f"objective.{name}: found {getattr(options, name):g}, allowed: {allowed}"
        for name, allowed, good in (
            ("mask_ratio", "0 to below 1", 0 <= options.mask_ratio < 1),
            ("temperature", "more than 0", options.temperature > 0),
            ("sort_weight", "0 or more", options.sort_weight >= 0),
            ("clip_lr_scale", "more than 0", options.clip_lr_scale > 0),
        )
        if not good
    ]
    if not found and int(patches_of(full, recipe.input.size) * (1 - options.mask_ratio)) < 1:
        found.append(f"objective.mask_ratio: found {options.mask_ratio:g}, which hides all patches of a frame")
    tuned = options.tune_text_blocks
    if tuned is not None and not 0 <= tuned <= full.text_depth:
        found.append(f"objective.tune_text_blocks: found {tuned}, allowed: 0 to {full.text_depth}, those of the tower")
    return found + _text_problems(recipe, full) + _source_problems(recipe) + _held_out_problems(recipe)


def _text_problems(recipe: Recipe, full: Any) -> list[str]:
    found = []
    for key in ("segments", "context"):
        own, wanted = getattr(recipe.input, key), getattr(full, key)
        if own != wanted:
            found.append(f"input.{key}: found {own}, allowed: {wanted}, model.{key}")
    if found:
        return found
    samples = narrated.NarratedClips(recipe.input, recipe.run.seed)
    vocabulary: int = recipe.model.vocabulary
    if samples.vocabulary > vocabulary:
        found.append(
            f"input.tokenizer={recipe.input.tokenizer}: {samples.vocabulary} ids, the text tower has "
            f"model.vocabulary={vocabulary}"
        )
    end = samples.end_id
    if end is None or end != (samples.vocabulary - 1 if recipe.model.end_id is None else recipe.model.end_id):
        # The tower would take another token for the text's end, and all texts might come out as one.
        found.append(
            f"model.end_id: found {recipe.model.end_id}, allowed: {end}, the token with which input.tokenizer ends a "
            "text (null: its highest id)"
        )
    return found


def _source_problems(recipe: Recipe) -> list[str]:
    named, there = recipe.input.narrated, list(recipe.data.sources)
    found = [
        f"input.narrated: found {name}, allowed: names of data.sources ({', '.join(there)})"
        for name in named
        if name not in there
    ]
    if named and set(there) - set(named) and recipe.data.compose != "alternate":
        found.append(
            f"data.compose: found {recipe.data.compose}, allowed: alternate; clips with {recipe.input.segments} texts "
            "and clips with one don't fit into one batch"
        )
    return found


def _held_out_problems(recipe: Recipe) -> list[str]:
    options = recipe.objective.held_out
    found = [
        f"objective.held_out.{name}: found {getattr(options, name)}, allowed: more than 0"
        for name in ("every_epochs", "micro")
        if getattr(options, name) <= 0
    ]
    if options.shards is not None and options.measure == "recognition" and options.class_names is None:
        found.append("objective.held_out.class_names: found null, allowed: a file with a name a line, or label2id.json")
    return found


def tvtsv2_warnings(recipe: Recipe) -> list[str]:
    """Name what is likely not meant."""
    found = []
    if recipe.run.init_weights is None:
        found.append(
            "run.init_weights is null: TVTSv2 starts from a CLIP, a file, a folder or hub:owner/name; its learning "
            "rates are meant for that"
        )
    if not recipe.input.narrated:
        found.append("input.narrated is empty: no source has transcripts, so nothing is sorted")
    return found

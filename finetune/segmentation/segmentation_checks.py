"""Checks of a segmentation recipe."""

from finetune.recipe import Evaluate, LabelledSource, Start, TuneRecipe

#: Keys of classification that segmentation has nothing for.
UNREAD = {
    "evaluate": (Evaluate, ("clips", "crops", "average", "micro")),
    "start": (Start, ("encoder_norm", "label_map")),
}
SOURCE_UNREAD = ("sampling", "flip", "short_side", "stride")
#: Most classes: labels travel as 16 bits.
MOST_CLASSES = 32_767


def check_segmentation(recipe: TuneRecipe) -> list[str]:
    """List what can't work, beyond each component's own checks."""
    options, evaluate, found = recipe.objective, recipe.evaluate, []
    if not 2 <= recipe.model.classes <= MOST_CLASSES:
        found.append(f"model.classes: found {recipe.model.classes}, allowed: 2 to {MOST_CLASSES} classes")
    if recipe.compute.dtype != "fp32":
        found.append(f"compute.dtype: found {recipe.compute.dtype}, allowed: fp32; running statistics of the head's "
                     "batch norms lose small steps in 16 bits")  # fmt: skip
    if options.channels < 1:
        found.append(f"objective.channels: found {options.channels}, allowed: 1 or more")
    if options.auxiliary < 0:
        found.append(f"objective.auxiliary: found {options.auxiliary}, allowed: 0 (none) or more")
    if options.judge == "slide" and not 1 <= options.stride <= recipe.input.crop_size:
        found.append(
            f"objective.stride: found {options.stride}, allowed: 1 to input.crop_size={recipe.input.crop_size}, or "
            "windows would leave pixels out"
        )
    if recipe.ema.decay is not None and not 0 <= recipe.ema.decay <= 1:
        found.append(f"ema.decay: found {recipe.ema.decay}, allowed: a share from 0 to 1")
    held_out = any(source.val or source.test for source in recipe.data.sources.values())
    if recipe.zero.stage == 3 and held_out:
        found.append("zero.stage: found 3, allowed with held-out pictures: 0 to 2; ranks would take different numbers "
                     "of passes through sharded weights")  # fmt: skip
    positive = {"evaluate.every_epochs": evaluate.every_epochs, "optim.layer_decay": recipe.optim.layer_decay}
    found += [f"{key}: found {value}, allowed: more than 0" for key, value in positive.items() if value <= 0]
    found += [f"evaluate.{name}: found {getattr(evaluate, name)}, allowed: 0 or more"
              for name in ("workers", "pictures") if getattr(evaluate, name) < 0]  # fmt: skip
    if evaluate.test == "best" and not any(source.val for source in recipe.data.sources.values()):
        found.append("evaluate.test: best needs a validation; give data.sources.<name>.val, or evaluate.test=last")
    if recipe.health.shards is not None:
        found.append("health.shards: for pre-training only; here data.sources.<name>.val is evaluated")
    return found + _unread(recipe)


def _unread(recipe: TuneRecipe) -> list[str]:
    """List values that would be passed over without a word."""
    found = []
    for section, (schema, names) in UNREAD.items():
        found += [f"{section}.{name}" for name in names if vars(vars(recipe)[section])[name] != vars(schema())[name]]
    plain = vars(LabelledSource(shards=""))
    for key, source in recipe.data.sources.items():
        found += [f"data.sources.{key}.{name}" for name in SOURCE_UNREAD if vars(source)[name] != plain[name]]
    return [f"{key}: has no effect with objective.name={recipe.objective.name}; remove it" for key in found]


def segmentation_warnings(recipe: TuneRecipe) -> list[str]:
    """List options that have no effect, or that are likely not meant."""
    warnings = []
    if recipe.run.init_weights is None:
        warnings.append("run.init_weights is null: the network starts from random weights; give pre-trained ones")
        if recipe.start != Start():
            warnings.append("start has no effect: run.init_weights is null")
    for name, source in recipe.data.sources.items():
        if source.val is None and source.test is None:
            warnings.append(f"data.sources.{name}: neither val nor test shards; nothing is measured on it")
    if recipe.objective.head == "linear" and recipe.objective.auxiliary != 0.4:
        warnings.append("objective.auxiliary has no effect: objective.head=linear has no auxiliary head")
    return warnings

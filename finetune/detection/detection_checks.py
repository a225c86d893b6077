"""Checks of a detection recipe."""

from finetune.recipe import Evaluate, LabelledSource, Start, TuneRecipe

#: Keys of classification that detection has nothing for.
UNREAD = {
    "evaluate": (Evaluate, ("clips", "crops", "average", "pictures")),
    "start": (Start, ("encoder_norm", "label_map")),
}
SOURCE_UNREAD = ("labels", "sampling", "flip", "short_side")
FOCAL_CLASSES = 80


def check_detection(recipe: TuneRecipe) -> list[str]:
    """List what can't work, beyond each component's own checks."""
    objective, model = recipe.objective, recipe.model
    problems = []
    if model.classes < 1:
        problems.append(f"model.classes: found {model.classes}, allowed: 1 or more actions")
    if objective.loss == "focal" and model.classes != FOCAL_CLASSES:
        problems.append(f"objective.loss=focal: model.classes={model.classes}; it is of AVA's {FOCAL_CLASSES} outputs")
    if any(one <= -1 for one in objective.extension):
        problems.append(f"objective.extension: found {list(objective.extension)}, allowed: more than -1 each")
    return problems + check_given_boxes(recipe) + check_judging(recipe)


def check_given_boxes(recipe: TuneRecipe) -> list[str]:
    """List what can't work with any task that is given the boxes of its persons."""
    if recipe.input.empty == "refuse":
        return []
    return [
        f"input.empty: found {recipe.input.empty}, allowed: refuse; without a person objective.name="
        f"{recipe.objective.name} has nothing to learn from a keyframe"
    ]


def check_judging(recipe: TuneRecipe) -> list[str]:
    """List what can't work with any task whose answers are boxes with actions."""
    evaluate, problems = recipe.evaluate, []
    if recipe.ema.decay is not None and not 0 <= recipe.ema.decay <= 1:
        problems.append(f"ema.decay: found {recipe.ema.decay}, allowed: a share from 0 to 1")
    positive = {"evaluate.every_epochs": evaluate.every_epochs, "evaluate.micro": evaluate.micro,
                "optim.layer_decay": recipe.optim.layer_decay}  # fmt: skip
    problems += [f"{key}: found {value}, allowed: more than 0" for key, value in positive.items() if value <= 0]
    if evaluate.workers < 0:
        problems.append(f"evaluate.workers: found {evaluate.workers}, allowed: 0 or more")
    if evaluate.test == "best" and not any(source.val for source in recipe.data.sources.values()):
        problems.append("evaluate.test: best needs a validation; give data.sources.<name>.val, or evaluate.test=last")
    if recipe.health.shards is not None:
        problems.append("health.shards: for pre-training only; here data.sources.<name>.val is evaluated")
    return problems + _unread(recipe)


def _unread(recipe: TuneRecipe) -> list[str]:
    """List values that would be passed over without a word."""
    found = []
    for section, (schema, names) in UNREAD.items():
        found += [f"{section}.{name}" for name in names if vars(vars(recipe)[section])[name] != vars(schema())[name]]
    plain = vars(LabelledSource(shards=""))
    for key, source in recipe.data.sources.items():
        found += [f"data.sources.{key}.{name}" for name in SOURCE_UNREAD if vars(source)[name] != plain[name]]
    return [f"{key}: has no effect with objective.name={recipe.objective.name}; remove it" for key in found]


def detection_warnings(recipe: TuneRecipe) -> list[str]:
    """List options that have no effect, or that are likely not meant."""
    warnings = []
    if recipe.run.init_weights is None:
        warnings.append("run.init_weights is null: the network starts from random weights; give pre-trained ones")
        if recipe.start != Start():
            warnings.append("start has no effect: run.init_weights is null")
    for name, source in recipe.data.sources.items():
        if source.val is None and source.test is None:
            warnings.append(f"data.sources.{name}: neither val nor test shards; nothing is measured on it")
    return warnings

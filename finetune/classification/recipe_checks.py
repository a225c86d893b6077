"""Checks of a classification recipe: what can't work, and what does not fit its data."""

import re

from finetune.recipe import TuneRecipe
from pretrain.samples.augmented_clip import Config

#: timm's notation: rand-m7-n4-mstd0.5-inc1 and the like.
NOTATION = re.compile(r"rand(-(m\d+|n\d+|p0?\.\d+|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t\w+|w\d))*")
#: Sources whose name holds one of these are known to be sampled sparsely and to tell left from right.
SPARSE_NAMES = ("ssv1", "ssv2", "something")
#: ... and these to be sampled densely.
DENSE_NAMES = ("k400", "k600", "k700", "k710", "kinetics", "ucf101", "hmdb51", "diving48")
SIDED = re.compile(r"\b(left|right)\b", re.IGNORECASE)


def check_classification(recipe: TuneRecipe) -> list[str]:
    """List what can't work, beyond each component's own checks."""
    if not isinstance(recipe.input, Config):
        return [f"input.name: found {recipe.input.name}, allowed with objective.name=classification: augmented_clip, "
                "segments, or a kind of yours that inherits from one of them"]  # fmt: skip
    augment, objective, data = recipe.augment, recipe.objective, recipe.data
    problems = _check_ranges(recipe)
    for name, source in data.sources.items():
        problems += recipe.input.sampling_problems(name, source.sampling)
        if source.flip_labels and objective.task == "regression":
            problems.append(f"data.sources.{name}.flip_labels: values to regress have no classes; leave it out")
    mixes = augment.mixup > 0 or augment.cutmix > 0
    # timm asserts it, at the first batch of a run that has waited for its nodes.
    if mixes and recipe.batch.micro * recipe.input.views % 2:
        problems.append(
            f"batch.micro: {recipe.batch.micro} x input.views = {recipe.input.views} is odd, and Mixup and CutMix pair "
            "clips; make one of them even, or set augment.mixup=0 augment.cutmix=0"
        )
    if mixes and objective.task == "regression":
        problems.append("augment.mixup: values to regress can't be mixed; set augment.mixup=0 augment.cutmix=0")
    if augment.randaugment and not NOTATION.fullmatch(augment.randaugment):
        problems.append(
            f"augment.randaugment: {augment.randaugment!r} is not timm's notation, such as rand-m7-n4-mstd0.5-inc1"
        )
    if recipe.model.classes < 1:
        problems.append(f"model.classes: found {recipe.model.classes}, allowed: 1 or more outputs")
    elif recipe.model.classes == 1 and objective.task == "single":
        # Softmax over one output is 1: no loss, no gradient, and 100 % right.
        problems.append("model.classes: found 1, and one class among one has nothing to learn; allowed: 2 or more (1 "
                        "with objective.task=multi or regression); videos of other classes are needed")  # fmt: skip
    if recipe.evaluate.crops > 1 and recipe.input.height != recipe.input.width:
        problems.append("evaluate.crops: test crops are square; with input.height != input.width set evaluate.crops=1")
    if recipe.input.GEOMETRY == "tsn" and recipe.evaluate.crops not in (1, 3):
        problems.append(f"evaluate.crops: found {recipe.evaluate.crops}, allowed with input.name={recipe.input.name}: "
                        "1 (centre), 3 (left, right, centre)")  # fmt: skip
    evaluate = recipe.evaluate
    if recipe.input.evaluated_filter is not None and (evaluate.clips, evaluate.crops) != (1, 1):
        problems.append(
            f"evaluate: found clips={evaluate.clips} and crops={evaluate.crops}, but a picture (input.name="
            f"{recipe.input.name}) is judged by its middle alone; set evaluate.clips=1 evaluate.crops=1"
        )
    if recipe.evaluate.test == "best" and not any(source.val for source in data.sources.values()):
        problems.append("evaluate.test: best needs a validation; give data.sources.<name>.val, or evaluate.test=last")
    if recipe.health.shards is not None:
        problems.append("health.shards: for pre-training only; here data.sources.<name>.val is evaluated")
    return problems


def _check_ranges(recipe: TuneRecipe) -> list[str]:
    augment, evaluate = recipe.augment, recipe.evaluate
    shares = {
        "objective.smoothing": recipe.objective.smoothing,
        "augment.erasing": augment.erasing,
        "augment.mix_probability": augment.mix_probability,
        "augment.switch_probability": augment.switch_probability,
        "ema.decay": recipe.ema.decay,
    }
    problems = [f"{key}: found {value}, allowed: a share from 0 to 1" for key, value in shares.items()
                if value is not None and not 0 <= value <= 1]  # fmt: skip
    positive = {
        "evaluate.every_epochs": evaluate.every_epochs,
        "evaluate.clips": evaluate.clips,
        "evaluate.crops": evaluate.crops,
        "evaluate.crop_size": evaluate.crop_size,
        "evaluate.micro": evaluate.micro,
        "optim.layer_decay": recipe.optim.layer_decay,
        "optim.bias_rate": recipe.optim.bias_rate,
        "optim.head_rate": recipe.optim.head_rate,
    }
    problems += [f"{key}: found {value}, allowed: more than 0" for key, value in positive.items()
                 if value is not None and value <= 0]  # fmt: skip
    not_negative = {
        "augment.mixup": augment.mixup,
        "augment.cutmix": augment.cutmix,
        "evaluate.workers": evaluate.workers,
    }
    problems += [f"{key}: found {value}, allowed: 0 or more" for key, value in not_negative.items() if value < 0]
    ranges = {"augment.area": (augment.area, 1.0), "augment.aspect": (augment.aspect, float("inf"))}
    return problems + [
        f"{key}: found {list(pair)}, allowed: two numbers above 0, the smaller one first"
        + (", up to 1" if most == 1 else "")
        for key, (pair, most) in ranges.items()
        if not 0 < pair[0] <= pair[1] <= most
    ]


def classification_warnings(recipe: TuneRecipe) -> list[str]:
    """List options without effect, and sampling or flips that don't fit the data (worth 1 to 1.3 points on SSv2)."""
    warnings = []
    if recipe.run.init_weights is None:
        warnings.append("run.init_weights is null: the network starts from random weights; give pre-trained ones")
    for name, source in recipe.data.sources.items():
        # By the name: shards don't say which data set they are of.
        text, key = f"{name} {source.shards}".lower(), f"data.sources.{name}"
        sparse, whole = any(word in text for word in SPARSE_NAMES), recipe.input.GEOMETRY == "tsn"
        if sparse and source.sampling == "dense":
            warnings.append(f"{key}.sampling=dense, but {name} looks like Something-Something: published with sparse")
        if sparse and source.flip and not source.flip_labels:
            warnings.append(f"{key}.flip=true, but classes of {name} tell left from right: published without flips")
        if source.flip_labels and not source.flip:
            warnings.append(f"{key}.flip_labels has no effect: {key}.flip=false")
        # TSN and its heirs sample all data sets in this way.
        if not sparse and not whole and source.sampling == "sparse" and any(word in text for word in DENSE_NAMES):
            warnings.append(f"{key}.sampling=sparse, but {name} is published with dense sampling")
        if source.sampling == "sparse" and source.stride is not None:
            warnings.append(f"{key}.stride has no effect: sparse sampling spreads frames over the whole video")
        if source.sampling == "motion" and source.stride is not None:
            warnings.append(f"{key}.stride has no effect: sampling by motion takes frames from the whole video")
        if source.val is None and source.test is None:
            warnings.append(f"{key}: neither val nor test shards; nothing is measured on it")
    if recipe.input.crop == "center" and recipe.augment != type(recipe.augment)():
        warnings.append("augment has no effect on pixels: input.crop=center takes the middle as it is (mixing is on)")
    if recipe.input.crop == "multiscale" and recipe.augment.area != type(recipe.augment)().area:
        warnings.append("augment.area has no effect: input.crop=multiscale draws its own sizes")
    if recipe.input.motion != type(recipe.input.motion)() and not any(
        source.sampling == "motion" for source in recipe.data.sources.values()
    ):
        warnings.append("input.motion has no effect: no source has sampling=motion")
    if recipe.start != type(recipe.start)() and recipe.run.init_weights is None:
        warnings.append("start has no effect: run.init_weights is null")
    return warnings


def sided_classes(names: tuple[str, ...]) -> list[str]:
    """Name classes that tell left from right: flips would contradict them."""
    return [name for name in names if SIDED.search(name.replace("_", " "))]

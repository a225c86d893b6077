"""Sizes and forms of SparseFormers: published ones, the constants of both official codes, and what can't work.

systems/sparseformer.md, sections 3 and 4; systems/sparseformer_bootstrap.md, sections 2 and 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from pretrain.models.encoder import size_problems
from pretrain.models.sparseformer.point_sampling import Padding

#: What a unit does to its tokens: attention, moving of regions, sampling with mixing, code of the region, MLP.
Operation = Literal["attend", "move", "sample", "code", "mlp"]
#: Units of v1: regions move in front of the sampling.
LOOK_V1: tuple[Operation, ...] = ("attend", "move", "sample", "mlp")
#: Units of bootstrapped models: the first, and the second look.
FOCUS: tuple[Operation, ...] = ("sample", "code", "attend", "mlp", "move")
SECOND_LOOK: tuple[Operation, ...] = ("sample", "code")
PLAIN: tuple[Operation, ...] = ("attend", "mlp")
#: Heads of v1 whatever the width, and channels of a head in bootstrapped models.
HEADS = HEAD_DIM = 64
#: Unit of bootstrapped models in front of which the class token enters, counted from 0.
CLASS_AT = 2
#: Rows behind the mixing over points that the library makes at least.
LEAST_OUT_POINTS = 32
#: What a size fixes.
SIZE_FIELDS = (
    "form", "tokens", "focus_dim", "dim", "depth", "repeats", "points", "channels", "classes", "drop_path", "head_bias",
    "activation",
)  # fmt: skip
PRESETS: dict[str, tuple[Any, ...]] = {
    "tiny": ("v1", 49, 256, 512, 8, 4, 36, 96, 1000, 0.2, True, "gelu"),
    "small": ("v1", 64, 320, 640, 8, 4, 36, 96, 1000, 0.3, True, "gelu"),
    "base": ("v1", 81, 384, 768, 10, 4, 36, 96, 1000, 0.4, True, "gelu"),
    "augreg_base": ("bootstrapped", 48, 384, 768, 8, 4, 16, 64, 1000, 0.0, True, "gelu"),
    "augreg_large": ("bootstrapped", 48, 512, 1024, 16, 4, 16, 64, 1000, 0.0, True, "gelu"),
    "clip_base": ("bootstrapped", 48, 384, 768, 8, 4, 16, 64, 512, 0.0, False, "quick_gelu"),
    "clip_large": ("bootstrapped", 63, 512, 1024, 16, 4, 16, 64, 768, 0.0, False, "quick_gelu"),
}
#: Sizes that have no default in a model of one's own; the other fields have, by its form.
CUSTOM_FIELDS = ("form", "tokens", "focus_dim", "dim", "depth", "repeats", "points", "channels", "classes")


@dataclass
class Config:
    """A SparseFormer of images or clips; null means: as the size has it."""

    name: str = "sparseformer"
    """architecture: pretrain/models/<name>"""
    size: Literal[
        "tiny", "small", "base", "augreg_base", "augreg_large", "clip_base", "clip_large", "custom"
    ] = "tiny"  # fmt: skip
    """published size; custom: sizes below that are null must be given"""
    form: Literal["v1", "bootstrapped"] | None = None
    """v1: trained by itself; bootstrapped: most units are a ViT's blocks, with a class token"""
    parity: Literal["train", "library"] | None = None
    """constants of v1's two official codes, in which the same weights answer slightly differently: train, the code that
    the published accuracy is of, or library; bootstrapped models have the library's. null: train, where both are"""
    tokens: int | None = None
    """latent tokens of an image"""
    focus_dim: int | None = None
    """channels of the first unit, which looks again and again"""
    dim: int | None = None
    """channels of the units behind it"""
    depth: int | None = None
    """units behind the first; in bootstrapped models those that a ViT's blocks become"""
    repeats: int | None = None
    """times that the first unit is applied, with the same weights"""
    points: int | None = None
    """samples of a token at each look"""
    channels: int | None = None
    """channels of the map that is sampled"""
    units: list[str] | None = None
    """operations of each unit, in place of the form's: names out of attend, move, sample, code, mlp, apart by blanks;
    the first unit has focus_dim channels and `repeats`"""
    generator_dim: int | None = None
    """channels inside of what generates mixing matrices; null: a quarter of the unit's channels in v1, else 128"""
    classes: int | None = None
    """outputs of the head; 0: no head"""
    head_bias: bool | None = None
    """whether the head has a bias; a CLIP model's projection has none"""
    activation: Literal["gelu", "quick_gelu"] | None = None
    """inside the MLPs of units that are applied once; null: exact GELU"""
    norm_eps: float | None = None
    """epsilon of layer norms; null: 1e-6 in v1, 1e-5 in bootstrapped models"""
    drop_path: float | None = None
    """stochastic depth rate of the last unit, rising linearly from 0 over all applications of units"""
    adjust: bool = True
    """let regions move; false: they stay where they began (for ablation)"""
    offsets: Literal["adaptive", "static"] = "adaptive"
    """places of a token's points in its region: they depend on the token, or are learned alone (for ablation)"""
    clamp_points: bool | None = None
    """clamp the gradient of points, by the loss scale; null: as parity has it (train: yes, library: no)"""
    video: bool = False
    """regions and points have a time; input.frames may be above 1, and an image model's weights are inflated"""
    replicates: int = 1
    """slices of a clip with `tokens` tokens each; published: 8"""
    temporal_offsets: Literal["spread", "official"] = "spread"
    """times of points at first: spread over the region's length, or all in its middle, whose normalisation is singular:
    the first training step moves them by a third of the length, at random"""
    time_eps: float = 0.1
    """added to the deviation of points' times where temporal_offsets=spread"""
    region_lr_scale: float = 1.0
    """factor on the learning rate of what moves regions and points"""


@dataclass(frozen=True)
class UnitShape:
    """A unit: what it does, in this order, how wide it is, and how often it is applied."""

    operations: tuple[Operation, ...]
    dim: int
    repeats: int = 1


@dataclass(frozen=True)
class Constants:
    """In what the forms and codes of the same modules differ.

    Attributes:
        map_unbiased, map_eps: variance over a map's channels, and what is added to it.
        offset_eps: added to the deviation of a token's offsets.
        norm_eps, generator_eps: of layer norms, and of that of the mixing generator.
        least_out_points: rows behind the mixing over points that there are at least.
        clamped: whether the gradient of points is clamped.
        scattered: first offsets: those that a square grid leaves over are drawn, and all depend on the token.
        padding: outside of the map.
        mixing_bias: biases in the mixing.
        adjust_hidden: a second layer in what moves regions, which then has no stochastic depth.
        transition_norm: a layer norm where the width changes.
        stages: an embedding for each application of a unit.
        one_embedding: all tokens begin with the same embedding.
        class_at: number of the unit in front of which a class token enters; None: none does.
    """

    map_unbiased: bool
    map_eps: float
    offset_eps: float
    norm_eps: float
    generator_eps: float
    least_out_points: int
    clamped: bool
    scattered: bool
    padding: Padding
    mixing_bias: bool = True
    adjust_hidden: bool = False
    transition_norm: bool = True
    stages: bool = False
    one_embedding: bool = False
    class_at: int | None = None


TRAIN = Constants(True, 1e-7, 1e-7, 1e-6, 1e-6, 0, True, True, "zeros")
LIBRARY = Constants(False, 1e-5, 1e-5, 1e-6, 1e-5, LEAST_OUT_POINTS, False, False, "zeros")
BOOTSTRAPPED = Constants(
    False, 1e-5, 1e-5, 1e-5, 1e-5, LEAST_OUT_POINTS, False, False, "border", mixing_bias=False, adjust_hidden=True,
    transition_norm=False, stages=True, one_embedding=True, class_at=CLASS_AT,
)  # fmt: skip


def resolve(config: Config) -> Config:
    """Fill in what the size and the form say."""
    preset = dict(zip(SIZE_FIELDS, PRESETS.get(config.size, ()), strict=False))
    full = replace(config, **{key: value for key, value in preset.items() if getattr(config, key) is None})
    bootstrapped = full.form == "bootstrapped"
    found = constants_of(full)
    defaults: dict[str, Any] = {
        "parity": "library" if bootstrapped else "train",
        "head_bias": True,
        "activation": "gelu",
        "drop_path": 0.0,
        "norm_eps": found.norm_eps,
        "clamp_points": found.clamped,
    }
    return replace(full, **{key: value for key, value in defaults.items() if getattr(full, key) is None})


def constants_of(config: Config) -> Constants:
    """Tell the constants of a form and code, with what of them the configuration changes."""
    if config.form == "bootstrapped":
        base = BOOTSTRAPPED
    else:
        base = LIBRARY if config.parity == "library" else TRAIN
    if config.norm_eps is not None:
        # One number in the official configuration, but for v1's generator in the library, which keeps its own.
        generator = base.generator_eps if base is LIBRARY else config.norm_eps
        base = replace(base, norm_eps=config.norm_eps, generator_eps=generator)
    return base if config.clamp_points is None else replace(base, clamped=config.clamp_points)


def layout_of(config: Config) -> tuple[UnitShape, ...]:
    """List the units of a full configuration."""
    if config.units is not None:
        given: list[Any] = [tuple(unit.split()) for unit in config.units]
    elif config.form == "v1":
        given = [LOOK_V1, LOOK_V1, *[PLAIN] * (_whole(config.depth) - 1)]
    else:
        given = [FOCUS, SECOND_LOOK, *[PLAIN] * _whole(config.depth)]
    kept = [tuple(one for one in unit if one != "move" or config.adjust) for unit in given]
    dims = [_whole(config.focus_dim)] + [_whole(config.dim)] * (len(kept) - 1)
    repeats = [_whole(config.repeats)] + [1] * (len(kept) - 1)
    return tuple(UnitShape(*unit) for unit in zip(kept, dims, repeats, strict=True))


def heads_of(config: Config, dim: int) -> int:
    """Count the attention heads of a unit."""
    return dim // HEAD_DIM if config.form == "bootstrapped" else min(HEADS, dim)


def generator_dim_of(config: Config, dim: int) -> int:
    """Count the channels inside of what generates a unit's mixing matrices."""
    if config.generator_dim is not None:
        return config.generator_dim
    return 128 if config.form == "bootstrapped" else dim // 4


def out_points_of(config: Config) -> int:
    """Count the rows behind the mixing over points."""
    return max(_whole(config.points), constants_of(config).least_out_points)


def check(config: Config, frames: int = 1) -> list[str]:
    """List what keeps this model from being built for clips of so many frames."""
    full = resolve(config)
    if open_fields := [
        f"model.{key}: null, but model.size=custom has no default for it"
        for key in CUSTOM_FIELDS
        if getattr(full, key) is None and not (key == "depth" and full.units)
    ]:
        return open_fields
    sizes = ("tokens", "focus_dim", "dim", "repeats", "channels", "replicates", "region_lr_scale")
    found = size_problems(full, (*sizes, *(["depth"] if full.units is None else [])))
    if full.generator_dim is not None and full.generator_dim < 1:
        found.append(f"model.generator_dim: found {full.generator_dim}, allowed: more than 0")
    if _whole(full.points) < 2:
        found.append(f"model.points: found {full.points}, allowed: 2 or more, since their spread is normalised")
    if _whole(full.classes) < 0:
        found.append(f"model.classes={full.classes}: 0 (no head) or more is needed")
    if not 0 <= (full.drop_path or 0) < 1:
        found.append(f"model.drop_path={full.drop_path}: a probability from 0 to below 1 is needed")
    found += _form_problems(full, frames)
    return found or _unit_problems(full)


def _form_problems(full: Config, frames: int) -> list[str]:
    found = []
    if full.form == "bootstrapped" and full.parity == "train":
        found.append("model.parity: found train, allowed with bootstrapped models: library, the code that they are of")
    if not full.video and frames != 1:
        found.append(f"input.frames={frames}: an image model takes single pictures; set model.video=true")
    if not full.video and full.replicates != 1:
        found.append(f"model.replicates={full.replicates}: an image has one slice; set model.video=true")
    if full.time_eps <= 0:
        found.append(f"model.time_eps={full.time_eps:g}, allowed: more than 0")
    return found


def _unit_problems(full: Config) -> list[str]:
    least = 1 if full.form == "v1" else CLASS_AT + 1
    if full.units is not None and len(full.units) < least:
        return [f"model.units: found {len(full.units)}, allowed: {least} or more"]
    units = layout_of(full)
    known = set(get_args(Operation))
    if unknown := sorted({name for unit in units for name in unit.operations} - known):
        return [f"model.units: found {', '.join(unknown)}, allowed: {', '.join(sorted(known))}"]
    found = []
    for dim in dict.fromkeys(unit.dim for unit in units):
        heads = heads_of(full, dim)
        if not heads or dim % heads:
            what = "channels of a head" if full.form == "bootstrapped" else "heads"
            found.append(f"model.focus_dim, model.dim: found {dim}, allowed: a multiple of {HEADS}, the {what}")
        if any("code" in unit.operations for unit in units) and dim % 8:
            found.append(f"model.focus_dim, model.dim: found {dim}, allowed: a multiple of 8, for codes of regions")
    if not any("sample" in unit.operations for unit in units):
        found.append("model.units: none samples, so the model would not see its input; add sample to one")
    return found


def _whole(value: int | None) -> int:
    assert value is not None, "filled in by `resolve`, and checked"
    return value


def layer_places(units: Sequence[UnitShape]) -> list[int]:
    """Tell each unit's place in `layers`, in which a change of width has a place of its own."""
    places, place = [], 0
    for index, unit in enumerate(units):
        place += int(index > 0 and unit.dim != units[index - 1].dim)
        places.append(place)
        place += 1
    return places

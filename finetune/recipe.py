"""Fine-tuning recipe: pre-training's sections, and what a labelled task adds to them."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from finetune.adapters.config import Tune
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import PRETRAINING, Data, Optim, Recipe, Schedule, Source
from pretrain.samples.pixel_augment import PixelAugment


@dataclass
class LabelledSource(Source):
    """One labelled data set: its shards, and what is right for its videos."""

    val: str | None = None
    """folder of the validation shards; null: no evaluation on this source while training"""
    test: str | None = None
    """folder of the test shards; null: val"""
    labels: str = "auto"
    """file of class names, one a line in the order of the classes, or a JSON list or {name: class}; integer: labels of
    the shards are class numbers; auto: numbers as they are, names numbered in alphabetical order"""
    sampling: Literal["dense", "sparse", "strided", "motion"] = "dense"
    """dense: frames at about the stride, as officially fine-tuned (Kinetics); sparse: one frame of each of T segments
    (Something-Something); strided: frames at exactly the stride, as in pre-training (AdaptFormer);
    motion: frames that carry equal shares of the motion (MGSampler; launch/motion_index.py measures it first)"""
    flip: bool = True
    """mirror half of the training clips; false where classes tell left from right, unless flip_labels names them all"""
    flip_labels: list[list[str]] | None = None
    """pairs of classes, numbers or names, that a mirrored clip exchanges: [[86, 87], [push left, push right]]"""
    short_side: int | None = None
    """short side of validation frames before the centre crop, pixels; null: input.height"""

    @property
    def needs_motion(self) -> bool:
        """Tell whether its order of frames depends on motion curves."""
        return self.sampling == "motion"


@dataclass
class TuneData(Data):
    """Labelled samples: their sources, and their order."""

    sources: dict[str, LabelledSource] = field(default_factory=dict)  # type: ignore[assignment]
    """data sets by name; each owns its sampling, flip, short side and label map"""


@dataclass
class TuneOptim(Optim):
    """The optimiser and its learning rate."""

    base_lr: float = 1e-3
    """learning rate for base_batch videos; actual peak = base_lr x batch.samples / base_batch"""
    base_min_lr: float = 1e-6
    """learning rate at the end of a cosine or linear schedule, for base_batch videos"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay rates of the two moments of AdamW and Adam"""
    layer_decay: float = 0.75
    """factor on the learning rate from each layer to the one below it; 1: the same for all"""
    decayed: Literal["matrices", "all"] = "matrices"
    """what weight decay is for: matrices: tensors of two or more dimensions; all: norms and biases too (TDN)"""
    bias_rate: float = 1.0
    """factor on the learning rate of biases beside matrices, norms' not among them (TSM: 2)"""
    head_rate: float = 1.0
    """factor on the learning rate of the head, together with bias_rate where that applies (TSM: 5)"""


@dataclass
class TuneSchedule(Schedule):
    """Length of the training, and the shape of the learning rate."""

    epochs: float = 50
    """passes over the data, counted in decoded videos"""
    warmup_epochs: float = 5
    """epochs of linear warm-up from base_warmup_lr"""


@dataclass
class Augment(PixelAugment):
    """Training clips: all pixels uint8, all draws the sample's own."""

    mixup: float = 0.8
    """alpha of Mixup's beta distribution; 0: no Mixup"""
    cutmix: float = 1.0
    """alpha of CutMix' beta distribution; 0: no CutMix"""
    mix_probability: float = 1.0
    """probability that clips are mixed; drawn for eight neighbouring videos"""
    switch_probability: float = 0.5
    """probability of CutMix rather than Mixup, where both are on"""


@dataclass
class Ema:
    """Exponential moving average of the weights."""

    decay: float | None = None
    """share that the average keeps at each step; null: no average. Where there is one, it is evaluated and tested"""
    warmup: bool = False
    """start with a smaller decay, min(decay, (1 + n) / (10 + n)) at step n, as TensorFlow does; officially there is
    none"""


@dataclass
class Evaluate:
    """Validation while training, and the test after it."""

    every_epochs: float = 1
    """epochs between two validations (one centre view a video); fractions find a best step within an epoch"""
    clips: int = 5
    """test: clips of a video, evenly spread in time"""
    crops: int = 3
    """test: square crops along a frame's long side"""
    crop_size: int | None = None
    """test: side of the crops and short side of the frames that they are cut from, pixels; null: input.height"""
    average: Literal["probabilities", "logits"] = "probabilities"
    """test: what the mean over views is of; logits: as for AdaptFormer's numbers, half a point less on Kinetics"""
    micro: int = 8
    """views in one forward pass of one rank"""
    test: Literal["last", "best", "none"] = "last"
    """weights that are tested when training is done (officially the last epoch's)"""
    workers: int = 2
    """data worker processes of each rank while evaluating"""
    pictures: int = 8
    """test: videos in examples.png, with their true and predicted classes; 0: no such picture"""


@dataclass
class Start:
    """Adoption of the weights of run.init_weights."""

    encoder_norm: Literal["discard", "fc_norm"] = "discard"
    """fate of the pre-trained encoder's last norm: officially discarded, or copied to fc_norm"""
    head: Literal["match", "new"] = "match"
    """match: the checkpoint's head where its shape fits; new: never"""
    label_map: str | None = None
    """file with the checkpoint's class of each class here (label_710to400.json): the head is cut out by it"""


@dataclass
class TuneRecipe(Recipe):
    """A fine-tuning run, resolved."""

    FOLDER: ClassVar[str] = "finetune"
    METHODS: ClassVar[str] = "finetune.{}.task"
    OPTIONAL: ClassVar[tuple[str, ...]] = ("tune", "augment", "ema", "evaluate", "start")

    program: Literal["finetune"] = "finetune"  # type: ignore[assignment]
    """what runs this recipe: launch/<program>.py"""

    data: TuneData = field(default_factory=TuneData)
    optim: TuneOptim = field(default_factory=TuneOptim)
    schedule: TuneSchedule = field(default_factory=TuneSchedule)
    tune: Tune = field(default_factory=Tune)
    augment: Augment = field(default_factory=Augment)
    ema: Ema = field(default_factory=Ema)
    evaluate: Evaluate = field(default_factory=Evaluate)
    start: Start = field(default_factory=Start)


def load_tune_recipe(name_or_path: str, overrides: list[str] | None = None) -> TuneRecipe:
    """Load a recipe as `pretrain.recipe.load.load_recipe` does, for names in recipes/finetune/."""
    recipe = load_recipe(name_or_path, overrides, TuneRecipe)
    assert isinstance(recipe, TuneRecipe)
    return recipe


#: Kinds of recipe by the `program` that stands in them.
PROGRAMS: dict[str, type[Recipe]] = {**PRETRAINING, TuneRecipe.program: TuneRecipe}

"""The recipe: one typed dataclass a component.

The string under each field is its documentation: meaning and unit, one line. `--print` shows it beside the value, so
it is written for someone who reads a recipe, not this file. `model`, `objective` and `input` are completed by the
`Config` dataclass of the file they name (pretrain/models/<name>.py, pretrain/objectives/<name>.py,
pretrain/samples/<name>.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from omegaconf import MISSING


@dataclass
class Source:
    """One data set of packed shards."""

    shards: str = MISSING
    """folder (any fsspec URL) that holds index.json and the tar shards"""
    weight: float | None = None
    """share of the epoch's samples, relative to the other sources; null: in proportion to its size"""
    stride: int | None = None
    """clips: frames between two sampled frames; null: input.stride"""
    expected_samples: int | None = None
    """samples of the published data set; the dry run counts with it until the shards are there, then compares"""

    @property
    def needs_motion(self) -> bool:
        """Tell whether the choice of its frames depends on motion curves beside the shards."""
        return False


@dataclass
class Input:
    """Rows of a batch that a sample becomes; each kind of sample adds its own keys."""

    #: Whether clips of two batches may differ in height and width: models must then take any size.
    VARIES: ClassVar[bool] = False

    name: str = "clip"
    """kind of sample: pretrain/samples/<name>.py"""
    views: int = 1
    """rows of a batch that each sample becomes"""

    def problems(self) -> list[str]:
        """Say what in this section can't work."""
        return [] if self.views > 0 else [f"input.views: found {self.views}, allowed: more than 0"]

    def source_problems(self, name: str, source: Source) -> list[str]:
        """Say what in a source's section can't work beside this one."""
        return []

    def describe(self) -> list[tuple[str, str, str]]:
        """Say in rows of name, value and remark what a row of the batch is, for the dry run and the model card."""
        return []

    def describe_source(self, source: Source) -> str:
        """Say what a source changes of this section, in a few words."""
        return ""


@dataclass
class Data:
    """Sources of the samples, and their order."""

    root: str = "${oc.env:TUBELET_DATA,shards}"
    """folder (any fsspec URL) that recipes find their sources in, as ${data.root}/<name>; default: $TUBELET_DATA"""
    sources: dict[str, Source] = field(default_factory=dict)
    """data sets by name"""
    compose: Literal["mixed", "alternate", "together"] = "mixed"
    """mixed: a batch holds samples of all sources, by weight or size; alternate: a step of each source in turn, equally
    often; together: a sample of each source side by side (unpaired translation)"""
    epoch_samples: int | None = None
    """samples in one epoch over all sources (together: of each source); null: as many as the sources hold, and where
    sources are not mixed as many of each as the largest holds"""
    lanes: int = 256
    """virtual lanes of the epoch order; part of the order, so never change it in a running job"""
    shuffle_window: int = 1024
    """neighbouring samples of a lane that are shuffled among each other"""
    workers: int | None = None
    """data worker processes of each rank; null: one for each core that falls to the rank, but no more than /dev/shm has
    room for; 0 decodes in the training process"""
    affinity: Literal["device", "none"] = "device"
    """device: a rank and its data workers keep to the cores of the NUMA node of its GPU, where a host's GPUs are spread
    over several; none: anywhere"""
    prefetch: int = 2
    """micro-batches that each worker prepares ahead"""
    readahead: int = 16
    """samples that each worker fetches ahead of decoding, undecoded"""
    cache_dir: str | None = None
    """local folder for whole shards; null: read ranges straight from the source"""
    cache_gb: float = 100.0
    """most bytes that cache_dir may hold, GB"""
    bad_rate: float = 0.01
    """share of unusable samples, per source, above which the run stops"""
    bad_minimum: int = 20
    """unusable samples of a source below which bad_rate is not applied"""
    bad_attempts: int = 10
    """substitutes tried for one unusable sample"""
    deadline_s: float = 300.0
    """longest time that one read may take, retries included, seconds"""


@dataclass
class Batch:
    """Samples of one optimiser step."""

    samples: int = 2048
    """samples of one optimiser step over all ranks; rows of the batch = samples x input.views"""
    micro: int = 32
    """samples of one forward pass of one rank; accumulation = samples / (micro x ranks)"""
    ranks: int | None = None
    """ranks of the published run, for the dry run's arithmetic only; training takes the ranks that were launched"""


@dataclass
class Optim:
    """The optimiser and its learning rate."""

    name: Literal["adamw", "adam", "sgd", "lars"] = "adamw"
    """adamw; adam (weight decay added to the gradient); sgd with momentum; lars (SGD whose step is scaled to each
    tensor's norm, for large batches; zero.stage 0 only)"""
    base_lr: float = 1.5e-4
    """learning rate for base_batch videos; actual peak = base_lr x batch.samples / base_batch"""
    base_batch: int = 256
    """batch size that base_lr, base_min_lr and base_warmup_lr are stated for"""
    base_min_lr: float = 1e-5
    """learning rate at the end of a cosine or linear schedule, for base_batch videos"""
    base_warmup_lr: float = 0.0
    """learning rate that the warm-up begins from, for base_batch videos"""
    scaled: Literal["all", "peak", "none"] = "all"
    """rates that are multiplied by batch.samples / base_batch: all three; only the peak (DeiT); or none"""
    betas: tuple[float, float] = (0.9, 0.95)
    """decay rates of the two moments of AdamW and Adam"""
    eps: float = 1e-8
    """epsilon of AdamW and Adam"""
    momentum: float = 0.9
    """momentum of SGD and LARS"""
    nesterov: bool = False
    """Nesterov's correction of SGD's momentum"""
    trust: float = 0.001
    """LARS's trust coefficient: length of a tensor's step relative to its norm, at learning rate 1"""
    weight_decay: float = 0.05
    """weight decay, for tensors of two or more dimensions; decoupled in AdamW, else added to the gradient"""
    weight_decay_end: float | None = None
    """weight decay at the end, reached along half a cosine over the whole schedule; null: constant"""
    clip_grad: float | None = None
    """largest global gradient norm; null: no clipping"""


@dataclass
class Schedule:
    """Length of the run, and shape of the learning rate."""

    epochs: float = 800
    """passes over the data, counted in samples (effective epochs = epochs x input.views)"""
    steps: int | None = None
    """length in optimiser steps; null: by epochs"""
    shape: Literal["cosine", "linear", "steps", "constant"] = "cosine"
    """learning rate after the warm-up: half a cosine or a line down to base_min_lr, multiplied by gamma at each
    milestone, or constant"""
    decay_from_epoch: float | None = None
    """epoch at which the cosine or line begins; null: where the warm-up ends (official); 0: as if there were no warm-up
    (timm, Swin); later: the peak is held until then"""
    milestones: list[float] | None = None
    """epochs after which the rate of shape steps drops"""
    milestone_steps: list[int] | None = None
    """the same in optimiser steps"""
    gamma: float = 0.1
    """factor on the rate at each milestone"""
    stepping: Literal["step", "epoch"] = "step"
    """whether the rate changes with each optimiser step, or with each epoch and stays for all of it"""
    lag: int = 0
    """steps or epochs (see stepping) by which the whole curve comes late; 1: trainers whose scheduler is told the
    number of the epoch that has just ended (DeiT)"""
    warmup_epochs: float = 40
    """epochs of linear warm-up from base_warmup_lr"""
    warmup_steps: int | None = None
    """length of the warm-up in optimiser steps; null: by warmup_epochs"""
    warmup_ends: Literal["both", "start", "end"] = "both"
    """which end of its line a warm-up of W steps takes: both: step/(W-1), from the start value to the peak (VideoMAE);
    start: step/W (timm, MoCo v3, AdaptFormer); end: (step+1)/W"""
    max_steps: int | None = None
    """stop after this many optimiser steps, without changing the schedule; null: run to the end"""


@dataclass
class Compute:
    """Number formats and how a step is computed."""

    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """format of weights and activations in forward and backward; optimiser states are float32"""
    matmul: Literal["highest", "high", "medium"] = "high"
    """float32 matrix multiplication on the accelerator (torch.set_float32_matmul_precision)"""
    activation_checkpointing: bool | str = False
    """true: recompute each block in the backward pass; selective: all but its matrix products and attention"""
    compile: bool = False
    """torch.compile each block of the model, and the loss; not with selective recomputation"""
    fp8: Literal["none", "tensorwise", "rowwise"] = "none"
    """experimental, not measured yet: format of the products of blocks, scaled as a whole or row by row (torchao);
    with bf16, compute.compile and zero.stage 0 to 2, on GPUs of compute capability 8.9 or more"""
    deterministic: bool = False
    """the same bits again on the same accelerators: torch's deterministic algorithms and one attention back end, slower
    (on a CPU it is always so)"""


@dataclass
class Zero:
    """DeepSpeed ZeRO."""

    # Not 1: in bf16 it sends no gradient before the backward pass is over (docs/decisions.md).
    stage: int = 2
    """what is sharded over ranks: 0 nothing, 1 optimiser, 2 + gradients, 3 + weights"""
    offload: Literal["none", "cpu"] = "none"
    """where optimiser states live: none = on the accelerator"""
    init: Literal["auto", "always", "never"] = "auto"
    """build the model sharded (deepspeed.zero.Init); auto: stage 3 and more than 500 M parameters"""
    bucket_mb: int = 200
    """size of a communication bucket, MB"""
    communication_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """format in which gradients cross ranks; auto: that of the weights, and fp32 above 64 ranks, where the rounding of
    a long sum would show"""
    overlap: bool = True
    """communicate gradients while the backward pass goes on (accelerators only)"""


@dataclass
class Checkpoint:
    """Times at which a checkpoint is written, and which are kept."""

    every_steps: int | None = None
    """optimiser steps between two checkpoints; null: by every_epochs"""
    every_epochs: float = 5
    """epochs between two checkpoints, where every_steps is null"""
    keep_last: int = 2
    """newest checkpoints that are kept"""
    keep_every_epochs: float | None = None
    """a checkpoint of every so many epochs is kept for good; null: none but the last ones"""
    asynchronous: bool = True
    """training goes on while a copy of the state in host memory is written; false: it waits until it is published"""
    max_failures: int = 3
    """saves in a row that may fail (full disk, ...) before the run stops; older checkpoints stay as they are"""
    upload: str | None = None
    """folder (any fsspec URL) of this run alone that checkpoints are copied to, and come back from; null: none"""
    upload_deadline_s: float = 1800
    """longest time that a checkpoint's upload or download may take on a rank, retries included, seconds"""


@dataclass
class Guard:
    """Answer to a step whose loss or gradient is not finite, or whose loss is a spike."""

    nonfinite: Literal["skip", "lower_lr", "rewind", "stop"] = "skip"
    """the update is left out, and: skip: go on; lower_lr: go on with a lower rate for some steps; rewind: go back to
    the newest checkpoint and leave these samples out; stop: end the run with exit code 1"""
    spike: Literal["ignore", "record", "skip", "lower_lr", "rewind", "stop"] = "record"
    """the same for a loss far above recent ones; record: update, and write the batch down; ignore: don't look"""
    window: int = 200
    """updates whose losses a spike is measured against; none is told before half of them are done"""
    z: float = 10.0
    """deviations (1.4826 x median absolute deviation) above the window's median from which a loss is a spike"""
    max_skips: int = 10
    """steps in a row that may pass without an update, under any policy, before the run stops"""
    lower_lr_factor: float = 0.1
    """lower_lr: factor on the scheduled learning rate"""
    lower_lr_steps: int = 100
    """lower_lr: steps with the lowered rate"""
    max_lowered: int = 10
    """lower_lr: times that the rate may be lowered in a run before it stops"""
    leave_out: int = 1
    """rewind: steps, up to and with the bad one, whose samples are left out when the run comes there again"""
    max_rewinds: int = 5
    """rewind: times that a run may go back before it stops"""


@dataclass
class Watchdog:
    """Answer to a run whose steps finish no more."""

    enabled: bool = True
    """watch for hangs; false for work with a debugger"""
    factor: float = 10.0
    """a step that takes this many times the median is a stall: every rank and data worker writes its stacks"""
    least_s: float = 120.0
    """shortest time after which a step is a stall, seconds"""
    long_s: float = 1800.0
    """the same at the start with the first step, and for a save, an evaluation or pictures with the step after it"""
    stop_after_s: float | None = None
    """a stall in which no rank goes on for so long ends the run, seconds; null: data.deadline_s + 60"""
    leave_s: float = 300.0
    """a rank that failed may take this long to clean up, seconds; then it is ended, whatever it waits for"""
    join_s: float = 120.0
    """ranks that have not all met after this end, seconds; longer where many hosts load Python from one file server"""
    beat_s: float = 10.0
    """seconds between two heartbeats of a rank; six missed ones in a stall mean that it is gone, and without flock that
    the run folder may be taken over"""
    on_hang: Literal["requeue", "fail"] = "requeue"
    """exit code after a hang: requeue = 75 (start the same command again), fail = 1"""
    max_restarts: int = 3
    """hangs without a checkpoint in between after which the exit code is 1 also with on_hang=requeue"""


@dataclass
class Log:
    """Records that training writes."""

    every_steps: int = 10
    """optimiser steps between two console and wandb lines; metrics.jsonl has every step"""
    pictures_every_steps: int | None = None
    """optimiser steps between two reconstruction pictures; null: once an epoch; 0: none"""
    pictures: int = 4
    """clips in one reconstruction picture"""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with an API key, else offline into the run folder"""
    wandb_project: str = "tubelet"
    """wandb project"""
    peak_tflops: float | None = None
    """matmul rate that MFU is measured against, TFLOP/s a device; null: measured at start"""


@dataclass
class Health:
    """Nearest neighbours among labelled videos while pre-training: do features get better, or collapse?"""

    shards: str | None = None
    """folder of a small labelled set (label in each sample's json); null: no such measure"""
    every_epochs: float = 10
    """epochs between two measures; fractions are allowed"""
    neighbours: int = 20
    """nearest other videos that vote on each video's class"""


@dataclass
class Run:
    """The run itself."""

    name: str = ""
    """name of the run, also in wandb; empty: the recipe's file name"""
    dir: str = "runs/${run.name}"
    """folder that receives everything the run writes"""
    seed: int = 0
    """seed of weights, order, clips, crops and masks"""
    time_limit_minutes: float | None = None
    """stop with a checkpoint this long after the start; null: SLURM_JOB_END_TIME if set, else none"""
    init_weights: str | None = None
    """checkpoint to start from (official, Hugging Face, or ours), weights only; null: random"""
    init_averaged: bool = True
    """of a run with averaged weights take those, which are what it evaluates and tests; false: the live ones"""


@dataclass
class Recipe:
    """A pre-training run, resolved. Another kind of run is a subclass: more sections, the same engine."""

    #: Folder below recipes/ whose files are named without a path.
    FOLDER: ClassVar[str] = ""
    #: Modules that `objective.name` names.
    METHODS: ClassVar[str] = "pretrain.objectives.{}"
    #: Sections that only some methods read; those name them in `Method.SECTIONS`.
    OPTIONAL: ClassVar[tuple[str, ...]] = ()

    program: Literal["pretrain"] = "pretrain"
    """what runs this recipe: launch/<program>.py"""
    model: Any = MISSING
    """architecture: pretrain/models/<name>.py"""
    objective: Any = MISSING
    """self-supervised method: pretrain/objectives/<name>.py"""
    input: Any = MISSING
    """kind of sample: pretrain/samples/<name>.py; by default what the method takes"""
    data: Data = field(default_factory=Data)
    batch: Batch = field(default_factory=Batch)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    compute: Compute = field(default_factory=Compute)
    zero: Zero = field(default_factory=Zero)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    guard: Guard = field(default_factory=Guard)
    watchdog: Watchdog = field(default_factory=Watchdog)
    log: Log = field(default_factory=Log)
    health: Health = field(default_factory=Health)
    run: Run = field(default_factory=Run)


#: Kinds of recipe that pre-training knows, by the `program` that stands in them.
PRETRAINING: Mapping[str, type[Recipe]] = {Recipe.program: Recipe}

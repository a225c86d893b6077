"""Options of CycleACR."""

from dataclasses import dataclass, field
from typing import Literal

from finetune.cycleacr.memory_bank import MemoryOptions
from finetune.detection import task as detection


@dataclass
class Config(detection.Config):
    """CycleACR's head and memory, the loss of persons' actions, and the answer."""

    name: str = "cycleacr"
    """task: finetune/<name>/task.py"""
    extension: tuple[float, float] = (-0.05, -0.1)
    """shares of width and height by which boxes grow for pooling in the test; negative: shrink"""
    dim: int = 1024
    """channels of actors, context and memory, D"""
    outputs: int | None = None
    """channels of the instance interaction's result; null: those of the backbone's maps with fusion=add, else dim"""
    hidden: int = 1024
    """units of each of the classifier's two hidden layers"""
    depth: int = 1
    """blocks of each branch of the cycle"""
    instance_depth: int = 1
    """pairs of blocks, persons then memory, of the instance interaction"""
    max_persons: int = 20
    """places for persons of a clip; empty ones are not masked, so keep the number that weights were trained with"""
    person_choice: Literal["scores", "random"] = "scores"
    """of more persons than places: those of the highest detector scores, or a random subset as officially"""
    position_codes: bool = True
    """learned codes of time steps and of the memory's seconds"""
    fusion: Literal["add", "concat"] = "add"
    """interaction's result: added to a person's pooled features, or put beside them"""
    dropout: float = 0.2
    """dropout rate of the head"""
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    """long-term memory; past=0 and future=0 leave the keyframe's own second"""
    head_scale: float = 1.0
    """factor on the learning rate of the cycle and the instance interaction (not of the classifier behind them)"""
    bias_scale: float = 1.0
    """factor on the learning rate of biases"""
    decay_positions: bool = True
    """whether weight decay applies to learned codes (officially with AdamW it does, with SGD it does not)"""

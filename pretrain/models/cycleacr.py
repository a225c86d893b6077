"""CycleACR's head: actions of given persons from a backbone's maps (arXiv 2303.16118; systems/cycleacr.md, 2).

The scene is re-organised by each actor (A2C-R), then the actor looks at that scene (C2A-E); then the actors of a
clip, and those of the seconds around it, interact. Names of parameters are the official ones below `roi_heads.action.`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.interaction import INIT_STD, InteractionBlock, PersonDropout, PersonPlaces
from pretrain.models.linear import Linear
from pretrain.models.roi_align import roi_align

#: Bins of a person's map along each side.
POOLED = 7
#: Deviation of the classifier's first weights.
CLASSIFIER_STD = 0.01


@dataclass(frozen=True)
class HeadShape:
    """Sizes of the head.

    Attributes:
        inputs: channels of the backbone's maps, those of all pathways together.
        times: time steps of the context, Tc: of the fast pathway, or of the only one.
        scale: side of the maps divided by that of the pictures.
        classes: outputs.
        dim: channels D inside.
        outputs: channels of the instance interaction's result; `inputs` where it is added to the pooled ones.
        hidden: units of the classifier.
        depth: blocks of each branch of the cycle.
        instance_depth: pairs of blocks of the instance interaction.
        max_persons: places for persons of a clip.
        max_per_second: places for those of each second around it.
        seconds: seconds of the memory, that of the keyframe included.
        position_codes: learned codes of time steps and seconds.
        fusion: the interaction's result is added to a person's pooled features, or put beside them.
        dropout: rate.
    """

    inputs: int
    times: int
    scale: float
    classes: int
    dim: int
    outputs: int
    hidden: int
    depth: int
    instance_depth: int
    max_persons: int
    max_per_second: int
    seconds: int
    position_codes: bool
    fusion: Literal["add", "concat"]
    dropout: float


class Actors(NamedTuple):
    """What phase 0 makes of persons: `features` [n, D], which the memory keeps, and `pooled` [n, inputs]."""

    features: Tensor
    pooled: Tensor


class CycleModeling(nn.Module):
    """A2C-R, C2A-E and the global branch, `depth` blocks of each."""

    local_temporal_position: nn.Parameter | None

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        dim, rate = shape.dim, shape.dropout
        for name in ("local_a2c_blocks", "local_c2a_blocks", "global_a2c_blocks"):
            blocks = (InteractionBlock(dim, dim, rate) for _ in range(shape.depth))
            self.add_module(name, nn.ModuleList(blocks))
        codes = nn.Parameter(torch.zeros(shape.times, dim)) if shape.position_codes else None
        self.register_parameter("local_temporal_position", codes)

    def forward(self, actor: Tensor, context: Tensor, local: Tensor) -> Tensor:
        """Enhance actors [n, D] by their context [n, Tc, D] and local map [n, 49, D]; returns [n, 2D]."""
        # Of the context before it is re-organised.
        scene = context.mean(dim=1, keepdim=True)
        surroundings = torch.cat((actor[:, None], local), dim=1)
        for block in self.get_submodule("local_a2c_blocks").children():
            context = block(context, surroundings)
        if self.local_temporal_position is not None:
            context = context + self.local_temporal_position.to(context.dtype)
        enhanced = actor[:, None]
        for block in self.get_submodule("local_c2a_blocks").children():
            enhanced = block(enhanced, context)
        # With the enhanced actor, where the local branch had the raw one.
        surroundings = torch.cat((enhanced, local), dim=1)
        for block in self.get_submodule("global_a2c_blocks").children():
            scene = block(scene, surroundings)
        return torch.cat((enhanced, scene), dim=2)[:, 0]


class InstanceInteraction(nn.Module):
    """Actors look at one another, then at the seconds around them, `instance_depth` times in turn."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        dim, depth = shape.dim, shape.instance_depth
        seconds = shape.seconds if shape.position_codes else 0
        widths = [*[dim] * (depth - 1), shape.outputs]
        self.p_blocks = nn.ModuleList(InteractionBlock(dim, dim, shape.dropout) for _ in widths)
        self.m_blocks = nn.ModuleList(InteractionBlock(dim, width, shape.dropout, seconds) for width in widths)
        self.max_persons = shape.max_persons

    def forward(self, x: Tensor, persons: PersonPlaces, memory: Tensor, priority: Tensor) -> Tensor:
        """Transform persons [n, D] to [n, outputs]; see `CycleACRHead.classify`."""
        for person_block, memory_block in zip(self.p_blocks, self.m_blocks, strict=True):
            table = persons.table(x, self.max_persons, priority)
            x = person_block(x[:, None], table, persons.clips)
            x = memory_block(x, memory, persons.clips)[:, 0]
        return x


class CycleACRModule(nn.Module):
    """Reductions to D channels, the cycle and the instance interaction."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        for name in ("actor_dim_reduce", "context_dim_reduce", "local_dim_reduce"):
            self.add_module(name, Linear(shape.inputs, shape.dim, init=_normal))
        self.roi_dim_reduce = Linear(2 * shape.dim, shape.dim, init=_normal)
        # Three layers, as each has a key of its own: one layer would drop the same elements of all three.
        self.actor_dropout, self.context_dropout, self.local_dropout = (PersonDropout(shape.dropout) for _ in range(3))
        self.cycle_modeling = CycleModeling(shape)
        self.instance_interaction = InstanceInteraction(shape)

    def forward(self, pooled: Tensor, context: Tensor, local: Tensor, persons: PersonPlaces) -> Tensor:
        """Compute the memory's features [n, D].

        Args:
            pooled: features of persons [n, C].
            context: of clips [B, Tc, C].
            local: maps of persons, row by row [n, 49, C].
            persons: n persons of B clips.
        """
        actor = self.actor_dropout(self.get_submodule("actor_dim_reduce")(pooled))
        scene = self.context_dropout(self.get_submodule("context_dim_reduce")(context)[persons.clips])
        around = self.local_dropout(self.get_submodule("local_dim_reduce")(local))
        reduced: Tensor = self.roi_dim_reduce(self.cycle_modeling(actor, scene, around))
        return reduced


class FeatureExtractor(nn.Module):
    """The module and the two hidden layers behind it."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.cycleacr_module = CycleACRModule(shape)
        inputs = shape.inputs + (shape.outputs if shape.fusion == "concat" else 0)
        self.fc1 = Linear(inputs, shape.hidden, init=_uniform)
        self.fc2 = Linear(shape.hidden, shape.hidden, init=_uniform)


class ActionPredictor(nn.Module):
    """Dropout and classifier."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.dropout = PersonDropout(shape.dropout)
        self.cls_score = Linear(shape.hidden, shape.classes, init=_classifier)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.cls_score(self.dropout(x))
        return logits


class CycleACRHead(nn.Module):
    """Actions of persons, in the two phases of the official test: `actors`, then `classify` with the memory's rows."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        self.feature_extractor = FeatureExtractor(shape)
        self.predictor = ActionPredictor(shape)

    def actors(self, maps: list[Tensor], boxes: Tensor, persons: PersonPlaces) -> Actors:
        """Describe persons by the cycle of actor and context.

        Args:
            maps: of each pathway, slow before fast [B, C, T, H, W].
            boxes: x1, y1, x2, y2 in pixels [n, 4].
            persons: their clips.
        """
        self._set(persons)
        # RoIAlign is linear, so the mean over time may as well stand behind it (MEAN_BEFORE_POOLER: false).
        still = torch.cat([one.mean(dim=2) for one in maps], dim=1)
        local = roi_align(still, boxes, persons.clips, POOLED, self.shape.scale).flatten(2)
        pooled = local.amax(dim=2)
        module = self.feature_extractor.cycleacr_module
        features = module(pooled, context_of(maps).transpose(1, 2), local.transpose(1, 2), persons)
        return Actors(features, pooled)

    def classify(self, actors: Actors, persons: PersonPlaces, memory: Tensor, priority: Tensor) -> Tensor:
        """Compute logits [n, classes].

        Args:
            actors: from phase 0.
            persons: their clips.
            memory: rows of each clip's seconds in their order [B, seconds * max_per_second, D], empty ones zero.
            priority: float [n], by which persons are chosen where a clip has more than `max_persons`.
        """
        self._set(persons)
        extractor = self.feature_extractor
        interaction = extractor.cycleacr_module.instance_interaction
        found = interaction(actors.features, persons, memory.to(actors.features.dtype), priority)
        fused = actors.pooled + found if self.shape.fusion == "add" else torch.cat((actors.pooled, found), dim=1)
        logits: Tensor = self.predictor(F.relu(extractor.fc2(F.relu(extractor.fc1(fused)))))
        return logits

    def _set(self, persons: PersonPlaces) -> None:
        for layer in self.modules():
            if isinstance(layer, PersonDropout):
                layer.persons = persons


def context_of(maps: list[Tensor]) -> Tensor:
    """Take the maximum over space of all pathways' maps, at the time steps of the last one [B, C, Tc].

    Padding counts as officially: it is not masked.
    """
    times = maps[-1].shape[2]
    return torch.cat([F.interpolate(one.amax(dim=(3, 4)), size=times, mode="nearest") for one in maps], dim=1)


def _normal(weight: Tensor) -> Tensor:
    return nn.init.normal_(weight, std=INIT_STD)


def _classifier(weight: Tensor) -> Tensor:
    return nn.init.normal_(weight, std=CLASSIFIER_STD)


def _uniform(weight: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(weight, a=1)

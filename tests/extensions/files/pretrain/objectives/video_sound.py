"""Contrast of clips with their sound over the global batch."""

from dataclasses import dataclass

from torch.nn import functional as F

from pretrain.data.samples import Batch
from pretrain.models.base import Cost
from pretrain.models.pixels import unit_pixels
from pretrain.objectives.base import Method, Objective, Output
from pretrain.runtime.collectives import gather_with_gradient, own_rows
from pretrain.runtime.process_group import present_ranks
from pretrain.samples.video_sound import VideoSound


@dataclass
class Config:
    """The loss."""

    name: str = "video_sound"
    """method: pretrain/objectives/<name>.py"""


class VideoSoundMethod(Method):
    """Contrast of what is seen with what is heard."""

    INPUT = "video_sound"

    def samples(self) -> VideoSound:
        return VideoSound(self.recipe.input, self.recipe.run.seed)

    def build(self) -> "VideoSoundObjective":
        objective = VideoSoundObjective()
        objective.model = self.architecture.build()
        return objective

    def cost(self) -> Cost:
        return Cost({"picture": 1e3, "sound": 1e3})


METHOD = VideoSoundMethod


class VideoSoundObjective(Objective):
    """InfoNCE in both directions."""

    whole_batch = True
    cross_rank_batch_norm = True

    def forward(self, batch: Batch) -> Output:
        seen, heard = self.model(unit_pixels(batch["video"]), batch["sound"])
        seen, heard = F.normalize(seen.float(), dim=1), F.normalize(heard.float(), dim=1)
        ranks = present_ranks(seen.device)
        rows = own_rows(len(seen), ranks).to(seen.device)
        to_sound = F.cross_entropy(seen @ gather_with_gradient(heard, ranks).t() * 10, rows)
        to_picture = F.cross_entropy(heard @ gather_with_gradient(seen, ranks).t() * 10, rows)
        return Output((to_sound + to_picture) / 2, {"to_sound": to_sound.detach()})

"""Features of sliding windows over a whole video, for temporal detection (extract_tad_feature.py of VideoMAEv2).

Consecutive frames, squeezed to the model's size without keeping the aspect, in [0, 1] without mean and deviation: that
is how the published THUMOS14 (step 4) and FineAction (step 16) features were made.
"""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.classification.views import VideoSet
from finetune.probe.feature_shards import Row
from finetune.recipe import TuneRecipe
from pretrain.data.decoders import open_video
from pretrain.data.fetch import SampleReader
from pretrain.data.linked_video import VideoFile
from pretrain.data.members import parse_sample
from pretrain.errors import SampleError
from pretrain.runtime.process_group import Ranks
from pretrain.samples.transforms import resize

logger = logging.getLogger(__name__)

#: Windows in one forward pass.
BATCH = 4


def window_rows(model: Any, recipe: TuneRecipe, ranks: Ranks, sets: list[VideoSet], step: int) -> Iterator[Row]:
    """Yield features [windows, C] of this rank's videos; one that can't be read is left out, with a line about it."""
    reader = SampleReader([one.index for one in sets], None, recipe.data.deadline_s)
    places = [
        (source, shard, row)
        for source, one in enumerate(sets)
        for shard, count in enumerate(one.index.shards.samples.tolist())
        for row in range(count)
    ]
    for source, shard, row in places[ranks.rank :: ranks.world_size]:
        entry = sets[source]
        name = entry.index.shards[shard].name.removesuffix(".tar")
        key = f"{entry.name}/{name}/{reader.key(source, shard, row).replace('/', '_')}"
        try:
            video = parse_sample(reader.read(source, shard, row)).video()
            features = window_features(model, video, recipe.input.decoder, recipe.input.size, step, ranks.device)
        except SampleError as error:
            logger.warning("%s left out: %s", key, error)
            continue
        yield Row(key, features.numpy(), {"step": step, "window": recipe.input.size[0]})


def window_starts(num_frames: int, frames: int, step: int) -> list[int]:
    """List the first frame of each window; every window lies inside the video."""
    return list(range(0, num_frames - frames + 1, step))


@torch.no_grad()
def window_features(
    model: Any, video: VideoFile, decoder: str, size: tuple[int, int, int], step: int, device: torch.device
) -> Tensor:
    """Compute features float32 [windows, C] of a video.

    Args:
        model: a classifier in evaluation mode.
        video: the file.
        decoder: library that decodes.
        size: frames, height and width of a window.
        step: frames between two windows.
        device: of the model.

    Raises:
        SampleError: the video can't be read or is shorter than a window.
    """
    frames, height, width = size
    with open_video(video, decoder) as reader:
        starts = window_starts(reader.num_frames, frames, step)
        if not starts:
            raise SampleError("too_short", f"{reader.num_frames} frames, a window has {frames}")
        found = []
        for first in range(0, len(starts), BATCH):
            some = starts[first : first + BATCH]
            # Windows overlap: frames of the batch are decoded and squeezed once.
            low, high = some[0], some[-1] + frames
            pixels = resize(reader.frames(np.arange(low, high)), width, height, antialias=False)
            clips = torch.from_numpy(np.stack([pixels[start - low : start - low + frames] for start in some]))
            # Not `objective.features`, which normalises: published features are of pixels in [0, 1].
            found.append(model.forward_features(clips.to(device).float() / 255).float().cpu())
    return torch.cat(found)

"""Features of video files by TVTSv2's video tower: whole videos, or windows of long ones.

Source: systems/tvtsv2.md, sections 6 and 9: T frames from the first to the last, squeezed to the model's size without
keeping the aspect, all patches. More frames than the temporal table has rows stretch it.
"""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.decoders import VideoReader, open_video
from pretrain.errors import DataError, RecipeError, SampleError, StorageError
from pretrain.models.initial_weights import read_weights
from pretrain.objectives.base import method_of
from pretrain.objectives.tvtsv2 import TVTSv2Objective
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Recipe
from pretrain.runtime import storage
from pretrain.samples.narrated import spread_frames
from pretrain.samples.transforms import Clip, resize
from pretrain.trained.load_run import load_trained

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureWindows:
    """Parts of a video that have a feature each.

    Attributes:
        frames: of a part.
        seconds: length of a part; None: the whole video is one.
        hop: from one part's start to the next; None: a part's length.
    """

    frames: int
    seconds: float | None = None
    hop: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not 0 < value < math.inf:
                raise RecipeError(f"--{name}: found {value:g}, allowed: more than 0")
        if self.hop is not None and self.seconds is None:
            raise RecipeError("--hop: windows have no length; give --window too")


@dataclass(frozen=True)
class FeatureRow:
    """A row of the features: of which file, and from when to when, seconds."""

    path: str
    start: float
    end: float


def open_model(source: str, recipe: str | None) -> tuple[TVTSv2Objective, Recipe]:
    """Open a run, a checkpoint or an export; or with the name of a recipe a file of released weights, or a CLIP.

    Raises:
        RecipeError: it is no TVTSv2.
        WeightsError: the weights don't fit.
    """
    if recipe is None:
        trained = load_trained(source)
        objective, found = trained.objective, trained.recipe
    else:
        found = load_recipe(recipe)
        objective = method_of(found).build()
        objective.load_pretrained(source, read_weights(source))
    if not isinstance(objective, TVTSv2Objective):
        raise RecipeError(f"{source}: objective {found.objective.name} has no text and video towers; tvtsv2 has")
    return objective.eval(), found


def windows_of(reader: VideoReader, windows: FeatureWindows) -> Iterator[tuple[float, float, Any]]:
    """Yield start, end and the frames [T] of each window; the last ends with the video, none is shorter than others."""
    if windows.seconds is None or windows.seconds >= reader.duration:
        yield 0.0, reader.duration, spread_frames(reader.num_frames, windows.frames)
        return
    hop, latest = windows.hop or windows.seconds, reader.duration - windows.seconds
    starts = [place * hop for place in range(math.ceil(latest / hop - 1e-6))] + [latest]
    for start in starts:
        first, last = (int(frame) for frame in reader.indices_at([start, start + windows.seconds]))
        yield start, start + windows.seconds, first + spread_frames(last - first + 1, windows.frames)


def clips_of(path: str, windows: FeatureWindows, recipe: Recipe) -> Iterator[tuple[FeatureRow, Clip]]:
    """Yield the squeezed clip uint8 [T, H, W, 3] of each window of a file, any fsspec URL.

    Raises:
        SampleError: it can't be decoded.
        StorageError: it can't be read.
    """
    _, height, width = recipe.input.size
    with open_video(storage.read_bytes(path), recipe.input.decoder) as reader:
        for start, end, frames in windows_of(reader, windows):
            yield FeatureRow(path, round(start, 3), round(end, 3)), resize(reader.frames(frames), width, height)


@torch.no_grad()
def extract(
    objective: TVTSv2Objective,
    recipe: Recipe,
    paths: Iterable[str],
    windows: FeatureWindows,
    normalize: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[list[FeatureRow], Tensor, list[str]]:
    """Compute features [rows, E] of files; those that can't be read are left out and told.

    Args:
        objective: in evaluation mode.
        recipe: its own.
        paths: any fsspec URLs.
        windows: of each file.
        normalize: divide each feature by its length.
        device: where to compute.

    Returns:
        what each row is of, the features float32, and a line about each file that was left out.
    """
    rows: list[FeatureRow] = []
    found: list[Tensor] = []
    missing: list[str] = []
    objective = objective.to(device)
    for path in paths:
        own: list[tuple[FeatureRow, Tensor]] = []
        try:
            for row, clip in clips_of(path, windows, recipe):
                own.append((row, objective.features({"video": torch.from_numpy(clip[None]).to(device)})[0].cpu()))
        except (SampleError, StorageError) as error:
            # A file that ends early has no rows at all: half of them would pass for the whole video.
            missing.append(f"{path}: {error}")
            logger.warning("left out: %s", missing[-1])
            continue
        rows += [row for row, _ in own]
        found += [feature for _, feature in own]
    features = torch.stack(found) if found else torch.zeros(0, 0)
    return rows, F.normalize(features, dim=-1) if normalize else features, missing


def listed_files(where: str) -> list[str]:
    """Read a list of files, a path or URL a line; paths are relative to the list.

    Raises:
        DataError: there is no such list, or nothing is in it.
    """
    try:
        lines = [line.strip() for line in storage.read_bytes(where).decode("utf-8-sig").splitlines()]
    except (StorageError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: {error}; allowed: a text file with a path a line") from error
    found = [line for line in lines if line]
    if not found:
        raise DataError(f"{where}: an empty list")
    folder = storage.parent(where)
    return [path if "://" in path or path.startswith("/") else storage.join(folder, path) for path in found]


def write_features(rows: Sequence[FeatureRow], features: Tensor, dest: str) -> None:
    """Write features.safetensors, [rows, E] under `features`, and rows.jsonl with path, start and end of each row."""
    storage.write_bytes(
        storage.join(dest, "features.safetensors"),
        safetensors.numpy.save({"features": np.ascontiguousarray(features.float().numpy())}),
    )
    text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    storage.write_bytes(storage.join(dest, "rows.jsonl"), text.encode())

"""What bench/loader.py compares with: a bare decoder, a plain loader, and the official dataset class of a checkout."""

import argparse
import io
import itertools
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from pretrain.data.fetch import SampleReader
from pretrain.data.index import load_index
from pretrain.data.members import parse_sample
from pretrain.samples.masks import MaskPlan, draw
from pretrain.samples.transforms import multiscale_box

ROOT = Path(__file__).parents[1]
FRAMES, STRIDE, SIZE = 16, 4, 224
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
MASKS = MaskPlan(8, 14, 14)


@dataclass(frozen=True)
class VideoSet:
    """The same videos as shards at `url` and as `files`; `grids` are step and phase of each file's reference frames."""

    url: str
    files: list[Path]
    grids: list[tuple[int, int]]


def prepare(videos: list[Path], arguments: list[str], folder: Path) -> VideoSet:
    """Pack videos into `folder` with launch/pack.py and lay each packed video beside them as a file."""
    shards = folder / "shards"
    words = [str(ROOT / "launch" / "pack.py"), *map(str, videos), str(shards), "--workers", "0", *arguments]
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    reader = SampleReader([load_index(str(shards))], None, 60.0)
    files, grids = [], []
    for row in range(load_index(str(shards)).samples):
        members = parse_sample(reader.read(0, 0, row))
        files.append(folder / f"{row}.mp4")
        video = members.video()
        assert isinstance(video, bytes)  # only shards packed in place hold links
        files[-1].write_bytes(video)
        grids.append(members.grid)
    return VideoSet(str(shards), files, grids)


def bare(videos: VideoSet, decoder: str) -> Iterator[None]:
    """Decode clips to RGB at random starts (on the grid where there is one) and throw them away."""
    return _bare_decord(videos) if decoder == "decord" else _bare_pyav(videos)


def _bare_pyav(videos: VideoSet) -> Iterator[None]:
    import av
    from av.video.reformatter import VideoReformatter

    loaded = [(path.read_bytes(), _stamps(path), grid) for path, grid in zip(videos.files, videos.grids, strict=True)]
    rng = np.random.default_rng(0)
    for data, stamps, (step, phase) in itertools.cycle(loaded):
        start = int(rng.integers((len(stamps) - FRAMES * STRIDE - phase) // step)) * step + phase
        wanted = set(stamps[start : start + FRAMES * STRIDE : STRIDE])
        converter, left = VideoReformatter(), FRAMES
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            stream.codec_context.skip_frame = "NONREF" if step > 1 else "DEFAULT"
            container.seek(stamps[start], stream=stream)
            for frame in container.decode(stream):
                if frame.pts in wanted:
                    converter.reformat(frame, format="rgb24", threads=1)
                    left -= 1
                if not left:
                    break
        yield


def _stamps(path: Path) -> list[int]:
    import av

    with av.open(str(path)) as container:
        return sorted(packet.pts for packet in container.demux(video=0) if packet.size and packet.pts is not None)


def _bare_decord(videos: VideoSet) -> Iterator[None]:
    import decord

    rng = np.random.default_rng(0)
    for path in itertools.cycle(videos.files):
        reader = decord.VideoReader(str(path), num_threads=1)
        start = int(rng.integers(len(reader) - FRAMES * STRIDE))
        reader.get_batch(range(start, start + FRAMES * STRIDE, STRIDE)).asnumpy()
        yield


def plain(videos: VideoSet, views: int) -> Iterator[list[dict[str, Any]]]:
    """An own plain loader: decord, PIL, float tensors; every view cropped and resized frame by frame."""
    import decord
    from PIL import Image

    rng = np.random.default_rng(0)
    for path in itertools.cycle(videos.files):
        reader = decord.VideoReader(str(path), num_threads=1)
        start = int(rng.integers(len(reader) - FRAMES * STRIDE + 1))
        frames = reader.get_batch(range(start, start + FRAMES * STRIDE, STRIDE)).asnumpy()
        images = [Image.fromarray(frame) for frame in frames]
        made = []
        for _ in range(views):
            x, y, width, height = multiscale_box(*images[0].size, SIZE, SIZE, rng)
            box = (x, y, x + width, y + height)
            small = [image.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR) for image in images]
            clip = torch.from_numpy(np.stack([np.asarray(image) for image in small])).float().div(255)
            made.append({"video": clip.sub(MEAN).div(STD).permute(3, 0, 1, 2).contiguous(), **draw(MASKS, rng, rng)})
        yield made


def official(videos: VideoSet, views: int, checkout: Path) -> Iterator[Any]:
    """Samples of VideoMAEv2's dataset class VideoMAE, as its run_mae_pretraining.py makes it."""
    from pretrain.runtime.vision_ops import ensure_torchvision

    ensure_torchvision()
    # Its package's __init__ imports what only fine-tuning needs (pandas among others).
    package = ModuleType("dataset")
    package.__path__ = [str(checkout / "dataset")]
    sys.modules["dataset"] = package
    from dataset.pretrain_datasets import DataAugmentationForVideoMAEv2, VideoMAE  # type: ignore[import-not-found]

    arguments = argparse.Namespace(
        input_size=SIZE, mask_type="tube", window_size=(8, 14, 14), mask_ratio=0.9, decoder_mask_ratio=0.5,
        decoder_mask_type="run_cell",
    )  # fmt: skip
    setting = videos.files[0].parent / "list.csv"
    setting.write_text("".join(f"{path.name} 0 -1\n" for path in videos.files), encoding="utf-8")
    augmentation = DataAugmentationForVideoMAEv2(arguments)
    dataset = VideoMAE(
        root=str(setting.parent), setting=str(setting), new_length=FRAMES, new_step=STRIDE, transform=augmentation,
        num_sample=views,
    )  # fmt: skip
    random.seed(0)
    np.random.seed(0)
    for number in itertools.count():
        yield dataset[number % len(dataset)]

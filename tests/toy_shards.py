"""Tiny videos, shards of them, and their index, for tests that train."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def encoded(frames: Iterable[np.ndarray], rate: int = 12) -> bytes:
    """Frames [height, width, 3] of 8 bits as an MP4 file with H.264."""
    target, pictures = io.BytesIO(), list(frames)
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, _ = pictures[0].shape
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return target.getvalue()


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, Any], bytes]]) -> None:
    """A tar of samples: key, what their json says, video."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, facts, video in samples:
            for suffix, data in (("json", json.dumps(facts).encode()), ("mp4", video)):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def index(*folders: Path) -> None:
    """launch/pack.py --index-only, in this process: a start takes longer than the work."""
    from pretrain.commands.pack import main

    assert main(["--index-only", *map(str, folders)]) == 0


def forget_hashes(folder: Path) -> None:
    """Make the index one of an early release: without hashes of the member tables."""
    content = json.loads((folder / "index.json").read_text())
    for entry in content["shards"]:
        assert len(entry.pop("members")) == 64
    shards = json.dumps(content["shards"], sort_keys=True)
    content["fingerprint"] = hashlib.sha256(shards.encode()).hexdigest()[:16]
    (folder / "index.json").write_text(json.dumps(content))


def swap_rows(table: Path) -> None:
    """Swap the first two samples of a member table, with their places and checksums: each is whole."""
    content = json.loads(table.read_text())
    for column in ("keys", "offsets", "sizes", "crc32"):
        content[column][:2] = content[column][1::-1]
    table.write_text(json.dumps(content))

"""Faults of what is packed: sources that can't be used, among those that training needs."""

import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tests.faults.case import Case
from tests.faults.lab import Lab, NotKept
from tests.ranks import ROOT
from tests.toy_run import SAMPLES

PROMISE = "packing names it and leaves it out, the others are packed as without it; training on them, bit for bit"


def pictures(folder: Path, names: Iterator[str], dtype: str = "uint8") -> None:
    """Grey pictures in a new folder."""
    folder.mkdir(parents=True)
    for name in names:
        Image.fromarray(np.arange(48 * 64).reshape(48, 64).astype(dtype)).save(folder / name)


def flow_beside(folder: Path) -> None:
    """Pictures and the flow between them."""
    pictures(folder, (f"{series}_{n:05d}.png" for series in ("img", "flow_x", "flow_y") for n in range(1, 13)))


def two_cameras(folder: Path) -> None:
    """Two recordings of which both numbers count."""
    pictures(folder, (f"cam{camera}_{n}.png" for camera in (1, 2) for n in range(1, 13)))


def numbers_twice(folder: Path) -> None:
    """A picture that was extracted again, under a name of another width."""
    pictures(folder, (f"img_{n}.png" for n in (*range(1, 13), "07")))


def measurements(folder: Path) -> None:
    """Depths in 32 bits, which are no colours."""
    pictures(folder, (f"depth_{n}.tif" for n in range(1, 13)), "int32")


def packed_with(add: Callable[[Path], None], said: str) -> Callable[[Lab], None]:
    """Pack the run's videos anew with a folder among them, and train on what came out; packing must say why."""

    def before(lab: Lab) -> None:
        sources, dest = lab.folder / "sources", lab.folder / "packed"
        add(sources / "0005b")
        for shard in sorted((lab.toy.folder / "shards").glob("*.tar")):
            with tarfile.open(shard) as tar:
                tar.extractall(sources, [one for one in tar if one.name.endswith(".mp4")], filter="data")
        words = [
            sys.executable,
            str(ROOT / "launch" / "pack.py"),
            str(sources),
            str(dest),
            "--copy",
            "--order",
            "given",
        ]
        words += ["--shard-samples", str(SAMPLES // 2), "--workers", "0", "--check-decoders", "pyav"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=lab.folder)
        if done.returncode or f"{SAMPLES} videos packed" not in done.stderr or said not in done.stderr:
            raise NotKept(f"packing ended with {done.returncode}: {done.stderr[-1500:]}")
        lab.options.append(f"data.sources.toy.shards={dest}")

    return before


def sources() -> Iterator[Case]:
    """Frame folders that are none, one at a time."""
    faults = {
        "frame folder with flow beside the pictures": (flow_beside, "3 series of pictures"),
        "frame folder of two cameras": (two_cameras, "several numbers vary"),
        "frame folder with a number twice": (numbers_twice, "have the same number"),
        "frame folder of 32-bit measurements": (measurements, "holds measurements"),
    }
    for fault, (add, said) in faults.items():
        yield Case(f"sources: {fault}", "pack", PROMISE, held=False, before=packed_with(add, said))

"""launch/pack.py --check on data sets whose members were damaged after packing, by kind of member."""

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.commands.pack import main
from pretrain.data.pack.contents import describe
from tests.films import write_film
from tests.pack.media_files import array_bytes, geotiff_bytes, sound_bytes, wave

Damage = Callable[[bytes], bytes]


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def blank(data: bytes) -> bytes:
    """Zeros in the middle, as a disk leaves them."""
    begin, end = len(data) // 3, len(data) * 2 // 3
    return data[:begin] + bytes(end - begin) + data[end:]


def raster() -> bytes:
    pixels = np.random.default_rng(1).integers(0, 4000, (2, 96, 64)).astype(np.uint16)
    return geotiff_bytes(pixels, compress="deflate", tiled=True, blockxsize=32, blockysize=32)


def table() -> bytes:
    values = np.random.default_rng(0).normal(size=(7, 11)).astype(np.float32)
    values[3, 4] = np.nan
    return array_bytes(values)


#: By ending: content, what happens to it, and what is said of it.
CASES: dict[str, tuple[Callable[[], bytes], Damage, str]] = {
    "wav": (lambda: sound_bytes(wave(0.5)), cut, "wav: .*the file is cut"),
    "flac": (lambda: sound_bytes(wave(2.0), "flac", "flac"), cut, "flac: "),
    "npy": (table, cut, "npy: "),
    "tif": (raster, blank, "tif: "),
    "txt": (lambda: "Über den Fluß".encode(), lambda data: data.replace("ß".encode(), b"\xdf"), "txt: not a text in"),
}
#: By ending: a fact that the json may state wrongly.
FACTS: dict[str, tuple[str, Any]] = {
    "wav": ("rate", 48000),
    "npy": ("nonfinite", 0),
    "tif": ("bands", 3),
    "txt": ("characters", 12),
}


def write(folder: Path, ending: str, spoilt: Damage, facts: dict[str, Any]) -> str:
    """A shard with a sound sample and one with a spoilt member, indexed as they are."""
    content = CASES[ending][0]()
    folder.mkdir()
    with tarfile.open(folder / "shard-000000.tar", "w") as tar:
        for key, data, more in (("sound", content, {}), ("spoilt", spoilt(content), facts)):
            stated = json.dumps(describe(ending, content) | more).encode()
            for name, part in ((f"{key}.json", stated), (f"{key}.{ending}", data)):
                info = tarfile.TarInfo(name)
                info.size = len(part)
                tar.addfile(info, io.BytesIO(part))
    assert main(["--index-only", str(folder)]) == 0
    return str(folder)


def problems(folder: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    code = main(["--check", folder, "--workers", "0", "--check-decoders", "pyav"])
    *found, verdict = capsys.readouterr().err.splitlines()
    assert (code == 0) == (not found) and verdict.endswith("verifies" if not found else f"{len(found)} problems found")
    return found


@pytest.mark.parametrize("ending", CASES)
def test_a_damaged_member_is_told(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(write(tmp_path / "whole", ending, bytes, {}), capsys) == []
    (line,) = problems(write(tmp_path / "out", ending, CASES[ending][1], {}), capsys)
    assert "sample 'spoilt'" in line and "shard-000000.tar" in line
    assert re.search(CASES[ending][2], line), line


@pytest.mark.parametrize("ending", FACTS)
def test_a_json_that_states_something_else_is_told(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, value = FACTS[ending]
    (line,) = problems(write(tmp_path / "out", ending, bytes, {name: value}), capsys)
    assert f"{ending} has {name}" in line and f"its json says {value}" in line


def test_a_damaged_film_that_is_linked_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("whole", "spoilt"):
        write_film(tmp_path / "films" / f"{name}.mp4", frames=60)
    out = str(tmp_path / "out")
    assert main(["--in-place", "--workers", "0", str(tmp_path / "films"), out]) == 0
    assert problems(out, capsys) == []
    film = tmp_path / "films" / "spoilt.mp4"
    film.write_bytes(blank(film.read_bytes()))
    (line,) = problems(out, capsys)
    assert "spoilt" in line and "whole" not in line.partition("sample")[2]

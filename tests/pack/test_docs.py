"""The packing commands of docs/data.md for other kinds than videos do what that page says."""

import json
import re
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pretrain.commands.pack import main
from pretrain.data.index import load_index
from tests.pack.media_files import (
    array_bytes,
    geotiff_bytes,
    image_bytes,
    picture,
    sound_bytes,
    video_with_sound,
    wave,
)

ROOT = Path(__file__).resolve().parents[2]
SECTION = "## Images, sound, arrays, rasters and texts"


def _commands() -> list[list[str]]:
    text = (ROOT / "docs/data.md").read_text().split(SECTION)[1].split("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line)[2:] for line in block.splitlines()]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the commands name, as working directory."""
    image, tone = image_bytes(picture(), "JPEG"), wave(1.0)
    for name in ("photos/cat", "imagenet", "pairs", "talks", "features", "landsat"):
        (tmp_path / name).mkdir(parents=True)
    files = {"photos/cat/a.jpg": image, "pairs/a.jpg": image, "pairs/a.txt": b"a cat", "a.png": image_bytes(picture())}
    files |= {
        "talks/a.wav": sound_bytes(tone),
        "hum.wav": sound_bytes(tone),
        "imagenet/train_map.txt": b"n01/a.JPEG\t0\n",
    }
    files["features/a.npy"] = array_bytes(np.ones((3, 4)))
    files["landsat/a.tif"] = geotiff_bytes(np.ones((2, 5, 6), np.uint8))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    video_with_sound(tmp_path / "talks/a.mp4", tone, frames=25)
    with zipfile.ZipFile(tmp_path / "imagenet/train.zip", "w") as archive:
        archive.writestr("n01/a.JPEG", image)
    row = {"path": "a.png", "caption": "a cat", "boxes": [[1, 2, 3, 4]], "sound": "hum.wav"}
    (tmp_path / "captions.jsonl").write_text(json.dumps(row))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands(sources: Path) -> None:
    commands = _commands()
    assert len(commands) == 8
    for words in commands:
        assert main([*words, "--workers", "0"]) == 0, words
    made = sorted(path.name for path in (sources / "shards").iterdir())
    assert made == ["captioned", "features", "imagenet", "landsat", "pairs", "photos", "talks"]
    assert {load_index(str(sources / "shards" / name)).samples for name in made} == {1}

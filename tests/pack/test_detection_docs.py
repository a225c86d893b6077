"""The commands of docs/detection_data.md do what that page says, on small files of the same names."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.commands.pack import main
from pretrain.data.index import load_index
from tests.data.boxes.box_files import act, write
from tests.films import write_film

ROOT = Path(__file__).resolve().parents[2]
FAST = ["--workers", "0", "--preset", "ultrafast", "--check-reads", "1"]


def _blocks(language: str) -> list[str]:
    text = (ROOT / "docs/detection_data.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def _pictures(folder: Path, template: str, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(1, count + 1):
        Image.fromarray(np.full((48, 64, 3), 40 * (number % 6), np.uint8)).save(folder / template.format(number))


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    # A film of 1 frame a second, so that second 902 is near.
    write_film(tmp_path / "films/m.mp4", 910, fps=1)
    write_film(tmp_path / "videos/club/a.mp4", 400)
    _pictures(tmp_path / "frames/m", "m_{:06d}.jpg", 100)
    _pictures(tmp_path / "Frames/run/p", "{:05d}.png", 5)
    (own,) = [one for one in _blocks("") if one.startswith("video,time")]
    write(tmp_path / "own.csv", own)
    write(tmp_path / "ava_val_v2.2.csv", "m,0902,0.1,0.2,0.5,0.6,2,0\nm,0903\n")
    write(tmp_path / "ava_action_list.pbtxt", 'label { name: "a" label_id: 1 label_type: PERSON_MOVEMENT }\n'
          'label { name: "b" label_id: 2 label_type: PERSON_INTERACTION }')  # fmt: skip
    write(tmp_path / "ava_val_excluded_timestamps_v2.2.csv", "m,0903\n")
    write(tmp_path / "ava_val_boxes.csv", "m,0904,0.1,0.2,0.5,0.6,,0.9\nm,0901,0.1,0.2,0.5,0.6,,0.9\n")
    rows = "".join(f'm 0 {number} m/m_{number + 1:06d}.jpg ""\n' for number in range(100))
    write(tmp_path / "frame_lists/val.csv", "original_vido_id video_id frame_id path labels\n" + rows)
    write(tmp_path / "JHMDB-GT.pkl", act({"x": 4, "run/p": 5}, (240, 320)))
    for line in "".join(_blocks("bash")).splitlines():
        assert main([*shlex.split(line)[2:], *FAST]) == 0, capsys.readouterr().err
    counts = {name: load_index(str(tmp_path / "shards" / name)).samples for name in ("own", "ava_val", "jhmdb_test")}
    assert counts == {"own": 2, "ava_val": 2, "jhmdb_test": 5}
    assert load_index(str(tmp_path / "shards/ava_val_frames")).samples == 2
    classes = json.loads((tmp_path / "shards/ava_val/classes.json").read_text())
    assert classes["groups"] == {"pose": [0, 1], "interaction": [1, 2]} and classes["ids"] == [1, 2]

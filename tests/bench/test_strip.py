"""Frames of videos in a picture: rows of one width, a frame where it was asked for."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.strip import GAP, main
from tests.toy_shards import encoded


def test_frames_stand_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey = [np.full((48, 64, 3), 20 * number, np.uint8) for number in range(10)]
    (tmp_path / "a.mp4").write_bytes(encoded(grey, 10))
    (tmp_path / "b@.mp4").write_bytes(encoded(grey[::-1], 10))
    rows = [f"{tmp_path}/a.mp4@0.1,0.5", f"{tmp_path}/b@.mp4@0"]
    assert main([*rows, "--width", "132", "--out", str(tmp_path / "strip.png")]) == 0
    picture = np.asarray(Image.open(tmp_path / "strip.png")).astype(int)
    assert picture.shape == (48 + GAP + 99, 132, 3) and "132 x 151" in capsys.readouterr().out
    found = [picture[24, 30, 0], picture[24, 66, 0], picture[24, 100, 0], picture[100, 60, 0]]
    assert np.abs(np.array(found) - [20, 255, 100, 180]).max() <= 4

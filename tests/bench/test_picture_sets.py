"""The sets of pictures that packages ship: halves, classes, what is refused; the packages are made up."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import picture_sets
from pretrain.errors import DataError


def png(pixels: np.ndarray) -> bytes:
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "png")
    return stored.getvalue()


def packages(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(picture_sets, "package_file", lambda *place: content)


def test_digits_become_class_folders_of_two_halves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = np.concatenate([np.full((12, 64), 16), np.tile([[3], [7]], (6, 1))], axis=1)
    packages(monkeypatch, gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode()))
    counts = picture_sets.write(picture_sets.digits(), tmp_path)
    assert counts == {"train": {"3": 5, "7": 5}, "test": {"3": 1, "7": 1}}
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert "test/3/00005.png" in files and "train/7/00006.png" in files and len(files) == 12
    picture = np.asarray(Image.open(tmp_path / "train/3/00001.png"))
    assert picture.shape == (8, 8) and (picture == 255).all(), "16 is white"
    with pytest.raises(DataError, match="is there already"):
        picture_sets.write(picture_sets.digits(), tmp_path)


def test_tiles_do_not_overlap_and_flat_ones_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (130, 200, 3), dtype=np.uint8)
    picture[:64, 64:128] = 9
    packages(monkeypatch, png(picture))
    found = [np.asarray(tile) for label, tile in picture_sets.photographs() if label == "moon"]
    places = [picture[y : y + 64, x : x + 64] for y in (0, 64) for x in (0, 64, 128)]
    assert np.array_equal(found, places[:1] + places[2:])
    packages(monkeypatch, png(np.random.default_rng(0).integers(0, 256, (640, 704), dtype=np.uint8)))
    assert sum(label == "moon" for label, _ in picture_sets.photographs()) == 64, "of 110, so that no class outweighs"


def test_a_stamps_class_is_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(np.full((300, 200, 4), 90, np.uint8))
    files = ["animals/birds/kiwi.png", "animals/birds/kiwi_mirror.png", "space/moon/full.png", "vehicles/auto/red.png"]
    monkeypatch.setattr(picture_sets, "_stamp_files", lambda: [(name, data) for name in reversed(files)])
    found = list(picture_sets.stamps())
    assert [label for label, _ in found] == ["bird", "vehicle"]
    assert all((stamp.mode, stamp.size) == ("RGBA", (85, 128)) for _, stamp in found)


def test_what_can_not_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="false failed; try another"):
        picture_sets._run(["false"], tmp_path, "try another")
    with pytest.raises(DataError, match="can't be started .*try another"):
        picture_sets._run(["no-such-program"], tmp_path, "try another")

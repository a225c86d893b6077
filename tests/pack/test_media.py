"""Images, sound, arrays, rasters and texts: packed, indexed, streamed raw, restarted, divided, checked."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from pretrain.commands.pack import main
from pretrain.data.decoders import open_video
from pretrain.data.decoders.array import decode_array, decode_arrays
from pretrain.data.decoders.geotiff import decode_raster
from pretrain.data.decoders.image import decode_image
from pretrain.data.decoders.sound import decode_sound
from pretrain.data.fetch import SampleReader
from pretrain.data.index import load_index
from pretrain.data.members import Members, parse_sample
from pretrain.data.pack.discover import Item
from pretrain.data.pack.options import Options
from pretrain.data.pack.pack_plan import make_plan
from pretrain.errors import SampleError
from tests.pack.media_files import (
    array_bytes,
    geotiff_bytes,
    hdf5_bytes,
    image_bytes,
    picture,
    sound_bytes,
    turned_jpeg,
    video_with_sound,
    wave,
)

ROOT = Path(__file__).resolve().parents[2]
ALONE = ["--workers", "0"]
FAST = ["--preset", "ultrafast", "--workers", "0", "--check-reads", "1", "--check-decoders", "pyav"]


def _stream(folder: Path | str) -> dict[str, Members]:
    """Every sample by key, as training fetches it."""
    index = load_index(str(folder))
    reader, found = SampleReader([index], None, 10), {}
    for number, shard in enumerate(index.shards):
        for row in range(shard.samples):
            members = parse_sample(reader.read(0, number, row))
            found[members.key] = members
    return found


def _rejected(folder: Path) -> dict[str, str]:
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    return {Path(one["path"]).name: one["reason"] for one in map(json.loads, lines)}


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders with eight images each, of several formats; read only."""
    formats: list[tuple[str, str, dict[str, Any]]] = [
        ("jpg", "JPEG", {}), ("JPEG", "JPEG", {"quality": 90}), ("png", "PNG", {}), ("webp", "WEBP", {"lossless": True})
    ]  # fmt: skip
    files = {}
    for number in range(24):
        ending, kind, options = formats[number % 4]
        pixels = picture(40 + number, 31 + number, number)
        files[f"class{number % 3}/image {number}.{ending}"] = image_bytes(pixels, kind, **options)
    return _write(tmp_path_factory.mktemp("images"), files)


def test_upright_images_are_kept_byte_for_byte(images: Path, tmp_path: Path) -> None:
    assert main([str(images), str(tmp_path / "out"), "--kind", "image", "--shard-samples", "10", *ALONE]) == 0
    index, found = load_index(str(tmp_path / "out")), _stream(tmp_path / "out")
    assert [shard.samples for shard in index.shards] == [10, 10, 4] and len(found) == 24
    for path in images.rglob("*.*"):
        members = found[f"{path.parent.name}/{path.stem.replace(' ', '_')}"]
        assert members.image() == path.read_bytes() and members.label == path.parent.name
        _, height, width, _ = decode_image(members.image()).shape
        facts = members.facts
        assert (facts["width"], facts["height"], facts["frames"]) == (width, height, 1)
        assert facts["source"] == f"{path.parent.name}/{path.name}" and facts["reencoded"] is None
    assert main(["--check", str(tmp_path / "out"), *ALONE]) == 0


def test_images_that_are_encoded_anew(tmp_path: Path) -> None:
    pixels = picture(60, 41)
    source = _write(
        tmp_path / "in",
        {
            "turned.jpg": turned_jpeg(pixels, 6),
            "bitmap.bmp": image_bytes(pixels, "BMP"),
            "tagged.tif": image_bytes(pixels[:20], "TIFF"),
            "moving.gif": image_bytes(pixels[:30], "GIF"),
            "deep.png": image_bytes(np.arange(60 * 41, dtype=np.uint16).reshape(41, 60) * 26),
            "disguised.jpg": image_bytes(pixels[:, :50], "PNG"),
            "cut.jpg": image_bytes(picture(200, 100), "JPEG")[:-300],
            "measured.tif": image_bytes(np.ones((9, 9), np.float32), "TIFF"),
            "empty.png": b"",
            "text.webp": b"no image",
        },
    )
    out = tmp_path / "out"
    assert main([str(source), str(out), "--kind", "image", *ALONE]) == 0
    found = _stream(out)
    assert _rejected(out) == {"cut.jpg": "decode", "measured.tif": "decode", "empty.png": "empty", "text.webp": "open"}
    for key, members in found.items():
        assert set(members.files) >= {"json", "jpg" if key == "turned" else "png"}
    turned = decode_image(found["turned"].image())
    assert turned.shape == (1, 60, 41, 3) and found["turned"].facts["original"]["orientation"] == 6
    assert np.abs(turned.astype(int) - decode_image(turned_jpeg(pixels, 6))).mean() < 1.5
    assert Image.open(io.BytesIO(found["turned"].image())).size == (41, 60), "upright for those who ignore EXIF"
    assert found["turned"].facts["reencoded"] == "turned by its orientation 6"
    assert np.array_equal(decode_image(found["bitmap"].image())[0], pixels)
    for name in ("deep.png", "disguised.jpg"):
        assert found[name.split(".")[0]].image() == (source / name).read_bytes()


def test_short_side_makes_large_images_smaller_only(tmp_path: Path) -> None:
    wide = np.repeat(np.repeat(picture(40, 25), 5, 0), 5, 1)
    source = _write(
        tmp_path / "in",
        {"a.jpg": image_bytes(wide, "JPEG"), "b.png": image_bytes(wide), "c.jpg": image_bytes(picture(60, 41), "JPEG")},
    )
    assert main([str(source), str(tmp_path / "out"), "--kind", "image", "--short-side", "50", *ALONE]) == 0
    found = _stream(tmp_path / "out")
    assert decode_image(found["a"].image()).shape == decode_image(found["b"].image()).shape == (1, 50, 80, 3)
    assert (
        np.abs(decode_image(found["b"].image())[0].astype(int) - wide[::5, ::5].repeat(2, 0).repeat(2, 1)).mean() < 12
    )
    assert found["c"].image() == (source / "c.jpg").read_bytes()


def test_kill_9_and_again_gives_the_same_bytes(images: Path, tmp_path: Path) -> None:
    options = ["--kind", "image", "--shard-samples", "3", "--short-side", "30"]
    assert main([str(images), str(tmp_path / "whole"), *options, *ALONE]) == 0
    command = [
        sys.executable,
        str(ROOT / "launch/pack.py"),
        str(images),
        str(tmp_path / "again"),
        *options,
        "--workers",
    ]
    process = subprocess.Popen([*command, "1"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "again/_pack/shard-000001.tar.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "again/index.json").exists()
    first = os.stat(tmp_path / "again/shard-000000.tar").st_mtime_ns
    assert main([str(images), str(tmp_path / "again"), *options, *ALONE]) == 0
    assert os.stat(tmp_path / "again/shard-000000.tar").st_mtime_ns == first
    assert _tree(tmp_path / "again") == _tree(tmp_path / "whole")


def test_two_parts_hold_what_one_does_and_find_duplicates(images: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(images, tmp_path / "in"))
    for number in (3, 4, 5):
        shutil.copy(next(source.rglob(f"image {number}.*")), source / f"again{number}.png")
    for part in ("0/2", "1/2"):
        assert main([str(source), str(tmp_path / "parts"), "--kind", "image", "--part", part, *ALONE]) == 0
    assert main([str(source), str(tmp_path / "whole"), "--kind", "image", *ALONE]) == 0
    parts, whole = _stream(tmp_path / "parts"), _stream(tmp_path / "whole")
    assert len(parts) == 24 and {key: one.image() for key, one in parts.items()} == {
        key: one.image() for key, one in whole.items()
    }
    for folder in ("parts", "whole"):
        assert list(_rejected(tmp_path / folder).values()) == ["duplicate"] * 3


def test_check_finds_a_damaged_image(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([str(images), str(out), "--kind", "image", *ALONE]) == 0
    shard = out / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    victim = next(images.rglob("image 4.*")).read_bytes()
    place = data.index(victim[-400:])
    data[place : place + 400] = victim[-400:-380] + bytes(380)
    shard.write_bytes(data)
    assert main(["--index-only", str(out)]) == 0
    capsys.readouterr()
    assert main(["--check", str(out), *ALONE]) == 1
    said = capsys.readouterr().err
    assert "1 problems" in said and "class1/image_4" in said and "jpg" in said
    data[place : place + 400] = victim[-400:]
    text = data.rindex(b'"width": 44')
    data[text : text + 11] = b'"width": 45'
    shard.write_bytes(data)
    assert main(["--index-only", str(out)]) == 0
    assert main(["--check", str(out), *ALONE]) == 1
    assert "has width 44, its json says 45" in capsys.readouterr().err


@pytest.fixture
def archive(images: Path, tmp_path: Path) -> Path:
    """The images in a zip archive, and a map that names most of them, one that is not there, and a damaged one."""
    with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_DEFLATED) as out:
        for path in sorted(images.rglob("*.*")):
            out.write(path, path.relative_to(images))
        out.writestr("class0/broken.png", bytes(5000))
        out.mkdir("empty")
    data = bytearray((tmp_path / "train.zip").read_bytes())
    place = data.index(b"class0/broken.png") + len("class0/broken.png") + 3
    data[place : place + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "train.zip").write_bytes(data)
    lines = [
        f"class{number % 3}/{path.name}\t{number % 3}"
        for number in range(20)
        for path in images.rglob(f"image {number}.*")
    ]
    (tmp_path / "train_map.txt").write_text("\n".join([*lines, "class0/gone.JPEG\t0", "class0/broken.png\t0"]) + "\n")
    return tmp_path / "train.zip"


def test_zip_archive_with_a_map(archive: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = archive.parent / "out"
    assert main([str(archive), str(out), *ALONE]) == 0
    assert "20 images packed (20 files kept, 0 encoded)" in capsys.readouterr().err
    found = _stream(out)
    for number in range(20):
        members = found[f"class{number % 3}/image_{number}"]
        assert members.label == number % 3
        assert members.image() == next(images.rglob(f"image {number}.*")).read_bytes()
    assert _rejected(out) == {"gone.JPEG": "missing", "broken.png": "unreadable"}
    again = archive.parent / "again"
    arguments = [str(archive.parent / "train_map.txt"), str(again), "--data-root", str(archive), *ALONE]
    assert main(arguments) == 0
    assert load_index(str(again)).fingerprint == load_index(str(out)).fingerprint


def test_what_a_folder_names_and_does_not_hold_is_listed(images: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out"
    shutil.copytree(next(path for path in images.iterdir() if path.is_dir()), folder / "class")
    (folder / "class" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(folder / "class" / "pipe.png")
    assert main([str(folder), str(out), "--kind", "image", *ALONE]) == 0
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    told = {Path(line["path"]).name: line for line in lines}
    assert told.keys() == {"gone.png", "pipe.png"} and {line["reason"] for line in lines} == {"missing"}
    assert "nowhere.png" in json.dumps(told["gone.png"]) and "no regular file" in json.dumps(told["pipe.png"])


def test_images_and_archives_on_an_object_store(archive: Path, images: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/media/train.zip", archive.read_bytes())
    fs.pipe_file("/media/train_map.txt", (archive.parent / "train_map.txt").read_bytes())
    for name, data in {
        "a.jpg": image_bytes(picture(), "JPEG"),
        "a.txt": b"one",
        "b.jpg": b"x",
        "b.txt": b"two",
    }.items():
        fs.pipe_file(f"/media/pairs/{name}", data)
    assert main(["memory://media/train.zip", "memory://packed/zip", *ALONE]) == 0
    assert load_index("memory://packed/zip").samples == 20
    assert main(["memory://media/pairs", "memory://packed/pairs", "--kind", "image", "--with", "txt", *ALONE]) == 0
    (members,) = _stream("memory://packed/pairs").values()
    assert members.text() == "one" and members.image() == image_bytes(picture(), "JPEG")


def test_zip_archive_without_a_map_in_parts(archive: Path) -> None:
    (archive.parent / "train_map.txt").unlink()
    out = archive.parent / "out"
    for part in ("0/2", "1/2"):
        assert main([str(archive), str(out), "--part", part, *ALONE]) == 0
    found = _stream(out)
    assert len(found) == 24 and {members.label for members in found.values()} == {"class0", "class1", "class2"}
    cut = archive.parent / "cut.zip"
    cut.write_bytes(archive.read_bytes()[:-30])
    assert main([str(cut), str(out) + "2", *ALONE]) == 2


def _foreign(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for ending, data in members.items():
                entry = tarfile.TarInfo(f"{key}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def test_foreign_image_shards_are_indexed_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jpeg, png = image_bytes(picture(), "JPEG"), image_bytes(picture(seed=3))
    samples = {
        "a": {"jpg": jpeg, "cls": b"17", "txt": b"a dog\n", "json": b'{"caption": "not this"}'},
        "b": {"png": png, "cls": b"tabby cat\n", "json": b'{"label": null, "caption": "a cat"}'},
        "c": {"left.webp": jpeg, "right.jpg": png, "json": b'{"label": 5, "meta": {"boxes": [[1, 2, 3, 4]]}}'},
        "d": {"txt": b"nothing but words"},
        "e": {"npy": array_bytes(np.ones(3)), "wav": b"x"},
    }
    path = _foreign(tmp_path / "sub/00000.tar", samples)
    before = path.read_bytes()
    assert main(["--index-only", str(tmp_path)]) == 0
    assert "1 of 5" in capsys.readouterr().err and path.read_bytes() == before
    found = _stream(tmp_path)
    assert list(found) == ["a", "b", "c", "e"]
    assert (found["a"].label, found["b"].label, found["c"].label, found["e"].label) == (17, "tabby cat", 5, None)
    assert (found["a"].text(), found["b"].text()) == ("a dog\n", "a cat")
    assert found["a"].image() == jpeg and found["c"].image("right") == png and found["c"].image() == jpeg
    assert found["c"].boxes() == [[1, 2, 3, 4]] and decode_array(found["e"].array()).tolist() == [1, 1, 1]


def test_shards_with_videos_keep_the_index_that_they_had(tmp_path: Path) -> None:
    """Samples that only later releases can use must not change an index by being there."""
    samples = {"a": {"mp4": b"v" * 700}, "b": {"jpg": b"j"}, "c": {"txt": b"t"}, "d": {"webm": b"v", "jpg": b"j"}}
    _foreign(tmp_path / "x.tar", samples)
    assert main(["--index-only", str(tmp_path)]) == 0
    assert list(_stream(tmp_path)) == ["a", "d"]


def test_packings_of_videos_that_were_begun_before_can_go_on() -> None:
    """The fingerprint is that of the release without images, and one of images knows their options."""
    items = [Item("/a.mp4", "a.mp4", 3, meta={"x": 1}), Item("/f", "f", is_folder=True)]
    options = Options(tune="fastdecode", shard_samples=3)
    assert make_plan(items).fingerprint(options.stated("video")) == "15b41e28f601f213"
    assert replace(options, image_quality=80).stated("video") == options.stated("video")
    assert replace(options, image_quality=80).stated("image") != options.stated("image")


def test_sounds(tmp_path: Path) -> None:
    samples = wave(1.5)
    whole = sound_bytes(samples)
    source = _write(
        tmp_path / "in",
        {
            "bell/a.wav": whole,
            "bell/b.flac": sound_bytes(samples[:1], "flac", "flac"),
            "bell/again.wav": whole,
            "cut.wav": sound_bytes(wave(1.7))[:100_000],
            "text.mp3": b"no sound" * 50,
        },
    )
    out = tmp_path / "out"
    assert main([str(source), str(out), "--order", "given", *ALONE]) == 0
    found = _stream(out)
    assert found["bell/a"].sound() == whole and found["bell/a"].label == "bell"
    facts = found["bell/a"].facts
    assert (facts["rate"], facts["channels"], facts["duration"], facts["codec"]) == (44100, 2, 1.5, "pcm_s16le")
    assert np.abs(decode_sound(found["bell/b"].sound(), 44100) - samples[:1]).max() < 1e-4
    assert _rejected(out) == {"again.wav": "duplicate", "cut.wav": "damaged", "text.mp3": "open"}
    assert main(["--check", str(out), *ALONE]) == 0


def test_sound_in_and_beside_a_video(tmp_path: Path) -> None:
    samples = wave(2.0)
    source = tmp_path / "in"
    source.mkdir()
    video_with_sound(source / "a.mp4", samples)
    _write(source, {"a.wav": sound_bytes(samples), "a.txt": b"a rising tone"})
    shutil.copy(source / "a.mp4", source / "alone.mp4")
    out = tmp_path / "out"
    assert main([str(source), str(out), "--audio", "keep", "--with", "wav,txt", *FAST]) == 0
    (members,) = _stream(out).values()
    assert _rejected(out) == {"alone.mp4": "companion"}
    assert members.sound() == (source / "a.wav").read_bytes() and members.text() == "a rising tone"
    inside = Members({"mp4": members.video()})
    beside, within = (decode_sound(one.sound(), 16000, 2, 0.5, 1.0) for one in (members, inside))
    assert beside.shape == within.shape == (2, 16000) and np.abs(beside - within).mean() < 0.02
    with open_video(members.video(), "pyav", members.stamps) as reader:
        assert reader.num_frames == 50
    assert main(["--check", str(out), *ALONE]) == 0


def test_sound_of_segments_in_place(tmp_path: Path) -> None:
    """Seconds count from the segment's first frame, and what lies outside of it is not heard."""
    whole = video_with_sound(tmp_path / "a.mp4", wave(4.0), frames=100).read_bytes()
    (tmp_path / "m.csv").write_text("path,start,end\na.mp4,1.2,2.6\n")
    assert main(["--in-place", str(tmp_path / "m.csv"), str(tmp_path / "out")]) == 0
    (members,) = _stream(tmp_path / "out").values()
    film = decode_sound(whole, 16000, 2)
    for start, duration in ((0.0, 1.4), (0.0, None), (0.3, 0.5)):
        found = decode_sound(members.sound(), 16000, 2, start, duration)
        first = 19200 + round(start * 16000)
        assert found.shape == (2, round((duration or 1.4) * 16000))
        assert np.abs(found - film[:, first : first + found.shape[1]]).max() < 1e-5
    found = decode_sound(members.sound(), 16000, 2, -0.5, 2.5)
    assert (
        not found[:, :8000].any() and not found[:, 8000 + 22400 :].any() and found[:, 8000:30400].any(0).mean() > 0.99
    )
    with open_video(members.video(), "pyav", members.stamps) as reader:
        assert reader.num_frames == 35
    with pytest.raises(SampleError, match="too_short"):
        decode_sound(members.sound(), 16000, 2, 1.5, 0.2)


def test_large_files_of_other_kinds_in_place_are_no_films(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = _write(tmp_path / "in", {"a.npy": array_bytes(np.zeros((1500, 1500)))})
    assert main(["--in-place", str(source), str(tmp_path / "out")]) == 0
    (members,) = _stream(tmp_path / "out").values()
    assert decode_array(members.array()).shape == (1500, 1500) and not caplog.records


HOLES = np.array([[1.0, np.nan, -0.0], [np.inf, 2.5, 3.0]], dtype=np.float32)


def test_arrays_and_rasters(tmp_path: Path) -> None:
    raster = np.arange(3 * 20 * 30, dtype=np.int16).reshape(3, 20, 30)
    arrays = _write(
        tmp_path / "arrays",
        {
            "a.npy": array_bytes(HOLES),
            "b.h5": hdf5_bytes({"rgb/features": HOLES, "flow": HOLES[:1]}),
            "objects.npy": array_bytes(np.array([{}], dtype=object), allow_pickle=True),
            "cut.npy": array_bytes(HOLES)[:-1],
        },
    )
    assert main([str(arrays), str(tmp_path / "out"), *ALONE]) == 0
    found = _stream(tmp_path / "out")
    assert decode_array(found["a"].array()).tobytes() == HOLES.tobytes() and found["a"].facts["nonfinite"] == 2
    assert found["a"].facts["arrays"] == {"": {"dtype": "float32", "shape": [2, 3]}}
    assert list(decode_arrays(found["b"].array())) == ["flow", "rgb/features"]
    assert _rejected(tmp_path / "out") == {"objects.npy": "decode", "cut.npy": "decode"}
    rasters = _write(tmp_path / "rasters", {"x.tif": geotiff_bytes(raster, nodata=-1), "y.npy": array_bytes(raster),
                                            "z.npy": array_bytes(np.ones(3))})  # fmt: skip
    assert main([str(rasters), str(tmp_path / "maps"), "--kind", "raster", *ALONE]) == 0
    found = _stream(tmp_path / "maps")
    assert np.array_equal(decode_raster(found["x"].raster()), raster) and found["x"].facts["crs"] == "EPSG:32633"
    assert np.array_equal(decode_array(found["y"].array()), raster)
    assert _rejected(tmp_path / "maps") == {"z.npy": "shape"}
    assert main(["--check", str(tmp_path / "maps"), str(tmp_path / "out"), *ALONE]) == 0


def test_texts(tmp_path: Path) -> None:
    files = {"a.txt": "où est le chat ?".encode(), "b.txt": b"\xff\xfe\x00", "c.txt": b"  \n"}
    out = tmp_path / "out"
    assert main([str(_write(tmp_path / "in", files)), str(out), "--kind", "text", *ALONE]) == 0
    assert {key: one.text() for key, one in _stream(out).items()} == {"a": "où est le chat ?"}
    assert _rejected(out) == {"b.txt": "damaged", "c.txt": "empty"}
    before = (out / "index.json").read_bytes()
    assert main(["--index-only", str(out)]) == 0 and (out / "index.json").read_bytes() == before
    assert main(["--check", str(out), *ALONE]) == 0


def test_companions_of_a_manifest(tmp_path: Path) -> None:
    boxes = [{"label": "cat", "box": [1, 2, 30, 20]}]
    files = {f"i/{name}.png": image_bytes(picture(seed=number)) for number, name in enumerate("abc")}
    files |= {f"i/{name}.flow.npy": array_bytes(HOLES) for name in "abc"}
    files |= {"i/a.json": b'{"camera": 3, "split": "no"}', "i/b.json": b"[1, 2]", "i/c.json": b"{"}
    _write(tmp_path, files | {"s/a.wav": sound_bytes(wave(0.2))})
    rows = [
        {"path": "i/a.png", "label": 4, "caption": "a cat", "boxes": boxes, "sound": "s/a.wav", "split": "train"},
        {"path": "i/b.png", "caption": ["one", "two"], "boxes": [], "sound": "s/a.wav"},
        {"path": "i/c.png", "caption": "c", "boxes": [], "sound": "s/a.wav"},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    asked = "caption,boxes,sound,flow.npy,json"
    assert main([str(tmp_path / "m.jsonl"), str(out), "--with", asked, *ALONE]) == 0
    found = _stream(out)
    members = found["i/a"]
    assert set(members.files) >= {"png", "json", "caption.txt", "boxes.json", "sound.wav", "flow.npy"}
    assert (members.text(), members.boxes(), members.label) == ("a cat", boxes, 4)
    assert members.sound("sound") == (tmp_path / "s/a.wav").read_bytes()
    assert decode_array(members.array("flow")).tobytes() == HOLES.tobytes()
    assert members.facts["meta"] == {"camera": 3, "split": "train"}
    assert found["i/b"].boxes() == [] and found["i/b"].facts["meta"] == {"json": [1, 2]}
    assert found["i/b"].texts("caption") == ["one", "two"]
    assert _rejected(out) == {"c.png": "companion"}
    (tmp_path / "m.csv").write_text('path,caption,boxes\ni/a.png,"cat, sitting","[[1, 2, 3, 4]]"\n')
    assert main([str(tmp_path / "m.csv"), str(tmp_path / "csv"), "--with", "caption,boxes", *ALONE]) == 0
    (members,) = _stream(tmp_path / "csv").values()
    assert members.text("caption") == "cat, sitting" and members.boxes() == [[1, 2, 3, 4]]


def class_mask(width: int = 37, height: int = 23, seed: int = 0) -> bytes:
    return image_bytes(picture(width, height, seed)[:, :, 0], mode="L")


def test_masks_that_do_not_fit_their_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of another size, in colours, turned, or made for the picture before it was packed smaller."""
    wrong = {"size": class_mask(40, 30), "turned": class_mask(23, 37), "colours": image_bytes(picture())}
    masks = {"right": class_mask(), **wrong}
    _write(tmp_path / "masks", {f"{name}.png": data for name, data in masks.items()})
    _write(tmp_path / "in", {f"{name}.png": image_bytes(picture(seed=len(name))) for name in masks})
    out, asked = tmp_path / "out", f"mask.png={tmp_path / 'masks'}"
    assert main([str(tmp_path / "in"), str(out), "--kind", "image", "--no-labels", "--with", asked, *ALONE]) == 0
    assert set(_stream(out)) == {"right"} and _rejected(out) == {f"{name}.png": "mask" for name in wrong}
    smaller = [str(tmp_path / "in" / "right.png"), str(tmp_path / "small"), "--with", asked, "--short-side", "16"]
    assert main([*smaller, "--no-labels", *ALONE]) == 1
    assert _rejected(tmp_path / "small") == {"right.png": "mask"}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with tarfile.open(foreign / "a.tar", "w") as tar:
        for name, data in masks.items():
            for ending, content in (("png", image_bytes(picture())), ("mask.png", data)):
                entry = tarfile.TarInfo(f"{name}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    assert main(["--index-only", str(foreign)]) == 0
    assert main(["--check", str(foreign), *ALONE]) == 1
    told = "".join(capsys.readouterr())
    assert [name for name in masks if f"sample {name!r}: mask" in told] == list(wrong)


def test_companions_below_a_folder(tmp_path: Path) -> None:
    """Masks of the same path below another folder, as ADE20K's; one of another kind is said by its ending."""
    masks = {name: class_mask(seed=number) for number, name in enumerate(("a/1", "b/1", "b/2"))}
    _write(tmp_path / "annotations", {f"{name}.png": data for name, data in masks.items() if name != "b/2"})
    pictures = {f"{name}.png": image_bytes(picture(seed=9 + number)) for number, name in enumerate(masks)}
    _write(tmp_path / "images", pictures)
    out, asked = tmp_path / "out", f"mask.png={tmp_path / 'annotations'}"
    assert main([str(tmp_path / "images"), str(out), "--kind", "image", "--with", asked, *ALONE]) == 0
    found = _stream(out)
    assert {key: one.image("mask") for key, one in found.items()} == {key: masks[key] for key in ("a/1", "b/1")}
    assert _rejected(out) == {"2.png": "companion"}
    alone = tmp_path / "alone"
    _write(tmp_path / "annotations", {"1.png": masks["a/1"]})
    assert main([str(tmp_path / "images/a/1.png"), str(alone), "--with", asked, *ALONE]) == 0
    assert next(iter(_stream(alone).values())).image("mask") == masks["a/1"]


def test_companions_that_are_no_companions(tmp_path: Path) -> None:
    """Nothing in the list, a text without words, and what would take the place of the image itself."""
    _write(tmp_path, {f"{name}.bmp": image_bytes(picture(seed=ord(name)), "BMP") for name in "abcd"})
    _write(tmp_path, {f"{name}.png": image_bytes(picture()) for name in "ad"})
    rows = [{"path": f"{name}.bmp", "caption": text} for name, text in zip("abc", ["A", " ", None], strict=True)]
    rows += [{"path": "d.bmp", "caption": "\ud800"}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for asked, kept in (("caption", ["a"]), ("png", [])):
        out = tmp_path / asked
        assert main([str(tmp_path / "m.jsonl"), str(out), "--with", asked, *ALONE]) == (0 if kept else 1)
        lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        assert [line["reason"] for line in lines] == ["companion"] * (4 - len(kept))
    assert sum("would be its member 'png'" in line["detail"] for line in lines) == 2
    assert list(_stream(tmp_path / "caption")) == ["a"]


def test_samples_that_the_index_leaves_out_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A shard with a video is one of videos, whatever was packed."""
    _write(tmp_path, {"a.txt": b"A rising tone", "b.txt": b"Silence"})
    video_with_sound(tmp_path / "tone.mp4", wave(0.4), frames=10)
    (tmp_path / "m.csv").write_text("path,more\na.txt,tone.mp4\nb.txt,nothing more\n")
    assert main([str(tmp_path / "m.csv"), str(tmp_path / "out"), "--with", "more", *ALONE]) == 0
    assert "shard-000000.tar: 1 of 2 samples hold none of the others' kind and are left out" in caplog.text


def test_the_member_that_is_meant_among_several_of_a_kind(tmp_path: Path) -> None:
    """Tar files have members by name: a mask comes before its image, and so does a JPEG before a PNG."""
    own, mask, other = image_bytes(picture()), image_bytes(picture(9, 9)), image_bytes(picture(8, 8), "JPEG")
    _write(tmp_path / "in", {"a.png": own, "a.LEFT.png": mask, "a.jpg": other})
    (tmp_path / "m.csv").write_text("path\nin/a.png\n")
    out = tmp_path / "out"
    assert main([str(tmp_path / "m.csv"), str(out), "--with", "LEFT.png,jpg", *ALONE]) == 0
    (members,) = _stream(out).values()
    assert members.image() == own and members.image("left") == mask and members.files["jpg"] == other
    assert main(["--check", str(out), *ALONE]) == 0
    assert Members({"left.webp": b"l", "mask.png": b"m", "png": b"p"}).image() == b"p"
    assert Members({"left.webp": b"l", "mask.png": b"m", "json": b'{"member": ["png"]}'}).image() == b"l"


def test_images_in_place(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["--in-place", str(images), str(out), "--kind", "image"]) == 0
    found = _stream(out)
    assert len(found) == 24
    for key, members in found.items():
        number = key.rsplit("_", 1)[1]
        assert members.image() == next(images.rglob(f"image {number}.*")).read_bytes()
    assert main(["--check", str(out), *ALONE]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{in}/flat", "{out}"], "--kind image"),
        (["{in}/mixed.txt", "{out}"], "videos and images"),
        (["{in}/mixed.txt", "{out}", "--kind", "image"], "v.mp4: not the ending of image files"),
        (["{in}/flat", "{out}", "--kind", "sound"], "no sound found"),
        (["{in}/flat", "{out}", "--kind", "image", "--in-place", "--with", "txt"], "choose one"),
        (["{in}/a.zip", "{out}", "--in-place"], "zip archive"),
        (["{in}/flat", "{out}", "--kind", "image", "--cut", "2"], "segments of videos"),
        (["{in}/segments.csv", "{out}"], "start and end are for videos"),
        (["{in}/films.csv", "{out}", "--with", "wav"], "not the segment"),
        (["{in}/flat", "{out}", "--with", "txt,,"], "separated by commas"),
        (["{in}/flat", "{out}", "--image-quality", "100"], "1 to 95"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lists = {"segments.csv": b"path,start,end\na.wav,0,2\n", "films.csv": b"path,start,end\na.mp4,0,2\n"}
    _write(tmp_path, lists | {"flat/a.png": image_bytes(picture()), "mixed.txt": b"v.mp4 1\nflat/a.png 2\n"})
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as out:
        out.writestr("a.png", image_bytes(picture()))
    filled = [one.format(**{"in": tmp_path, "out": tmp_path / "o"}) for one in arguments]
    try:
        code: object = main(filled)
    except SystemExit as stop:  # argparse's own errors
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_folders_of_pictures_are_said_to_be_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path, {f"in/walk/{number}.png": image_bytes(picture(64, 48, number)) for number in range(3)})
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), *FAST]) == 0
    assert "taken for one video; --kind image" in capsys.readouterr().err


def test_members_that_are_missing_or_damaged() -> None:
    members = Members({"__key__": b"", "json": b'{"caption": 7}', "txt": b"\xff", "boxes.json": b"{"})
    reasons = {}
    for name in ("video", "image", "sound", "array", "raster", "text", "boxes"):
        with pytest.raises(SampleError) as error:
            getattr(members, name)()
        reasons[name] = error.value.reason
        assert "__key__" not in str(error.value)
    assert reasons == {"video": "index", "image": "index", "sound": "index", "array": "index", "raster": "index",
                       "text": "text", "boxes": "boxes"}  # fmt: skip
    with pytest.raises(SampleError, match="no text but '7'"):
        Members({"json": b'{"caption": 7}'}).text()
    with pytest.raises(SampleError, match="index: no text"):
        Members({"json": b"{}"}).text("title")

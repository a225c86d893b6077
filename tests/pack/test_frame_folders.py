"""Frame folders: which pictures are the video, in which order, and what each kind of picture becomes."""

import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.commands import pack
from pretrain.data.decoders import open_video
from pretrain.data.pack.discover import Item
from pretrain.data.pack.frame_folders import select_frames, template_pattern
from pretrain.data.pack.options import Options
from pretrain.data.pack.packed import Packed, Rejected
from pretrain.data.pack.packers import pack_sample
from pretrain.errors import SampleError

FAST = Options(preset="ultrafast", crf=10, gop=8, decoders=("pyav",))


def _folder(path: Path, names: list[str]) -> Item:
    """Empty files: which are chosen does not depend on what is in them."""
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).touch()
    return Item(str(path), path.name, key=path.name, is_folder=True)


def _numbered(template: str, numbers: range) -> list[str]:
    return [template.format(number) for number in numbers]


ORDERED = {
    "padded": _numbered("img_{:05d}.jpg", range(8, 12)),
    "plain": _numbered("{}.jpg", range(8, 12)),
    "number in front": _numbered("{}_cam2.jpg", range(1, 12)),
    "number in the middle": _numbered("v_01_frame{}_part3.png", range(1, 12)),
    "ending in two cases": ["IMG_1.JPG", "IMG_2.jpg", "IMG_10.JPG"],
    "numbers that agree": ["f_9_t0300.jpg", "f_10_t0333.jpg", "f_11_t0366.jpg"],
    "scene and frame": ["scene1_9.jpg", "scene1_10.jpg", "scene2_11.jpg"],
    "one picture": ["cover.jpg"],
}


@pytest.mark.parametrize("kind", ORDERED)
def test_the_number_that_varies_orders(kind: str, tmp_path: Path) -> None:
    names = ORDERED[kind]
    item = _folder(tmp_path / "clip", [*names, "._" + names[0], ".hidden.jpg", "notes.txt", "Thumbs.db"])
    assert select_frames(item) == (names, 0)


REFUSED = {
    "pictures and flow": (
        [*_numbered("img_{:05d}.jpg", range(1, 4)), *_numbered("flow_x_{:05d}.jpg", range(1, 3)),
         *_numbered("flow_y_{:05d}.jpg", range(1, 3))],
        r"3 series of pictures: img_\{:05d\}.jpg \(3\), flow_x_\{:05d\}.jpg \(2\), flow_y_.*--frames",
    ),
    "a picture beside": ([*_numbered("img_{:05d}.jpg", range(1, 4)), "cover.jpg"], r"2 series.* cover.jpg \(1\)"),
    "two endings": ([*_numbered("{:03d}.jpg", range(3)), *_numbered("{:03d}.png", range(3))], "2 series"),
    "two cameras": ([f"cam{cam}_{n}.jpg" for cam in (1, 2) for n in range(9, 12)], r"cam\{\}_\{\}.jpg: several num"),
    "cameras in turn": ([f"cam{n % 2}_{n:03d}.jpg" for n in range(6)], r"cam\{\}_\{:03d\}.*0 to 1 and 0 to 5"),
    "a number twice": (["img_1.jpg", "img_01.jpg", "img_2.jpg"], "img_01.jpg and img_1.jpg have the same number"),
    "no numbers": (["first.jpg", "second.jpg"], "no number orders first.jpg, second.jpg"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_several_series_are_refused_with_what_was_found(kind: str, tmp_path: Path) -> None:
    names, message = REFUSED[kind]
    with pytest.raises(SampleError, match=f"frames-mixed: .*{message}"):
        select_frames(_folder(tmp_path / "clip", names))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("img_{:05d}.jpg", ["img_00009.jpg", "img_00010.jpg"]),
        ("img_{:05}.jpg", ["img_00009.jpg", "img_00010.jpg"]),
        ("flow_x_{}.jpg", ["flow_x_00009.jpg", "flow_x_00010.jpg"]),
        ("s1.{}_*.png", ["s1.2_b.png", "s1.10_a.png"]),
        ("{:d}-{:d}.bmp", ["1-2.bmp", "1-10.bmp", "2-1.bmp"]),
    ],
)
def test_a_template_chooses(template: str, expected: list[str], tmp_path: Path) -> None:
    others = ["img_9.jpg", "ximg_00009.jpg", "img_00009.jpg.png", "s1x2_b.png", "1-2-3.bmp"]
    names = [*others, "img_00009.jpg", "img_00010.jpg", "flow_x_00009.jpg", "flow_x_00010.jpg", "s1.10_a.png",
             "s1.2_b.png", "2-1.bmp", "1-10.bmp", "1-2.bmp"]  # fmt: skip
    assert select_frames(_folder(tmp_path / "clip", names), template) == (expected, 0)


def test_a_template_that_fits_nothing_or_is_none(tmp_path: Path) -> None:
    item = _folder(tmp_path / "clip", _numbered("image_{:05d}.jpg", range(1, 4)))
    with pytest.raises(SampleError, match=r"frames-missing: .*'img_\{:05d\}.jpg', but one .*image_\{:05d\}.jpg \(3\)"):
        select_frames(item, "img_{:05d}.jpg")
    for wrong in ("img_%05d.jpg", "img_{name}.jpg", "a/{}.jpg", "*.jpg", "{}{.jpg"):
        with pytest.raises(ValueError, match=r"\{\}"):
            template_pattern(wrong)


def test_numbers_of_a_list(tmp_path: Path) -> None:
    """Those of official lists, in a folder with flow, and where another number than the last one varies."""
    item = _folder(tmp_path / "clip", [f"{n}_cam2.jpg" for n in range(1, 21)])
    listed = Item(item.path, item.name, frames=(9, 3), is_folder=True)
    assert select_frames(listed)[0] == ["9_cam2.jpg", "10_cam2.jpg", "11_cam2.jpg"]
    timed = _folder(tmp_path / "timed", [f"{n}_{33 * n}.jpg" for n in range(1, 9)])
    counted = Item(timed.path, timed.name, frames=(2, 2), is_folder=True)
    with pytest.raises(SampleError, match=r"frames-mixed: \{\}_\{\}.jpg: which number the list counts by"):
        select_frames(counted)
    assert select_frames(counted, "{}_*.jpg")[0] == ["2_66.jpg", "3_99.jpg"]
    lone = _folder(tmp_path / "lone", ["cover.jpg"])
    with pytest.raises(SampleError, match="frames-missing: 0 pictures numbered from 1"):
        select_frames(Item(lone.path, lone.name, frames=(1, 1), is_folder=True))


@pytest.mark.parametrize(
    ("numbers", "missing", "said"),
    [
        ([1, 2, 3, 6, 7, 8, 10], 3, "of 10 pictures by their numbers 3 are missing (4 to 5, 9)"),
        ([0, 5, 10, 20, 25], 1, "1 are missing (15)"),
        ([33, 67, 100, 133, 167, 200], 0, ""),
        ([4, 9, 27, 81], 0, ""),
        ([5], 0, ""),
    ],
)
def test_gaps_are_said(
    numbers: list[int], missing: int, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    item = _folder(tmp_path / "clip", [f"img_{number}.jpg" for number in numbers])
    with caplog.at_level(logging.WARNING):
        names, found = select_frames(item)
    assert (len(names), found) == (len(numbers), missing)
    assert (
        [record.getMessage() for record in caplog.records if said in record.getMessage()]
        if said
        else not caplog.records
    )


def _ramp(top: int, dtype: str) -> np.ndarray:
    """Black to white from left to right, 64 x 48."""
    return np.tile(np.linspace(0, top, 64).round(), (48, 1)).astype(dtype)


def _png_of_16_bits(path: Path) -> None:
    """RGB, which Pillow can't write: red the ramp, green half of it, blue none."""
    import av

    ramp = _ramp(65535, "uint16")
    frame = av.VideoFrame.from_ndarray(np.stack([ramp, ramp // 2, 0 * ramp], axis=-1), format="rgb48le")
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 64, 48, "rgb48be", 1
    path.write_bytes(b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)]))


def _turned(path: Path) -> None:
    """A JPEG whose ramp goes downwards, and whose EXIF data turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(_ramp(255, "uint8").T.copy()[:, ::-1]).rotate(0).save(path, exif=exif, quality=95)


def _with_alpha(path: Path) -> None:
    """The right half is transparent over a green that nobody sees."""
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[:, :32], pixels[:, 32:] = (0, 0, 255, 255), (0, 255, 0, 0)
    Image.fromarray(pixels).save(path)


GREY = [(x, x, x) for x in (32, 128, 223)]
#: How a picture is written, and the colours a quarter, half and three quarters... of its width along: at 8, 32 and 55.
PICTURES = {
    "16 bits, grey": ("png", lambda p: Image.fromarray(_ramp(65535, "uint16")).save(p), GREY),
    "16 bits, grey, tiff": ("tif", lambda p: Image.fromarray(_ramp(65535, "uint16")).save(p), GREY),
    "16 bits, colour": ("png", _png_of_16_bits, [(32, 16, 0), (128, 64, 0), (223, 111, 0)]),
    "8 bits, grey": ("png", lambda p: Image.fromarray(_ramp(255, "uint8")).save(p), GREY),
    "palette": ("png", lambda p: Image.fromarray(_ramp(255, "uint8")).convert("P").save(p), GREY),
    "1 bit": ("png", lambda p: Image.fromarray(_ramp(255, "uint8") > 90).save(p), [(0,) * 3, (255,) * 3, (255,) * 3]),
    "CMYK": ("jpg", lambda p: Image.new("CMYK", (64, 48), (255, 0, 0, 0)).save(p), [(0, 255, 255)] * 3),
    "alpha": ("png", _with_alpha, [(0, 0, 255), (255, 255, 255), (255, 255, 255)]),
    "EXIF": ("jpg", _turned, GREY),
}


def _packed(folder: Path, options: Options = FAST) -> Packed | Rejected:
    (folder.parent / "out").mkdir(exist_ok=True)
    return pack_sample(Item(str(folder), folder.name, key="k", is_folder=True), options, str(folder.parent / "out"))


@pytest.mark.parametrize("kind", PICTURES)
def test_every_kind_of_picture(kind: str, tmp_path: Path) -> None:
    ending, write, colours = PICTURES[kind]
    (tmp_path / "clip").mkdir()
    for number in (1, 2):
        write(tmp_path / "clip" / f"img_{number}.{ending}")
    packed = _packed(tmp_path / "clip")
    assert isinstance(packed, Packed), packed
    with open_video(Path(packed.files["mp4"]).read_bytes(), "pyav") as reader:
        frame = reader.frames([1])[0].astype(int)
    assert frame.shape == (48, 64, 3)
    assert np.abs(frame[24, [8, 32, 55]] - colours).max() < 9, frame[24, [8, 32, 55]]


def test_measurements_and_damage_are_refused_by_name(tmp_path: Path) -> None:
    target = io.BytesIO()
    Image.fromarray(_ramp(255, "uint8")).save(target, "PNG")
    contents = {
        "decode: .*img_2.tif: .*measurements": ("tif", lambda p: Image.fromarray(_ramp(70_000, "int32")).save(p)),
        "decode: .*img_2.tiff: .*measurements": ("tiff", lambda p: Image.fromarray(_ramp(1, "float32")).save(p)),
        "decode: img_2.png": ("png", lambda p: p.write_bytes(target.getvalue()[:70])),
        "open: img_2.jpg": ("jpg", lambda p: p.write_bytes(b"<html>")),
        "empty: img_2.bmp": ("bmp", lambda p: p.touch()),
    }
    for place, (message, (ending, write)) in enumerate(contents.items()):
        folder = tmp_path / str(place)
        folder.mkdir()
        Image.fromarray(_ramp(255, "uint8")).save(folder / f"img_1.{ending}")
        write(folder / f"img_2.{ending}")
        with pytest.raises(SampleError, match=message):
            rejected = _packed(folder)
            assert isinstance(rejected, Rejected)
            raise SampleError(rejected.reason, rejected.detail)


def test_an_official_list_with_pictures_and_flow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One command as users give it, refused; the same with the template; gaps stand in the sample's json."""
    for name, shade in (("img", 200), ("flow_x", 20), ("flow_y", 20)):
        for number in range(1, 9):
            path = tmp_path / "videos" / "a" / f"{name}_{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 48), (shade, 10 * number, 50)).save(path)
    (tmp_path / "videos" / "a" / "img_00007.jpg").unlink()
    (tmp_path / "list.txt").write_text("videos/a 7 3\n")
    words = [str(tmp_path / "list.txt"), str(tmp_path / "out"), "--list-format", "frames", "--workers", "0"]
    words += ["--preset", "ultrafast", "--crf", "10", "--check-decoders", "pyav"]
    assert pack.main(words) == 1
    said = capsys.readouterr().err
    assert "videos/a: 3 series of pictures: flow_x_{:05d}.jpg (8), flow_y_{:05d}.jpg (8), img_{:05d}.jpg (7)" in said
    with pytest.raises(SystemExit):
        pack.main([*words, "--frames", "img_%05d.jpg"])
    assert "write {} or {:05d}" in capsys.readouterr().err
    assert pack.main([*words, "--frames", "img_{:05d}.jpg", "--overwrite"]) == 0
    with tarfile.open(next((tmp_path / "out").glob("*.tar"))) as tar:
        facts, video = (tar.extractfile(f"videos/a.{ending}").read() for ending in ("json", "mp4"))  # type: ignore[union-attr]
    assert json.loads(facts)["original"]["missing"] == 1 and json.loads(facts)["label"] == 3
    with open_video(video, "pyav") as reader:
        means = reader.frames(range(reader.num_frames)).mean((1, 2))
    assert np.allclose(means[:, 1], [10, 20, 30, 40, 50, 60, 80], atol=4) and np.allclose(means[:, 0], 200, atol=4)

"""One video at a time: what kinds come out how."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.data.decoders import open_video
from pretrain.data.members import Members
from pretrain.data.pack.discover import Item
from pretrain.data.pack.encode import encode_video
from pretrain.data.pack.media_probe import probe
from pretrain.data.pack.options import Options
from pretrain.data.pack.packed import Packed, Rejected
from pretrain.data.pack.packers import pack_sample
from pretrain.data.pack.verify import check_random_reads, even_stamps, sequential_signatures
from pretrain.data.time_segment import Segment
from pretrain.errors import SampleError
from tests.films import numbers_of, write_film

MakeVideo = Callable[..., Path]
FAST = Options(preset="ultrafast", crf=10, gop=8)
KEEP = Options(preset="ultrafast", crf=10, gop=8, copy=True)


def _pack(path: Path, options: Options = FAST, **more: object) -> Packed:
    result = _any(path, options, **more)
    assert isinstance(result, Packed), result
    return result


def _any(path: Path, options: Options = FAST, **more: object) -> Packed | Rejected:
    item = Item(str(path), path.name, key=path.stem, **more)  # type: ignore[arg-type]
    folder = path.parent / "out"
    folder.mkdir(exist_ok=True)
    return pack_sample(item, options, str(folder))


def _frames(path: str | Path, decoder: str = "decord") -> np.ndarray:
    with open_video(Path(path).read_bytes(), decoder) as reader:
        return reader.frames(range(reader.num_frames)).astype(np.float32)


def _same(one: np.ndarray, two: np.ndarray, tolerance: float = 10.0) -> bool:
    return one.shape == two.shape and bool(np.abs(one - two).mean() < tolerance)


BT709, BT2020, SMPTE240M, BT601, UNSPECIFIED = 1, 9, 7, 6, 2
#: By what the source is: its pixel format, matrix, full range or not, and what packing does with it.
COLOURS: dict[str, tuple[str, int, bool, Options]] = {
    "HD": ("yuv420p", BT709, False, FAST),
    "HD, smaller": ("yuv420p", BT709, False, replace(FAST, short_side=32)),
    "HD, kept": ("yuv420p", BT709, False, KEEP),
    "HD, phone": ("yuvj420p", BT709, True, FAST),
    "no tag": ("yuv420p", UNSPECIFIED, False, FAST),
    "no tag, full": ("yuvj420p", UNSPECIFIED, True, FAST),
    "DVD": ("yuv420p", BT601, False, FAST),
    "old HD": ("yuv422p", SMPTE240M, False, FAST),
    "UHD": ("yuv420p10le", BT2020, False, FAST),
    "UHD, full": ("yuv420p10le", BT2020, True, FAST),
    "to hevc": ("yuv420p", BT709, False, replace(FAST, codec="hevc")),
    "to vp9": ("yuv420p", BT709, False, replace(FAST, codec="vp9", preset="8")),
    "to av1": ("yuv420p", BT709, False, replace(FAST, codec="av1", preset="12", decoders=("pyav",))),
}


def _two_colours(path: Path, pix_fmt: str, matrix: int, full: bool) -> Path:
    """A red and a green half, in the matrix and range of the tags."""
    import av

    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32], pixels[:, 32:] = (189, 44, 30), (20, 200, 30)
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25, options={"crf": "1"})
        video.width, video.height, video.pix_fmt = 64, 48, pix_fmt
        video.codec_context.colorspace, video.codec_context.color_range = matrix, 2 if full else 1
        for _ in range(6):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format=pix_fmt, dst_colorspace=5 if matrix in (BT601, UNSPECIFIED) else matrix,
                                   dst_color_range=2 if full else 1)  # fmt: skip
            frame.colorspace = matrix
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    return path


@pytest.mark.parametrize("kind", COLOURS)
def test_colours_stay_the_same(kind: str, tmp_path: Path) -> None:
    """For both decoders, and for tags as they are: another matrix moves these two by 13 levels and more."""
    pix_fmt, matrix, full, options = COLOURS[kind]
    source = _two_colours(tmp_path / "a.mp4", pix_fmt, matrix, full)
    packed = _pack(source, options)
    for decoder in options.decoders:
        for frames in (_frames(source, decoder), _frames(packed.files["mp4"], decoder)):
            middle, width = frames.shape[1] // 2, frames.shape[2]
            found = frames[3, middle, width // 4], frames[3, middle, 3 * width // 4]
            assert np.abs(np.array(found) - [(189, 44, 30), (20, 200, 30)]).max() < 5, (decoder, found)


KINDS = {
    "plain.mp4": {},
    "ten_bits.mp4": {"pix_fmt": "yuv420p10le"},
    "rotated90.mp4": {"rotation": 90},
    "rotated270.mp4": {"rotation": -90},
    "rotated180.mp4": {"rotation": 180},
    "matroska.mkv": {},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "stream.ts": {"container": "mpegts"},
}


@pytest.mark.parametrize("options", [FAST, KEEP], ids=["encode", "copy"])
@pytest.mark.parametrize("name", KINDS)
def test_pictures_stay_the_same(name: str, options: Options, tmp_path: Path, make_video: MakeVideo) -> None:
    source = make_video(tmp_path / name, **KINDS[name])
    packed = _pack(source, options)
    before, after = _frames(source, "pyav"), _frames(packed.files["mp4"], "pyav")
    assert len(after) == 24 == packed.facts["frames"]
    assert _same(before, after) and not _same(before[1:], after[:-1])
    assert packed.facts["width"], packed.facts["height"] == after.shape[2:0:-1]
    assert (packed.facts["reencoded"] is None) == options.copy
    assert packed.facts["fps"] == 25


def test_rotation_is_baked_in(tmp_path: Path, make_video: MakeVideo) -> None:
    packed = _pack(make_video(tmp_path / "r.mp4", rotation=90))
    written = probe(packed.files["mp4"])
    assert (written.rotation, written.width, written.height) == (0, 96, 128)
    assert packed.facts["original"]["rotation"] == 90


@pytest.mark.parametrize(
    ("name", "video"),
    [
        ("packed.avi", {"codec": "mpeg4", "b_frames": 2, "frames": 60}),
        ("program.mpg", {"codec": "mpeg2video", "container": "mpeg", "b_frames": 2, "frames": 60}),
    ],
)
def test_inexact_random_access_is_found_and_encoded(
    name: str, video: dict[str, object], tmp_path: Path, make_video: MakeVideo
) -> None:
    source = make_video(tmp_path / name, **video)
    packed = _pack(source, KEEP)
    assert packed.facts["reencoded"].startswith("inexact") and packed.facts["codec"] == "h264"
    assert packed.facts["frames"] == 60
    assert _same(_frames(packed.files["mp4"], "pyav"), _frames(source, "pyav"))


def test_codec_that_a_decoder_lacks_is_encoded(tmp_path: Path, make_video: MakeVideo) -> None:
    source = make_video(tmp_path / "a.mp4", codec="libsvtav1", options={"preset": "12"})
    assert "decord" in _pack(source, KEEP).facts["reencoded"]
    pyav = _pack(source, Options(copy=True, decoders=("pyav",)))
    assert pyav.facts["reencoded"] is None and pyav.facts["codec"] == "av1"


def test_streams_whose_decoder_encodes_nothing_are_copied(tmp_path: Path, make_video: MakeVideo) -> None:
    """AV1 by libdav1d, out of a container that is not mp4; also as a segment, which is copied before it is encoded."""
    source = make_video(tmp_path / "a.webm", codec="libsvtav1", options={"preset": "12", "g": "8"})
    kept = _pack(source, Options(copy=True, decoders=("pyav",)))
    assert kept.facts["reencoded"] is None and kept.facts["codec"] == "av1" and kept.facts["frames"] == 24
    assert (_frames(kept.files["mp4"], "pyav") == _frames(source, "pyav")).all()
    cut = _pack(source, FAST, segment=Segment(0.2, 0.6))
    assert cut.facts["frames"] == 10 and _same(_frames(cut.files["mp4"], "pyav"), _frames(source, "pyav")[5:15])


def test_variable_frame_rate_keeps_its_times_or_becomes_constant(tmp_path: Path, make_video: MakeVideo) -> None:
    times = [0, 20, 200, 220, 240, 700, 720, 1000]
    source = make_video(tmp_path / "v.mp4", frames=8, times_ms=times)
    kept = _pack(source)
    assert kept.facts["vfr"] and kept.facts["frames"] == 8
    import av

    with av.open(kept.files["mp4"]) as container:
        written = [float(frame.time) for frame in container.decode(video=0)]
    assert np.allclose(written, np.array(times) / 1000, atol=1e-4)
    even = _pack(source, Options(preset="ultrafast", crf=10, fps=Fraction(10)))
    assert not even.facts["vfr"] and even.facts["fps"] == 10
    assert 10 <= even.facts["frames"] <= 11
    shown = _frames(source)[[0, 2, 4, 4, 4]]  # what is on the screen at 0, 200, 300, 400, 500 ms
    assert _same(_frames(even.files["mp4"])[[0, 2, 3, 4, 5]], shown)


@pytest.mark.parametrize("name", ["a.mp4", "a.ts", "a.mkv"])
def test_another_rate_shows_the_same_seconds(name: str, tmp_path: Path) -> None:
    """Time bases differ by container, and the length of the last frame must not be read in the wrong one."""
    source = write_film(tmp_path / name, frames=50, container="mpegts" if name == "a.ts" else None)
    for rate in (Fraction(10), Fraction(30000, 1001), Fraction(50)):
        packed = _pack(source, replace(FAST, fps=rate))
        assert packed.facts["frames"] == round(2 * rate) and packed.facts["duration"] == pytest.approx(2, abs=0.01)
        shown = [25 * number // rate for number in range(packed.facts["frames"])]
        assert numbers_of(_frames(packed.files["mp4"])) == pytest.approx(shown, abs=1)


def test_a_slow_video_and_pictures_at_another_rate(tmp_path: Path) -> None:
    slow = write_film(tmp_path / "slow.mp4", frames=8, fps=1)
    assert _pack(slow, replace(FAST, fps=Fraction(2))).facts["frames"] == 16
    _frame_folder(tmp_path / "clip", range(1, 21))
    folder = _pack(tmp_path / "clip", replace(FAST, fps=Fraction(12)), is_folder=True)
    assert (folder.facts["frames"], folder.facts["fps"]) == (10, 12)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((161, 121), 320, (160, 120)),
        ((200, 100), 64, (128, 64)),
        ((101, 99), 64, (66, 64)),
        ((128, 96), None, (128, 96)),
    ],
)
def test_size(
    size: tuple[int, int], short_side: int | None, expected: tuple[int, int], tmp_path: Path, make_video: MakeVideo
) -> None:
    source = make_video(tmp_path / "s.mkv", size=size, pix_fmt="yuv444p")
    packed = _pack(source, Options(preset="ultrafast", short_side=short_side))
    assert (packed.facts["width"], packed.facts["height"]) == expected
    assert _frames(packed.files["mp4"]).shape[1:3] == expected[::-1]


def test_references_lie_on_the_grid_of_the_json(tmp_path: Path, make_video: MakeVideo) -> None:
    """A clip on the grid reaches the decoder with its references only; any other is as exact, at a higher price."""
    from pretrain.data.decoders.pyav_reader import PyAVReader

    phases = set()
    for name in ("a", "b", "c"):
        packed = _pack(make_video(tmp_path / f"{name}.mp4", frames=72), Options(preset="ultrafast", crf=10))
        step, phase = packed.facts["grid"]["step"], packed.facts["grid"]["phase"]
        phases.add(phase)
        every = sequential_frames(packed.files["mp4"])
        for start, stride, most in ((phase + 8, step, 16), (phase + 9, step, 28), (0, 1, 16), (3, 2, 24)):
            indices = start + stride * np.arange(12)
            with PyAVReader(Path(packed.files["mp4"]).read_bytes()) as reader:
                assert (reader.frames(indices) == every[indices]).all()
                assert reader.decoded <= most, (start, stride)
    assert len(phases) > 1, "each video draws its own"


EVEN: dict[str, tuple[dict[str, Any], Options]] = {
    "default": ({}, FAST),
    "kept": ({}, KEEP),
    "kept, B frames": ({"frames": 50, "options": {"g": "12", "bf": "3"}}, KEEP),
    "turned": ({"rotation": 90}, KEEP),
    "hevc": ({"frames": 30}, replace(FAST, codec="hevc", preset="ultrafast")),
    "no grid": ({"frames": 50}, replace(FAST, grid=0, gop=250, tune=None)),
}


@pytest.mark.parametrize("kind", EVEN)
def test_evenly_spaced_frames_are_read_without_the_list_of_all_packets(
    kind: str, tmp_path: Path, make_video: MakeVideo
) -> None:
    from pretrain.data.decoders.pyav_reader import PyAVReader

    source, options = EVEN[kind]
    packed = _pack(make_video(tmp_path / "a.mp4", **source), options)
    stamps = Members({"json": json.dumps(packed.facts).encode()}).stamps
    assert stamps is not None and len(stamps) == packed.facts["frames"]
    data = Path(packed.files["mp4"]).read_bytes()
    with PyAVReader(data) as reader:
        frames = reader.frames(range(reader.num_frames))
    for start in range(len(stamps)):
        for stride in (1, 2, 4):
            wanted = list(range(start, len(stamps), stride))[:5]
            with PyAVReader(data, stamps) as reader:
                assert (reader.frames(wanted) == frames[wanted]).all() and isinstance(reader.stamps, range)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("uneven.mp4", {"times_ms": [number * number for number in range(1, 25)]}),
        ("one_frame.mp4", {"frames": 1}),
        ("stream.ts", {"container": "mpegts"}),
    ],
)
def test_what_is_not_even_is_not_promised(
    name: str, source: dict[str, Any], tmp_path: Path, make_video: MakeVideo
) -> None:
    path = make_video(tmp_path / name, **source)
    assert even_stamps(str(path)) is None
    assert ("stamps" in _pack(path).facts) == (name == "stream.ts"), "the transport stream becomes an mp4"


def sequential_frames(path: str) -> np.ndarray:
    import av

    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_key_frames_come_every_gop(tmp_path: Path, make_video: MakeVideo) -> None:
    import av

    packed = _pack(make_video(tmp_path / "g.mp4", frames=40, options={"g": "5"}), replace(FAST, grid=0))
    with av.open(packed.files["mp4"]) as container:
        keys = [number for number, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert keys == [0, 8, 16, 24, 32]


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_audio(keep: bool, copy: bool, tmp_path: Path, make_video: MakeVideo) -> None:
    source = make_video(tmp_path / "a.mp4", audio=True, frames=50)
    packed = _pack(source, Options(preset="ultrafast", audio=keep, copy=copy))
    written = probe(packed.files["mp4"])
    assert written.audio == packed.facts["audio"] == ("aac" if keep else None)
    assert written.packets == 50


@pytest.mark.parametrize("options", [FAST, KEEP], ids=["encode", "copy"])
def test_foreign_audio_becomes_aac(options: Options, tmp_path: Path, make_video: MakeVideo) -> None:
    """It begins half a second behind the pictures."""
    import av

    with av.open(str(tmp_path / "pcm.mkv"), "w") as out, av.open(str(make_video(tmp_path / "v.mp4"))) as video:
        copied = out.add_stream_from_template(video.streams.video[0])
        sound = out.add_stream("pcm_s16le", rate=16000, layout="mono")
        for packet in video.demux(video=0):
            if packet.size:
                packet.stream = copied
                out.mux(packet)
        for start in range(0, 16000, 800):
            tone = 8000 * np.sin(np.arange(start, start + 800) / 8)[None]
            noise = av.AudioFrame.from_ndarray(tone.astype("i2"), format="s16", layout="mono")
            noise.sample_rate, noise.pts, noise.time_base = 16000, start + 8000, Fraction(1, 16000)
            out.mux(sound.encode(noise))
        out.mux(sound.encode(None))
    packed = _pack(tmp_path / "pcm.mkv", replace(options, audio=True))
    assert packed.facts["audio"] == "aac" and (packed.facts["reencoded"] is None) == options.copy
    with av.open(packed.files["mp4"]) as container:
        frames = list(container.decode(audio=0))
    assert abs(sum(frame.samples for frame in frames) - 16000) < 3000
    assert frames[0].time == pytest.approx(0.5, abs=0.1)
    loudness = np.sqrt(np.mean(np.concatenate([frame.to_ndarray() for frame in frames[2:-2]], axis=1) ** 2))
    assert loudness == pytest.approx(8000 / 32768 / np.sqrt(2), rel=0.05)


def test_equal_input_gives_equal_bytes(tmp_path: Path, make_video: MakeVideo) -> None:
    source = make_video(tmp_path / "d.mp4", audio=True, size=(96, 72))
    options = Options(audio=True)
    packed = [_pack(source, options) for _ in range(8)]  # x264 differs in about every third run where it does
    assert len({Path(one.files["mp4"]).read_bytes() for one in packed}) == 1
    assert all(one.facts == packed[0].facts for one in packed)


@pytest.mark.parametrize("codec", ["hevc", "vp9", "av1"])
def test_codecs(codec: str, tmp_path: Path, make_video: MakeVideo) -> None:
    preset = {"hevc": "ultrafast", "vp9": "8", "av1": "12"}[codec]
    decoders = ("pyav",) if codec == "av1" else ("decord", "pyav")
    options = Options(codec=codec, preset=preset, crf=20, decoders=decoders)  # type: ignore[arg-type]
    source = make_video(tmp_path / "c.mp4")
    packed = _pack(source, options)
    assert packed.facts["codec"] == codec
    assert _same(_frames(packed.files["mp4"], "pyav"), _frames(source, "pyav"), 12)


def test_no_thread_keeps_the_real_time_priority_of_the_av1_encoder(tmp_path: Path, make_video: MakeVideo) -> None:
    """Only root may take it: elsewhere this can't fail."""
    source = make_video(tmp_path / "c.mp4")
    facts = probe(str(source))
    found = set()

    def policies(*_: object) -> int:
        found.update(os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task"))
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.data.pack.encode.picture_type", policies)
        encode_video(str(source), facts, str(tmp_path / "out.mp4"), Options(codec="av1", preset="12"))
    assert found == {os.SCHED_OTHER}


def _cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def test_reasons_for_rejection(tmp_path: Path, make_video: MakeVideo, make_sound: Callable[[Path], Path]) -> None:
    broken = {
        "no-video": make_sound(tmp_path / "sound.mp4"),
        "missing": tmp_path / "nowhere.mp4",
        "empty": tmp_path / "empty.mp4",
        "unreadable": tmp_path / "text.mp4",
        "too-short": make_video(tmp_path / "short.mp4", frames=3),
    }
    broken["empty"].write_bytes(b"")
    broken["unreadable"].write_text("this is no video" * 100)
    for reason, path in broken.items():
        result = _any(path, Options(min_frames=4))
        assert isinstance(result, Rejected) and result.reason == reason, result


def test_cut_file_with_its_index_in_front(tmp_path: Path, make_video: MakeVideo) -> None:
    whole = _pack(make_video(tmp_path / "whole.mp4", frames=60, size=(160, 120)))  # packed files have it in front
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(Path(whole.files["mp4"]).read_bytes())
    _cut(cut, 0.6)
    for options in (FAST, KEEP):
        result = _any(cut, options)
        assert isinstance(result, Rejected) and result.reason == "damaged" and "of 60" in result.detail, result


def test_random_reads_that_are_one_frame_off_are_found_in_slow_scenes(tmp_path: Path) -> None:
    _frame_folder(tmp_path / "clip", range(1, 21), step=3)
    video = Path(_pack(tmp_path / "clip", is_folder=True).files["mp4"])
    signatures = sequential_signatures(str(video))
    check_random_reads(video.read_bytes(), signatures, "pyav", 4, "key")
    for wrong in (np.roll(signatures, 1, axis=0), signatures[:-1], signatures[::-1]):
        with pytest.raises(SampleError, match="inexact"):
            check_random_reads(video.read_bytes(), wrong, "pyav", 4, "key")


def _frame_folder(folder: Path, numbers: range, step: int = 8) -> None:
    folder.mkdir(parents=True)
    for number in numbers:
        Image.new("RGB", (64, 48), (step * number, 100, 50)).save(folder / f"img_{number:05}.png")


def test_frame_folder(tmp_path: Path) -> None:
    _frame_folder(tmp_path / "clip", range(1, 21))
    everything = _pack(tmp_path / "clip", is_folder=True)
    assert everything.facts["frames"] == 20 and everything.facts["fps"] == 24
    five = _pack(tmp_path / "clip", is_folder=True, frames=(4, 5))
    reds = _frames(five.files["mp4"])[:, :, :, 0].mean((1, 2))
    assert np.allclose(reds, [32, 40, 48, 56, 64], atol=4)
    first = _pack(tmp_path / "clip", is_folder=True, frames=(None, 3))
    assert np.allclose(_frames(first.files["mp4"])[:, :, :, 0].mean((1, 2)), [8, 16, 24], atol=4)


def test_frame_folder_that_lacks_frames(tmp_path: Path) -> None:
    _frame_folder(tmp_path / "clip", range(1, 11))
    result = _any(tmp_path / "clip", is_folder=True, frames=(5, 10))
    assert isinstance(result, Rejected) and result.reason == "frames-missing" and "6 pictures" in result.detail
    Image.new("RGB", (32, 32)).save(tmp_path / "clip" / "img_00006.png")
    odd = _any(tmp_path / "clip", is_folder=True)
    assert isinstance(odd, Rejected) and odd.reason == "damaged"

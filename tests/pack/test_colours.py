"""Colours of a source against those of what is packed of it: what coding may change, and what is found."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pretrain.data.decoders import open_video
from pretrain.data.pack import encode
from pretrain.data.pack.colour import tag_stream
from pretrain.data.pack.colour_check import ColourCheck, colour_limit
from pretrain.data.pack.discover import Item
from pretrain.data.pack.media_probe import probe
from pretrain.data.pack.options import Options
from pretrain.data.pack.packed import Packed, Rejected
from pretrain.data.pack.packers import pack_sample
from pretrain.data.time_segment import Segment
from pretrain.errors import SampleError
from tests.films import write_film
from tests.toy_shards import ROOT

FAST = Options(preset="ultrafast", gop=8, decoders=("pyav",))
BT709, BT601, UNSPECIFIED = 1, 6, 2
RED, GREEN, SKIN = (189, 44, 30), (20, 200, 30), (200, 150, 120)


def _pack(path: Path, options: Options = FAST, **more: Any) -> Packed | Rejected:
    folder = path.parent / "out"
    folder.mkdir(exist_ok=True)
    return pack_sample(Item(str(path), path.name, key=path.stem, **more), options, str(folder))


def _frames(path: Path | str) -> np.ndarray:
    with open_video(Path(path).read_bytes(), "pyav") as reader:
        return reader.frames(range(reader.num_frames)).astype(float)


def _write(
    path: Path,
    pictures: Iterator[np.ndarray],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    matrix: int = BT709,
    full: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    """Pictures in the matrix and range of the stream's tags."""
    with av.open(str(path), "w") as out:
        video = out.add_stream(codec, rate=25, options=options or {"crf": "1", "preset": "ultrafast"})
        context = video.codec_context
        context.colorspace, context.color_range = matrix, 2 if full else 1
        for number, picture in enumerate(pictures):
            if not number:
                video.height, video.width, video.pix_fmt = *picture.shape[:2], pix_fmt
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            table = 5 if matrix in (BT601, UNSPECIFIED) else matrix
            frame = frame.reformat(format=pix_fmt, dst_colorspace=table, dst_color_range=2 if full else 1)
            frame.colorspace = matrix
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    return path


def _flat(*colours: tuple[int, int, int], frames: int = 12) -> Iterator[np.ndarray]:
    """Columns of colours on 96 x 64, brighter towards the bottom."""
    picture = np.repeat(np.array(colours, float)[None], 64, axis=0)
    picture = np.repeat(picture, 96 // len(colours), axis=1) * np.linspace(0.4, 1, 64)[:, None, None]
    yield from [picture.astype(np.uint8)] * frames


def _stripes(width: int, frames: int = 6) -> Iterator[np.ndarray]:
    """Red and green stripes that move: the colours that chroma of half the size takes most from."""
    for number in range(frames):
        place = (np.arange(320) + number) // width % 2
        yield np.repeat(np.array([(255, 0, 0), (0, 255, 0)], np.uint8)[place][None], 240, axis=0)


def _difference(path: Path, options: Options) -> float:
    """Mean difference of the channel that differs most, of what packing writes."""
    facts = probe(str(path))
    frames = facts.duration * float(options.fps) if options.fps else facts.packets
    check = ColourCheck(options, frames, facts.rotation)
    target = path.with_suffix(".packed.mp4")
    encode.encode_video(str(path), facts, str(target), options, seen=check.source)
    _read_into(check, target)
    return float(check.differences().max())


def _read_into(check: ColourCheck, path: Path, change: Callable[[av.VideoFrame], av.VideoFrame] = lambda f: f) -> None:
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            check.written(number, change(frame))


QUALITIES = {
    "h264": replace(FAST, preset="veryfast"),
    "h264, worst": replace(FAST, crf=51),
    "hevc": replace(FAST, codec="hevc"),
    "hevc, worst": replace(FAST, codec="hevc", crf=51),
    "vp9": replace(FAST, codec="vp9", preset="8"),
    "vp9, worst": replace(FAST, codec="vp9", preset="8", crf=63),
    "av1, worst": replace(FAST, codec="av1", preset="12", crf=63),
}


@pytest.mark.parametrize("quality", QUALITIES)
def test_coding_stays_below_the_limit(quality: str, tmp_path: Path) -> None:
    """Films by far; also stripes finer than chroma, whose pixels change by more than 40 levels in the mean."""
    options = QUALITIES[quality]
    for name in ("biking", "running"):
        film = tmp_path / f"{name}.mp4"
        film.write_bytes((ROOT / f"tests/assets/actions/clips/{name}/man_dark.mp4").read_bytes())
        assert _difference(film, options) < 0.5 * colour_limit(options), name
    for width in (1, 3, 8):
        lossless = {"crf": "0", "preset": "ultrafast"}
        stripes = _write(tmp_path / f"{width}.mkv", _stripes(width), pix_fmt="yuv444p", options=lossless)
        assert _difference(stripes, options) < colour_limit(options), width


def _swapped(frame: av.VideoFrame) -> av.VideoFrame:
    planes = frame.to_ndarray(format="yuv420p")
    height, quarter = frame.height, frame.height // 4
    planes[height:] = np.concatenate([planes[height + quarter :], planes[height : height + quarter]])
    swapped = av.VideoFrame.from_ndarray(planes, format="yuv420p")
    swapped.colorspace, swapped.color_range = frame.colorspace, frame.color_range
    return swapped


def _tagged(**tags: int) -> Callable[[av.VideoFrame], av.VideoFrame]:
    def change(frame: av.VideoFrame) -> av.VideoFrame:
        for name, value in tags.items():
            setattr(frame, name, value)
        return frame

    return change


CHANGES = {
    "601 for 709": (_tagged(colorspace=BT601), [RED, GREEN], "green"),
    "no matrix for 709": (_tagged(colorspace=UNSPECIFIED), [RED, GREEN], "green"),
    "full for limited": (_tagged(color_range=2), [(250, 250, 250), SKIN, (10, 10, 10)], "red"),
    "U and V swapped": (_swapped, [SKIN], "blue"),
}


@pytest.mark.parametrize("options", [FAST, replace(FAST, crf=35), replace(FAST, short_side=32)], ids=["", "35", "32"])
@pytest.mark.parametrize("kind", CHANGES)
def test_other_colours_are_found(kind: str, options: Options, tmp_path: Path) -> None:
    change, colours, channel = CHANGES[kind]
    source = _write(tmp_path / "a.mp4", _flat(*colours))
    facts = probe(str(source))
    check = ColourCheck(options, facts.packets)
    encode.encode_video(str(source), facts, str(tmp_path / "b.mp4"), options, seen=check.source)
    _read_into(check, tmp_path / "b.mp4", change)
    with pytest.raises(SampleError, match=rf"colours: .*{channel} [\d.]+.* levels .*BT.709.*--copy"):
        check.check()


def test_a_video_of_other_colours_is_rejected_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mistake in its place that an earlier release had: numbers of one matrix under the tag of another."""
    source = _write(tmp_path / "a.mp4", _flat(RED, GREEN))
    assert isinstance(_pack(source), Packed)

    def forgetful(context: Any, frame: Any) -> None:
        tag_stream(context, frame)
        context.colorspace = BT601

    monkeypatch.setattr(encode, "tag_stream", forgetful)
    rejected = _pack(source)
    assert isinstance(rejected, Rejected) and rejected.reason == "colours" and rejected.path == str(source)
    assert "BT.709, limited" in rejected.detail and "BT.601, limited" in rejected.detail


@pytest.mark.parametrize("rate", [Fraction(10), Fraction(30000, 1001), Fraction(50), Fraction(1)])
def test_frames_are_held_against_the_frame_that_they_show(rate: Fraction, tmp_path: Path) -> None:
    """Every frame has another number in bars: one frame off, half of the picture would be another."""
    for name, film in {"even.mp4": {}, "uneven.mkv": {"times_ms": [n * n // 3 + 20 * n for n in range(75)]}}.items():
        source = write_film(tmp_path / name, frames=75, **film)
        assert _difference(source, replace(FAST, fps=rate, crf=10)) < 1


def test_a_turned_video_is_compared_upright(tmp_path: Path, make_video: Callable[..., Path]) -> None:
    for rotation in (90, 180, -90):
        source = make_video(tmp_path / f"{rotation}.mp4", rotation=rotation)
        assert _difference(source, replace(FAST, crf=10)) < 1.5


@pytest.mark.parametrize("tags", [{"matrix": BT709}, {"matrix": UNSPECIFIED, "full": True}], ids=["matrix", "range"])
def test_copies_keep_colours_that_only_the_container_states(tags: dict[str, Any], tmp_path: Path) -> None:
    """Matroska states a matrix and a range for codecs that can't; mp4 does not take them over."""
    source = _write(tmp_path / "a.mkv", _flat(RED, GREEN), codec="mpeg4", options={"qscale": "2", "g": "4"}, **tags)
    copied, cut = _pack(source, replace(FAST, copy=True)), _pack(source, segment=Segment(0.08, 0.4))
    assert isinstance(copied, Packed) and str(copied.facts["reencoded"]).startswith("colours: BT.")
    for packed in (copied, cut):
        assert isinstance(packed, Packed)
        assert np.abs(_frames(packed.files["mp4"])[3] - _frames(source)[3]).max() < 12
        assert np.abs(_frames(packed.files["mp4"])[3] - _frames(source)[3]).mean() < 2

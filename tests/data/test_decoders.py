"""All decoders: the asked frames exactly, upright, and errors instead of wrong frames."""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from pretrain.data.decoders import open_video
from pretrain.data.pack.media_probe import video_stream
from pretrain.errors import RecipeError, SampleError
from tests.films import skip_without

Encode = Callable[..., bytes]
Number = Callable[[np.ndarray], int]


@pytest.fixture(params=["decord", "pyav", "torchcodec"])
def decoder(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    skip_without(name)
    return name


def sequential(data: bytes) -> np.ndarray:
    """All frames, decoded from beginning to end without any seeking."""
    with av.open(io.BytesIO(data)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


VIDEOS = {
    "plain": {},
    "long_gop": {"gop": 250, "frames": 60},
    "no_b": {"b_frames": 0},
    "many_b": {"gop": 3, "b_frames": 3},
    "variable_rate": {"variable": True},
    "odd_size": {"width": 66, "height": 50},
    "odd_444": {"width": 65, "height": 49, "pixel_format": "yuv444p"},
    "wide": {"width": 322, "height": 182},
    "matroska": {"container": "matroska"},
    "matroska_variable": {"container": "matroska", "variable": True},
}


@pytest.mark.parametrize("video", VIDEOS)
def test_frames_are_exact(decoder: str, video: str, encode: Encode, frame_number: Number) -> None:
    data = encode(**VIDEOS[video])
    expected = sequential(data)
    assert [frame_number(frame) for frame in expected] == list(range(len(expected))), "the fixture works"
    order = np.random.default_rng(0).permutation(len(expected))
    with open_video(data, decoder) as reader:
        assert reader.num_frames == len(expected)
        assert (reader.frames(order) == expected[order]).all(), "pixel-identical in any order"
        in_turn = list(reader.in_turn())
        assert len(in_turn) == len(expected) and (np.stack(in_turn) == expected).all(), "one after the other"
        for index in (0, len(expected) - 1, len(expected) // 2, 1):
            assert (reader.frames([index])[0] == expected[index]).all(), "each alone"
        repeated = reader.frames([3, 3, 9, 9, 9])
        assert [frame_number(frame) for frame in repeated] == [3, 3, 9, 9, 9]
        if "variable" not in video:
            assert reader.fps == pytest.approx(24, abs=0.1)


@pytest.mark.parametrize(("degrees", "turns"), [(90, 3), (180, 2), (270, 1)])
def test_rotation_is_applied(decoder: str, degrees: int, turns: int, encode: Encode) -> None:
    """`turns` quarter turns counter-clockwise make the video upright."""
    data = encode(width=128, height=96)
    expected = np.rot90(sequential(data), turns, axes=(1, 2))
    with open_video(rotate(data, degrees), decoder) as reader:
        found = reader.frames([0, 7, 20])
    assert found.shape == expected[[0, 7, 20]].shape
    assert np.abs(found.astype(int) - expected[[0, 7, 20]]).max() <= 8, "chroma is interpolated along other axes"


def rotate(data: bytes, degrees: int) -> bytes:
    """The mp4 with a display matrix that turns it clockwise."""
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    header = data.index(b"tkhd")
    place = header + 8 + 20 + 16
    return data[:place] + struct.pack(">9i", *matrix) + data[place + 36 :]


def flip_bits(data: bytes, number: int) -> bytes:
    broken = bytearray(data)
    begin = data.index(b"mdat") + len(data) // 4
    for place in np.random.default_rng(0).integers(begin, begin + len(data) // 4, number):
        broken[place] ^= 0x55
    return bytes(broken)


@pytest.mark.parametrize(
    ("kind", "reasons"),
    [("empty", {"empty"}), ("text", {"open"}), ("cut", {"open", "decode"}), ("flipped", {"open", "decode"})],
)
def test_damage_is_an_error_with_a_reason(decoder: str, kind: str, reasons: set[str], encode: Encode) -> None:
    data = encode(frames=60, width=128, height=96)
    data = {"empty": b"", "text": b"hello" * 99, "cut": data[: len(data) // 2], "flipped": flip_bits(data, 300)}[kind]
    with pytest.raises(SampleError) as caught, open_video(data, decoder) as reader:
        reader.frames(range(0, reader.num_frames, 4))
    assert caught.value.reason in reasons


def test_audio_alone_is_no_video(decoder: str) -> None:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(SampleError) as caught:
        open_video(out.getvalue(), decoder)
    assert caught.value.reason == "open"


@pytest.mark.parametrize("indices", [[24], [0, 99], [-1]])
def test_frames_beyond_the_end(decoder: str, indices: list[int], encode: Encode) -> None:
    with open_video(encode(), decoder) as reader, pytest.raises(SampleError) as caught:
        reader.frames(indices)
    assert caught.value.reason == "too_short"


def test_unknown_decoder() -> None:
    with pytest.raises(RecipeError, match="decord, pyav, torchcodec"):
        open_video(b"", "opencv")


def test_only_needed_frames_are_decoded(encode: Encode) -> None:
    """Late frames of a long video with short GOPs cost as many decoded frames as early ones."""
    from pretrain.data.decoders.pyav_reader import PyAVReader

    data = encode(frames=200, gop=8, b_frames=2)
    for indices, most in (([190, 193, 196], 12), ([40], 1), ([41, 42, 43], 8)):
        with PyAVReader(data) as reader:
            reader.frames(indices)
            assert len(indices) <= reader.decoded <= most


@pytest.mark.parametrize("container", ["avi", "mpegts"])
def test_containers_that_other_decoders_misread(container: str, encode: Encode, frame_number: Number) -> None:
    """AVI stores no presentation time stamps, MPEG-TS no index: PyAV counts, or seeks again where a seek overshot."""
    data = encode(container=container, gop=3, b_frames=2, frames=40)
    with open_video(data, "pyav") as reader:
        for indices in ([2, 5, 17], [39], [0], [21, 23, 38]):
            assert [frame_number(frame) for frame in reader.frames(indices)] == indices


def test_memory_stays_flat(decoder: str, encode: Encode) -> None:
    data = encode(frames=60, width=320, height=240)

    def use(times: int) -> int:
        for _ in range(times):
            with open_video(data, decoder) as reader:
                reader.frames(range(3, 51, 3))
        return int(psutil.Process().memory_info().rss)

    use(20)
    before = use(10)
    assert use(60) - before < 12e6, "16 frames are 3.7 MB: a leak of one reader in four would show"


@pytest.mark.parametrize("default", [0, 1])
@pytest.mark.parametrize("decoder", ["pyav", "torchcodec"])
def test_of_two_films_in_a_file_the_default_one_is_shown(decoder: str, default: int, tmp_path: Path) -> None:
    """A small preview may come first; decord always takes the first, so packing chooses for it."""
    skip_without(decoder)
    path, sizes = tmp_path / "two.mkv", [(24, 32), (64, 96)]
    with av.open(str(path), "w") as file:
        streams = [file.add_stream("libx264", rate=12) for _ in sizes]
        for number, (stream, (height, width)) in enumerate(zip(streams, sizes, strict=True)):
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            flags = av.stream.Disposition
            stream.disposition = flags.default if number == default else flags(0)
        for _ in range(6):
            for stream in streams:
                picture = np.full((stream.height, stream.width, 3), 90, np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            file.mux(stream.encode(None))
    with open_video(path.read_bytes(), decoder) as reader:
        assert reader.frames([0]).shape[1:3] == sizes[default]
    with av.open(str(path)) as container:
        assert video_stream(container).height == sizes[default][0]

"""Reading by the time stamps that a packer promises: the frames that all packets give, whatever is promised."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pretrain.data.decoders.crops import Box
from pretrain.data.decoders.pyav_reader import PyAVReader
from pretrain.data.members import Members
from pretrain.errors import SampleError
from tests.data.broken_inputs import inputs, video

Encode = Callable[..., bytes]

VIDEOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "long_gop": {"gop": 250, "frames": 60},
    "no_b": {"b_frames": 0, "frames": 40},
    "many_b": {"gop": 3, "b_frames": 3},
    "odd_size": {"width": 66, "height": 50},
}


def scanned(data: bytes) -> tuple[np.ndarray, list[int]]:
    """All frames and their time stamps, by the list of all packets."""
    with PyAVReader(data) as reader:
        assert reader.stamps is not None and not isinstance(reader.stamps, range)
        return reader.frames(range(reader.num_frames)), list(reader.stamps)


def promise(stamps: list[int]) -> range:
    return range(stamps[0], stamps[-1] + stamps[1] - stamps[0], stamps[1] - stamps[0])


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_of_every_start_and_stride(name: str, encode: Encode) -> None:
    data = encode(**VIDEOS[name])
    frames, stamps = scanned(data)
    for stride in (1, 2, 4):
        for start in range(len(stamps)):
            wanted = list(range(start, len(stamps), stride))[:6]
            with PyAVReader(data, promise(stamps)) as reader:
                assert reader.num_frames == len(stamps) and reader.fps == pytest.approx(24)
                assert (reader.frames(wanted) == frames[wanted]).all()
                assert isinstance(reader.stamps, range), "the whole file was not read"


def test_any_order_far_apart_and_again(encode: Encode) -> None:
    data = encode(frames=100, gop=8)
    frames, stamps = scanned(data)
    with PyAVReader(data, promise(stamps)) as reader:
        for wanted in ([99, 0, 50, 50], [7, 8, 9], [3], [96], [0]):
            assert (reader.frames(wanted) == frames[wanted]).all()
        (crop,) = reader.crops([5, 70], lambda *_: [Box(3, 5, 20, 11)])
        assert (crop == frames[[5, 70], 5:16, 3:23]).all()
        assert isinstance(reader.stamps, range)


def test_as_few_packets_are_decoded_as_with_the_list(encode: Encode) -> None:
    data = encode(frames=200, gop=8)
    _, stamps = scanned(data)
    for wanted in ([190, 193, 196], [0, 100, 199], [40]):
        with PyAVReader(data) as listed, PyAVReader(data, promise(stamps)) as promised:
            listed.frames(wanted)
            promised.frames(wanted)
            assert promised.decoded == listed.decoded


LIES: dict[str, Callable[[int, int, int], range]] = {
    "fewer frames": lambda first, step, count: range(first, first + step * (count - 4), step),
    "more frames": lambda first, step, count: range(first, first + step * (count + 9), step),
    "one later": lambda first, step, count: range(first + step, first + step * (count + 1), step),
    "one earlier": lambda first, step, count: range(first - step, first + step * (count - 1), step),
    "off by a tick": lambda first, step, count: range(first + 1, first + 1 + step * count, step),
    "half the step": lambda first, step, count: range(first, first + step * count // 2, step // 2),
    "half the step, twice the frames": lambda first, step, count: range(first, first + step * count, step // 2),
    "twice the step": lambda first, step, count: range(first, first + 2 * step * count, 2 * step),
    "twice the step, half the frames": lambda first, step, count: range(first, first + step * count, 2 * step),
    "far away": lambda first, step, count: range(10**15, 10**15 + step * count, step),
    "one frame": lambda first, step, count: range(first, first + step, step),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_changes_no_frame(lie: str, encode: Encode) -> None:
    data = encode(frames=40)
    frames, stamps = scanned(data)
    with PyAVReader(data, LIES[lie](stamps[0], stamps[1] - stamps[0], len(stamps))) as reader:
        assert reader.num_frames == 40
        for wanted in ([0], [0, 4, 8], [16, 18, 20], [39]):
            assert (reader.frames(wanted) == frames[wanted]).all()


def test_uneven_frames_that_are_promised_to_be_even(encode: Encode) -> None:
    data = encode(variable=True, frames=40)
    frames, stamps = scanned(data)
    with PyAVReader(data) as reader:
        duration = reader._stream.duration
    for step in {stamps[1] - stamps[0], duration // 40, stamps[-1] // 39}:
        with PyAVReader(data, range(stamps[0], stamps[0] + 40 * step, step)) as reader:
            for wanted in ([0, 1, 2], [4, 8, 12], [20], [39]):
                assert (reader.frames(wanted) == frames[wanted]).all()


def outcome(data: bytes, stamps: range | None, wanted: list[int]) -> Any:
    """Pictures, or the reason for none."""
    try:
        with PyAVReader(data, stamps) as reader:
            return reader.frames(wanted).tobytes()
    except SampleError as error:
        return error.reason


@pytest.mark.parametrize("name", sorted(inputs()))
def test_broken_files_end_as_they_do_without_a_promise(name: str) -> None:
    """But for cut files: clips from what is left of them are right, which reading all packets refuses."""
    data = inputs()[name].data
    frames, stamps = scanned(video(muxer=(("movflags", "faststart"),)))
    for wanted in ([0], [0, 4, 8], [12, 14], [20, 23]):
        allowed = [outcome(data, None, wanted)]
        if "index_in_front_cut" in name:
            allowed.append(frames[wanted].tobytes())
        assert outcome(data, promise(stamps), wanted) in allowed


def test_frames_that_the_header_promises_and_the_file_lacks(encode: Encode) -> None:
    """Damage behind the header: the promise agrees with it, the packets don't."""
    data = encode(frames=60, width=128, height=96)
    frames, stamps = scanned(data)
    broken = bytearray(data)
    begin = data.index(b"mdat") + len(data) // 2
    broken[begin : begin + len(data) // 8] = bytes(len(data) // 8)
    results = set()
    for start in range(0, 56, 2):
        wanted = [start, start + 2, start + 4]
        found = outcome(bytes(broken), promise(stamps), wanted)
        assert found == outcome(bytes(broken), None, wanted)
        results.add(found == frames[wanted].tobytes() if isinstance(found, bytes) else found)
    assert results >= {True, "decode"}, "both kinds occur"


def facts(**more: Any) -> dict[str, bytes]:
    return {"json": json.dumps(more).encode()}


def test_promises_in_a_samples_json() -> None:
    assert Members(facts(frames=3, stamps={"first": 5, "step": 2})).stamps == range(5, 11, 2)
    for wrong in (
        {"frames": 3}, {"stamps": {"first": 0, "step": 1}}, {"frames": 3, "stamps": {"first": 0, "step": 0}},
        {"frames": 0, "stamps": {"first": 0, "step": 1}}, {"frames": 3, "stamps": 7},
        {"frames": 3, "stamps": {"first": 0.5, "step": 1}}, {"frames": True, "stamps": {"first": 0, "step": 1}},
        {"frames": 10**30, "stamps": {"first": 0, "step": 1}}, {"frames": 3, "stamps": {"first": -(10**30), "step": 1}},
    ):  # fmt: skip
        assert Members(facts(**wrong)).stamps is None, wrong
    assert (
        Members({}).stamps is None
        and Members({"json": b"\xff{"}).stamps is None
        and Members({"json": b"[1]"}).stamps is None
    )

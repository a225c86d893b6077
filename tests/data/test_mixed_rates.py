"""Frames by time: sources of any rate, and of uneven rates, show the same seconds."""

from collections.abc import Sequence

import numpy as np
import pytest

from pretrain.data.decoders import open_video
from pretrain.samples.sampling import clip_times, latest_start
from tests.films import numbers_of, skip_without, write_film

SECONDS = 8


def uneven(seed: int) -> list[int]:
    """Times of frames, ms, with pauses of up to 0.4 s."""
    steps = np.random.default_rng(seed).choice([10, 33, 40, 400], 200, p=[0.4, 0.3, 0.25, 0.05])
    return [int(time) for time in np.cumsum([0, *steps]) if time < 1000 * SECONDS]


RATES: dict[str, Sequence[int] | int] = {"12": 12, "25": 25, "60": 60, "uneven": uneven(3)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, np.ndarray]]:
    """Films of 8 s, and when their frames are shown, seconds."""
    root, found = tmp_path_factory.mktemp("rates"), {}
    for name, rate in RATES.items():
        times = np.arange(rate * SECONDS) / rate if isinstance(rate, int) else np.array(rate) / 1000
        more = {"fps": rate} if isinstance(rate, int) else {"times_ms": rate}
        path = write_film(root / f"{name}.mp4", frames=len(times), gop=30, **more)  # type: ignore[arg-type]
        found[name] = path.read_bytes(), times
    return found


@pytest.mark.parametrize("decoder", ["pyav", "decord", "torchcodec"])
@pytest.mark.parametrize("name", RATES)
def test_the_frame_shown_at_a_time(name: str, decoder: str, sources: dict[str, tuple[bytes, np.ndarray]]) -> None:
    skip_without(decoder)
    data, times = sources[name]
    asked = np.random.default_rng(0).uniform(-0.1, SECONDS + 0.5, 40)
    asked += 0.002 * (np.abs(asked[:, None] - times).min(1) < 0.001)  # lists round to milliseconds, and so do readers
    expected = [max(int((times <= time).sum()) - 1, 0) for time in asked]
    with open_video(data, decoder) as reader:
        assert reader.times() == pytest.approx(times, abs=0.0006) and reader.times().dtype == np.float64
        assert reader.indices_at(asked).tolist() == expected
        assert reader.indices_at(times).tolist() == list(range(len(times))), "at the very moment a frame appears"
        assert reader.indices_at(asked.reshape(8, 5)).shape == (8, 5)
        assert numbers_of(reader.frames(reader.indices_at(asked))) == expected


def test_promised_time_stamps_are_times(sources: dict[str, tuple[bytes, np.ndarray]]) -> None:
    data, times = sources["25"]
    with open_video(data, "pyav") as reader:
        stamps = list(reader.stamps)  # type: ignore[attr-defined]
    promise = range(stamps[0], stamps[-1] + stamps[1], stamps[1] - stamps[0])
    for decoder in ("pyav", "decord"):
        with open_video(data, decoder, promise) as reader:
            assert reader.times() == pytest.approx(times)


def test_times_of_a_clip() -> None:
    assert latest_start(10, 16, 4) == 6 and latest_start(3, 16, 4) == 0
    assert clip_times(10, 4, 2, 1.5).tolist() == [1.5, 2, 2.5, 3]
    assert clip_times(2, 4, 1, 0).tolist() == [0, 1, 1, 1], "the video ends at 2 s: nothing is shown then"
    assert clip_times(0.5, 3, 1, 0).tolist() == [0, 0, 0]
    assert clip_times(10, 16, 4, latest_start(10, 16, 4))[-1] == 9.75
    for rate in (3.0, 7.5, 29.97, 24000 / 1001):
        times = clip_times(16 / rate, 16, rate, 0.0)
        assert times == pytest.approx(np.arange(16) / rate), "a video just as long as its clip is shown once"

"""Clips of a rate: sources of 12, 25 and 60 frames a second show the same seconds."""

import io

import av
import numpy as np
import pytest

from pretrain.data.members import Members
from pretrain.data.samples import Place, SourceInfo
from pretrain.recipe.schema import Source
from pretrain.samples import augmented_clip
from pretrain.samples.clip import ClipSamples, Config
from tests.films import skip_without

SECONDS = 4


def film(rate: int) -> bytes:
    """Four seconds whose brightness is the time: 40 levels a second."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=rate, options={"crf": "4", "g": "8"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in range(SECONDS * rate):
            level = round(20 + 40 * number / rate)
            frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), level, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def shown(rate: int, position: int, decoder: str = "pyav") -> np.ndarray:
    """When each frame of a clip is shown, seconds."""
    options = Config(frames=6, fps=4.0, height=32, width=32, crop="center", decoder=decoder)  # type: ignore[arg-type]
    source = SourceInfo("films", (), Source(shards=""))
    clip = ClipSamples(options, seed=3)(Place(0, position, 0, 0, 0), source, Members({"mp4": film(rate)}))["video"][0]
    return (clip.mean((1, 2, 3)) - 20) / 40


@pytest.mark.parametrize("decoder", ["pyav", "decord", "torchcodec"])
def test_sources_of_any_rate_show_the_same_seconds(decoder: str) -> None:
    skip_without(decoder)
    for position in range(3):
        times = {rate: shown(rate, position, decoder) for rate in (12, 25, 60)}
        for rate, found in times.items():
            assert np.allclose(np.diff(found), 0.25, atol=1.5 / rate + 0.03), (rate, found)
            assert np.abs(found - times[60]).max() < 1 / rate + 0.05, (rate, found, times[60])
    assert abs(shown(25, 0)[0] - shown(25, 1)[0]) > 0.1, "the start is drawn"


def test_times_are_listed_once_for_a_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("decord")
    content, opened, whole = film(12), [], av.open
    monkeypatch.setattr(av, "open", lambda *one, **more: opened.append(one) or whole(*one, **more))
    samples = ClipSamples(Config(frames=6, fps=4.0, height=32, width=32, decoder="decord"), seed=3)
    samples(Place(0, 0, 0, 0, 0), SourceInfo("films", (), Source(shards="")), Members({"mp4": content}))
    assert len(opened) == 1


def test_the_middle_is_the_middle_at_any_rate() -> None:
    options = Config(frames=6, fps=4.0, height=32, width=32)
    source = SourceInfo("films", (), Source(shards=""))
    for rate in (12, 60):
        clip = ClipSamples(options, 0).without_chance(source, Members({"mp4": film(rate)}))["video"][0]
        first = (clip[0].mean() - 20) / 40
        assert abs(first - (SECONDS - 6 / 4) / 2) < 1 / rate + 0.05


def test_a_rate_is_a_number_above_0_and_not_for_sources_with_sampling_rules() -> None:
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        assert any("input.fps" in problem for problem in Config(fps=wrong).problems())
    assert any("input.fps: found 4" in problem for problem in augmented_clip.Config(fps=4.0).problems())
    assert Config(fps=4.0).describe()[0][2] == "4 frames a second"

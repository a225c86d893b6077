"""Decoding on a GPU, with a stand-in for it: which device, the same frames, and who is at fault when it fails."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.data.decoders import open_video
from pretrain.errors import DataError, SampleError
from tests.films import skip_without

Encode = Callable[..., bytes]


class Fallback(str):
    """torchcodec's status: text, true where it decodes on the CPU."""


class Gpu:
    """Two GPUs that decode by torchcodec on the CPU, as far as they do not fail."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.devices: list[str] = []
        self.fails, self.status = "", Fallback("")

    def __call__(self, data: bytes, device: str, **options: Any) -> Any:
        self.devices.append(device)
        if device == "cpu":
            return self._decoder(data, device=device, **options)
        if self.fails == "open":
            raise RuntimeError("Unsupported device: cuda:1 (device type: cuda)")
        made = self._decoder(data, device="cpu", **options)
        return Decoder(made, self)


class Decoder:
    def __init__(self, made: Any, gpu: Gpu) -> None:
        self._made, self._gpu, self.metadata, self.cpu_fallback = made, gpu, made.metadata, gpu.status

    def __len__(self) -> int:
        return len(self._made)

    def get_frames_at(self, wanted: list[int]) -> Any:
        if self._gpu.fails == "decode":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._made.get_frames_at(wanted)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    skip_without("torchcodec")
    import torchcodec.decoders

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    found = Gpu(torchcodec.decoders.VideoDecoder)
    monkeypatch.setattr(torchcodec.decoders, "VideoDecoder", found)
    return found


def frames(data: bytes, decoder: str = "torchcodec_cuda") -> np.ndarray:
    with open_video(data, decoder) as reader:
        return reader.frames([3, 9, 4])


def test_a_rank_decodes_on_its_own_gpu(gpu: Gpu, encode: Encode) -> None:
    data = encode()
    assert np.array_equal(frames(data), frames(data, "torchcodec"))
    assert gpu.devices == ["cuda:1", "cpu"]


@pytest.mark.parametrize("fails", ["open", "decode"])
def test_a_gpu_that_fails_is_no_bad_sample(fails: str, gpu: Gpu, encode: Encode) -> None:
    """Else every sample would be replaced by another one that fails as well."""
    gpu.fails = fails
    with pytest.raises(DataError, match="the GPU does not decode what the CPU does") as caught:
        frames(encode())
    for word in ("input.decoder=torchcodec_cuda", "Unsupported" if fails == "open" else "memory", "libnvcuvid"):
        assert word in str(caught.value)


@pytest.mark.parametrize("fails", ["", "open"])
def test_a_damaged_video_is_a_bad_sample(fails: str, gpu: Gpu, encode: Encode) -> None:
    gpu.fails = fails
    with pytest.raises(SampleError) as caught:
        frames(b"no video" * 100)
    assert caught.value.reason == "open"


def test_what_the_gpu_leaves_to_the_cpu_is_told_once(
    gpu: Gpu, encode: Encode, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.status = Fallback("[CUDA] Fallback status: Falling back due to: Video not supported")
    data = encode()
    assert frames(data).shape == frames(data).shape
    (said,) = caplog.messages
    assert "is decoded on the CPU" in said and "Video not supported" in said
    gpu.status = Fallback("[CUDA] Fallback status: Falling back due to: NVcuvid unavailable")
    with pytest.raises(DataError, match="no libnvcuvid here"):
        frames(data)


def test_a_host_without_a_gpu_is_refused_with_one_error(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(DataError, match=r"no GPU 2 here, torch \S+ shows 2; it needs a GPU with NVDEC"):
        frames(b"x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(DataError, match="shows 0") as caught:
        frames(b"x")
    assert "input.decoder=pyav" in str(caught.value) and "tubelet[torchcodec]" in str(caught.value)

"""torchcodec on a GPU's video decoder (NVDEC). Frames come back to the host, where all else of a sample is made.

Nothing of this has run on a GPU yet (docs/performance.md). Colours are converted on the GPU and may differ from the
other decoders' by rounding; which frames are decoded is the same.
"""

import logging
import os

import numpy as np
import numpy.typing as npt
import torch

from pretrain.data.decoders import DECODERS, VideoReader
from pretrain.data.decoders.crops import Boxes
from pretrain.data.decoders.torchcodec_reader import TorchCodecReader
from pretrain.errors import DataError, SampleError

logger = logging.getLogger(__name__)

NAME = "torchcodec_cuda"

#: Reasons for decoding on the CPU that this process has told.
_TOLD: set[str] = set()


class TorchCodecCudaReader(TorchCodecReader):
    """Reader by torchcodec.decoders.VideoDecoder on the rank's GPU.

    Raises:
        DataError: what fails on the GPU goes on the CPU, so that not the video is at fault. As a bad sample it would be
            replaced, and so would all others.
        SampleError: it fails on the CPU as well.
    """

    def __init__(self, data: bytes, stamps: range | None = None) -> None:
        self.device = rank_gpu()
        try:
            super().__init__(data, stamps)
        except SampleError as error:
            with TorchCodecReader(data, stamps):
                raise _gpu_at_fault(error) from error
        assert self._decoder is not None
        if self._decoder.cpu_fallback:
            _tell_of_cpu(str(self._decoder.cpu_fallback))

    def _decode(self, wanted: list[int], boxes: Boxes) -> list[npt.NDArray[np.uint8]]:
        try:
            return super()._decode(wanted, boxes)
        except SampleError as error:
            with TorchCodecReader(self._data, self._stamps) as reader:
                reader._decode(wanted, boxes)
            raise _gpu_at_fault(error) from error


def rank_gpu() -> str:
    """Name the GPU of this process's rank: also in a data worker, which a rank tells by LOCAL_RANK.

    Raises:
        DataError: there is none.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number < count:
        return f"cuda:{number}"
    raise DataError(
        f"input.decoder={NAME}: no GPU {number} here, torch {torch.__version__} shows {count}; {DECODERS[NAME][1]}"
    )


def _gpu_at_fault(error: SampleError) -> DataError:
    return DataError(
        f"input.decoder={NAME}: the GPU does not decode what the CPU does ({error}). If its memory is full, lower "
        f"data.workers or batch.micro; else {DECODERS[NAME][1]}"
    )


def _tell_of_cpu(reason: str) -> None:
    """Say why torchcodec decodes on the CPU instead, once in a process for each reason.

    Raises:
        DataError: NVIDIA's library for it is missing, so that no video would be decoded on the GPU.
    """
    if "NVcuvid unavailable" in reason:
        raise DataError(f"input.decoder={NAME}: no libnvcuvid here ({reason}); {DECODERS[NAME][1]}")
    if reason not in _TOLD:
        _TOLD.add(reason)
        logger.warning("input.decoder=%s: a video is decoded on the CPU, and so are others like it: %s", NAME, reason)


def open_reader(data: bytes, stamps: range | None) -> VideoReader:
    """Open a video in memory; makes its own list of frames, so that what is promised serves for their times only."""
    return TorchCodecCudaReader(data, stamps)

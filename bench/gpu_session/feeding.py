"""Feeding of one rank, by bench/loader_decoders.py: numbers of data workers, and decoding on the GPU."""

from dataclasses import asdict

from bench.gpu_session.session import Rows, Session
from bench.loader_decoders import DECODERS, DecoderRate, decoder_rates


def workers(session: Session) -> dict[str, Rows]:
    """Measure clips a second of one rank with 8, 12 and 16 data workers that decode on the CPU."""
    found = decoder_rates(decoders=("pyav",), workers=(1,) if session.toy else (8, 12, 16), clips=_clips(session))
    return {"data workers": [asdict(one) for one in found]}


def decoders(session: Session) -> dict[str, Rows]:
    """Compare torchcodec on the GPU's decoder with decoding on the CPU."""
    found = decoder_rates(decoders=DECODERS, workers=(0,) if session.toy else (0, 2, 4, 8), clips=_clips(session))
    return {"input.decoder": [asdict(one) for one in map(_short, found)]}


def _short(found: DecoderRate) -> DecoderRate:
    """Cut the reason why a decoder can't work here to a line."""
    return DecoderRate(**asdict(found) | {"error": found.error[:120]})


def _clips(session: Session) -> int:
    return 3 if session.toy else 256

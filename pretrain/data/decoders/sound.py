"""Sound by PyAV: from a sound file, or the sound stream of a video, only the part that a window needs.

Time 0 is the first picture of a file that holds a video, else the first sound in it, so that a clip of frames and a
window of seconds belong together. A window equals the same part of the whole decode: it is decoded with a margin before
and behind it, and its samples are cut on a grid that both share. Two things keep it from being equal bit by bit: noise
bands of AAC, which its decoder draws anew, and containers that count milliseconds (mkv, webm), which move it by one.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.decoders.streams import main_film
from pretrain.data.linked_video import LinkedVideo, VideoFile
from pretrain.errors import DataError, SampleError

#: FFmpeg's names of channel layouts, by number of channels.
LAYOUTS = {1: "mono", 2: "stereo"}
#: Seconds decoded before and behind a window: codecs need what came before, the resampler both.
MARGIN_S = 0.25
#: Longer holes in the time stamps are silence; shorter ones are the rounding of containers that count milliseconds.
HOLE_S = 0.05

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SoundFacts:
    """A sound stream as it is stored.

    Attributes:
        codec: FFmpeg's name.
        rate: samples a second.
        channels: how many.
        duration: seconds that its header states; None where it states none.
    """

    codec: str
    rate: int
    channels: int
    duration: float | None


def decode_sound(
    data: VideoFile,
    rate: int,
    channels: int = 1,
    start: float = 0.0,
    duration: float | None = None,
    filled: bool = False,
) -> Samples:
    """Decode a window of the first sound stream.

    Args:
        data: The whole file, sound or video; or a linked one, of whose segment time 0 is the beginning, and whose sound
            outside of the segment counts as not there.
        rate: Samples a second of the result.
        channels: Channels of the result, 1 or 2. One is the mean of left and right, two of one are twice the same; more
            than two are mixed to left and right by FFmpeg's rules first.
        start: Beginning of the window, seconds.
        duration: Length of the window, seconds; None: to the end of the sound.
        filled: Whether the sound must fill the window, but for the rounding of time stamps (`HOLE_S`).

    Returns:
        float32 [channels, samples], usually in [-1, 1]; with a duration exactly round(duration * rate) samples, of
        which those before the sound's beginning and behind its end are zero.

    Raises:
        SampleError: "empty", "open" for a file that FFmpeg does not know, "no_sound" without a sound stream, "decode"
            for damage, "too_short" where no sound lies in the window, or, if it must be filled, too little.
        DataError: a rate or a number of channels that makes no sense, or a store that does not answer.
    """
    import av

    if channels not in LAYOUTS or rate < 1:
        raise DataError(f"sound of {channels} channels at {rate} Hz: 1 or 2 channels and a positive rate are allowed")
    zero, end = _bounds(data, rate)
    first = zero + round(start * rate)
    count = None if duration is None else round(duration * rate)
    try:
        with _opened(data) as container:
            stops = [stop for stop in (None if count is None else first + count, end) if stop is not None]
            heard, begins = _resampled(container, rate, channels, first, min(stops) - first if stops else None)
    except (av.error.FFmpegError, SampleError) as error:
        if isinstance(data, LinkedVideo):
            data.check()
        raise error if isinstance(error, SampleError) else SampleError("decode", str(error)) from error
    if isinstance(data, LinkedVideo):
        data.check()  # FFmpeg takes a failed read for the end of the file
        heard, begins = (
            heard[:, max(zero - begins, 0) : None if end is None else max(end - begins, 0)],
            max(begins, zero),
        )
    return _window(heard, begins, first, count, round(HOLE_S * rate) if filled else None)


def _bounds(data: VideoFile, rate: int) -> tuple[int, int | None]:
    """Give the numbers of the first sample of what is meant and of the one behind its last; None: to the file's end."""
    segment = data.span.segment if isinstance(data, LinkedVideo) else None
    if segment is None:
        return 0, None
    return round(segment.start * rate), None if segment.end is None else round(segment.end * rate)


def probe_sound(data: VideoFile) -> SoundFacts:
    """Read what the header of the first sound stream says; errors as for `decode_sound`."""
    with _opened(data) as container:
        stream = container.streams.audio[0]
        context = stream.codec_context
        stated = None if stream.duration is None else float(stream.duration * stream.time_base)
        return SoundFacts(context.codec.canonical_name, context.sample_rate, context.channels, stated)


def sound_span(data: VideoFile) -> tuple[float, float]:
    """Find from when to when there is sound, seconds on the clock of `decode_sound`; errors as for it.

    As the header states it, which may promise more than a damaged file holds. Where it states nothing: as the packets
    of a file in memory say; of a linked one, which that would read to its end, as the whole film lasts.
    """
    with _opened(data) as container:
        stream = container.streams.audio[0]
        zero, base = _time_zero(container, stream), stream.time_base
        begin = (stream.start_time or 0) * base
        if stream.duration is not None:
            end = begin + stream.duration * base
        elif isinstance(data, LinkedVideo):
            end = zero + Fraction(container.duration or 0, 1_000_000)
        else:
            ends = [(one.pts + (one.duration or 0)) * base for one in container.demux(stream) if one.pts is not None]
            end = max(ends, default=begin)
    if isinstance(data, LinkedVideo):
        data.check()
    segment = data.span.segment if isinstance(data, LinkedVideo) else None
    first, last = float(begin - zero), float(end - zero)
    if segment is None:
        return first, last
    last = last if segment.end is None else min(last, segment.end)
    return max(first - segment.start, 0.0), last - segment.start


def _opened(data: VideoFile) -> Any:
    import av

    if isinstance(data, bytes) and not data:
        raise SampleError("empty", "no bytes")
    if isinstance(data, LinkedVideo):
        data.seek(0)
    try:
        file = data if isinstance(data, LinkedVideo) else io.BytesIO(data)
        container = av.open(file, mode="r", metadata_errors="ignore")
    except (av.error.FFmpegError, ValueError) as error:
        raise SampleError("open", str(error)) from error
    stream = next(iter(container.streams.audio), None)
    if stream is None or stream.codec_context is None or not stream.codec_context.sample_rate:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        container.close()
        raise SampleError("no_sound", f"the file holds {kinds} and no sound that FFmpeg can decode")
    return container


def _resampled(container: Any, rate: int, channels: int, first: int, count: int | None) -> tuple[Samples, int]:
    """Return the sound around the window at `rate`, and the number of its first sample, counted from time 0."""
    stream = container.streams.audio[0]
    stream.thread_type = "NONE"
    own = stream.codec_context.sample_rate
    # Every `period`-th stored sample falls on a sample of the result: both grids meet there, for any window.
    period = own // math.gcd(own, rate)
    margin = MARGIN_S + period / own
    begin = first / rate - margin
    end = math.inf if count is None else (first + count) / rate + MARGIN_S
    heard, number = _stored(container, stream, channels, begin, end)
    skip = -number % period
    number, heard = number + skip, heard[:, skip:]
    if not heard.shape[1]:
        raise SampleError("too_short", f"no sound from second {first / rate:g} on")
    return _at_rate(heard, own, rate, channels), number * rate // own


def _stored(container: Any, stream: Any, channels: int, begin: float, end: float) -> tuple[Samples, int]:
    """Return the sound at the stored rate around [begin, end) seconds, and the number of its first sample."""
    zero = _time_zero(container, stream)
    own = stream.codec_context.sample_rate
    late = True
    if begin > 0:
        container.seek(int((Fraction(begin) + zero) / stream.time_base), stream=stream)
        pieces, late = _pieces(stream, container, channels, zero, begin, end)
    if late:  # the file's index led behind the window, or the window is at the beginning
        container.seek(min(stream.start_time or 0, 0), stream=stream)
        pieces, _ = _pieces(stream, container, channels, zero, -math.inf, end)
    if not pieces:
        raise SampleError("too_short", f"no sound between seconds {begin:g} and {end:g}")
    return _joined(pieces, own)


def _time_zero(container: Any, stream: Any) -> Fraction:
    # A song's cover picture is a video stream for FFmpeg; its time is no beginning.
    lead = main_film(container) or stream
    return (lead.start_time or 0) * (lead.time_base or stream.time_base)


def _pieces(
    stream: Any, container: Any, channels: int, zero: Fraction, begin: float, end: float
) -> tuple[list[tuple[float, Samples]], bool]:
    """Decode pieces with their times, seconds, up to `end`; and tell whether the first one comes after `begin`."""
    pieces: list[tuple[float, Samples]] = []
    clock = 0.0
    late = False
    for number, frame in enumerate(_frames(container, stream)):
        if frame.pts is not None:
            clock = float(frame.pts * frame.time_base - zero)
        late = late or (number == 0 and (frame.pts is None or clock > begin))
        if clock >= end:
            break
        length = frame.samples / frame.sample_rate
        if clock + length > begin:
            pieces.append((clock, _mixed(frame.to_ndarray(), channels)))
        clock += length
    return pieces, late


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decode frames to float planes of one or two channels, at the stored rate."""
    import av

    context = stream.codec_context
    mixer = av.AudioResampler(format="fltp", layout=LAYOUTS[min(context.channels, 2)], rate=context.sample_rate)
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise SampleError("decode", f"damaged sound at time stamp {frame.pts}")
        yield from mixer.resample(frame)


def _mixed(piece: Samples, channels: int) -> Samples:
    """Mix channels, not by FFmpeg, whose sum of two is louder than both and leaves [-1, 1]."""
    if piece.shape[0] == channels:
        return piece
    return piece.mean(0, keepdims=True) if channels == 1 else np.repeat(piece, 2, 0)


def _joined(pieces: list[tuple[float, Samples]], own: int) -> tuple[Samples, int]:
    """Join all pieces to one array, holes filled with silence; return it and the number of its first sample."""
    number = round(pieces[0][0] * own)
    parts: list[Samples] = []
    length = 0
    for clock, piece in pieces:
        # Without silence in a hole all that follows it would be heard too early.
        hole = round(clock * own) - number - length
        if hole > HOLE_S * own:
            parts.append(np.zeros((piece.shape[0], hole), dtype=np.float32))
            length += hole
        parts.append(piece)
        length += piece.shape[1]
    return np.concatenate(parts, axis=1), number


def _at_rate(heard: Samples, own: int, rate: int, channels: int) -> Samples:
    import av

    if own == rate:
        return heard
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(heard), format="fltp", layout=LAYOUTS[channels])
    frame.sample_rate, frame.time_base, frame.pts = own, Fraction(1, own), 0
    converter = av.AudioResampler(format="fltp", layout=LAYOUTS[channels], rate=rate)
    # None brings out what the filter still holds; the end would be missing without it.
    return np.concatenate([one.to_ndarray() for one in [*converter.resample(frame), *converter.resample(None)]], axis=1)


def _window(heard: Samples, begins: int, first: int, count: int | None, most: int | None) -> Samples:
    """Cut samples [first, first + count) out of those that begin at number `begins`; zeros where there are none.

    More than `most` zeros are an error.
    """
    if count is None:
        count = max(begins + heard.shape[1] - first, 0)
    found = heard[:, max(first - begins, 0) : max(first - begins + count, 0)]
    if not found.shape[1]:
        raise SampleError("too_short", f"no sound in {count} samples from sample {first} on")
    if most is not None and count - found.shape[1] > most:
        raise SampleError("too_short", f"{found.shape[1]} of {count} samples from sample {first} on hold sound")
    before = max(begins - first, 0)
    return np.pad(found, ((0, 0), (before, count - before - found.shape[1])))

"""The sound of a re-encoded video."""

from fractions import Fraction
from typing import Any

from pretrain.data.pack.media_probe import codec_name

#: Sound codecs that an mp4 file can hold as they are; others become AAC.
MP4_AUDIO = frozenset({"aac", "mp3", "ac3", "eac3", "alac", "flac", "opus"})

#: A pause from here on stays one, seconds; less is taken for the rounding of time stamps.
GAP_S = 0.05


class Sound:
    """Writer of the first sound track: copied, or turned into AAC where mp4 can't hold it.

    Args:
        out: the mp4 file being written.
        container: the original.
        start: time that becomes zero, seconds: that of the first picture, or 0 where pictures keep their times.
    """

    def __init__(self, out: Any, container: Any, start: float) -> None:
        self.out, self.start = out, start
        self.next = 0  # sample behind the last one
        self.source = container.streams.audio[0]
        self.copied = codec_name(self.source) in MP4_AUDIO
        if self.copied:
            self.stream = out.add_stream_from_template(self.source)
        else:
            context = self.source.codec_context
            # Of one channel two would be made, each 3 dB softer.
            layout = "mono" if context.channels == 1 else "stereo"
            self.stream = out.add_stream("aac", rate=context.sample_rate, layout=layout)

    def write(self, packet: Any) -> None:
        """Take over one packet of the original."""
        if packet.dts is None or packet.pts is None:
            return
        shift = round(Fraction(self.start) / packet.time_base)
        if packet.pts < shift:  # sound before the first picture
            return
        if self.copied:
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = self.stream
            self.out.mux(packet)
            return
        for frame in packet.decode():
            self._stamp(frame)
            self.out.mux(self.stream.encode(frame))

    def _stamp(self, frame: Any) -> None:
        """Set the time of decoded sound: behind the sound before it, or where a pause says."""
        rate, time = frame.sample_rate, self.next
        # Not as stated: stamps are rounded, in Matroska to milliseconds, and an encoder refuses samples that overlap.
        if frame.pts is not None:
            stated = round((frame.pts * frame.time_base - Fraction(self.start)) * rate)
            time = stated if stated - self.next > GAP_S * rate else self.next
        frame.pts, frame.time_base, self.next = time, Fraction(1, rate), time + frame.samples

    def finish(self) -> None:
        """Write what the encoder still holds."""
        if not self.copied:
            self.out.mux(self.stream.encode(None))

"""Sound of a re-encoded video."""

from fractions import Fraction
from typing import Any

from pretrain.data.pack.media_probe import codec_name

#: Sound codecs that an mp4 file can hold as they are; others become AAC.
MP4_AUDIO = frozenset({"aac", "mp3", "ac3", "eac3", "alac", "flac", "opus"})


class Sound:
    """First sound track of a video: copied, or turned into AAC where mp4 can't hold it.

    Args:
        out: the mp4 file being written.
        container: the original.
        start: time of the first picture, seconds; becomes zero.
    """

    def __init__(self, out: Any, container: Any, start: float) -> None:
        self.out, self.start = out, start
        self.source = container.streams.audio[0]
        self.copied = codec_name(self.source) in MP4_AUDIO
        if self.copied:
            self.stream = out.add_stream_from_template(self.source)
        else:
            self.stream = out.add_stream("aac", rate=self.source.codec_context.sample_rate)

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
            frame.pts = None
            self.out.mux(self.stream.encode(frame))

    def finish(self) -> None:
        """Write what the encoder still holds."""
        if not self.copied:
            self.out.mux(self.stream.encode(None))

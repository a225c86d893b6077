"""Writing mp4 files: re-encoding (upright, square pixels, 8 bits), encoding frame folders, and copying streams."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pretrain.data.pack.colour import colours_of, same_colours, scaler_tags, set_scaler_tags, tag_stream
from pretrain.data.pack.media_probe import Facts, codec_name, video_stream
from pretrain.data.pack.options import ENCODERS, Options
from pretrain.data.pack.scheduling import leave_real_time
from pretrain.data.pack.sound_track import MP4_AUDIO, Sound
from pretrain.errors import SampleError

#: Share of coded frames that may be lost or concealed before a video counts as damaged.
DAMAGE_TOLERANCE = 0.05
#: Time base of videos that keep uneven time stamps: the usual MPEG clock.
CLOCK = Fraction(1, 90_000)
#: Without version strings, so that bytes depend on content only; index in front, so that it streams.
MP4_OPTIONS = {"movflags": "+faststart", "fflags": "+bitexact"}


#: Called with each frame of the source before it is changed, at its time for the encoder.
Seen = Callable[[Any], None]


@dataclass
class Losses:
    """Losses of a decode: what failed, and what came flawed."""

    failed: int = 0
    corrupt: int = 0
    delivered: int = 0

    def check(self, expected: int) -> None:
        """Raise SampleError("damaged") when more is lost than DAMAGE_TOLERANCE."""
        lost = max(expected - self.delivered, self.failed) + self.corrupt
        if lost > max(1, DAMAGE_TOLERANCE * expected):
            raise SampleError(
                "damaged",
                f"{self.delivered} of {expected} coded frames decode ({self.corrupt} of them flawed): "
                "the file is cut or overwritten; fetch it again",
            )


def decode(container: Any, streams: list[Any], losses: Losses) -> Iterator[Any]:
    """Yield video frames, and packets of other streams, in file order; count what does not decode."""
    import av

    for packet in container.demux(streams):
        if packet.stream.type != "video":
            yield packet
            continue
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            # Not the end: a film is judged by all that it loses, and may lose 5 %.
            losses.failed += 1
            continue
        for frame in frames:
            losses.delivered += 1
            losses.corrupt += bool(frame.is_corrupt)
            yield frame


def encode_video(
    source: str,
    facts: Facts,
    target: str,
    options: Options,
    phase: int = 0,
    shown: range | None = None,
    seen: Seen = lambda frame: None,
) -> None:
    """Re-encode the video `source` to `target`, with frame `phase` as the first of the grid of reference frames.

    Args:
        source, target: local files.
        facts: of the source, `probe(source, shown)`.
        options: how.
        phase: see above.
        shown: time stamps of the only frames to keep, as for `probe`; None: all.
        seen: what else looks at each frame that is kept.

    Raises:
        SampleError: "damaged", or "encode" when FFmpeg refuses.
    """
    import av

    losses, hidden = Losses(), 0
    try:
        with av.open(source) as container, av.open(target, "w", format="mp4", options=MP4_OPTIONS) as out:
            video = video_stream(container)
            video.codec_context.thread_count = 1
            sink = _Sink(out, facts, options, phase)
            sound = Sound(out, container, facts.start) if options.audio and facts.audio else None
            clock = _Clock(facts)
            streams = [video, sound.source] if sound else [video]
            for got in decode(container, streams, losses):
                if isinstance(got, av.VideoFrame):
                    if shown is None or got.pts in shown:
                        frame = clock.stamp(got, video.time_base)
                        seen(frame)
                        sink.write(frame)
                    else:
                        hidden += 1
                elif sound:
                    sound.write(got)
            sink.finish()
            if sound:
                sound.finish()
    except av.error.FFmpegError as error:
        raise SampleError("encode", str(error)) from error
    # By the file's own table: of a file whose end is missing, all packets that are there may decode.
    losses.check(facts.listed + hidden)
    sink.check_length(facts.duration)


def encode_images(
    images: Iterable[Any], target: str, options: Options, phase: int = 0, seen: Seen = lambda frame: None
) -> None:
    """Encode PIL pictures of mode RGB, all of one size, at `options.image_fps`; `seen` looks at each frame.

    Raises:
        SampleError: "damaged" when their sizes differ.
    """
    import av

    sink = facts = None
    with av.open(target, "w", format="mp4", options=MP4_OPTIONS) as out:
        for number, image in enumerate(images):
            if sink is None or facts is None:
                facts = _image_facts(image, options)
                sink = _Sink(out, facts, options, phase)
            if image.size != (facts.width, facts.height):
                raise SampleError(
                    "damaged", f"picture {number} is {image.size}, the first is {(facts.width, facts.height)}"
                )
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base, frame.duration = number, 1 / facts.fps, 1
            seen(frame)
            sink.write(frame)
        if sink is not None:
            sink.finish()
            sink.check_length((number + 1) / float(options.image_fps))


def copy_stream(source: str, target: str, audio: bool) -> None:
    """Put the video stream of `source` into an mp4 file as it is; so its sound if wanted, or as AAC.

    Raises:
        SampleError: "copy" when mp4 can't hold the codec or the time stamps are unusable; "colours" when it loses what
            the container says of them.
    """
    import av

    try:
        with av.open(source) as container, av.open(target, "w", format="mp4", options=MP4_OPTIONS) as out:
            streams = [video_stream(container)]
            sounds = container.streams.audio[:1] if audio else ()
            foreign = [s for s in sounds if codec_name(s) not in MP4_AUDIO]
            copies = {s.index: add_copy(out, s) for s in [*streams, *sounds] if s not in foreign}
            encoded = Sound(out, container, 0.0) if foreign else None
            for packet in with_decoding_times(container.demux([*streams, *sounds])):
                if encoded is not None and packet.stream.type == "audio":
                    encoded.write(packet)
                    continue
                packet.stream = copies[packet.stream.index]
                out.mux(packet)
            if encoded is not None:
                encoded.finish()
        _compare_tags(source, target)
    except (av.error.FFmpegError, ValueError) as error:
        raise SampleError("copy", str(error)) from error


def add_copy(out: Any, stream: Any) -> Any:
    """Add a stream to an output that takes another one's packets as they are."""
    # PyAV looks for an encoder of the decoder's name, and there is none of AV1's: libdav1d.
    context = stream.codec_context
    return out.add_stream_from_template(stream, opaque=context.codec.name != context.codec.canonical_name or None)


def _compare_tags(source: str, copy: str) -> None:
    """Raise SampleError("colours") where a copied stream would be shown otherwise: mp4 holds a matrix only beside
    primaries and a curve, and no range, while Matroska states each of them for codecs that can't."""
    import av

    with av.open(source) as one, av.open(copy) as two:
        first, copied = (next(container.decode(video_stream(container)), None) for container in (one, two))
        if first is not None and copied is not None and not same_colours(first, copied):
            raise SampleError("colours", f"{colours_of(first)} would become {colours_of(copied)} in an mp4")


def with_decoding_times(packets: Iterable[Any]) -> Iterator[Any]:
    """Yield all packets with decoding times: mp4 needs them, the first of a Matroska file with B frames have none."""
    early: list[Any] = []
    for packet in packets:
        if packet.size and packet.dts is None:
            early.append(packet)
        elif packet.size:
            if packet.stream.type == "video":
                for before, one in enumerate(reversed(early), 1):
                    one.dts = packet.dts - before * (packet.duration or 1)
                yield from early
                early.clear()
            yield packet


def output_size(facts: Facts, short_side: int | None) -> tuple[int, int]:
    """Compute the encoded (width, height): upright, square pixels, short side at most `short_side`, both even."""
    width, height = Fraction(facts.width) * facts.pixel_aspect, Fraction(facts.height)
    if facts.rotation in (90, 270):
        width, height = height, width
    scale = min(Fraction(1), Fraction(short_side) / min(width, height)) if short_side else Fraction(1)
    return _even(width * scale), _even(height * scale)


def _even(length: Fraction) -> int:
    return max(2, 2 * round(length / 2))


def _image_facts(image: Any, options: Options) -> Facts:
    return Facts(
        container="images", codec="images", pix_fmt="rgb24", width=image.width, height=image.height,
        rotation=0, pixel_aspect=Fraction(1), fps=options.image_fps, packets=0, listed=0, start=0.0, duration=0.0,
        vfr=False, audio=None,
    )  # fmt: skip


class _Clock:
    """Time stamps for the encoder: frame numbers where frames are evenly spaced, else the original times from zero."""

    def __init__(self, facts: Facts) -> None:
        self.vfr, self.start = facts.vfr, facts.start
        self.base = CLOCK if facts.vfr else 1 / facts.fps
        self.next = 0

    def stamp(self, frame: Any, stream_base: Fraction) -> Any:
        time = self.next
        if self.vfr and frame.pts is not None:
            # Never the same time twice, nor an earlier one, as some originals have: encoders refuse it.
            time = max(time, round((frame.pts * stream_base - Fraction(self.start)) / self.base))
        # In the new time base as well: a change of rate shows the last frame for as long as this says.
        frame.duration = max(round(frame.duration * stream_base / self.base), 1) if self.vfr else 1
        frame.pts, frame.time_base, self.next = time, self.base, time + 1
        return frame


class _Sink:
    """Filter graph (rotate, frame rate, scale, 8 bits) and encoder."""

    def __init__(self, out: Any, facts: Facts, options: Options, phase: int) -> None:
        self.out, self.facts, self.options, self.phase = out, facts, options, phase
        self.written = 0
        self.width, self.height = output_size(facts, options.short_side)
        encoder = ENCODERS[options.codec]
        self.stream = out.add_stream(encoder.name, rate=options.fps or facts.fps, options=_encoder_options(options))
        context = self.stream.codec_context
        context.width, context.height, context.pix_fmt = self.width, self.height, "yuv420p"
        # x264's bytes depend on the number of threads, and a restart must write the shards that an earlier run wrote.
        context.thread_count = 1
        self.base = 1 / options.fps if options.fps else (CLOCK if facts.vfr else 1 / facts.fps)
        context.time_base = self.base
        if options.codec == "hevc":
            # FFmpeg's own choice, hev1, is not played by QuickTime and Safari.
            context.codec_tag = "hvc1"
        os.environ.setdefault("SVT_LOG", "1")  # errors only: the AV1 encoder prints a page for every video
        self.graph: Any = None
        self.input: tuple[int, int, str] | None = None

    def write(self, frame: Any) -> None:
        if self.graph is None:
            self._build(frame)
        set_scaler_tags(frame)
        if (frame.width, frame.height, frame.format.name) != self.input:  # the stream changed its mind on the way
            assert self.input is not None
            width, height, pix_fmt = self.input
            pts, base = frame.pts, frame.time_base
            frame = frame.reformat(width=width, height=height, format=pix_fmt)
            frame.pts, frame.time_base = pts, base
        self.graph.vpush(frame)
        self._drain()

    def finish(self) -> None:
        if self.graph is not None:
            self.graph.vpush(None)
            self._drain()
            self.out.mux(self.stream.encode(None))

    def check_length(self, seconds: float) -> None:
        """Raise SampleError("encode") where other than so many seconds were written: nobody would see it later."""
        rate = float(self.options.fps or self.facts.fps)
        # The last frame of an uneven video has no length of its own; what may be lost is judged by Losses.
        tolerance = 2 + DAMAGE_TOLERANCE * seconds * rate + rate / float(self.facts.fps)
        if abs(self.written - seconds * rate) > tolerance:
            raise SampleError(
                "encode", f"{self.written} frames written for {seconds:.2f} s at {rate:g} frames/s; pack without --fps"
            )

    def _build(self, frame: Any) -> None:
        import av

        self.input = (frame.width, frame.height, frame.format.name)
        tag_stream(self.stream.codec_context, frame)
        matrix, color_range = scaler_tags(frame)
        self.graph = av.filter.Graph()
        self.graph.threads = 1
        source = {
            "video_size": f"{frame.width}x{frame.height}", "pix_fmt": frame.format.name, "pixel_aspect": "1/1",
            "time_base": str(frame.time_base), "colorspace": str(matrix), "range": str(color_range),
        }  # fmt: skip
        nodes = [self.graph.add("buffer", **source)]
        nodes += [self.graph.add(name, arguments) for name, arguments in self._filters()]
        self.graph.link_nodes(*nodes, self.graph.add("buffersink")).configure()

    def _filters(self) -> list[tuple[str, str]]:
        turns = {
            0: [],
            90: [("transpose", "cclock")],
            180: [("hflip", ""), ("vflip", "")],
            270: [("transpose", "clock")],
        }
        rate = [("fps", f"fps={self.options.fps}:round=up")] if self.options.fps else []
        # setsar: the size is that of square pixels, and the original's aspect would stretch the picture once more.
        size = f"{self.width}:{self.height}:flags=bicubic+accurate_rnd:out_range=tv"
        return [*turns.get(self.facts.rotation, []), *rate, ("scale", size), ("setsar", "1"), ("format", "yuv420p")]

    def _drain(self) -> None:
        import av

        while True:
            try:
                frame = self.graph.vpull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            # Never the original's picture types: they would force key frames where they were.
            frame.pict_type = picture_type(self.written, self.phase, self.options)
            self.out.mux(self.stream.encode(frame))
            if self.written == 0 and self.options.codec == "av1":
                leave_real_time()
            self.written += 1


def _encoder_options(options: Options) -> dict[str, str]:
    encoder = ENCODERS[options.codec]
    chosen = {
        "crf": str(options.crf if options.crf is not None else encoder.crf),
        encoder.preset_option: options.preset or encoder.preset,
        "g": str(options.gop),
        "threads": "1",
        **dict(encoder.extra),
    }
    if options.gridded:
        # No picture type by the encoder's own choice: a key frame at a change of scene would shift the grid.
        grid = f"bframes={options.grid - 1}:b-adapt=0:b-pyramid=none:scenecut=0"
        chosen |= {"x264-params": f"{chosen['x264-params']}:{grid}", "forced-idr": "1"}
    return chosen | ({"tune": options.tune} if options.tune else {})


def picture_type(number: int, phase: int, options: Options) -> int:
    """Choose what frame `number` is coded as, in FFmpeg's numbers: 1 key frame, 2 P, 3 B, 0 as the encoder likes.

    Frames phase, phase + grid, ... are references. So is the last one before a key frame, which no B frame may
    look across.
    """
    if not options.gridded:
        return 0
    place = number - phase
    if number == 0 or place % options.gop == 0:
        return 1
    return 2 if place % options.grid == 0 or (place + 1) % options.gop == 0 else 3

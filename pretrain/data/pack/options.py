"""Options of packing, as the command line decides them, in one picklable object."""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from pretrain.data.media import Kind

Codec = Literal["h264", "hevc", "av1", "vp9"]


@dataclass(frozen=True)
class FFmpegEncoder:
    """An FFmpeg encoder and what a codec needs with it; one thread, since x264's bytes depend on the thread count."""

    name: str
    crf: int
    preset: str
    preset_option: str = "preset"
    extra: tuple[tuple[str, str], ...] = ()


ENCODERS: dict[Codec, FFmpegEncoder] = {
    # Without cpu-independent the bytes differ from run to run: x264's AVX-512 macroblock tree (measured).
    "h264": FFmpegEncoder("libx264", 23, "medium", extra=(("x264-params", "cpu-independent=1"),)),
    # Closed GOPs: after a seek, frames that lean on the GOP before would be wrong.
    "hevc": FFmpegEncoder(
        "libx265", 26, "medium", extra=(("x265-params", "pools=none:frame-threads=1:open-gop=0:log-level=error"),)
    ),
    "av1": FFmpegEncoder("libsvtav1", 35, "8", extra=(("svtav1-params", "lp=1"),)),
    "vp9": FFmpegEncoder("libvpx-vp9", 32, "4", "cpu-used", (("b", "0"), ("row-mt", "0"), ("deadline", "good"))),
}


@dataclass(frozen=True)
class Options:
    """Everything that changes the bytes of a shard; hashed into the plan's fingerprint.

    Attributes:
        copy: keep the original stream where it reads exactly, re-encode only what doesn't.
        short_side: short side of the encoded video, pixels; smaller originals keep theirs; None keeps all.
        fps: constant frame rate to convert to; None keeps the original time stamps.
        gop: frames from one key frame to the next.
        grid: H.264 only: every grid-th frame is a reference, those between are B frames that a reader may leave out
            undecoded; 0 leaves the choice to the encoder.
        codec, crf, preset, tune: the encoder's; None takes the codec's default.
        audio: keep the sound.
        image_fps: frame rate of frame folders.
        frames: template of the names of their pictures; None where each holds one series (frame_folders.py).
        min_frames: shorter videos are rejected.
        decoders: which decoders must read random frames exactly.
        reads: random frames compared with a sequential decode, for each decoder.
        image_short_side: short side of images, pixels; smaller originals keep theirs; None keeps all.
        image_quality: of images that were JPEG and are encoded anew, 1 to 95.
        shard_bytes, shard_samples: a shard is closed when it reaches one of them.
    """

    copy: bool = False
    short_side: int | None = 320
    fps: Fraction | None = None
    gop: int = 32
    grid: int = 4
    codec: Codec = "h264"
    crf: int | None = None
    preset: str | None = None
    tune: str | None = None
    audio: bool = False
    image_fps: Fraction = Fraction(24)
    min_frames: int = 1
    decoders: tuple[str, ...] = ("decord", "pyav")
    reads: int = 6
    image_short_side: int | None = field(default=None, repr=False)
    image_quality: int = field(default=95, repr=False)
    frames: str | None = field(default=None, repr=False)
    shard_bytes: int = 512_000_000
    shard_samples: int | None = None

    def stated(self, kind: Kind) -> str:
        """Say what a plan's fingerprint holds of them; for videos what it held before there were images."""
        if kind == "image":
            return f"{self}, image_short_side={self.image_short_side}, image_quality={self.image_quality}"
        return f"{self}, frames={self.frames}" if self.frames else str(self)

    @property
    def gridded(self) -> bool:
        """True where encoded videos have a grid of reference frames."""
        return self.codec == "h264" and self.grid > 1

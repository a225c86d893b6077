"""Videos with texts for TVTSv2: windows of narrated films with K texts in the order of time, and captioned clips.

Source: systems/tvtsv2.md, section 5; TencentARC/TVTS @ 290a63e, folder v2. Chosen here, where that is silent or broken:
a window with a text that is too short is drawn anew, a few times, and then another sample takes its place
and is counted; so is a video with fewer frames than a clip has, for which the official code gives blank ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from pretrain.data.decoders import Decoder, VideoReader, open_video, why_missing
from pretrain.data.linked_video import Footage
from pretrain.data.members import Members
from pretrain.data.randomness import generator
from pretrain.data.samples import Arrays, Batch, Place, Samples, SourceInfo, made_up_samples
from pretrain.errors import SampleError
from pretrain.recipe.schema import Input, Source
from pretrain.samples.sampling import Indices
from pretrain.samples.text import CLIP, Encoded, Tokenizer
from pretrain.samples.transcripts import Transcript, parse_transcript
from pretrain.samples.transforms import Clip, centred, resize

#: Text of made-up samples.
MADE_UP = "made up"


@dataclass
class Config(Input):
    """Clips with texts: of a caption, or of what is said in four segments."""

    name: str = "narrated"
    """kind of sample: pretrain/samples/<name>.py"""
    frames: int = 12
    """frames of a clip, T, one of each of as many equal parts of the window or video"""
    height: int = 224
    """height of a frame after resize and crop, pixels"""
    width: int = 224
    """width of a frame after resize and crop, pixels"""
    narrated: list[str] = field(default_factory=list)
    """names of the data.sources whose samples have a transcript with times; those of the others have a caption"""
    segments: int = 4
    """segments of a narrated window, each with its own text, K"""
    seconds: tuple[int, ...] = (3, 4, 5)
    """lengths of a segment, seconds, of which one is drawn for each window"""
    gap: float = 1.0
    """time between two segments of a window, seconds; frames are taken there too"""
    min_words: int = 1
    """words that each segment of a window must have; a window with fewer is drawn anew"""
    windows: int = 5
    """windows drawn from a video before it counts as unusable"""
    scale: float = 1.2
    """short side before the crop, times that of the crop, rounded down"""
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    """how frames are resized before the crop; nearest: as published"""
    tokenizer: str = CLIP
    """clip, or a tokenizer.json (any URL); has to be the text tower's"""
    context: int = 77
    """tokens of a text with start and end"""
    too_long: Literal["cut", "refuse"] = "cut"
    """longer texts: cut: the first tokens are kept, and the metric `cut` counts the others; refuse: another sample
    takes the place, and this is counted"""
    decoder: Decoder = "pyav"
    """library that decodes video"""

    def problems(self) -> list[str]:
        """Say what in this section can't work."""
        names = ("frames", "height", "width", "segments", "min_words", "windows", "context")
        found = [f"input.{key}: found {getattr(self, key)}, allowed: more than 0" for key in names
                 if getattr(self, key) <= 0]  # fmt: skip
        if self.views != 1:
            found.append(f"input.views: found {self.views}, allowed: 1")
        if not self.seconds or min(self.seconds) <= 0:
            found.append(f"input.seconds: found {list(self.seconds)}, allowed: lengths above 0")
        if self.gap < 0:
            found.append(f"input.gap: found {self.gap:g}, allowed: 0 or more")
        if self.scale < 1:
            found.append(f"input.scale: found {self.scale:g}, allowed: 1 or more")
        missing = why_missing(self.decoder)
        return [*found, f"input.decoder: {missing}"] if missing else found

    def describe(self) -> list[tuple[str, str, str]]:
        """Say what a clip is."""
        size = f"{self.frames} x {self.height} x {self.width}"
        return [("pixels", size, "spread over a window or video"), ("texts", f"1 or {self.segments}", "of a clip")]

    def describe_source(self, source: Source) -> str:
        """Say nothing: a source is told by its name here."""
        return ""

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of a clip."""
        return self.frames, self.height, self.width


class NarratedClips(Samples):
    """Clips with one text, or with one for each segment in the order of time.

    A batch holds `video` uint8 [B, T, H, W, 3], `ids` int64 [B, K, L] with K = 1 for captions, `cut` int64 [B], the
    tokens that its texts have lost, and `visible` int64 [B, n], the patches kept in every frame, where some are hidden.

    Args:
        options: the recipe's input section.
        seed: the recipe's run.seed.
        patches: of a frame, and how many are kept; None: all are.
        narrated: sources with transcripts; None: those that the options name.
        texts: false: `without_chance` gives pixels alone, of videos that have no text.
    """

    def __init__(
        self,
        options: Config,
        seed: int,
        patches: tuple[int, int] | None = None,
        narrated: Sequence[str] | None = None,
        texts: bool = True,
    ) -> None:
        self._options, self._seed, self._patches, self._texts = options, seed, patches, texts
        self._narrated = frozenset(options.narrated if narrated is None else narrated)
        self._tokenizer = Tokenizer(options.tokenizer, options.context, too_long=options.too_long)

    @property
    def vocabulary(self) -> int:
        """Number of the tokenizer's ids."""
        return self._tokenizer.vocabulary

    @property
    def end_id(self) -> int | None:
        """Token behind a text; None where the tokenizer adds none."""
        return self._tokenizer.end_id

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        rng = generator(self._seed, place.epoch, place.position, 0, "clip")
        clip, texts = self._read(members, source.name in self._narrated, rng, training=True)
        return {"video": self._cropped(clip, rng)[None]} | self._encoded(texts) | self._visible(rng)

    def without_chance(self, source: SourceInfo, members: Members) -> Arrays:
        """Take each part's middle frame and the centre crop; a narrated window depends on the sample's key alone."""
        rng = generator("held out", members.key)
        if not self._texts:
            return {"video": self.judged_clip(members.footage(), members.stamps)[None]}
        clip, texts = self._read(members, source.name in self._narrated, rng, training=False)
        return {"video": self._cropped(clip, None)[None]} | self._encoded(texts)

    def example(self, count: int) -> Batch:
        options, rng = self._options, generator("made-up clip")
        video = rng.integers(256, size=(1, *options.size, 3), dtype=np.uint8)
        texts = [f"{MADE_UP} {number}" for number in range(options.segments if self._narrated else 1)]
        # Unchecked: a vocabulary of one's own need not have these words.
        arrays = {"video": video} | _text_arrays(self._tokenizer.encode(texts)) | self._visible(rng)
        return self.collate(made_up_samples(count, lambda place: arrays))

    def judged_clip(self, footage: Footage, stamps: range | None = None) -> Clip:
        """Make the one clip of a video by which it is judged, uint8 [T, H, W, 3]."""
        with open_video(footage, self._options.decoder, stamps) as reader:
            return self._cropped(self._frames(reader, 0, reader.num_frames, None), None)

    def captions(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode texts as those of samples are, int64 [len(texts), L]."""
        return torch.from_numpy(self._checked(texts).ids)

    def _read(
        self, members: Members, narrated: bool, rng: np.random.Generator, training: bool
    ) -> tuple[Clip, Sequence[str]]:
        options = self._options
        transcript = self._transcript(members) if narrated else None
        with open_video(members.footage(), options.decoder, members.stamps) as reader:
            if transcript is None:
                texts = members.texts()
                texts = [texts[int(rng.integers(len(texts))) if training else 0]]
                first, count = 0, reader.num_frames
            else:
                start, end, texts = self._window(transcript, reader.duration, rng)
                first, last = (int(frame) for frame in reader.indices_at([start, end]))
                count = last - first + 1
            return self._frames(reader, first, count, rng if training else None), texts

    def _frames(self, reader: VideoReader, first: int, count: int, rng: np.random.Generator | None) -> Clip:
        wanted = self._options.frames
        if count < wanted and reader.num_frames > 1:
            raise SampleError("too_short", f"{count} frames, a clip has {wanted}")
        # A picture is a video of one frame, which a clip then shows all the time.
        chosen = part_frames(max(count, wanted), wanted, rng)
        return reader.frames(first + np.minimum(chosen, count - 1))

    def _transcript(self, members: Members) -> Transcript:
        content = members.stated("narration", "narration")
        if content is None:
            content = {name: members.stated(name, "narration") for name in ("subtitles", "denoised")}
            if content["subtitles"] is None:
                raise SampleError(
                    "narration", "no transcript: no member narration.json, and no narration or subtitles in its json"
                )
        return parse_transcript(content)

    def _window(
        self, transcript: Transcript, duration: float, rng: np.random.Generator
    ) -> tuple[float, float, list[str]]:
        """Draw a window with words in all of its segments: start and end in seconds, texts."""
        options, fewest = self._options, 0
        gaps = (options.segments - 1) * options.gap
        fitting = [length for length in options.seconds if options.segments * length + gaps <= duration]
        if not fitting:
            raise SampleError("too_short", f"{duration:.1f} s, {options.segments} segments don't fit")
        for _ in range(options.windows):
            length = fitting[int(rng.integers(len(fitting)))]
            whole = options.segments * length + gaps
            start = float(rng.random()) * (duration - whole)
            starts = [start + place * (length + options.gap) for place in range(options.segments)]
            texts = [transcript.between(one, one + length) for one in starts]
            fewest = max(fewest, sum(len(text.split()) >= options.min_words for text in texts))
            if all(len(text.split()) >= options.min_words for text in texts):
                return start, start + whole, texts
        raise SampleError(
            "narration", f"of {options.segments} segments at most {fewest} have {options.min_words} words in any of "
            f"{options.windows} windows"
        )  # fmt: skip

    def _cropped(self, clip: Clip, rng: np.random.Generator | None) -> Clip:
        """Resize the short side, cut a random crop, the same of all frames; without a generator the centre."""
        options = self._options
        height, width = clip.shape[1:3]
        scale = max(int(options.height * options.scale) / height, int(options.width * options.scale) / width)
        tall, wide = (max(least, int(size * scale + 1e-6)) for size, least in
                      ((height, options.height), (width, options.width)))  # fmt: skip
        spare = tall - options.height, wide - options.width
        top, left = (centred(free) if rng is None else int(rng.integers(free + 1)) for free in spare)
        if options.interpolation == "bilinear":
            return np.ascontiguousarray(
                resize(clip, wide, tall)[:, top : top + options.height, left : left + options.width]
            )
        # torch's nearest takes the pixel floor(i x old / new); only those of the crop are looked up.
        rows = (top + np.arange(options.height)) * height // tall
        columns = (left + np.arange(options.width)) * width // wide
        return np.ascontiguousarray(clip[:, rows[:, None], columns])

    def _encoded(self, texts: Sequence[str]) -> Arrays:
        return _text_arrays(self._checked(texts))

    def _checked(self, texts: Sequence[str]) -> Encoded:
        """Encode texts; refuse those of which the tokenizer knows nothing, which would all be one text to the tower."""
        tokenizer, encoded = self._tokenizer, self._tokenizer.encode(list(texts))
        marks = {tokenizer.start_id, tokenizer.end_id, tokenizer.unknown_id}
        for text, ids, length in zip(texts, encoded.ids, encoded.lengths, strict=True):
            if marks.issuperset(ids[:length].tolist()):
                raise SampleError("text_unknown", f"the tokenizer has no token for any of {text[:60]!r}")
        return encoded

    def _visible(self, rng: np.random.Generator) -> Arrays:
        if self._patches is None or self._patches[0] == self._patches[1]:
            return {}
        every, kept = self._patches
        return {"visible": rng.permutation(every)[None, :kept]}


def _text_arrays(encoded: Encoded) -> Arrays:
    return {"ids": encoded.ids[None], "cut": encoded.cut.sum(keepdims=True)}


def part_frames(num_frames: int, parts: int, rng: np.random.Generator | None) -> Indices:
    """Choose a frame of each of T equal parts [a, b) of n >= T frames, int64 [T].

    Args:
        num_frames: n.
        parts: T.
        rng: draws from [a, b - 2], the last frame is never chosen; a part of one frame, which the official code ends
            on, gives that. None: the middle, (a + b - 1) // 2.
    """
    borders = np.linspace(0, num_frames, parts + 1).astype(np.int64)
    first, last = borders[:-1], borders[1:] - 1
    if rng is None:
        return np.asarray((first + last) // 2, dtype=np.int64)
    return first + (rng.random(parts) * np.maximum(last - first, 1)).astype(np.int64)


def spread_frames(num_frames: int, frames: int) -> Indices:
    """Choose frames for features: equally spaced from the first to the last, rounded down, int64 [T]."""
    return np.linspace(0, num_frames - 1, frames).astype(np.int64)

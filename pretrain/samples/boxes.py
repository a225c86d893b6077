"""Clips around a keyframe with the persons on it: boxes, labels, and a detector's boxes, ragged over clips.

A sample is a segment of video and `boxes.json`, as `launch/pack.py --task detection` writes them. Sources of the
sampling rules: systems/action_detection.md sections 2.3, 2.4 and 3.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from pretrain.data.decoders import Decoder, VideoReader, open_video
from pretrain.data.decoders.crops import Box, cut
from pretrain.data.members import Members
from pretrain.data.samples import Arrays, Batch, Draw, Place, Sample, Samples, SourceInfo, draws, made_up_samples
from pretrain.errors import SampleError
from pretrain.recipe.schema import Input, Source
from pretrain.samples import box_transforms as geometry
from pretrain.samples.box_facts import KeyframeFacts, read_keyframe, require_in_video
from pretrain.samples.box_transforms import CONVENTIONS, BoxArray, Convention, ConventionName
from pretrain.samples.transforms import Clip, resize

#: Sides of the frames that plans count with where nothing is cropped: films are this wide.
ASPECT = 16 / 9
#: Persons of a made-up clip.
MADE_UP_PERSONS = 3


@dataclass
class Config(Input):
    """Clips around keyframes: sampling, geometry, colour, persons."""

    VARIES: ClassVar[bool] = True

    name: str = "boxes"
    """kind of sample: pretrain/samples/<name>.py"""
    frames: int = 16
    """frames of a clip, T"""
    stride: int = 4
    """frames of the video between two frames of the clip"""
    video_fps: float | None = None
    """rate at which stride counts frames, whatever the video's own is (AVA is published at 30 or 25): frames are then
    found by time; null: the video's own"""
    keyframe: Literal["slowfast", "alphaction"] = "slowfast"
    """place of the keyframe: slowfast: it is frame T/2 of the clip; alphaction: between two of its frames"""
    slow_jitter: bool = False
    """training with keyframe=alphaction: the first frame is drawn from as many as the stride"""
    convention: ConventionName = "continuous"
    """counting of pixels: alphaction (boxes end in their last pixel, sizes rounded down), slowfast (edges, mirrored as
    pixels before the resize), continuous (edges throughout)"""
    short_side: int = 256
    """short side of frames, pixels"""
    long_side: int | None = None
    """most pixels of the long side, for which the short one is made smaller; null: no limit"""
    crop: Literal["none", "random"] = "none"
    """training: whole frames, or random squares of crop_size"""
    crop_size: int = 224
    """side of random crops, pixels"""
    min_remaining: float = 0.0
    """share of a person's box that a crop must leave, else the person is dropped; 0: all stay, as officially"""
    flip: float = 0.5
    """training: probability that a clip is mirrored"""
    colour: Literal["none", "hsv"] = "none"
    """training: hsv shifts hue, saturation and value of a clip"""
    jitter: bool = False
    """training: sides of boxes are moved at random, outwards more than inwards"""
    max_boxes: int = 100
    """training: most persons of a clip, a random choice where there are more"""
    empty: Literal["refuse", "keep"] = "refuse"
    """training: keyframes that were annotated with nobody on them are bad samples (no_persons), or kept for a detector
    that finds persons itself (objective.name=evad); those of a person detector alone are bad samples either way"""
    min_score: float = 0.8
    """a person detector's boxes below this score are left out"""
    pad: int = 16
    """clips of a batch are filled up with zeros, right and below, to a multiple of this many pixels"""
    decoder: Decoder = "pyav"
    """library that decodes video"""

    def problems(self) -> list[str]:
        """Say what in this section can't work."""
        names = ("frames", "stride", "video_fps", "short_side", "long_side", "crop_size", "max_boxes", "pad")
        found = [
            f"input.{name}: found {getattr(self, name)}, allowed: more than 0"
            for name in names
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf
        ]
        found += [
            f"input.{name}: found {getattr(self, name)}, allowed: a share from 0 to 1"
            for name in ("flip", "min_remaining", "min_score")
            if not 0 <= getattr(self, name) <= 1
        ]
        if self.views != 1:
            found.append(f"input.views: found {self.views}, allowed: 1 (a clip has its own persons)")
        if self.crop == "random" and self.crop_size > self.short_side:
            found.append(f"input.crop_size: found {self.crop_size}, allowed: up to input.short_side={self.short_side}")
        if self.slow_jitter and self.keyframe != "alphaction":
            found.append("input.slow_jitter: only with input.keyframe=alphaction; slowfast puts the keyframe at T/2")
        return found

    def describe(self) -> list[tuple[str, str, str]]:
        """Say what a clip is."""
        rate = f"every {self.stride} frames" + ("" if self.video_fps is None else f" at {self.video_fps:g} a second")
        varies = "" if self.crop == "random" else "; frames of other shapes are longer or shorter"
        return [("pixels", " x ".join(map(str, self.size)), f"{rate} around a keyframe{varies}")]

    def describe_source(self, source: Source) -> str:
        """Say at which stride a source is sampled."""
        return f"stride {source.stride or self.stride}"

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of a training clip; where whole frames are taken those of a wide film."""
        if self.crop == "random":
            return self.frames, self._padded(self.crop_size), self._padded(self.crop_size)
        nearest = CONVENTIONS[self.convention].nearest
        width, height = geometry.resized_size(round(1080 * ASPECT), 1080, self.short_side, self.long_side, nearest)
        return self.frames, self._padded(height), self._padded(width)

    def _padded(self, side: int) -> int:
        return -(-side // self.pad) * self.pad


class BoxSamples(Samples):
    """Clips with boxes, ragged: see `collate`.

    Args:
        options: The recipe's input section.
        seed: The recipe's run.seed.
        classes: Actions that labels are among, K.
        detected: Judged clips are given a person detector's boxes, else those of the annotation.
    """

    def __init__(self, options: Config, seed: int, classes: int, detected: bool = False) -> None:
        self._options, self._seed, self._classes, self.detected = options, seed, classes, detected

    def __call__(self, place: Place, source: SourceInfo, members: Members) -> Arrays:
        options = self._options
        keyframe = read_keyframe(members, self._classes)
        # What only a detector's boxes brought in may have persons: trained as empty it would teach not to see them.
        if not len(keyframe.boxes) and not (options.empty == "keep" and keyframe.annotated):
            raise SampleError("no_persons", f"{keyframe}: training needs a person; pack with --drop-empty")
        (draw,) = draws(self._seed, place, 1)
        frames, original = self._decode(members, keyframe, source.options.stride, draw)
        clip, boxes = _resized(frames, keyframe.boxes, options, mirrored=draw("flip").random() < options.flip)
        clip, boxes, keyframe = _cropped(clip, boxes, keyframe, options, draw("crop"))
        kept = _some(len(boxes), options.max_boxes, draw("persons"))
        boxes, keyframe = boxes[kept], keyframe.take(kept)
        if options.colour == "hsv":
            clip = geometry.shift_hsv(clip, *geometry.draw_hsv_shift(draw("colour")))
        if options.jitter:
            boxes = geometry.jitter_boxes_inclusive(boxes, clip.shape[2], clip.shape[1], draw("jitter"))
        return _arrays(keyframe, clip, original) | _persons(boxes, keyframe.labels, keyframe.persons)

    def without_chance(self, source: SourceInfo, members: Members) -> Arrays:
        """Make the whole clip by which a keyframe is judged: boxes of the detector or of the annotation in `boxes`,
        the annotation besides in `truth_boxes`, `truth_labels`, `truth_counts`, `annotated`. Rows differ in size: join
        by `collate`.
        """
        keyframe = read_keyframe(members, self._classes)
        frames, _ = self._decode(members, keyframe, source.options.stride, None)
        return self._judged(frames, keyframe)

    def has_detections(self, members: Members) -> bool:
        """Tell, without decoding, whether a keyframe has a person detector's box that is judged.

        Raises:
            SampleError: as `read_keyframe`.
        """
        return bool((read_keyframe(members, self._classes).detected_scores >= self._options.min_score).any())

    def judged(self, reader: VideoReader, keyframe: KeyframeFacts) -> Batch:
        """Make the batch of a single keyframe of a video that is open already, as `without_chance` makes its rows.

        Raises:
            SampleError: "keyframe" or "decode".
        """
        arrays = self._judged(reader.frames(keyframe_indices(reader, keyframe, self._options)), keyframe)
        return self.collate(made_up_samples(1, lambda place: arrays))

    def _judged(self, frames: Clip, keyframe: KeyframeFacts) -> Arrays:
        clip, truth = _resized(frames, keyframe.boxes, self._options, mirrored=False)
        arrays = _arrays(keyframe, clip, (frames.shape[1], frames.shape[2])) | {
            "truth_boxes": truth,
            "truth_labels": keyframe.labels,
            "truth_counts": np.array([len(truth)], np.int64),
            "annotated": np.array([keyframe.annotated]),
        }
        if not self.detected:
            return arrays | _persons(truth, keyframe.labels, keyframe.persons)
        kept = keyframe.detected_scores >= self._options.min_score
        _, found = _resized(frames[:0], keyframe.detected[kept], self._options, mirrored=False)
        unknown = np.full(len(found), -1, np.int64)
        persons = _persons(found, np.zeros((len(found), self._classes), np.float32), unknown)
        return arrays | persons | {"box_scores": keyframe.detected_scores[kept]}

    def collate(self, samples: list[Sample]) -> Batch:
        """Join B clips with N persons in all.

        Returns:
            `video` uint8 [B, T, H, W, 3], zeros right and below; `sizes` int64 [B, 2], height and width without them;
            `originals` int64 [B, 2], those of the decoded frame; `boxes` float32 [N, 4], x1 y1 x2 y2 in pixels, of clip
            after clip, `counts` int64 [B] of each; `labels` float32 [N, K], 1 for each action; `box_scores` float32
            [N], 1 where a person was annotated; `persons` int64 [N], -1 where a person has no number; `times` float64
            [B]; `videos`, a list of B names; of judged clips `truth_boxes`, `truth_labels`, `truth_counts` as well,
            and `annotated` bool [B], true where the annotation lists the keyframe; and the columns of every batch.
        """
        most = [max(int(sample.arrays["sizes"][0, side]) for sample in samples) for side in (0, 1)]
        height, width = (-(-side // self._options.pad) * self._options.pad for side in most)
        rows = [replace(sample, arrays=_padded(sample.arrays, height, width)) for sample in samples]
        # Words are no tensors.
        videos = [str(name) for row in rows for name in row.arrays.pop("videos")]
        return super().collate(rows) | {"videos": videos}

    def example(self, count: int) -> Batch:
        _, height, width = self._options.size
        rng = np.random.default_rng(0)

        def arrays(place: Place) -> Arrays:
            clip = rng.integers(256, size=(self._options.frames, height, width, 3), dtype=np.uint8)
            corners = rng.uniform(0, 0.5, (MADE_UP_PERSONS, 2)).astype(np.float32)
            boxes = np.concatenate((corners, corners + np.float32(0.4)), axis=1)
            boxes = boxes * np.array([width, height, width, height], np.float32)
            labels = np.zeros((MADE_UP_PERSONS, self._classes), np.float32)
            labels[np.arange(MADE_UP_PERSONS), rng.integers(self._classes, size=MADE_UP_PERSONS)] = 1
            numbers = np.arange(MADE_UP_PERSONS, dtype=np.int64)
            keyframe = KeyframeFacts("made_up", float(place.position), 0.0, boxes, labels, numbers)
            return _arrays(keyframe, clip, (height, width)) | _persons(boxes, labels, numbers)

        return self.collate(made_up_samples(count, arrays))

    def _decode(
        self, members: Members, keyframe: KeyframeFacts, stride: int | None, draw: Draw | None
    ) -> tuple[Clip, tuple[int, int]]:
        """Decode the clip's frames; also height and width of a frame."""
        options = self._options if stride is None else replace(self._options, stride=stride)
        phase = int(draw("clip").integers(options.stride)) if draw is not None and options.slow_jitter else None
        with open_video(members.footage(), options.decoder, members.stamps) as reader:
            clip = reader.frames(keyframe_indices(reader, keyframe, options, phase))
        return clip, (clip.shape[1], clip.shape[2])


def clip_offsets(frames: int, stride: int, keyframe: str, phase: int | None = None) -> npt.NDArray[np.int64]:
    """List the frames of a clip, counted from its keyframe, int64 [frames].

    Args:
        frames: T.
        stride: frames of the video between two of the clip, s.
        keyframe: `slowfast`: from -(T s // 2) on, so that frame T // 2 is the keyframe (of even T, or even T s);
            `alphaction`: as of 2 m frames around it, from (2m - T s) // 2 + (s - 1) // 2 - m on.
        phase: `alphaction`: drawn from 0 .. s - 1 in the place of (s - 1) // 2.
    """
    span = frames * stride
    if keyframe == "slowfast":
        start = -(span // 2)
    else:
        start = -span // 2 + ((stride - 1) // 2 if phase is None else phase)
    return start + stride * np.arange(frames, dtype=np.int64)


def keyframe_indices(
    reader: VideoReader, keyframe: KeyframeFacts, options: Config, phase: int | None = None
) -> npt.NDArray[np.int64]:
    """Find the frames of a clip in the segment; before its start the first one is repeated, after its end the last.

    Raises:
        SampleError: "keyframe": the keyframe is not in the video, which is then shorter than its annotation.
    """
    require_in_video(keyframe, reader)
    offsets = clip_offsets(options.frames, options.stride, options.keyframe, phase)
    if options.video_fps is not None:
        return reader.indices_at(keyframe.seconds + offsets / options.video_fps)
    return np.clip(reader.indices_at(keyframe.seconds) + offsets, 0, reader.num_frames - 1)


def _resized(clip: Clip, shares: BoxArray, options: Config, mirrored: bool) -> tuple[Clip, BoxArray]:
    """Resize a clip to the short side, and mirror it, with boxes that come in shares of the frame."""
    rules, (height, width) = CONVENTIONS[options.convention], clip.shape[1:3]
    boxes = geometry.pixels_from_shares(shares, width, height, rules)
    size = geometry.resized_size(width, height, options.short_side, options.long_side, rules.nearest)
    if mirrored and rules.mirror_first:
        clip, boxes = _mirrored(clip, boxes, rules)
    if len(clip):
        clip = resize(clip, *size, antialias=False)
    boxes = geometry.scale_boxes(boxes, (width, height), size)
    return _mirrored(clip, boxes, rules) if mirrored and not rules.mirror_first else (clip, boxes)


def _mirrored(clip: Clip, boxes: BoxArray, rules: Convention) -> tuple[Clip, BoxArray]:
    return clip[:, :, ::-1], geometry.mirror_boxes(boxes, clip.shape[2], rules)


def _cropped(
    clip: Clip, boxes: BoxArray, keyframe: KeyframeFacts, options: Config, rng: np.random.Generator
) -> tuple[Clip, BoxArray, KeyframeFacts]:
    """Cut a random square; persons that it leaves too little of are dropped.

    Raises:
        SampleError: "cropped": nobody is left.
    """
    if options.crop == "none":
        return clip, boxes, keyframe
    # A long side that has a limit may have made the short one smaller than the crop.
    height, width = (min(options.crop_size, side) for side in clip.shape[1:3])
    x, y = int(rng.integers(clip.shape[2] - width + 1)), int(rng.integers(clip.shape[1] - height + 1))
    box = Box(x, y, width, height)
    inside = geometry.crop_boxes(boxes, box, CONVENTIONS[options.convention])
    if options.min_remaining > 0 and len(boxes):
        # Continuous whatever the convention: an inclusive box without area at the border still counts a column.
        remaining = (inside[:, 2:] - inside[:, :2]).prod(1) / np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(1), 1e-6)
        kept = np.flatnonzero(remaining >= options.min_remaining)
        if not len(kept):
            raise SampleError("cropped", f"{keyframe}: the crop leaves less than input.min_remaining of every person")
        inside, keyframe = inside[kept], keyframe.take(kept)
    return cut(clip, box), inside, keyframe


def _some(count: int, most: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Choose at most so many persons, in their order."""
    if count <= most:
        return np.arange(count)
    return np.sort(rng.choice(count, most, replace=False))


def _arrays(keyframe: KeyframeFacts, clip: Clip, original: tuple[int, int]) -> Arrays:
    return {
        "video": np.ascontiguousarray(clip)[None],
        "sizes": np.array([clip.shape[1:3]], np.int64),
        "originals": np.array([original], np.int64),
        "times": np.array([keyframe.time], np.float64),
        "videos": np.array([keyframe.video]),
    }


def _persons(boxes: BoxArray, labels: npt.NDArray[np.float32], numbers: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {
        "boxes": boxes,
        "counts": np.array([len(boxes)], np.int64),
        "labels": labels,
        "box_scores": np.ones(len(boxes), np.float32),
        "persons": numbers,
    }


def _padded(arrays: Arrays, height: int, width: int) -> Arrays:
    video = arrays["video"]
    if video.shape[2:4] == (height, width):
        return dict(arrays)
    padded = np.zeros((*video.shape[:2], height, width, 3), np.uint8)
    padded[:, :, : video.shape[2], : video.shape[3]] = video
    return arrays | {"video": padded}

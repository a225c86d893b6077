"""Choice of the frames that a clip holds: the official rules of VideoMAE V1 and V2, as pure functions.

Functions take the number of frames n and whatever was drawn, and return frame indices, int64, zero-based; those for
clips of a given rate take the duration and return times, for which the opened video knows the frames (`indices_at`).
Sources: datasets/kinetics.py, datasets/video_datasets.py and dataset/loader code of OpenGVLab/VideoMAEv2 @ 29eab1e.
"""

import math

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Times = npt.NDArray[np.float64]


def clip_starts(num_frames: int, frames: int, stride: int) -> int:
    """Count the start positions of a pre-training clip: n - L*s + 1, or 1 for a video shorter than L*s."""
    return max(num_frames - frames * stride + 1, 1)


def grid_starts(starts: int, stride: int, step: int, phase: int) -> range:
    """List the starts in [0, starts) from which a clip meets as many reference frames of a video as its stride can.

    Args:
        starts: From `clip_starts`.
        stride: Frames of the video between two frames of the clip.
        step: Frames from one reference frame to the next; 1: every start is as good.
        phase: The first reference frame.

    Returns:
        Every start that is `phase` modulo the greatest common divisor of stride and step; all starts if none is.
    """
    # Modulo this, all frames of a clip lie where its start lies: no other start meets more reference frames.
    spacing = math.gcd(stride, step)
    return range(phase % spacing, starts, spacing) or range(starts)


def clip_frames(num_frames: int, frames: int, stride: int, start: int) -> Indices:
    """List the frames of a pre-training clip that begins at frame `start` (in [0, `clip_starts`)).

    Where the video ends too early, the last index that was reached is repeated. The official loop counts from 1 and
    compares with "<", so the very last frame of a short video is not used (n = 33, s = 4 ends with 28, 28, ...).
    """
    steps = np.arange(frames, dtype=np.int64) * stride
    last = max((num_frames - 2 - start) // stride, 0) * stride
    return start + np.minimum(steps, last)


def latest_start(duration: float, frames: int, fps: float) -> float:
    """Compute the last time at which a clip of so many frames a second may begin, seconds; 0 for a shorter video.

    As for `clip_starts`, a clip of L frames spans L / fps seconds. The start is drawn uniformly from [0, this]: a time
    and not the number of a frame, so that the same draw shows the same seconds of a video whatever its own rate is.
    """
    return max(duration - frames / fps, 0.0)


def clip_times(duration: float, frames: int, fps: float, start: float) -> Times:
    """Compute when a clip's frames are shown that begins `start` seconds (in [0, `latest_start`]) after the first.

    Args:
        duration: Of the video, seconds, the last frame's own included.
        frames: Frames of the clip.
        fps: Frames of the clip a second; more than the video has shows some of them again.
        start: Seconds.

    Returns:
        float64 [frames], ascending; where the video ends too early, the last time before its end is repeated.
    """
    times = start + np.arange(frames) / fps
    # The product is often a whole number: a rounding error above it would add a frame behind the video's end.
    last = max(math.ceil((duration - start) * fps - 1e-6) - 1, 0)
    return np.minimum(times, start + last / fps)


def dense_end(num_frames: int, frames: int, stride: int) -> int | None:
    """Compute the exclusive end of the centred validation clip (V2); None for a video no longer than the clip spans."""
    span = frames * stride
    return (span + num_frames) // 2 if num_frames > span else None


def dense_frames(num_frames: int, frames: int, stride: int, end: int | None) -> Indices:
    """List the frames of a fine-tuning clip, dense sampling (Kinetics, UCF101, HMDB51, ...).

    Args:
        num_frames: Frames of the video, n.
        frames: Frames of the clip, L.
        stride: Sampling rate s; the span is L*s, and the mean distance of two frames L*s/(L-1).
        end: Exclusive end, in training uniform over {L*s, ..., n-1}, in validation `dense_end`; not used if n <= L*s.
    """
    span = frames * stride
    if num_frames <= span:
        some = num_frames // stride
        # Officially both ends belong to it, so that the last is n, which does not exist; `clip` takes it back.
        index = np.concatenate([np.linspace(0, num_frames, some), np.full(frames - some, float(num_frames))])
        return np.clip(index, 0, num_frames - 1).astype(np.int64)
    if end is None:
        raise ValueError(f"a video of {num_frames} frames is longer than {span}: say where the clip ends")
    # Both ends again: the mean step is span / (L - 1), 4.27 for 16 frames at rate 4, while tests use exactly 4.
    return np.clip(np.linspace(end - span, end, frames), end - span, end - 1).astype(np.int64)


def dense_views(num_frames: int, frames: int, stride: int, clips: int) -> Indices:
    """List the frames of all temporal test clips, [clips, L]: spread evenly over the strided video, its last one pads.

    One clip is centred (the official code divides by zero there).
    """
    strided = np.arange(0, num_frames, stride, dtype=np.int64)
    strided = np.concatenate([strided, np.full(max(frames - len(strided), 0), strided[-1])])
    free = len(strided) - frames
    starts = [int(c * (free / (clips - 1))) for c in range(clips)] if clips > 1 else [free // 2]
    return np.stack([strided[start : start + frames] for start in starts])


def sparse_segment(num_frames: int, segments: int) -> int:
    """Compute a segment's length for sparse sampling; training draws an offset in it. 0: the video is too short."""
    return num_frames // segments


def sparse_frames(num_frames: int, segments: int, offsets: npt.ArrayLike) -> Indices:
    """List the frames of a fine-tuning clip, sparse sampling (Something-Something V2): one of each segment.

    Args:
        num_frames: Frames of the video, n.
        segments: Frames of the clip.
        offsets: Offset inside each segment, [segments] or one for all: uniform below `sparse_segment` in training,
            half of it in validation. Not used where n < segments: then frame 0 is repeated in front (V2).
    """
    length = sparse_segment(num_frames, segments)
    if length == 0:
        return np.concatenate([np.zeros(segments - num_frames, dtype=np.int64), np.arange(num_frames)])
    return np.arange(segments, dtype=np.int64) * length + np.asarray(offsets, dtype=np.int64)


def sparse_views(num_frames: int, segments: int, clips: int) -> Indices:
    """List the frames of all temporal test clips, [clips, segments]: interleaved positions over the whole video."""
    tick = num_frames / segments
    every = sorted(int(t * tick / clips + x * tick) for t in range(clips) for x in range(segments))
    return np.array(every, dtype=np.int64).reshape(segments, clips).T

"""Which frames of a video a clip holds: the official rules of VideoMAE V1 and V2, as pure functions.

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
    """Number of start positions of a pre-training clip: n - L*s + 1, or 1 for a video shorter than L*s."""
    return max(num_frames - frames * stride + 1, 1)


def grid_starts(starts: int, stride: int, step: int, phase: int) -> range:
    """The starts in [0, starts) from which a clip meets as many reference frames of a video as its stride can.

    Args:
        starts: From `clip_starts`.
        stride: Frames of the video between two frames of the clip.
        step: Frames from one reference frame to the next; 1: every start is as good.
        phase: The first reference frame.

    Returns:
        Every start that is `phase` modulo the greatest common divisor of stride and step; all starts if none is.
    """
    spacing = math.gcd(stride, step)
    return range(phase % spacing, starts, spacing) or range(starts)


def clip_frames(num_frames: int, frames: int, stride: int, start: int) -> Indices:
    """Frames of a pre-training clip that begins at frame `start` (in [0, `clip_starts`)).

    Where the video ends too early, the last index that was reached is repeated. The official loop counts from 1 and
    compares with "<", so the very last frame of a short video is not used (n = 33, s = 4 ends with 28, 28, ...).
    """
    steps = np.arange(frames, dtype=np.int64) * stride
    last = max((num_frames - 2 - start) // stride, 0) * stride
    return start + np.minimum(steps, last)


def latest_start(duration: float, frames: int, fps: float) -> float:
    """The last time at which a clip of so many frames a second may begin, seconds; 0 for a video that is shorter.

    As for `clip_starts`, a clip of L frames spans L / fps seconds. The start is drawn uniformly from [0, this]: a time
    and not the number of a frame, so that the same draw shows the same seconds of a video whatever its own rate is.
    """
    return max(duration - frames / fps, 0.0)


def clip_times(duration: float, frames: int, fps: float, start: float) -> Times:
    """When the frames of a clip are shown that begins `start` seconds (in [0, `latest_start`]) after the first frame.

    Args:
        duration: Of the video, seconds, the last frame's own included.
        frames: Frames of the clip.
        fps: Frames of the clip a second; more than the video has shows some of them again.
        start: Seconds.

    Returns:
        float64 [frames], ascending; where the video ends too early, the last time before its end is repeated.
    """
    times = start + np.arange(frames) / fps
    last = max(math.ceil((duration - start) * fps - 1e-6) - 1, 0)
    return np.minimum(times, start + last / fps)


def dense_end(num_frames: int, frames: int, stride: int) -> int | None:
    """Exclusive end of the centred validation clip (V2); None where the video is not longer than the clip spans."""
    span = frames * stride
    return (span + num_frames) // 2 if num_frames > span else None


def dense_frames(num_frames: int, frames: int, stride: int, end: int | None) -> Indices:
    """Frames of a fine-tuning clip, dense sampling (Kinetics, UCF101, HMDB51, ...).

    Args:
        num_frames: Frames of the video, n.
        frames: Frames of the clip, L.
        stride: Sampling rate s; the span is L*s, and the mean distance of two frames L*s/(L-1).
        end: Exclusive end, in training uniform over {L*s, ..., n-1}, in validation `dense_end`; not used if n <= L*s.
    """
    span = frames * stride
    if num_frames <= span:
        some = num_frames // stride
        index = np.concatenate([np.linspace(0, num_frames, some), np.full(frames - some, float(num_frames))])
        return np.clip(index, 0, num_frames - 1).astype(np.int64)
    if end is None:
        raise ValueError(f"a video of {num_frames} frames is longer than {span}: say where the clip ends")
    return np.clip(np.linspace(end - span, end, frames), end - span, end - 1).astype(np.int64)


def dense_views(num_frames: int, frames: int, stride: int, clips: int) -> Indices:
    """Frames of all temporal test clips, [clips, L]: evenly spread over the strided video, padded with its last frame.

    One clip is centred (the official code divides by zero there).
    """
    strided = np.arange(0, num_frames, stride, dtype=np.int64)
    strided = np.concatenate([strided, np.full(max(frames - len(strided), 0), strided[-1])])
    free = len(strided) - frames
    starts = [int(c * (free / (clips - 1))) for c in range(clips)] if clips > 1 else [free // 2]
    return np.stack([strided[start : start + frames] for start in starts])


def sparse_segment(num_frames: int, segments: int) -> int:
    """Length of a segment of sparse sampling; an offset inside it is drawn in training. 0: the video is too short."""
    return num_frames // segments


def sparse_frames(num_frames: int, segments: int, offsets: npt.ArrayLike) -> Indices:
    """Frames of a fine-tuning clip, sparse sampling (Something-Something V2): one of each segment.

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
    """Frames of all temporal test clips, [clips, segments]: interleaved positions over the whole video."""
    tick = num_frames / segments
    every = sorted(int(t * tick / clips + x * tick) for t in range(clips) for x in range(segments))
    return np.array(every, dtype=np.int64).reshape(segments, clips).T

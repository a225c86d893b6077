"""The picture of launch/motion_index.py --plot."""

from pathlib import Path

from pretrain.data.decoders import VideoReader, open_video
from pretrain.data.fetch import SampleReader
from pretrain.data.index import ShardIndex, load_index, load_members
from pretrain.data.members import Members, parse_sample
from pretrain.data.motion_tables import Curve, load_motion_index
from pretrain.errors import DataError, RecipeError, SampleError
from pretrain.samples import motion
from pretrain.samples.motion_curves import measure_of, motion_curve
from pretrain.samples.motion_picture import motion_picture

DEADLINE_S = 60.0


def plot_motion(
    url: str, key: str, count: int, options: motion.MotionOptions, kind: motion.Kind | None, out: Path
) -> list[str]:
    """Draw a sample's curve and the frames that a test chooses by it.

    Args:
        url: folder of the data set.
        key: of the sample.
        count: frames of a clip.
        options: exponent and rule.
        kind: measure it anew by this measure; None: by the table beside its shard, where there is one.
        out: the picture.

    Returns:
        lines that say what was drawn.

    Raises:
        DataError: no such sample, one that can't be read, or the picture can't be written there.
        RecipeError: a video in which nothing moves.
    """
    index = load_index(url)
    shard, row = _find(index, key)
    facts = None if kind is not None else load_motion_index(index)
    reader = SampleReader([index], None, DEADLINE_S, tables=1, motion=() if facts is None else {0})
    members = parse_sample(reader.read(0, shard, row))
    measured = facts.facts.kind if facts is not None and members.motion is not None else kind or "ssim"
    try:
        with open_video(members.footage(), "pyav", members.stamps) as video:
            curve = _curve(members, video, kind)
            shares = motion.distribution(curve, options.mu) if motion.usable(curve) else None
            if shares is None:
                raise RecipeError(f"{key}: nothing moves in it, so its frames are chosen uniformly")
            targets = motion.test_targets(count)[0]
            found = motion.positions(shares, targets, options.rule)
            chosen = motion.rescaled(found, len(curve), video.num_frames)
            frames = video.frames(chosen)
    except SampleError as error:
        raise DataError(f"{url}: sample {key} can't be read ({error})") from error
    title = f"{key}: {len(curve) + 1} frames, {measured}, mu = {options.mu:g}, {options.rule}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        motion_picture(title, curve, shares, targets, chosen, list(frames)).save(out, optimize=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{out}: the picture can't be written ({error})") from error
    return [f"{key}: frames {', '.join(map(str, chosen.tolist()))} of {len(curve) + 1}", f"picture: {out}"]


def _curve(members: Members, video: VideoReader, kind: motion.Kind | None) -> Curve:
    stored = members.motion if kind is None else None
    return motion_curve(video.in_turn(), measure_of(kind or "ssim")) if stored is None else stored


def _find(index: ShardIndex, key: str) -> tuple[int, int]:
    for number, shard in enumerate(index.shards):
        keys = list(load_members(index.url, shard).keys)
        if key in keys:
            return number, keys.index(key)
    first = load_members(index.url, index.shards[0]).keys[0] if len(index.shards) else "nothing"
    raise DataError(f"{index.url}: no sample {key!r}; keys look like {first!r}")

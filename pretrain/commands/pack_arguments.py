"""The arguments of launch/pack.py and their help."""

import argparse
import os
from fractions import Fraction

from pretrain.commands.detection_arguments import add_detection_options
from pretrain.commands.option_types import part_of, positive, whole
from pretrain.data.media import KINDS
from pretrain.data.pack.frame_folders import template_pattern
from pretrain.data.pack.options import ENCODERS
from pretrain.data.pack.pack_plan import WHOLE

#: Short side of encoded videos where none is asked for, pixels.
VIDEO_SHORT_SIDE = 320

DESCRIPTION = """\
Pack videos, images, sound, arrays, rasters or texts into tar shards with an index, ready for training.

  pack.py SOURCE [SOURCE ...] DEST    pack
  pack.py --index-only URL [URL ...]  index WebDataset shards that are already there, in place
  pack.py --in-place SOURCE [SOURCE ...] DEST
                                      pack nothing: small shards that name the files where they lie
  pack.py --task detection --annotations FILE --data-root VIDEOS DEST
                                      pack the video around every annotated keyframe, with its boxes
  pack.py --check URL [URL ...]       verify hashes, member tables, and that every member decodes
  pack.py --merge URL                 write the index of a job array whose parts are all done

SOURCE  a folder, searched at any depth (a video's folder is its label; a folder of pictures is one video),
        a video file, or one of another kind,
        a zip archive (with NAME_map.txt beside NAME.zip, `path label` lines: what that names, as Swin Transformer),
        a list file of the official VideoMAE repositories (see --list-format),
        a csv/jsonl manifest with a column `path` and optionally label, key, start, end, frames, and your own,
        or an annotation file: Kinetics' or HACS' csv, ActivityNet's json, COCO's json of objects (--with objects).
DEST    folder for the shards. Both may be local paths or fsspec URLs (s3://, gs://, az://, memory://, ...).

Every video is probed, encoded anew (or kept, --copy), decoded once in full, and read at random with the training
decoders: what they would not read frame by frame exactly is encoded anew even with --copy. What can't be used is left
out and listed with the reason in DEST/rejected.jsonl. Run the same command again after any interruption: finished
shards are kept, and the result is byte for byte what an uninterrupted run writes. Other kinds are decoded once in full
and kept as they are, but for images that must be turned, resized, or are of an unusual format.
"""

EPILOG = """\
examples:
  python launch/pack.py videos/ shards/                                     folders videos/<class>/*.mp4
  python launch/pack.py train.csv s3://bucket/k400/train --data-root /data/k400 --audio keep
  python launch/pack.py clips.csv shards/train --where split=train --short-side 128
  python launch/pack.py imagenet/train.zip shards/ --short-side 256         beside it train_map.txt
  python launch/pack.py cc3m/ shards/ --kind image --with txt --no-labels   images with captions
  python launch/pack.py videos/ shards/ --part $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
  python launch/pack.py --check s3://bucket/k400/train

exit code: 0 done (rejected videos are reported, not an error), 1 failed or --check found problems, 2 wrong usage
"""


def make_parser() -> argparse.ArgumentParser:
    """Build the parser; every option's help states unit and default."""
    parser = argparse.ArgumentParser(
        "pack.py", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="SOURCE ... DEST, or URLs with a mode below")
    modes = parser.add_argument_group("modes").add_mutually_exclusive_group()
    modes.add_argument("--index-only", action="store_true", help="index shards in place")
    modes.add_argument("--in-place", action="store_true", help="index video files in place: shards of links to them")
    modes.add_argument("--check", action="store_true", help="verify shards; lists all problems")
    modes.add_argument("--merge", action="store_true", help="write the index of a finished job array")
    _add_source_options(parser.add_argument_group("what to pack"))
    add_detection_options(parser.add_argument_group("boxes of people and their actions (--task detection)"))
    _add_video_options(parser.add_argument_group("video"))
    _add_image_options(parser.add_argument_group("image"))
    _add_check_options(parser.add_argument_group("checks"))
    _add_run_options(parser.add_argument_group("shards and work"))
    return parser


def _add_source_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--kind",
        default="auto",
        choices=("auto", *KINDS),
        help=(
            "what the samples are; auto (default) goes by endings: of a folder the videos and folders of pictures, "
            "without any its sounds, else arrays, else rasters; of a list what each path ends like. Images in folders "
            "and texts must be asked for"
        ),
    )
    group.add_argument(
        "--with",
        # `with` is a word of Python's.
        dest="companions",
        type=_listed,
        default=(),
        metavar="NAMES",
        help=(
            "further members of each sample, separated by commas: the column of a manifest (a path, or the value), "
            "else the ending of a file of the same stem, e.g. txt,json,wav,boxes.json, or ENDING=FOLDER for files of "
            "the same path below a folder, e.g. mask.png=annotations/train; samples that lack one are rejected"
        ),
    )
    group.add_argument(
        "--data-root",
        default="",
        metavar="URL",
        help="folder or zip archive that relative paths in lists start at (default: the list file's own folder)",
    )
    group.add_argument(
        "--list-format",
        default="auto",
        choices=("auto", "v1", "v2", "frames"),
        help=(
            "columns of an official list: v1 `path label`; v2 `path 0 -1` or `folder start total`; frames "
            "`folder total label`; auto (default) asks where a line could be two of them"
        ),
    )
    group.add_argument(
        "--where",
        type=_condition,
        action="append",
        default=[],
        metavar="COLUMN=VALUE[,VALUE]",
        help="only manifest rows with one of these values; may be repeated, and then all must hold",
    )
    group.add_argument(
        "--cut",
        type=_seconds,
        metavar="SECONDS",
        help="cut longer videos into samples of this length; with --copy and --in-place at the nearest key frames",
    )
    group.add_argument("--no-labels", action="store_true", help="do not take folder names as labels")
    group.add_argument(
        "--order",
        default="shuffled",
        choices=("shuffled", "given"),
        help="order in the shards: shuffled (default) mixes classes, the same way every time",
    )


def _add_video_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--copy", action="store_true", help="keep the original stream unless it can't be read exactly")
    group.add_argument(
        "--short-side",
        type=whole,
        metavar="PIXELS",
        help=f"short side, never enlarged; 0 keeps all (default {VIDEO_SHORT_SIDE} for videos, 0 for images)",
    )
    group.add_argument(
        "--fps",
        type=_rate,
        metavar="RATE",
        help="constant frame rate, e.g. 25 or 30000/1001 (default: keep the original time stamps, variable ones too)",
    )
    group.add_argument(
        "--gop",
        type=positive,
        default=32,
        metavar="FRAMES",
        help="frames from one key frame to the "
        "next: shorter decodes faster at random and takes more bytes (default 32)",
    )
    group.add_argument(
        "--grid",
        type=whole,
        default=4,
        metavar="FRAMES",
        help="H.264: frames from one reference frame to the next; those between can be left out undecoded, so a "
        "multiple of it as stride decodes fastest; 0 as the encoder likes (default 4)",
    )
    group.add_argument("--codec", default="h264", choices=tuple(ENCODERS), help="default h264")
    defaults = ", ".join(f"{codec} {one.crf}" for codec, one in ENCODERS.items())
    group.add_argument("--crf", type=whole, metavar="N", help=f"quality, lower is better (default: {defaults})")
    group.add_argument("--preset", help="the encoder's preset: slower is smaller (default: medium, av1 8, vp9 4)")
    group.add_argument(
        "--tune",
        # argparse fills in help texts by %, so a per cent sign is written twice.
        help="the encoder's tune, or none; fastdecode makes reading a third to a half faster and files 10 to 15 %% "
        "larger (default: fastdecode for h264, else none)",
    )
    group.add_argument("--audio", default="drop", choices=("drop", "keep"), help="default drop")
    group.add_argument(
        "--image-fps", type=_rate, default=Fraction(24), metavar="RATE", help="frame rate of frame folders (default 24)"
    )
    group.add_argument(
        "--frames",
        type=_template,
        metavar="NAME",
        help="names of the pictures of frame folders, {} or {:05d} for the number and * for any text, e.g. "
        "'img_{:05d}.jpg'; several numbers order from left to right (default: each folder holds one series of pictures "
        "whose names differ in one number)",
    )
    group.add_argument("--min-frames", type=positive, default=1, metavar="N", help="reject shorter videos (default 1)")


def _add_image_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--image-quality",
        type=_quality,
        default=95,
        metavar="N",
        help="of JPEG images that are encoded anew, because they are turned or resized (default 95)",
    )


def _add_check_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--check-decoders",
        type=_names,
        default=("decord", "pyav"),
        metavar="NAMES",
        help="decoders that must read random frames exactly: decord, pyav, torchcodec, separated by "
        "commas, or none (default decord,pyav)",
    )
    group.add_argument(
        "--check-reads",
        type=whole,
        default=6,
        metavar="N",
        help="random frames compared, for each video and decoder (default 6)",
    )
    group.add_argument("--hashes-only", action="store_true", help="with --check: do not decode, compare hashes only")


def _add_run_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--shard-mb",
        type=float,
        default=512.0,
        metavar="MB",
        help="size at which a shard is closed, in millions of bytes (default 512)",
    )
    group.add_argument("--shard-samples", type=positive, metavar="N", help="samples at which a shard is closed")
    group.add_argument(
        "--part",
        type=part_of,
        default=WHOLE,
        metavar="I/N",
        help="pack part I (from 0) of N, each its own process or job; the last one to finish writes the index",
    )
    group.add_argument(
        "--workers",
        type=whole,
        # The cores that this process may use: os.cpu_count() tells those of the whole node, in a job of four as well.
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="encoding processes, one core each; 0 works in this process (default: the cores, %(default)s)",
    )
    group.add_argument("--overwrite", action="store_true", help="delete shards of an earlier packing in DEST first")
    group.add_argument("--verbose", action="store_true", help="one line for each rejected or re-encoded video")


def _template(text: str) -> str:
    try:
        template_pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _quality(text: str) -> int:
    value = int(text)
    # Above 95 Pillow leaves out parts of JPEG's compression: large files, hardly any gain.
    if not 1 <= value <= 95:
        raise argparse.ArgumentTypeError(f"{text}: 1 to 95")
    return value


def _listed(text: str) -> tuple[str, ...]:
    names = tuple(name.strip().lstrip(".") for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}: names separated by commas, e.g. txt,json")
    return names


def _rate(text: str) -> Fraction:
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no frame rate; e.g. 25, 29.97 or 30000/1001") from error
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}: more than 0")
    # FFmpeg's fractions have 32 bits.
    return value.limit_denominator(100_000)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: more than 0 seconds")
    return value


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name and name != "none")
    unknown = sorted(set(names) - {"decord", "pyav", "torchcodec"})
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; allowed: decord, pyav, torchcodec, none")
    return names


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals or not column:
        raise argparse.ArgumentTypeError(f"{text!r}: expected COLUMN=VALUE[,VALUE]")
    return column, value

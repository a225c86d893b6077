"""The command line of launch/pack.py."""

import argparse
import logging
import sys
from collections.abc import Sequence

from pretrain.commands.detection_arguments import misplaced
from pretrain.commands.exit_codes import DONE, FAILED, USAGE
from pretrain.commands.pack_arguments import VIDEO_SHORT_SIDE, make_parser
from pretrain.data.media import kind_of_ending, plural_of
from pretrain.data.pack.companions import beside
from pretrain.data.pack.discover import Item, LabelRule, gather, with_sizes
from pretrain.data.pack.film_index import FilmIndex, cut_items
from pretrain.data.pack.options import Options
from pretrain.data.pack.pack_plan import Part, Plan, make_plan
from pretrain.data.pack.pack_run import Report, pack
from pretrain.data.pack.progress_report import progress_bar, report_text
from pretrain.data.pack.zip_source import is_entry
from pretrain.errors import RecipeError, TubeletError

SHOWN_PROBLEMS = 50


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(message)s")
    try:
        if args.task is None and (given := misplaced(args)):
            raise RecipeError(f"{', '.join(given)}: only with --task detection")
        if args.index_only:
            return _index(args.paths)
        if args.check:
            return _check(args.paths, args.workers, None if args.hashes_only else args.check_decoders)
        if args.merge:
            return _merge(args.paths)
        if args.task == "detection":
            return _detection(args)
        return _link(args) if args.in_place else _pack(args)
    except RecipeError as error:
        for problem in error.problems[:SHOWN_PROBLEMS]:
            _say(f"pack: {problem}")
        hidden = len(error.problems) - SHOWN_PROBLEMS
        if hidden > 0:
            _say(f"pack: ... and {hidden} more; nothing was packed")
        return USAGE
    except TubeletError as error:
        _say(f"pack: {error}")
        return FAILED
    except KeyboardInterrupt:
        _say("pack: interrupted; the same command continues after the last finished shard")
        return FAILED


def _pack(args: argparse.Namespace) -> int:
    if len(args.paths) < 2:
        raise RecipeError("give at least one SOURCE and a DEST (see --help)")
    *sources, dest = args.paths
    options = _options(args)
    return _pack_plan(args, _plan(args, sources, args.part), dest, options)


def _pack_plan(args: argparse.Namespace, plan: Plan, dest: str, options: Options) -> int:
    part = args.part
    noun = plural_of(item.kind for item in plan.items)
    _say(f"pack: {len(plan.items)} {noun} found" + (f", {len(plan.part(part))} in this part" if part.count > 1 else ""))
    # Class folders of images look like folders of frames: taken for videos silently, they would be packed wrongly.
    if args.kind == "auto" and all(item.is_folder and item.frames is None for item in plan.items):
        _say("pack: each folder of pictures is taken for one video; --kind image makes each picture a sample")
    with progress_bar(len(plan.part(part)), noun) as progress:
        report = pack(plan, dest, options, part, args.workers, args.overwrite, progress)
    # Rejected videos are no failure: every large data set has some, and a job array must not stop for them.
    _say(report_text(report, dest))
    return DONE


def _detection(args: argparse.Namespace) -> int:
    from pretrain.commands.pack_detection import read_detection_data
    from pretrain.data.pack.linked_shards import write_links

    if len(args.paths) != 1:
        raise RecipeError("--task detection takes DEST alone: videos are named by --annotations, below --data-root")
    (dest,), options = args.paths, _options(args)
    data = read_detection_data(args)
    data.check_dest(dest, args.overwrite)
    plan = make_plan(with_sizes(data.items), shuffle=args.order == "shuffled")
    if args.in_place:
        index = write_links(list(plan.items), dest, data.indexes)
        _say(f"pack: {dest}: {index.samples} keyframes of videos that stay where they are, {index.fingerprint}")
    else:
        _pack_plan(args, plan, dest, options)
    data.finish(dest)
    return DONE


def _link(args: argparse.Namespace) -> int:
    from pretrain.data.pack.linked_shards import write_links

    if len(args.paths) < 2:
        raise RecipeError("give at least one SOURCE and a DEST (see --help)")
    *sources, dest = args.paths
    if args.companions:
        raise RecipeError("--with copies files into shards, --in-place copies none: choose one")
    indexes: dict[str, FilmIndex] = {}
    plan = _plan(args, sources, args.part, indexes)
    noun = plural_of(item.kind for item in plan.items)
    index = write_links(with_sizes(list(plan.items)), dest, indexes)
    _say(f"pack: {dest}: {index.samples} {noun} stay where they are, fingerprint {index.fingerprint}")
    return DONE


def _plan(
    args: argparse.Namespace, sources: list[str], part: Part, indexes: dict[str, FilmIndex] | None = None
) -> Plan:
    labels: LabelRule = "none" if args.no_labels else "auto"
    items = gather(sources, args.data_root, args.list_format, labels, args.kind, args.companions)
    items = [item for item in items if _selected(item, args.where)]
    if not items:
        noun = "video" if args.kind == "auto" else args.kind
        hint = "; images and texts in folders are taken with --kind image or text" if args.kind == "auto" else ""
        raise RecipeError(f"{', '.join(sources)}: no {noun} found" + (" that --where selects" if args.where else hint))
    if args.cut and any(item.kind != "video" or is_entry(item.path) for item in items):
        raise RecipeError("--cut makes segments of videos, and of those outside of zip archives")
    if args.cut:
        # From one key frame to another a piece can be kept, or read in place, without what lies before it.
        items = cut_items(items, args.cut, at_keys=args.copy or args.in_place, indexes=indexes)
    timed = [name for name in args.companions if kind_of_ending(name) in ("sound", "video")]
    # Not as sets: a companion may hold a value of its list, boxes say, which has no hash.
    if any(item.segment and any(one in item.companions for one in beside(item.path, timed)) for item in items):
        raise RecipeError(
            f"--with {','.join(timed)}: lies beside the whole video, not the segment; "
            "keep its own sound with --audio keep"
        )
    # An item's size decides its part; without parts the question to the store is spared.
    return make_plan(with_sizes(items) if part.count > 1 else items, shuffle=args.order == "shuffled")


def _selected(item: Item, conditions: list[tuple[str, str]]) -> bool:
    columns = {"label": item.label, **item.meta}
    return all(str(columns.get(column)) in values.split(",") for column, values in conditions)


def _options(args: argparse.Namespace) -> Options:
    problems = []
    if args.overwrite and args.part.count > 1:
        problems.append("--overwrite with --part would delete what the other parts write; empty DEST first")
    if args.copy and args.fps:
        problems.append("--copy keeps the time stamps, --fps changes them: choose one")
    if args.codec == "av1" and "decord" in args.check_decoders:
        problems.append("decord can't decode AV1: add --check-decoders pyav, and train with input.decoder=pyav")
    # x264 takes at most 16 B frames between two references, and a key frame off the grid would shift the rest of it.
    if args.codec == "h264" and args.grid > 1 and (args.grid > 17 or args.gop % args.grid):
        problems.append(
            f"--grid {args.grid} with --gop {args.gop}: the grid may be 2 to 17 frames and must divide the key-frame "
            "distance; --grid 0 leaves the choice to the encoder"
        )
    if problems:
        raise RecipeError(problems)
    return Options(
        copy=args.copy,
        short_side=VIDEO_SHORT_SIDE if args.short_side is None else args.short_side or None,
        fps=args.fps,
        gop=args.gop,
        grid=args.grid,
        codec=args.codec,
        crf=args.crf,
        preset=args.preset,
        tune=_tune(args.tune, args.codec),
        audio=args.audio == "keep",
        image_fps=args.image_fps,
        frames=args.frames,
        min_frames=args.min_frames,
        decoders=args.check_decoders,
        reads=args.check_reads,
        image_short_side=args.short_side or None,
        image_quality=args.image_quality,
        shard_bytes=int(args.shard_mb * 1e6),
        shard_samples=args.shard_samples,
    )


def _tune(asked: str | None, codec: str) -> str | None:
    tune = asked or ("fastdecode" if codec == "h264" else "none")
    return None if tune == "none" else tune


def _index(urls: list[str]) -> int:
    from pretrain.data.pack.scan import index_folder

    for url in urls:
        index, notes = index_folder(url)
        for note in notes:
            _say(f"pack: {note}")
        _say(f"pack: {url}: {len(index.shards)} shards, {index.samples} samples, fingerprint {index.fingerprint}")
    return DONE


def _check(urls: list[str], workers: int, decoders: tuple[str, ...] | None) -> int:
    from pretrain.commands.pack_detection import keyframe_check
    from pretrain.data.pack.check_shards import check_folder

    problems = 0
    for url in urls:
        for problem in check_folder(url, workers, decoders, keyframe_check(url)):
            _say(f"pack: {problem}")
            problems += 1
    _say(f"pack: {problems} problems found" if problems else "pack: everything verifies")
    return FAILED if problems else DONE


def _merge(urls: list[str]) -> int:
    from pretrain.data.pack.shard_writer import count_parts, merge

    for url in urls:
        merged = merge(url, count_parts(url), require=True)
        assert merged is not None
        index, rejected = merged
        _say(report_text(Report(index, rejected, index.samples, 0), url))
    return DONE


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())

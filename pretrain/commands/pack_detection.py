"""`pack.py --task detection`: box annotations of any format, and the videos that they name, to items and classes."""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pretrain.data.boxes.action_list import ActionList, make_action_list, named_classes, parse_groups, read_action_list
from pretrain.data.boxes.ava_files import of_videos, read_keyframes, read_video_names
from pretrain.data.boxes.box_formats import BoxFiles, ReadingOptions, read_box_files, read_detections
from pretrain.data.boxes.keyframes import Annotations, RowLimits, collect_keyframes
from pretrain.data.boxes.records import BoxRecords
from pretrain.data.members import Members
from pretrain.data.pack.detection_films import DetectionFilm, find_films
from pretrain.data.pack.detection_items import detection_items
from pretrain.data.pack.discover import Item
from pretrain.data.pack.film_index import FilmIndex
from pretrain.errors import DataError, RecipeError
from pretrain.runtime import storage
from pretrain.samples.box_facts import check_keyframe

CLASSES_NAME = "classes.json"
REFUSED_NAME = "refused_rows.txt"
#: Classes that the report names with the numbers of their labels.
SHOWN_CLASSES = 100


@dataclass(frozen=True)
class DetectionData:
    """What is to be packed: items, what they were made of, and indexes of films by path."""

    items: list[Item]
    annotations: Annotations
    indexes: dict[str, FilmIndex]

    def check_dest(self, dest: str, overwrite: bool) -> None:
        """Raise DataError where DEST holds another list of classes."""
        where = storage.join(dest, CLASSES_NAME)
        if not overwrite and storage.exists(where) and storage.read_bytes(where) != self.annotations.classes.to_json():
            raise DataError(f"{where}: the classes of another packing; choose another DEST, or --overwrite")

    def finish(self, dest: str) -> None:
        """Write the classes, and the rows that were left out, beside the index."""
        storage.write_bytes(storage.join(dest, CLASSES_NAME), self.annotations.classes.to_json())
        where = storage.join(dest, REFUSED_NAME)
        if self.annotations.refused:
            lines = "".join(f"{line}\n" for line in self.annotations.refused)
            storage.write_bytes(where, lines.encode())
        elif storage.exists(where):
            # Of an earlier packing, before its annotations were corrected.
            storage.remove(where)


def keyframe_check(url: str) -> Callable[[Members], object] | None:
    """Find what a set with classes asks of its samples: that training can read their boxes; None for other sets.

    Raises:
        RecipeError: its classes can't be read.
    """
    where = storage.join(url, CLASSES_NAME)
    return partial(check_keyframe, classes=read_action_list(where).outputs) if storage.exists(where) else None


def read_detection_data(args: argparse.Namespace) -> DetectionData:
    """Read and check annotations, look up the videos, and make the items; tells what was found on stderr.

    Raises:
        RecipeError: anything wrong, with file and line.
    """
    if not args.annotations:
        raise RecipeError("--task detection needs --annotations FILE[,FILE]")
    how = ReadingOptions(args.format, args.min_score, args.split, args.fold, args.box_unit, args.first_frame)
    files = read_box_files(args.annotations, how)
    if not files.records:
        raise RecipeError(f"{', '.join(args.annotations)}: frame lists only; give the annotations as well")
    people = read_detections(args.detections, files.images, how)
    excluded = [key for source in args.exclude for key in read_keyframes(source)]
    records = files.records
    if args.videos:
        wanted = read_video_names(args.videos)
        records, people = ([of_videos(one, wanted) for one in part] for part in (records, people))
    root = args.data_root or storage.parent(args.annotations[0])
    films, broken = _films(args, files, [*records, *people], root)
    classes = _classes(args, files)
    unit = records[0].unit
    first, last = args.seconds
    limits = RowLimits(args.tolerance, first, last, args.max_persons, args.persons, args.classes is not None,
                       args.faulty == "skip")  # fmt: skip
    if broken and not limits.skip:
        raise RecipeError(broken)
    facts = {name: film.facts(unit, args.video_start) for name, film in films.items()}
    annotations = collect_keyframes(records, classes, limits, people, excluded, facts)
    annotations.refused[:0] = broken
    if args.drop_empty:
        annotations = replace(annotations, keyframes=[one for one in annotations.keyframes if one.persons])
    items = detection_items(annotations, films, args.span, args.video_start)
    if not items:
        raise RecipeError("no keyframe with a person is left; without --drop-empty those without are packed too")
    sys.stderr.write("".join(f"pack: {line}\n" for line in describe_annotations(annotations)))
    return DetectionData(items, annotations, {one.path: one.index for one in films.values() if one.index is not None})


def _films(
    args: argparse.Namespace, files: BoxFiles, records: Sequence[BoxRecords], root: str
) -> tuple[dict[str, DetectionFilm], list[str]]:
    names = {name for one in records for name in one.videos}
    names |= {video for one in records for video, _, _ in one.empty}
    return find_films(names, root, files.pictures, args.image_fps, args.frames)


def _classes(args: argparse.Namespace, files: BoxFiles) -> ActionList:
    """Find the classes: of --labels, of the annotations themselves, of the names in them, or as many as --classes."""
    names = [name for one in files.records for name in one.names or ()]
    if args.labels:
        found = read_action_list(args.labels)
    elif files.classes is not None:
        found = files.classes
    elif names:
        found = named_classes(files.records[0].source, names)
        sys.stderr.write(
            f"pack: {found.outputs} classes, numbered by their names in these files; pack other splits with "
            f"--labels DEST/{CLASSES_NAME}, or their numbers differ\n"
        )
    elif args.classes:
        found = make_action_list("--classes", {one: f"class {one}" for one in range(1, args.classes + 1)})
    else:
        raise RecipeError(
            "the annotations name classes by their ids alone: give their list with --labels (pbtxt, or names, one a "
            "line), or their number with --classes"
        )
    if args.classes:
        if args.classes < found.outputs:
            raise RecipeError(f"--classes {args.classes}: the list has ids to {max(found.names)}")
        found = replace(found, outputs=args.classes)
    if args.groups:
        try:
            found = replace(found, groups=parse_groups(args.groups, found.outputs))
        except ValueError as error:
            raise RecipeError(f"--groups {error}") from error
    return found


def describe_annotations(annotations: Annotations) -> list[str]:
    """Say what was found, line by line: keyframes, persons, what was clipped and left out, labels by class."""
    frames = annotations.keyframes
    persons = [person for one in frames for person in one.persons]
    videos = len({one.video for one in frames})
    empty = sum(not one.persons for one in frames)
    lines = [
        f"{len(frames)} keyframes of {videos} videos, {empty} of them without a person; {len(persons)} persons, "
        f"{sum(not one.labels for one in persons)} of them without a label, "
        f"{sum(len(one.detections) for one in frames)} detections"
    ]
    if empty:
        looked_at = sum(one.annotated for one in frames if not one.persons)
        lines.append(
            f"  without a person: {looked_at} that the annotations list and {empty - looked_at} of a detector alone; "
            "an evaluation counts false alarms on them, training takes them for bad samples (no_persons): pack "
            "training sets with --drop-empty, or train EVAD with input.empty=keep"
        )
    lines += [f"  {count} {what}" for what, count in sorted(annotations.counts.items()) if count]
    by_class = Counter(dict(enumerate(annotations.by_class())))
    shown = [f"{annotations.classes.name(output)} {count}" for output, count in by_class.most_common(SHOWN_CLASSES)]
    lines.append(f"  labels of {len(by_class)} classes: {', '.join(shown)}")
    if annotations.refused:
        refused = annotations.refused
        lines.append(f"  {len(refused)} faults, listed in {REFUSED_NAME}; the first: {refused[0]}")
    return lines

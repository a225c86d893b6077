"""Box files of any format, told apart by what they hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pretrain.data.boxes.action_list import ActionList
from pretrain.data.boxes.alphaction_files import Image, is_alphaction, read_alphaction, read_alphaction_detections
from pretrain.data.boxes.ava_files import read_ava
from pretrain.data.boxes.box_csv import BoxUnit, is_box_csv, read_box_csv
from pretrain.data.boxes.foreign_pickle import read_pickle
from pretrain.data.boxes.records import BoxRecords, read_text
from pretrain.data.boxes.slowfast_files import Pictures, is_frame_list, read_frame_list
from pretrain.data.boxes.tube_files import Split, is_act, is_pyannot, read_act, read_mmaction, read_pyannot
from pretrain.data.boxes.yowo_files import read_yowo
from pretrain.data.media import extension_of
from pretrain.errors import RecipeError
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json

Format = Literal["auto", "ava", "slowfast", "alphaction", "mmaction", "act", "pyannot", "yowo", "csv", "frames"]
FORMATS: tuple[Format, ...] = ("auto", "ava", "slowfast", "alphaction", "mmaction", "act", "pyannot", "yowo", "csv")


@dataclass(frozen=True)
class ReadingOptions:
    """How to read files.

    Attributes:
        format: of all of them; auto looks into each.
        min_score: boxes with a lower score are left out.
        split, fold: list of videos in ACT's pickles.
        box_unit, first_frame: of a csv with a header.
    """

    format: Format = "auto"
    min_score: float = 0.0
    split: Split = "all"
    fold: int = 1
    box_unit: BoxUnit = "auto"
    first_frame: int | None = None


@dataclass
class BoxFiles:
    """Content of some annotation files.

    Attributes:
        records: rows, a table a file.
        classes: as a file states them; None without.
        pictures: of the videos that a frame list names.
        images: of AlphAction's annotations, by id.
    """

    records: list[BoxRecords] = field(default_factory=list)
    classes: ActionList | None = None
    pictures: dict[str, Pictures] = field(default_factory=dict)
    images: dict[int, Image] = field(default_factory=dict)


def read_box_files(sources: Sequence[str], how: ReadingOptions) -> BoxFiles:
    """Read annotation files of one data set.

    Args:
        sources: paths or URLs, in any order.
        how: their format, and what some formats leave open.

    Raises:
        RecipeError: what the readers find wrong, of all files at once; files that count time or classes differently.
    """
    found = BoxFiles()
    problems: list[str] = []
    for source in sources:
        try:
            _add(found, source, how)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    if len({one.unit for one in found.records}) > 1:
        units = ", ".join(f"{one.source} by the {one.unit}" for one in found.records)
        raise RecipeError(f"keyframes are counted in different ways: {units}; pack each by itself")
    return found


def _add(found: BoxFiles, source: str, how: ReadingOptions) -> None:
    kind = how.format if how.format != "auto" else format_of(source)
    if kind != "yowo" and storage.is_folder(source):
        raise RecipeError(f"{source}: a folder; annotations are files, and a folder only of YOWO's texts")
    # Of SlowFast's layout there are two files, whose header tells them apart.
    if kind == "frames" or (kind == "slowfast" and is_frame_list(read_text(source))):
        found.pictures |= read_frame_list(source)
        return
    if kind == "alphaction":
        records, images = read_alphaction(source)
        found.images |= images
        found.records.append(records)
        return
    if kind == "act":
        records, classes = read_act(source, how.split, how.fold)
        if found.classes is not None and found.classes != classes:
            raise RecipeError(f"{source}: names other classes than the files before it; pack each by itself")
        found.classes = classes
        found.records.append(records)
        return
    found.records.append(_records(source, kind, how))


def _records(source: str, kind: Format, how: ReadingOptions, last: Literal["auto", "score"] = "auto") -> BoxRecords:
    if kind == "csv":
        return read_box_csv(source, how.box_unit, how.first_frame, how.min_score)
    if kind == "pyannot":
        return read_pyannot(source)
    if kind == "yowo":
        return read_yowo(source, how.min_score)
    if kind == "mmaction":
        return read_mmaction(source, how.min_score)
    if kind == "slowfast":
        return read_ava(source, "score", how.min_score)
    # Without a word what the eighth column is, the column itself tells.
    return read_ava(source, "person" if how.format == "ava" and last == "auto" else last, how.min_score)


def read_detections(sources: Sequence[str], images: Mapping[int, Image], how: ReadingOptions) -> list[BoxRecords]:
    """Read boxes of a person detector; labels in them are not looked at.

    Args:
        sources: SlowFast's csv, mmaction's pickle, AlphAction's json, YOWO's csv, or a csv with a header.
        images: of AlphAction's annotations.
        how: as for the annotations; its format does not apply.

    Raises:
        RecipeError: as by `read_box_files`.
    """
    found: list[BoxRecords] = []
    problems: list[str] = []
    for source in sources:
        try:
            kind = format_of(source)
            if kind == "alphaction":
                found.append(read_alphaction_detections(source, images, how.min_score))
            elif kind in ("act", "pyannot", "frames"):
                raise RecipeError(f"{source}: no detections but {kind}; give it with --annotations")
            else:
                # YOWO's detections look like AVA's; only the format of the annotations tells.
                found.append(_records(source, "yowo" if kind == "ava" and how.format == "yowo" else kind, how, "score"))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return found


def format_of(source: str) -> Format:
    """Tell the format of a file by what it holds.

    Raises:
        RecipeError: it is not there, or of no known format.
    """
    if storage.is_folder(source):
        return "yowo"
    ending = extension_of(source)
    if ending in ("pkl", "pickle"):
        content = read_pickle(source)
        return "act" if is_act(content) else "pyannot" if is_pyannot(content) else "mmaction"
    text = read_text(source)
    if ending == "json":
        return _format_of_json(source, text)
    if is_frame_list(text):
        return "frames"
    return "csv" if is_box_csv(text) else "ava"


def _format_of_json(source: str, text: str) -> Format:
    try:
        if is_alphaction(parse_json(text)):
            return "alphaction"
    except ValueError as error:
        raise RecipeError(f"{source}: not JSON ({error})") from error
    raise RecipeError(
        f"{source}: a json of no known format; known are AlphAction's annotations and detections. Write a csv with the "
        "header video,time,x1,y1,x2,y2,label"
    )

"""Keyframes with their persons, made of checked rows: what is packed, and what a data set's own tools read."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pretrain.data.boxes.action_list import ActionList, is_ava
from pretrain.data.boxes.records import NONE, BoxRecords, place_of
from pretrain.errors import RecipeError

Box = tuple[float, float, float, float]
Key = tuple[str, float]
#: Rows of a person: those of one box, as SlowFast and EVAD take them; or of one number, as AlphAction does.
Grouping = Literal["id", "box"]


@dataclass(slots=True)
class AnnotatedPerson:
    """A person on a keyframe: box in shares, xyxy; outputs of its labels, ascending; number of its track or None."""

    box: Box
    labels: list[int]
    person: int | None


@dataclass(slots=True)
class AnnotatedKeyframe:
    """A keyframe.

    Attributes:
        video: its name in the annotations.
        time: seconds, or number of the frame from 1.
        persons: annotated.
        detections: (box, score) of a person detector.
        annotated: the annotations list it, with persons or with none; else only a detector's boxes brought it in.
        place: where the annotations name it first, for messages.
    """

    video: str
    time: float
    persons: list[AnnotatedPerson] = field(default_factory=list)
    detections: list[tuple[Box, float]] = field(default_factory=list)
    annotated: bool = False
    place: str = ""


@dataclass(frozen=True)
class Film:
    """What is known of a video: upright width and height in pixels; times of last and first frame in the rows' unit.

    A width of 0 is one that is not known, which is enough for boxes in shares.
    """

    width: int = 0
    height: int = 0
    end: float = np.inf
    begin: float = -np.inf


@dataclass(frozen=True)
class RowLimits:
    """What rows are held against.

    Attributes:
        tolerance: boxes may lie this far outside the frame, as a share of it, and are clipped.
        first, last: times that are taken.
        max_persons: on a keyframe.
        grouping: which rows are one person.
        unnamed: ids that the action list leaves out are trained, and not evaluated.
        skip: leave faulty rows out in the place of refusing all.
    """

    tolerance: float = 0.01
    first: float = -np.inf
    last: float = np.inf
    max_persons: int = 100
    grouping: Grouping = "id"
    unnamed: bool = False
    skip: bool = False


@dataclass
class Annotations:
    """A data set's keyframes, by video and time.

    Attributes:
        keyframes: sorted.
        classes: outputs and names.
        unit: what times count.
        counts: rows and keyframes by what was done with them.
        refused: faulty rows, with their places, as far as they were left out.
    """

    keyframes: list[AnnotatedKeyframe]
    classes: ActionList
    unit: Literal["second", "frame"]
    counts: Counter[str]
    refused: list[str]

    def by_class(self) -> list[int]:
        """Count the labels of each output."""
        found = Counter(label for one in self.keyframes for person in one.persons for label in person.labels)
        return [found[output] for output in range(self.classes.outputs)]


def collect_keyframes(
    records: Sequence[BoxRecords],
    classes: ActionList,
    limits: RowLimits,
    detections: Sequence[BoxRecords] = (),
    excluded: Iterable[Key] = (),
    films: Mapping[str, Film] | None = None,
) -> Annotations:
    """Check all rows and make keyframes of them: of those that are annotated, and of those that have detections.

    Args:
        records: annotations.
        classes: which labels there are.
        limits: what is allowed.
        detections: of a person detector.
        excluded: keyframes that are left out of both.
        films: of the videos that there are; rows of others are faults. None: of none anything is known.

    Raises:
        RecipeError: faulty rows, each with its file and line, unless they are skipped; nothing that is left.
    """
    maker = _Maker(classes, limits, frozenset(excluded), films)
    for one in records:
        maker.add(one)
    for one in detections:
        maker.add(one, detected=True)
    maker.count_persons()
    if maker.problems and not limits.skip:
        raise RecipeError(maker.problems)
    if not maker.keyframes:
        why = ", ".join(f"{count} {what}" for what, count in maker.counts.items()) or "no rows"
        raise RecipeError(f"no keyframe is left of the annotations ({why})")
    ordered = sorted(maker.keyframes.values(), key=lambda one: (one.video, one.time))
    unit = records[0].unit if records else "second"
    return Annotations(ordered, classes, unit, maker.counts, maker.problems)


class _Maker:
    """Keyframes in the making."""

    def __init__(
        self, classes: ActionList, limits: RowLimits, excluded: frozenset[Key], films: Mapping[str, Film] | None
    ) -> None:
        self.classes, self.limits, self.excluded, self.films = classes, limits, excluded, films
        self.keyframes: dict[Key, AnnotatedKeyframe] = {}
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self._persons: dict[tuple[Any, ...], AnnotatedPerson] = {}
        self._absent: set[str] = set()
        # Ids of AVA's that are trained and not evaluated are known; of other lists a gap may be a wrong list.
        self._known = set(classes.ids) if limits.unnamed or is_ava(classes) else set(classes.names)

    def add(self, records: BoxRecords, detected: bool = False) -> None:
        """Add the rows of a file that are in order."""
        boxes, wrong = self._boxes(records)
        outputs = records.labels if detected else self._outputs(records, wrong)
        take = self._add_detection if detected else self._add_label
        for row, (video, time, box) in enumerate(
            zip(records.videos, records.times.tolist(), boxes.tolist(), strict=True)
        ):
            if not self._taken(video, time, "rows"):
                continue
            fault = self._beyond(video, time, records.unit)
            if (fault := wrong.get(row) if fault is None else fault) is not None:
                self.problems += [f"{records.where(row)}: {fault}"] if fault else []
                self.counts["rows refused"] += 1
                continue
            keyframe = self._keyframe(video, time, records, records.places[row], not detected)
            take(keyframe, tuple(box), records, row, int(outputs[row]))
        for video, time, place in records.empty:
            if not self._taken(video, time, "keyframes"):
                continue
            if (fault := self._beyond(video, time, records.unit)) is not None:
                self.problems += [f"{place_of(records.source, place)}: {fault}"] if fault else []
                continue
            self._keyframe(video, time, records, place, not detected)

    def _add_label(self, keyframe: AnnotatedKeyframe, box: Box, records: BoxRecords, row: int, output: int) -> None:
        """Add a row's label to its person."""
        number = int(records.persons[row])
        group = (keyframe.video, keyframe.time, box, number if self.limits.grouping == "id" else NONE)
        person = self._persons.get(group)
        if person is None:
            person = self._persons[group] = AnnotatedPerson(box, [], None if number == NONE else number)
            keyframe.persons.append(person)
        elif output in person.labels or output == NONE:
            self.counts["rows that repeat another"] += 1
            return
        if output != NONE:
            person.labels.append(output)
            person.labels.sort()

    def _add_detection(self, keyframe: AnnotatedKeyframe, box: Box, records: BoxRecords, row: int, output: int) -> None:
        """Add a detector's box; one that stands in a row for each of its labels is one box."""
        score = float(records.scores[row])
        found = (box, 1.0 if np.isnan(score) else score)
        if found in keyframe.detections:
            self.counts["rows that repeat another"] += 1
        else:
            keyframe.detections.append(found)

    def count_persons(self) -> None:
        """Find keyframes with more persons than are allowed."""
        for one in self.keyframes.values():
            if len(one.persons) > self.limits.max_persons:
                self.problems.append(
                    f"{one.place}: {len(one.persons)} persons on {one.video} at {one.time:g}, at most "
                    f"{self.limits.max_persons} are taken; are rows of several keyframes mixed? Else --max-persons"
                )
                if self.limits.skip:
                    self.counts["persons refused"] += len(one.persons) - self.limits.max_persons
                    del one.persons[self.limits.max_persons :]

    def _keyframe(
        self, video: str, time: float, records: BoxRecords, place: int | str, annotated: bool
    ) -> AnnotatedKeyframe:
        found = self.keyframes.get((video, time))
        if found is None:
            found = self.keyframes[video, time] = AnnotatedKeyframe(video, time, place=place_of(records.source, place))
        found.annotated |= annotated
        return found

    def _taken(self, video: str, time: float, what: str) -> bool:
        if not self.limits.first <= time <= self.limits.last:
            self.counts[f"{what} outside of the times asked for"] += 1
            return False
        if (video, time) in self.excluded:
            self.counts[f"{what} of excluded keyframes"] += 1
            return False
        return True

    def _beyond(self, video: str, time: float, unit: str) -> str | None:
        """Say what is wrong with a keyframe's video; "" where that was said already, None where nothing is."""
        if self.films is None:
            return None
        film = self.films.get(video)
        if film is None:
            first = video not in self._absent
            self._absent.add(video)
            return f"{video}: no such video below --data-root, nor a folder of its pictures" if first else ""
        if time < film.begin:
            return f"{video} at {unit} {time:g}: its first frame is at {film.begin:g}"
        if time > film.end:
            return f"{video} at {unit} {time:g}: its last frame is at {film.end:g}"
        return None

    def _boxes(self, records: BoxRecords) -> tuple[Any, dict[int, str]]:
        """Turn boxes into shares within the frame, and find the faulty ones."""
        boxes = records.boxes
        wrong: dict[int, str] = {}
        if records.pixels and self.films is None:
            raise RecipeError(f"{records.source}: boxes in pixels, which mean nothing without the videos' sizes")
        if records.pixels:
            sizes = np.array([self._size(video) for video in records.videos], dtype=np.float64).reshape(-1, 2)
            boxes = boxes / np.tile(sizes, 2)
        within = boxes.clip(0, 1)
        far = np.abs(boxes - within).max(axis=1, initial=0) > self.limits.tolerance
        flat = (within[:, 0] >= within[:, 2]) | (within[:, 1] >= within[:, 3])
        for row in np.flatnonzero(flat).tolist():
            wrong[row] = f"box {_shown(records.boxes[row])}: x1 < x2 and y1 < y2 are expected, within the frame"
        for row in np.flatnonzero(far).tolist():
            unit = f"pixels of {self._size(records.videos[row])}" if records.pixels else "shares"
            wrong[row] = (
                f"box {_shown(records.boxes[row])} lies outside the frame (in {unit}) by more than "
                f"{self.limits.tolerance:g} of it, --tolerance"
            )
        for row in np.flatnonzero((records.scores < 0) | (records.scores > 1)).tolist():
            wrong[row] = f"score {records.scores[row]:g}; scores are from 0 to 1"
        self.counts["boxes clipped"] += int(((within != boxes).any(axis=1) & ~far & ~flat).sum())
        return within, wrong

    def _size(self, video: str) -> tuple[float, float]:
        film = (self.films or {}).get(video)
        # An absent video is a fault of its own; its boxes must not become another.
        return (film.width, film.height) if film is not None and film.width else (np.inf, np.inf)

    def _outputs(self, records: BoxRecords, wrong: dict[int, str]) -> Any:
        """Turn labels into outputs of the model, and find those that the action list lacks."""
        if records.names is None:
            table = {one: one - self.classes.first for one in self._known}
            known = f"{len(self.classes.names)} ids from {min(self.classes.names)} to {max(self.classes.names)}"
        else:
            ids = {name: one for one, name in self.classes.names.items()}
            table = {place: ids[name] - self.classes.first for place, name in enumerate(records.names) if name in ids}
            known = f"{len(ids)} names: {', '.join(list(ids)[:3])}, …"
        table[NONE] = NONE
        values, places = np.unique(records.labels, return_inverse=True)
        outputs = np.array([table.get(value, -2) for value in values.tolist()], dtype=np.int64)[places]
        for row in np.flatnonzero(outputs == -2).tolist():
            label = int(records.labels[row])
            shown = f"class id {label}" if records.names is None else f"class {records.names[label]!r}"
            wrong.setdefault(row, f"{shown} is not in the action list ({known}); {self._advice(label, records)}")
        return outputs

    def _advice(self, label: int, records: BoxRecords) -> str:
        if records.names is None and label in self.classes.ids:
            return f"if it is trained and not evaluated, say --classes {self.classes.outputs}"
        return "give the list of this version of the data set with --labels"


def _shown(box: Any) -> str:
    return ", ".join(f"{one:g}" for one in box)

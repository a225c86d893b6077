"""Items to pack of annotated keyframes: the segment around each, with its boxes as the member `boxes.json`."""

import json
from collections.abc import Mapping

from pretrain.data.boxes.keyframes import AnnotatedKeyframe, Annotations
from pretrain.data.pack.companions import Companion
from pretrain.data.pack.detection_films import DetectionFilm
from pretrain.data.pack.discover import Item

#: Decimals of a share: a hundredth of a pixel of 8K.
DECIMALS = 6


def detection_items(
    annotations: Annotations, films: Mapping[str, DetectionFilm], span: float | None, begins: float
) -> list[Item]:
    """Make an item of each keyframe.

    Args:
        annotations: checked against these films.
        films: by the name of the video.
        span: seconds to either side of a keyframe; None: what a clip of 16 frames, every fourth, needs.
        begins: time in the annotations of a video's first frame, seconds.
    """
    items = []
    for one in annotations.keyframes:
        film = films[one.video]
        fields, keyframe_s = film.around(film.seconds(one.time, annotations.unit, begins), span)
        boxes = Companion("boxes.json", value=_boxes(one, film, keyframe_s, annotations))
        # The comma becomes an underscore in keys; times are padded, so that keys sort by time.
        whole, _, part = f"{one.time:.3f}".partition(".")
        key = f"{one.video},{whole.zfill(4)}" + (f",{part}" if part.strip("0") else "")
        items.append(Item(film.path, one.video, key=key, companions=(boxes,), distinct=True, **fields))
    return items


def _boxes(one: AnnotatedKeyframe, film: DetectionFilm, keyframe_s: float, annotations: Annotations) -> str:
    content = {
        "video": one.video,
        "time": one.time,
        "unit": annotations.unit,
        "keyframe_s": keyframe_s,
        "width": film.width,
        "height": film.height,
        "classes": annotations.classes.outputs,
        "annotated": one.annotated,
        "persons": [
            {"box": _rounded(person.box), "labels": person.labels, "person": person.person} for person in one.persons
        ],
        "detections": [{"box": _rounded(box), "score": score} for box, score in one.detections],
    }
    return json.dumps(content, ensure_ascii=False)


def _rounded(box: tuple[float, ...]) -> list[float]:
    return [round(one, DECIMALS) for one in box]

"""FoundPersons found on real video, linked to tracks, and drawn into a video that others can play."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest

from finetune.detection.persons import FoundPersons, distinct, person_detector
from finetune.detection.rendering import Sighting, at_time, draw_persons, render
from finetune.detection.tracks import link_tracks
from pretrain.data.decoders import open_video
from pretrain.errors import DataError, RecipeError, WeightsError
from pretrain.metrics.overlap import iou_continuous
from tests.toy_shards import encoded

#: Six seconds of pedestrians seen by a camera on a pole, 768 x 576.
PEDESTRIANS = Path(__file__).parents[1] / "assets" / "pedestrians.mp4"


def boxes_of(*boxes: tuple[float, ...]) -> np.ndarray:
    return np.array(boxes, np.float32).reshape(-1, 4)


def test_people_are_found_on_real_video() -> None:
    with open_video(PEDESTRIANS.read_bytes(), "pyav") as reader:
        picture = reader.frames([10])[0]
    found = person_detector("hog")(picture)
    sure = found.boxes[found.scores > 0.8]
    assert (found.scores[:-1] >= found.scores[1:]).all()
    # Three, measured by eye, on the way from left to right.
    for one in boxes_of((0.414, 0.36, 0.464, 0.51), (0.603, 0.292, 0.654, 0.427), (0.713, 0.413, 0.762, 0.565)):
        assert iou_continuous(one[None].astype(float), sure.astype(float)).max() > 0.5, (one, sure)


def test_pictures_without_people_have_none_that_are_sure() -> None:
    noise = np.random.default_rng(0).integers(100, 140, (120, 161, 3), dtype=np.uint8)
    found = person_detector("hog")(noise)
    assert found.boxes.shape == (len(found.scores), 4) and not (found.scores > 0.8).any()


def test_a_detector_of_ones_own_is_named_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_people.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = person_detector("my_people:everyone")(np.zeros((30, 50, 3), np.uint8))
    assert found.boxes.tolist() == [[0, 0, 1, 0.5]] and found.scores.tolist() == [1]


OWN = """
import numpy as np
from finetune.detection.persons import FoundPersons

def everyone(picture): return FoundPersons(np.array([[0, 0, 1, 0.5]]), np.ones(1))
def nobody(picture): return None
def pixels(picture): return FoundPersons(np.array([[0, 0, 50, 15]]), np.ones(1))
def turned(picture): return FoundPersons(np.array([[0, 0.5, 1, 0.2]]), np.ones(1))
def unsure(picture): return FoundPersons(np.array([[0, 0, 1, 0.5]]), np.array([np.nan]))
def uneven(picture): return FoundPersons(np.array([[0, 0, 1, 0.5]]), np.ones(2))
"""


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("nobody", "FoundPersons is expected, got NoneType"),
        ("pixels", "box .0.0, 0.0, 50.0, 15.0. with score 1, .* the picture has 50 x 30 pixels: divide by them"),
        ("turned", "allowed: x1 < x2, y1 < y2"),
        ("unsure", "with score nan"),
        ("uneven", r"boxes \(1, 4\) and scores \(2,\), allowed"),
    ],
)
def test_what_a_detector_of_ones_own_must_not_answer(
    function: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_people.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match=told):
        person_detector(f"their_people:{function}")(np.zeros((30, 50, 3), np.uint8))


@pytest.mark.parametrize(
    "name, message",
    [
        ("yolo", "found 'yolo', allowed: hog, torchvision:MODEL:WEIGHTS_FILE"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("json:no_such_function", "has no attribute 'no_such_function'"),
        ("torchvision:fasterrcnn_resnet50_fpn_v2:nowhere.pth", "found model 'fasterrcnn_resnet50_fpn_v2' and file"),
    ],
)
def test_an_unknown_detector_is_told_with_what_is_allowed(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        person_detector(name)


def test_a_file_that_holds_no_weights_of_the_detector_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match="no weights of torchvision's fasterrcnn_mobilenet_v3_large_320_fpn"):
        person_detector(f"torchvision:fasterrcnn_mobilenet_v3_large_320_fpn:{tmp_path / 'weights.pth'}")


def test_hog_without_opencv_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(DataError, match=r"pip install 'tubelet\[detection\]'"):
        person_detector("hog")


def test_of_boxes_that_overlap_the_best_is_left() -> None:
    boxes = boxes_of((0, 0, 0.5, 0.5), (0, 0, 0.5, 0.45), (0.5, 0.5, 0.5, 0.9), (0.6, 0, 1, 0.5))
    left = distinct(FoundPersons(boxes, np.float32([0.5, 0.9, 0.3, 0.9])))
    assert left.scores.tolist() == pytest.approx([0.9, 0.9, 0.3])
    assert np.array_equal(left.boxes, boxes[[1, 3, 2]])


def test_tracks_follow_persons_that_cross_and_survive_a_gap() -> None:
    left, right = boxes_of((0, 0, 0.2, 0.5)), boxes_of((0.8, 0, 1, 0.5))
    nobody = boxes_of()
    assert link_tracks([np.concatenate((left, right)), np.concatenate((right, left)), nobody, nobody, left]) == [
        [0, 1], [1, 0], [], [], [0],
    ]  # fmt: skip
    # After a longer gap it is someone else.
    assert link_tracks([left, nobody, nobody, nobody, left]) == [[0], [], [], [], [1]]
    # Both overlap with one: the larger overlap has it, though the other comes first.
    near, nearer = boxes_of((0.05, 0, 0.25, 0.5)), boxes_of((0.01, 0, 0.21, 0.5))
    assert link_tracks([left, np.concatenate((near, nearer))]) == [[0], [1, 0]]


def test_a_box_moves_evenly_between_keyframes_and_vanishes_behind_the_last() -> None:
    seen = [Sighting(1, 0, (0, 0, 0.2, 0.5), ("walk",)), Sighting(3, 0, (0.4, 0, 0.6, 0.5), ("stand",))]
    (quarter,) = at_time({0: seen}, 1.5, 2)
    assert quarter.box == pytest.approx((0.1, 0, 0.3, 0.5)) and quarter.lines == ("walk",)
    (late,) = at_time({0: seen}, 3.9, 2)
    assert late.box == (0.4, 0, 0.6, 0.5) and late.lines == ("stand",)
    assert not list(at_time({0: seen}, 4.1, 2)) and not list(at_time({0: seen}, -0.1, 2))


def test_a_rendered_video_has_every_frame_and_the_boxes(tmp_path: Path) -> None:
    seen = [Sighting(time, 2, (0.25, 0.25, 0.75, 0.75), ("walk 0.93", "talk 0.40")) for time in (0.0, 1.0)]
    count = render(str(PEDESTRIANS), seen, 1.0, tmp_path / "out" / "drawn.mp4")
    with av.open(str(tmp_path / "out" / "drawn.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == count == 60
    yellow = np.float32([255, 225, 25])
    edge = lambda frame: np.abs(frame[200:400, 192:194].astype(float).mean((0, 1)) - yellow).max()  # noqa: E731
    assert edge(frames[5]) < 40 < edge(frames[40])


def test_small_videos_are_enlarged_so_that_words_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "small.mp4").write_bytes(encoded([np.full((96, 130, 3), 90, np.uint8)] * 3))
    seen = [Sighting(0.0, 2, (0.25, 0.25, 0.75, 0.75), ())]
    assert render(str(tmp_path / "small.mp4"), seen, 1.0, tmp_path / "drawn.mp4") == 3
    with av.open(str(tmp_path / "drawn.mp4")) as video:
        frame = next(video.decode(video=0)).to_ndarray(format="rgb24")
    assert frame.shape == (384, 520, 3)
    inside, edge = frame[200, 260].astype(int), frame[200, 129:132].astype(int).max(0)
    assert abs(inside - 90).max() < 6 and edge[0] > 200, "the box at a quarter of the width"


def test_odd_sides_and_boxes_over_the_border_are_drawn() -> None:
    picture = np.zeros((35, 51, 3), np.uint8)
    persons = [Sighting(0, 0, (-0.2, -0.1, 1.3, 0.6), ("ä",)), Sighting(0, 1, (0.5, 0.5, 0.5, 0.5), ())]
    drawn = draw_persons(picture, persons)
    assert drawn.shape == picture.shape and drawn.any() and not picture.any()


def test_what_is_no_video_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(DataError, match="text.mp4 -> .*can't be written"):
        render(str(tmp_path / "text.mp4"), [], 1.0, tmp_path / "out.mp4")

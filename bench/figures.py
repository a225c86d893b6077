"""Films of drawn people over real video whose actions are well defined: what detectors of actions are tested on.

python bench/figures.py SET FOLDER --backgrounds VIDEOS
    SET: alone    each person's label is what it does
         others   what each does, and whether another person, far off, does the same at the same time
         before   what it does, and what it did 20 seconds ago
Writes FOLDER/{train,val}/*.mp4 and FOLDER/{train,val}.csv (video, time, x1, y1, x2, y2, label, person), ready for
launch/pack.py --task detection. Seeded: the same command writes the same films. Labels tell nothing but what is done:
boxes are those of all that a person might do, each second's action and its phase are drawn by themselves, and films to
judge by have the last third of each background, which those to train on don't show.
"""

import argparse
import csv
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]

WIDTH, HEIGHT, FPS = 128, 96, 8
#: Keyframes lie in the middle between two whole seconds, so that a clip of a second holds one action.
KEY = 0.5
#: Seconds that the set `before` looks back.
BACK = 20
#: Drawn so much larger and made smaller: lines without steps.
FINE = 3
#: Backgrounds are cut out of pictures up to so much larger than a film.
LARGEST = 1.6
#: Share of a background's frames that films to train on show; the others are those of films to judge by.
TRAINED = 2 / 3


@dataclass(frozen=True)
class Pose:
    """Angles of limbs in radians from hanging down, outwards; knees bent by a share of the legs."""

    arms: float = 0.25
    leg: float = 0.15
    crouch: float = 0.0


def stand(turn: float) -> Pose:
    """Stand still."""
    return Pose()


def reach(turn: float) -> Pose:
    """Hold both arms up."""
    return Pose(arms=2.5)


def wave(turn: float) -> Pose:
    """Move both arms up and down."""
    return Pose(arms=1.4 - 1.15 * math.cos(turn))


def squat(turn: float) -> Pose:
    """Bend the knees and get up again."""
    return Pose(crouch=0.35 - 0.35 * math.cos(turn))


#: By the turn that a person is in, radians: one turn a second.
ACTIONS: dict[str, Callable[[float], Pose]] = {"stand": stand, "reach": reach, "wave": wave, "squat": squat}


@dataclass(frozen=True)
class Person:
    """A drawn person.

    Attributes:
        x, y: of the feet, pixels.
        size: height of the body, pixels.
        skin, shirt, sleeves, trousers: colours.
        actions: what it does in each second.
        phases: turn that each second begins at, radians.
    """

    x: float
    y: float
    size: float
    skin: tuple[int, int, int]
    shirt: tuple[int, int, int]
    sleeves: tuple[int, int, int]
    trousers: tuple[int, int, int]
    actions: list[str]
    phases: list[float]

    def pose(self, time: float) -> Pose:
        """Pose at a time, seconds."""
        second = int(time)
        return ACTIONS[self.actions[second]](self.phases[second] + 2 * math.pi * (time - second))

    @property
    def box(self) -> tuple[float, float, float, float]:
        """What the person may reach, whatever it does: the box must not tell the action. x1, y1, x2, y2 in pixels."""
        return self.x - 0.4 * self.size, self.y - 1.1 * self.size, self.x + 0.4 * self.size, self.y


@dataclass
class Film:
    """People, and the labels of each at each second."""

    people: list[Person]
    seconds: int
    labels: list[list[list[str]]] = field(default_factory=list)


def draw(picture: Picture, people: list[Person], time: float) -> tuple[Picture, list[tuple[float, ...]]]:
    """Draw people into a picture, uint8 [H, W, 3]; returns it with their boxes in shares, at a time in seconds."""
    from PIL import Image, ImageDraw

    height, width = picture.shape[:2]
    image = Image.fromarray(picture).resize((width * FINE, height * FINE))
    pen = ImageDraw.Draw(image)
    boxes = []
    for person in people:
        _draw_person(pen, person, person.pose(time))
        corners = np.clip(np.array(person.box) / [width, height, width, height], 0, 1)
        boxes.append(tuple(corners.tolist()))
    return np.asarray(image.resize((width, height), Image.Resampling.BOX)), boxes


def _draw_person(pen: Any, person: Person, pose: Pose) -> None:
    size, thick = person.size, 0.11 * person.size
    hip = np.array([person.x, person.y - 0.42 * size * math.cos(pose.leg) * (1 - pose.crouch)])
    neck = hip - [0, 0.34 * size]

    def line(start: npt.NDArray[np.float64], end: npt.NDArray[np.float64], colour: Any, width: float) -> None:
        pen.line([*(start * FINE), *(end * FINE)], fill=colour, width=round(width * FINE))

    for side in (-1, 1):
        foot = np.array([person.x + side * 0.42 * size * math.sin(pose.leg), person.y])
        # Knees go outwards: their two halves stay as long as they were.
        knee = (hip + foot) / 2 + [side * 0.2 * size * math.sqrt(pose.crouch), 0]
        line(hip, knee, person.trousers, thick)
        line(knee, foot, person.trousers, thick)
    line(hip, neck, person.shirt, 2.6 * thick)
    for side in (-1, 1):
        shoulder = neck + [side * thick, 0.03 * size]
        swing = np.array([side * math.sin(pose.arms), math.cos(pose.arms)])
        line(shoulder, shoulder + 0.34 * size * swing, person.sleeves, thick)
    head = neck - [0, 0.12 * size]
    pen.ellipse([*((head - 0.11 * size) * FINE), *((head + 0.11 * size) * FINE)], fill=person.skin)


def make_person(rng: np.random.Generator, x: float, size: float, actions: list[str]) -> Person:
    """Draw a person's looks by chance; sleeves are light and trousers dark, as of a uniform."""

    def colour(low: int, high: int) -> tuple[int, int, int]:
        red, green, blue = rng.integers(low, high, 3).tolist()
        return red, green, blue

    tone = rng.uniform(0.45, 1)
    skin = int(255 * tone), int(215 * tone), int(185 * tone)
    sleeves, trousers = (
        (int(rng.integers(225, 256)), int(rng.integers(190, 230)), int(rng.integers(0, 60))),
        colour(0, 50),
    )
    y, phases = HEIGHT - rng.uniform(2, 14), rng.uniform(0, 2 * math.pi, len(actions)).tolist()
    return Person(x, y, size, skin, colour(0, 256), sleeves, trousers, actions, phases)


def alone(rng: np.random.Generator) -> Film:
    """One or two people; each does something else each second."""
    count, seconds = int(rng.integers(1, 3)), 4
    places = rng.permutation([0.27, 0.73])[:count] * WIDTH + rng.uniform(-8, 8, count)
    people = [
        make_person(rng, float(x), float(rng.uniform(60, 78)), rng.choice(list(ACTIONS), seconds).tolist())
        for x in places
    ]
    return Film(people, seconds, [[[person.actions[second]] for person in people] for second in range(seconds)])


def others(rng: np.random.Generator) -> Film:
    """Two people at both ends of the picture: do they do the same?"""
    seconds = 4
    doing = [rng.choice(["reach", "squat"], seconds).tolist() for _ in range(2)]
    people = [
        make_person(rng, x * WIDTH, float(rng.uniform(60, 72)), each) for x, each in zip((0.2, 0.8), doing, strict=True)
    ]
    # What each does besides: whether two things are the same is found out by who knows them.
    labels = [
        [[own, "together" if one == two else "apart"] for own in (one, two)] for one, two in zip(*doing, strict=True)
    ]
    return Film(people, seconds, labels)


def before(rng: np.random.Generator) -> Film:
    """One person for a minute: what does it do, and what did it do 20 seconds ago?"""
    seconds = 3 * BACK
    doing = rng.choice(["reach", "squat"], seconds).tolist()
    person = make_person(rng, float(rng.uniform(0.3, 0.7)) * WIDTH, float(rng.uniform(60, 72)), doing)
    # The present too: nothing else makes the memory hold it, which gets no gradients from what looks into it.
    labels = [
        [doing[second], *([f"{doing[second - BACK]} before"] if second >= BACK else [])] for second in range(seconds)
    ]
    return Film([person], seconds, [[own] for own in labels])


SETS: dict[str, Callable[[np.random.Generator], Film]] = {"alone": alone, "others": others, "before": before}


@functools.cache
def load_background(path: Path) -> list[Picture]:
    """Decode a video whole, its frames made as small as the largest cut needs."""
    from PIL import Image

    from pretrain.data.decoders import open_video

    with open_video(path.read_bytes(), "pyav") as reader:
        frames = [Image.fromarray(frame) for frame in reader.frames(np.arange(reader.num_frames))]
    larger = max(WIDTH / frames[0].width, HEIGHT / frames[0].height) * LARGEST
    size = math.ceil(frames[0].width * larger), math.ceil(frames[0].height * larger)
    return [np.asarray(frame.resize(size, Image.Resampling.BOX)) for frame in frames]


def backgrounds(videos: list[Path], part: str, rng: np.random.Generator, frames: int) -> Iterator[Picture]:
    """Give frames of a part (train, val) of one of some videos, uint8 [H, W, 3], place and cut by chance."""
    from PIL import Image

    shown = load_background(videos[int(rng.integers(len(videos)))])
    border = round(TRAINED * len(shown))
    shown = shown[:border] if part == "train" else shown[border:]
    start = int(rng.integers(len(shown)))
    # To and fro: a cut in the background would be the only sudden change of the film.
    places = [(start + step) % (2 * len(shown)) for step in range(frames)]
    scale, across, down, flipped = rng.uniform(1, LARGEST), rng.random(), rng.random(), rng.random() < 0.5
    width, height = round(WIDTH * LARGEST / scale), round(HEIGHT * LARGEST / scale)
    for place in places:
        frame = shown[min(place, 2 * len(shown) - 1 - place)]
        top, left = int((frame.shape[0] - height) * down), int((frame.shape[1] - width) * across)
        cut = frame[top : top + height, left : left + width]
        yield np.asarray(Image.fromarray(cut[:, ::-1] if flipped else cut).resize((WIDTH, HEIGHT)))


def write_film(film: Film, shown: Iterator[Picture], path: Path) -> list[list[object]]:
    """Write a film over a background as H.264; returns its rows of annotation."""
    import av

    rows: list[list[object]] = []
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast", "g": "8", "x264-params": "cpu-independent=1"}
        for number, picture in enumerate(shown):
            time = number / FPS
            drawn, boxes = draw(picture, film.people, time)
            target.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(drawn), format="rgb24")))
            if time % 1 == KEY:
                rows += _rows(path.name, time, boxes, film.labels[int(time)])
        target.mux(stream.encode())
    return rows


def _rows(video: str, time: float, boxes: list[tuple[float, ...]], labels: list[list[str]]) -> list[list[object]]:
    return [
        [video, f"{time:g}", *(f"{share:.4f}" for share in box), label, person]
        for person, (box, own) in enumerate(zip(boxes, labels, strict=True))
        for label in own or [""]
    ]


def make_set(kind: str, folder: Path, videos: list[Path], counts: dict[str, int]) -> None:
    """Write the films and annotations of a set; `counts` films in each part."""
    for part, count in counts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        with (folder / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["video", "time", "x1", "y1", "x2", "y2", "label", "person"])
            for number in range(count):
                rng = np.random.default_rng([number, sorted(SETS).index(kind), len(part)])
                film = SETS[kind](rng)
                shown = backgrounds(videos, part, rng, film.seconds * FPS)
                writer.writerows(write_film(film, shown, folder / part / f"{number:04d}.mp4"))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(SETS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backgrounds", type=Path, required=True, help="folder of videos")
    parser.add_argument("--train", type=int, default=300, help="films (default 300)")
    parser.add_argument("--val", type=int, default=60, help="films (default 60)")
    arguments = parser.parse_args()
    videos = sorted(path for path in arguments.backgrounds.rglob("*.mp4"))
    if not videos:
        parser.error(f"{arguments.backgrounds}: no .mp4 files")
    make_set(arguments.set, arguments.folder, videos, {"train": arguments.train, "val": arguments.val})


if __name__ == "__main__":
    import sys

    if not __package__:
        sys.path[0] = str(Path(__file__).parents[1])
    main()

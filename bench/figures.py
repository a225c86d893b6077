"""Films of drawn people over real video whose actions are well defined: what detectors of actions are tested on.

python bench/figures.py SET FOLDER --backgrounds VIDEOS
    SET: alone    each person's label is what it does
         others   whether another person, far off, does the same at the same time
         before   what it did 20 seconds ago
Writes FOLDER/{train,val}/*.mp4 and FOLDER/{train,val}.csv (video, time, x1, y1, x2, y2, label, person), ready for
launch/pack.py --task detection. Seeded: the same command writes the same films.
"""

import argparse
import csv
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

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


@dataclass(frozen=True)
class Pose:
    """Angles of limbs in radians from hanging down, outwards; heights as shares of the body."""

    left_arm: float = 0.15
    right_arm: float = 0.15
    left_leg: float = 0.12
    right_leg: float = 0.12
    lift: float = 0.0
    crouch: float = 0.0


def stand(time: float) -> Pose:
    """Stand still."""
    return Pose()


def wave(time: float) -> Pose:
    """Wave with both arms over the head, twice a second."""
    swing = 2.4 + 0.6 * math.sin(4 * math.pi * time)
    return Pose(left_arm=swing, right_arm=swing)


def jump(time: float) -> Pose:
    """Jump twice a second."""
    return Pose(lift=0.3 * abs(math.sin(2 * math.pi * time)), left_arm=0.6, right_arm=0.6)


def squat(time: float) -> Pose:
    """Bend the knees and get up again, once a second."""
    return Pose(crouch=0.35 * math.sin(math.pi * (time % 1)) ** 2, left_arm=1.4, right_arm=1.4)


def kick(time: float) -> Pose:
    """Kick sideways with one leg, twice a second."""
    return Pose(right_leg=0.1 + 1.2 * max(0.0, math.sin(4 * math.pi * time)))


ACTIONS: dict[str, Callable[[float], Pose]] = {"stand": stand, "wave": wave, "jump": jump, "squat": squat, "kick": kick}


@dataclass(frozen=True)
class Person:
    """A drawn person.

    Attributes:
        x, y: of the feet, pixels.
        size: height of the body, pixels.
        skin, shirt, trousers: colours.
        actions: what it does in each second.
    """

    x: float
    y: float
    size: float
    skin: tuple[int, int, int]
    shirt: tuple[int, int, int]
    trousers: tuple[int, int, int]
    actions: list[str]

    def pose(self, time: float) -> Pose:
        """Pose at a time, seconds."""
        return ACTIONS[self.actions[min(int(time), len(self.actions) - 1)]](time)


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
        points = _draw_person(pen, person, person.pose(time))
        (x1, y1), (x2, y2) = points.min(0), points.max(0)
        corners = np.clip([x1 / width, y1 / height, x2 / width, y2 / height], 0, 1)
        boxes.append(tuple(corners.tolist()))
    return np.asarray(image.resize((width, height), Image.Resampling.BOX)), boxes


def _draw_person(pen: object, person: Person, pose: Pose) -> npt.NDArray[np.float64]:
    """Draw one person; returns the corners of all its parts in pixels [n, 2]."""
    size, thick = person.size, 0.07 * person.size
    leg = 0.42 * size * (1 - pose.crouch)
    hip = np.array([person.x, person.y - leg - pose.lift * size])
    neck, arm = hip - [0, 0.34 * size], 0.34 * size
    head = neck - [0, 0.12 * size]
    corners = [head + 0.11 * size, head - 0.11 * size]

    def limb(start: npt.NDArray[np.float64], angle: float, length: float, colour: tuple[int, int, int]) -> None:
        end = start + [math.sin(angle) * length, math.cos(angle) * length]
        pen.line([*(start * FINE), *(end * FINE)], fill=colour, width=round(thick * FINE))  # type: ignore[attr-defined]
        corners.extend([end - thick / 2, end + thick / 2])

    for side, angle in ((-1, pose.left_leg), (1, pose.right_leg)):
        limb(hip, side * angle, 0.42 * size * (1 - pose.crouch) if abs(angle) < 1 else leg, person.trousers)
    pen.line([*(hip * FINE), *(neck * FINE)], fill=person.shirt, width=round(2.6 * thick * FINE))  # type: ignore[attr-defined]
    corners.extend([hip - 1.3 * thick, neck + 1.3 * thick])
    for side, angle in ((-1, pose.left_arm), (1, pose.right_arm)):
        limb(neck + [side * thick, 0.03 * size], side * angle, arm, person.skin)
    box = [*((head - 0.11 * size) * FINE), *((head + 0.11 * size) * FINE)]
    pen.ellipse(box, fill=person.skin)  # type: ignore[attr-defined]
    return np.array(corners)


def make_person(rng: np.random.Generator, x: float, size: float, actions: list[str]) -> Person:
    """Draw a person's looks by chance."""

    def colour(low: int, high: int) -> tuple[int, int, int]:
        red, green, blue = rng.integers(low, high, 3).tolist()
        return red, green, blue

    skin = tuple(int(part * rng.uniform(0.55, 1)) for part in (255, 215, 185))
    y = HEIGHT - rng.uniform(2, 14)
    return Person(x, y, size, (skin[0], skin[1], skin[2]), colour(0, 256), colour(0, 130), actions)


def alone(rng: np.random.Generator) -> Film:
    """One or two people; each does something else each second."""
    count, seconds = int(rng.integers(1, 3)), 4
    places = rng.permutation([0.27, 0.73])[:count] * WIDTH + rng.uniform(-8, 8, count)
    people = [
        make_person(rng, float(x), float(rng.uniform(48, 66)), rng.choice(list(ACTIONS), seconds).tolist())
        for x in places
    ]
    return Film(people, seconds, [[[person.actions[second]] for person in people] for second in range(seconds)])


def others(rng: np.random.Generator) -> Film:
    """Two people at both ends of the picture: do they do the same?"""
    seconds = 4
    doing = [rng.choice(["wave", "squat"], seconds).tolist() for _ in range(2)]
    people = [
        make_person(rng, x * WIDTH, float(rng.uniform(48, 60)), each)
        for x, each in zip((0.14, 0.86), doing, strict=True)
    ]
    labels = [["together"] if one == two else ["apart"] for one, two in zip(*doing, strict=True)]
    return Film(people, seconds, [[label, label] for label in labels])


def before(rng: np.random.Generator) -> Film:
    """One person for 40 seconds: what did it do 20 seconds ago?"""
    seconds = 2 * BACK
    doing = rng.choice(["wave", "squat"], seconds).tolist()
    person = make_person(rng, float(rng.uniform(0.3, 0.7)) * WIDTH, float(rng.uniform(48, 60)), doing)
    past = {"wave": "waved", "squat": "squatted"}
    labels = [[[past[doing[second - BACK]]] if second >= BACK else []] for second in range(seconds)]
    return Film([person], seconds, labels)


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


def backgrounds(videos: list[Path], rng: np.random.Generator, frames: int) -> Iterator[Picture]:
    """Give frames of one of some videos, uint8 [H, W, 3], place and cut by chance."""
    from PIL import Image

    shown = load_background(videos[int(rng.integers(len(videos)))])
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


def write_film(film: Film, videos: list[Path], rng: np.random.Generator, path: Path) -> list[list[object]]:
    """Write a film as H.264; returns its rows of annotation."""
    import av

    rows: list[list[object]] = []
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast", "g": "8", "x264-params": "cpu-independent=1"}
        for number, picture in enumerate(backgrounds(videos, rng, film.seconds * FPS)):
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
                writer.writerows(write_film(film, videos, rng, folder / part / f"{number:04d}.mp4"))


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

"""Build the demo's labelled action clips: animated people over moving photographs, 128 x 128, H.264.

Not needed to use the clips, which are committed beside this file; kept so that they can be made again:

    pip install av pillow numpy emoji==2.16.0
    pip install --no-deps scikit-image==0.26.0                                    # for its photographs only
    for i in 1 2 3 4; do npm pack @lobehub/fluent-emoji-anim-$i@1.0.0; done        # 730 MB
    for f in lobehub-*.tgz; do mkdir -p animations/$f && tar xzf $f -C animations/$f; done
    python tests/assets/actions/build.py animations

Every clip is a pure function of its animation's name: background, its path, place, size and mirroring of the person.
"""

import csv
import hashlib
import importlib.util
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import emoji
import numpy as np
from PIL import Image, ImageSequence

HERE = Path(__file__).parent
SIZE = 128
FPS = 24
LONGEST = 72
#: Photographs of scikit-image, all CC0 or in the public domain; README.md names their sources.
BACKGROUNDS = "brick.png grass.png gravel.png coffee.png chelsea.png hubble_deep_field.jpg rocket.jpg".split()
ACTIONS = (
    "biking bouncing_ball bowing cartwheeling climbing facepalming feeding_baby gesturing_NO gesturing_OK "
    "getting_haircut getting_massage golfing in_lotus_position in_motorized_wheelchair juggling lifting_weights "
    "mountain_biking playing_handball raising_hand rowing_boat running shrugging surfing swimming tipping_hand "
    "walking with_white_cane"
).split()


@dataclass(frozen=True)
class Clip:
    """One clip to make: its source animation, action, who performs it and their skin tone."""

    animation: Path
    action: str
    who: str
    tone: str

    @property
    def path(self) -> str:
        """Path of the clip, relative to the manifest."""
        return f"clips/{self.action}/{self.who}_{self.tone}.mp4"


def find_clips(folder: Path) -> list[Clip]:
    """The animations of ACTIONS below `folder`, recognised by the code points in their file names."""
    found: dict[str, Clip] = {}
    for file in sorted(folder.rglob("*.webp")):
        if not re.fullmatch(r"[0-9a-f]{2,5}(-[0-9a-f]{2,5})*", file.stem):
            continue
        name = emoji.demojize("".join(chr(int(code, 16)) for code in file.stem.split("-"))).strip(":")
        match = re.fullmatch(r"(man|woman|person)_([\w-]+)", name)
        if not match:
            continue
        who, rest = match.groups()
        tone = re.search(r"_?(light|medium-light|medium|medium-dark|dark)_skin_tone", rest)
        action = rest.replace(tone[0], "") if tone else rest
        if action in ACTIONS:
            clip = Clip(file, action, who, tone[1] if tone else "yellow")
            found[clip.path] = clip
    return [found[path] for path in sorted(found)]


def render(clip: Clip) -> Iterator[np.ndarray[Any, Any]]:
    """Frames [SIZE, SIZE, 3] of a clip."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(clip.path.encode()).digest()[:8], "big"))
    background = _background(rng)
    people = [frame.convert("RGBA") for frame in ImageSequence.Iterator(Image.open(clip.animation))][:LONGEST]
    side = int(rng.integers(92, 125))
    place, drift = rng.uniform(0, SIZE - side, 2), rng.uniform(-0.12, 0.12, 2)
    start, pan = rng.uniform(0.25, 0.75, 2), rng.uniform(-0.7, 0.7, 2)
    mirrored = bool(rng.integers(2))
    room = np.array(background.size) - SIZE
    for time, person in enumerate(people):
        x, y = np.clip(start * room + pan * time, 0, room)
        frame = background.crop((x, y, x + SIZE, y + SIZE)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        small = person.resize((side, side), Image.Resampling.LANCZOS)
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else small
        left, top = np.clip(place + drift * time, 0, SIZE - side)
        frame.paste(small, (round(left), round(top)), small)
        yield np.asarray(frame)


def _background(rng: np.random.Generator) -> Image.Image:
    """A photograph at a random size, tinted, a little darker or lighter; large enough to pan over."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None and spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "data" / BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    photo = Image.open(file).convert("RGB")
    scale = rng.uniform(1.8, 2.6) * SIZE / min(photo.size)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
    tinted = np.asarray(photo, dtype=np.float32) * rng.uniform(0.65, 1.1, 3)
    return Image.fromarray(tinted.clip(0, 255).astype(np.uint8))


def encode(clip: Clip, target: Path) -> int:
    """Write one clip; returns its number of frames."""
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    options = {"crf": "28", "preset": "veryslow", "g": "32", "threads": "1"}
    with av.open(str(target), "w", options={"movflags": "+faststart", "fflags": "+bitexact"}) as out:
        stream = out.add_stream("libx264", rate=Fraction(FPS), options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in render(clip):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            count += 1
        out.mux(stream.encode(None))
    return count


def make(clip: Clip) -> dict[str, object]:
    """Write one clip and return its line of the manifest: women are the test set, men and persons the training set."""
    frames = encode(clip, HERE / clip.path)
    split = "test" if clip.who == "woman" else "train"
    about = {"path": clip.path, "label": clip.action, "split": split}
    return about | {"who": clip.who, "tone": clip.tone, "length": frames}


def main() -> int:
    """Build everything below this file's folder."""
    if len(sys.argv) != 2:
        sys.exit("usage: build.py FOLDER_WITH_UNPACKED_ANIMATIONS (see the top of this file)")
    clips = find_clips(Path(sys.argv[1]))
    counts: dict[str, int] = defaultdict(int)
    for clip in clips:
        counts[clip.action] += 1
    lacking = {action: counts[action] for action in ACTIONS if counts[action] != 18}
    if lacking:
        sys.exit(f"18 variants of each action are expected, found {lacking}: are all four packages unpacked there?")
    with ProcessPoolExecutor() as pool:
        lines = list(pool.map(make, clips, chunksize=8))
    with open(HERE / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())

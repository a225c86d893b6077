"""Do a video and a sound encoder learn from each other, and what do speeds and soft targets change? By pretrain.py.

python bench/speed_coaug_learning.py WORK [--only RUN ...] [--epochs 30] [--clips FOLDER]

Made clips by default: a square blinks on a textured ground when a drum is heard, at random moments, so that nothing but
rhythm ties what is seen to what is heard; 512 to train on, 128 to judge by. With --clips: films with sound of your own
(musicalgestures' pianist.avi and dancer.avi, say), cut into pieces of 5 seconds, the last quarter of each to judge by.
Every run has the same network, files, passes and seed. R@k: a held-out video's own sound among the k nearest of all.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SIDE, FPS, SECONDS, RATE = 20, 16, 5, 8000
SETS = {"train": 512, "held_out": 128}
#: Share of a film of one's own that is trained on.
TRAINED = 0.75

RECIPE = """\
model: {{name: r2plus1d, width: 16, blocks: [1, 1, 1, 1], classes: 0, dropout: 0}}
objective:
  name: speed_coaug
  head: [128, 64]
  sound: {{width: 16}}
  held_out: {{pairs: {work}/shards/held_out, every_epochs: {epochs}}}
input:
  frames: 16
  fps: {fps}
  height: 16
  width: 16
  area: [0.6, 1.0]
  jitter: [0.2, 0.2, 0.2, 0.1]
  sound: {{rate: {rate}, seconds: 1.0}}
  spectrogram: {{window: 256, rate: 50}}
data:
  sources: {{made: {{shards: {work}/shards/train}}}}
  lanes: 16
  shuffle_window: 32
  workers: 1
batch: {{samples: 32, micro: 32, ranks: 1}}
optim: {{name: adam, base_lr: 1e-3, base_batch: 32, weight_decay: 1e-5, betas: [0.9, 0.999]}}
schedule: {{epochs: {epochs}, warmup_epochs: 1, shape: cosine}}
compute: {{dtype: fp32}}
zero: {{stage: 0}}
checkpoint: {{every_epochs: 100}}
log: {{every_steps: 16, pictures_every_steps: 0, wandb: disabled}}
"""
HARD = ["objective.loss.kind=info_nce"]
RUNS = {
    "vanilla": [*HARD, "input.views=1", "input.speeds=[1]"],
    "speed_info_nce": HARD,
    "speed_negatives": [*HARD, "objective.loss.same_file=negative"],
    "speed_soft": [],
    "speed_soft_schedule": ["objective.loss.soft.kind=schedule"],
    "speed_of_video": ["input.plays=video"],
    "speed_of_sound": ["input.plays=sound"],
}


def main() -> None:
    """Make or cut the clips, train each way, print a line of the table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for clips, shards and runs")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=Path, help="folder of films with sound of your own")
    options = parser.parse_args()
    options.work = options.work.absolute()
    if not (options.work / "shards").exists():
        make_shards(options.work, options.clips)
    print("| run | R@1, video -> sound | R@1, sound -> video | R@5 | median rank | of | minutes |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in options.only:
        print(train(name, options), flush=True)


def make_shards(work: Path, films: Path | None) -> None:
    """Write clips and pack them, sound kept."""
    for number, (name, count) in enumerate(SETS.items()):
        folder = work / "clips" / name
        folder.mkdir(parents=True, exist_ok=True)
        if films is None:
            for index in range(count):
                write_clip(folder / f"{index:04d}.mp4", *made_clip(np.random.default_rng((number, index))))
        else:
            for film in sorted(films.iterdir()):
                cut_film(film, folder, name == "train")
        words = [sys.executable, "launch/pack.py", str(folder), str(work / "shards" / name), "--audio", "keep"]
        subprocess.run(words, cwd=ROOT, check=True, env=environment(), stdout=subprocess.DEVNULL)


def made_clip(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a square that lights up on each beat of a drum: frames uint8 [T, H, W, 3] and sound [N]."""
    moments = np.cumsum(rng.uniform(0.12, 0.7, size=4 * SECONDS * FPS))
    moments = moments[moments < SECONDS]
    ground = rng.integers(0, 120, (SIDE, SIDE, 3))
    y, x = rng.integers(0, SIDE - 10, 2)
    colour = rng.integers(160, 256, 3)
    frames = np.repeat(ground[None], SECONDS * FPS, 0)
    for moment in moments:
        # Two frames long, as a flash is seen; the frame that is shown at the beat is the first.
        first = round(moment * FPS)
        frames[first : first + 2, y : y + 10, x : x + 10] = colour
    times = np.arange(SECONDS * RATE) / RATE
    sound = rng.normal(0, 0.003, len(times))
    for moment in moments:
        after = times - moment
        sound += np.where(after >= 0, np.exp(-after * 40), 0) * rng.normal(0, 0.25, len(times))
    return frames.astype(np.uint8), np.clip(sound, -1, 1).astype(np.float32)


def cut_film(film: Path, folder: Path, train: bool) -> None:
    """Cut a film into pieces, small and at one rate, of its beginning to train on or of its end."""
    sys.path.insert(0, str(ROOT))
    from pretrain.data.decoders import open_video
    from pretrain.data.decoders.sound import decode_sound, sound_span
    from pretrain.samples.transforms import centre_crop

    content = film.read_bytes()
    with open_video(content, "pyav") as reader:
        last = min(reader.duration, sound_span(content)[1])
        turn = int(last * TRAINED / SECONDS) * SECONDS
        for start in range(0, turn, SECONDS) if train else range(turn, int(last) - SECONDS, 2):
            frames = reader.frames(reader.indices_at(start + np.arange(SECONDS * FPS) / FPS))
            sound = decode_sound(content, RATE, 1, float(start), float(SECONDS))[0]
            write_clip(folder / f"{film.stem}_{start:04d}.mp4", centre_crop(frames, SIDE, SIDE), sound)


def write_clip(path: Path, frames: np.ndarray, sound: np.ndarray) -> None:
    """Write frames and sound as one mp4."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "20"})
        heard = out.add_stream("aac", rate=RATE, layout="mono")
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        for picture in frames:
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(video.encode(None))
        one = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        one.sample_rate, one.time_base, one.pts = RATE, Fraction(1, RATE), 0
        out.mux(heard.encode(one))
        out.mux(heard.encode(None))


def environment() -> dict[str, str]:
    """Give the environment of a run on one thread."""
    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}


def train(name: str, options: argparse.Namespace) -> str:
    """Train one way in a fresh folder; returns its line."""
    recipe = options.work / f"{name}.yaml"
    recipe.write_text(RECIPE.format(work=options.work, epochs=options.epochs, fps=FPS, rate=RATE), encoding="utf-8")
    run = options.work / f"{name}_{options.seed}_{time.strftime('%H%M%S')}"
    own = [f"run.dir={run}", f"run.seed={options.seed}", *RUNS[name]]
    started = time.monotonic()
    subprocess.run([sys.executable, "launch/pretrain.py", "--recipe", str(recipe), *own], cwd=ROOT,
                   env=environment(), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    minutes = (time.monotonic() - started) / 60
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [record for record in records if "eval/pairs" in record][-1]
    names = ("video_to_sound_R@1", "sound_to_video_R@1", "video_to_sound_R@5", "video_to_sound_median_rank", "pairs")
    numbers = " | ".join(f"{last[f'eval/{key}']:.1f}" for key in names)
    return f"| {name} | {numbers} | {minutes:.1f} |"


if __name__ == "__main__":
    main()

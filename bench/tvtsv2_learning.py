"""Does TVTSv2 learn on two cores? A small CLIP from captioned clips and pictures, then transcript sorting on films.

python bench/tvtsv2_learning.py WORK [--pictures FOLDER] [--seed 0] [--only clip|sorting|clips]

1. `clip`: the contrast alone on single frames of captioned clips (27 actions of men and persons, tests/assets/actions),
   and of captioned pictures (`bench/picture_sets.py stamps FOLDER`), from random weights; saved as a CLIP file.
2. `sorting`: TVTSv2 from that file, a step on narrated films, a step on captioned clips, in turn. A film is four clips
   of different actions, one after another; what is said over each names its action.
`clips` is the second stage without films. Judged on performers that nobody trained on (women): zero-shot top-1 of 27
actions by the sentence "a person {}" (chance 3.7 %), places of texts (25 %) and films in the right order (1/24, 4.2 %).
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

ROOT = Path(__file__).resolve().parents[1]
ACTIONS = ROOT / "tests/assets/actions"
RATE, SIDE = 12, 64
#: Seconds of a film's segment, and between two of them; films of each half.
SEGMENT, GAP = 1.0, 0.25
FILMS = {"train": 400, "test": 96}
RECIPE = """\
model: {{name: tvtsv2, size: custom, image_size: 40, patch_size: 8, dim: 96, depth: 3, heads: 3, embedding: 64,
  text_dim: 64, text_depth: 4, text_heads: 2, activation: quick_gelu, context: 12, vocabulary: {vocabulary}, frames: 4,
  sort_heads: 4}}
objective: {{name: tvtsv2, mask_ratio: 0, temperature: {temperature}, clip_lr_scale: {scale},
  tune_text_blocks: {tuned}}}
input: {{name: narrated, frames: {frames}, height: 40, width: 40, narrated: {narrated}, seconds: [1], gap: 0.25,
  tokenizer: {work}/tokenizer.json, context: 12}}
data: {{sources: {sources}, compose: {compose}, lanes: 4, shuffle_window: 512, workers: 1}}
batch: {{samples: 48, micro: 48, ranks: 1}}
optim: {{base_lr: {rate}, scaled: none, betas: [0.9, 0.98], eps: 1e-6, base_min_lr: 1e-5, clip_grad: 1}}
schedule: {{steps: {steps}, warmup_epochs: 0, warmup_steps: 30}}
compute: {{dtype: fp32}}
zero: {{stage: 0}}
checkpoint: {{every_epochs: 100}}
log: {{every_steps: 50, pictures_every_steps: 0, wandb: disabled}}
run: {{seed: {seed}, init_weights: {init}, dir: {run}}}
"""


def main() -> None:
    """Prepare what is missing, train, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder of bench/picture_sets.py stamps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("clip", "sorting", "clips"))
    parser.add_argument("--steps", type=int, nargs=2, default=(500, 900), help="of the first and the second stage")
    options = parser.parse_args()
    options.work = options.work.absolute()
    if not (options.work / "done").exists():
        prepare(options.work, options.pictures)
    for stage in ("clip", "sorting", "clips"):
        if options.only in (None, stage):
            print(json.dumps(train(stage, options)), flush=True)


def prepare(work: Path, pictures: Path | None) -> None:
    """Pack clips, films and pictures, and make the tokenizer of their words."""
    work.mkdir(parents=True, exist_ok=True)
    with (ACTIONS / "manifest.csv").open() as file:
        rows: list[dict[str, Any]] = [row | {"path": str(ACTIONS / row["path"])} for row in csv.DictReader(file)]
    for row in rows:
        row["label"] = row["label"].replace("_", " ")
        row["caption"] = f"a person {row['label']}"
    names = sorted({row["label"] for row in rows})
    (work / "names.txt").write_text("\n".join(names) + "\n")
    words = make_tokenizer(work / "tokenizer.json", [*names, "a person", *(CLASSES if pictures else ())])
    (work / "vocabulary").write_text(str(words))
    if pictures:
        stamps = sorted(pictures.glob("train/*/*.png"))
        named = [(str(path), path.parent.name) for path in stamps]
        pack(work, "stamps", [{"path": path, "caption": f"a {name}"} for path, name in named], "--kind", "image")
    for half in ("train", "test"):
        own = [row for row in rows if row["split"] == half]
        pack(work, f"clips_{half}", own, "--copy")
        pack(work, f"films_{half}", make_films(work / f"raw_{half}", own, FILMS[half], half == "test"), "--copy")
    (work / "done").touch()


CLASSES = ("bird", "insect", "mammal", "fruit", "vegetable", "household", "plant", "vehicle")


def make_tokenizer(path: Path, texts: list[str]) -> int:
    """Write a tokenizer that knows these texts' words; returns their number."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    words = ["[PAD]", "[UNK]", "<start>", *sorted({word for text in texts for word in text.split()}), "<end>"]
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    marks = [(word, words.index(word)) for word in ("<start>", "<end>")]
    tokenizer.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=marks)
    tokenizer.save(str(path))
    return len(words)


def make_films(folder: Path, rows: list[dict[str, Any]], count: int, held_out: bool) -> list[dict[str, Any]]:
    """Write films of four actions with what is said over them."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(held_out)
    labels = sorted({row["label"] for row in rows})
    clips = {label: [frames_of(row["path"]) for row in rows if row["label"] == label] for label in labels}
    found = []
    for number in range(count):
        chosen = [labels[place] for place in rng.permutation(len(labels))[:4]]
        parts = [clips[label][int(rng.integers(len(clips[label])))] for label in chosen]
        length = round((SEGMENT + GAP) * RATE)
        path = folder / f"{number:04d}.mp4"
        write_film(path, [frame for part in parts for frame in part[np.arange(length) % len(part)]])
        said = [
            {"word": word, "time": 0.4 + place * (SEGMENT + GAP) + 0.02 * n}
            for place, label in enumerate(chosen)
            for n, word in enumerate(f"a person {label}".split())
        ]
        found.append({"path": str(path), "narration": {"subtitles": said}})
    return found


def frames_of(path: str) -> Any:
    """Decode a clip at the films' rate and size, uint8 [T, H, W, 3]."""
    import av

    with av.open(path) as file:
        frames = [frame.to_ndarray(width=SIDE, height=SIDE, format="rgb24") for frame in file.decode(video=0)]
    return np.stack(frames[::2])


def write_film(path: Path, frames: list[Any]) -> None:
    """Encode a film with H.264."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "g": "6"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def pack(work: Path, name: str, rows: list[dict[str, Any]], *words: str) -> None:
    """Pack rows by launch/pack.py."""
    listed = work / f"{name}.jsonl"
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("launch/pack.py", str(listed), str(work / name), *words)


def train(stage: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run a stage; returns its last scores."""
    work, seed, first = options.work, options.seed, stage == "clip"
    run_dir, file = work / f"{stage}_{seed}", work / f"clip_{seed}.pt"
    sources = {"clips": {"shards": str(work / "clips_train")}}
    if (work / "stamps").is_dir():
        sources["stamps"] = {"shards": str(work / "stamps")}
    sorts = stage == "sorting"
    if sorts:
        sources = {"films": {"shards": str(work / "films_train")}, "clips": sources["clips"]}
    recipe = work / f"{stage}_{seed}.yaml"
    recipe.write_text(RECIPE.format(
        work=work, run=run_dir, seed=seed, vocabulary=(work / "vocabulary").read_text(), sources=json.dumps(sources),
        narrated="[films]" if sorts else "[]", compose="alternate" if sorts else "mixed", frames=1 if first else 4,
        scale=1 if first else 0.3, tuned=4 if first else 1, rate=1e-3, init="null" if first else file,
        temperature=0.1 if first else 0.05, steps=options.steps[0 if first else 1],
    ))  # fmt: skip
    started = time.monotonic()
    run("launch/pretrain.py", "--recipe", str(recipe))
    found: dict[str, Any] = {"stage": stage, "seed": seed, "seconds": round(time.monotonic() - started)}
    return found | judge(run_dir, work, file if first else None)


def judge(run_dir: Path, work: Path, file: Path | None) -> dict[str, float]:
    """Measure a run on held-out performers; writes its towers as a CLIP file where one is asked for."""
    import torch

    from pretrain.models.clip_weights import open_clip_names
    from pretrain.objectives.tvtsv2_evaluation import VideoTextEvaluation
    from pretrain.runtime.process_group import present_ranks
    from pretrain.trained.load_run import load_trained

    trained = load_trained(run_dir)
    state = trained.objective.model.state_dict()
    if file is not None:
        new = ("times.", "timeattn.", "norm3.", "sorting.")
        torch.save(open_clip_names({k: v for k, v in state.items() if not any(part in k for part in new)}), file)
    found: dict[str, float] = {}
    trained.recipe.input.frames = 4
    for measure, shards, keys in (("recognition", "clips_test", ("top1", "top5")),
                                  ("sorting", "films_test", ("placed", "sorted", "t2v_R@10"))):  # fmt: skip
        options = trained.recipe.objective.held_out
        options.measure, options.shards, options.class_names = measure, str(work / shards), str(work / "names.txt")
        scores = VideoTextEvaluation(trained.recipe, present_ranks(torch.device("cpu")))(trained.objective)
        found |= {key: round(scores[key], 1) for key in keys}
    return found


def run(*words: str) -> None:
    """Run one of our commands."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    main()

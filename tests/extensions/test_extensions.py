"""Six additions of every kind, in miniature: files in a copy of the checkout, nothing edited; then they train.

A contrastive method with a queue on pairs of pictures, one on video with sound, one on captioned pictures with a frozen
tower, an adversarial one on rasters of two sources, a detection task with boxes, a narration task on feature arrays.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from tests.toy_run import free_port
from tests.toy_shards import ROOT

HERE = Path(__file__).parent
RUNS = {
    "queue_contrast": "pretrain",
    "video_sound": "pretrain",
    "captioned": "pretrain",
    "translation": "pretrain",
    "tiny_detection": "finetune",
    "tiny_narration": "finetune",
}
#: Eight samples and four a step: two steps an epoch.
STEPS = 6
SHORT = (
    "schedule.epochs=3 schedule.warmup_epochs=0 log.peak_tflops=1 log.wandb=disabled log.pictures_every_steps=0 "
    "compute.dtype=fp32 zero.stage=1 checkpoint.every_steps=3 optim.base_lr=0.1"
).split()


def draw(number: int, size: int = 40) -> np.ndarray:
    """A picture of noise with a bright square, never flat."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
    pixels[number : number + 16, 8:24] = rng.integers(130, 255, 3)
    return pixels


def write_film(path: Path, number: int) -> None:
    """One second of 12 frames with a tone whose height goes with the picture."""
    rate = 8000
    with av.open(str(path), "w") as file:
        video, audio = file.add_stream("libx264", rate=12), file.add_stream("aac", rate=rate)
        video.width = video.height = 40
        video.pix_fmt = "yuv420p"
        audio.layout = "mono"
        for _ in range(15):
            file.mux(video.encode(av.VideoFrame.from_ndarray(draw(number), format="rgb24")))
        tone = np.sin(2 * np.pi * (200 + 90 * number) * np.arange(rate * 5 // 4) / rate).astype(np.float32)
        sound = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
        sound.sample_rate = rate
        file.mux(audio.encode(sound))
        file.mux(audio.encode(None))
        file.mux(video.encode(None))


def make_sources(folder: Path) -> None:
    """Pictures with captions and boxes, films, rasters and features, as people have them."""
    for name in ("pictures", "films", "old", "new", "told"):
        (folder / name).mkdir(parents=True)
    boxes = []
    for number in range(8):
        picture = folder / "pictures" / f"{number}.png"
        Image.fromarray(draw(number)).save(picture)
        picture.with_suffix(".txt").write_text(f"a square {number}")
        row = {"path": str(picture), "boxes": [[0.2, number / 40, 0.6, (number + 16) / 40]] * (1 + number % 3)}
        boxes.append(json.dumps(row))
        write_film(folder / "films" / f"{number}.mp4", number)
        rng = np.random.default_rng(number)
        np.save(folder / "old" / f"{number}.npy", rng.gamma(2, 3, (1, 24, 20)).astype(np.float32))
        np.save(folder / "new" / f"{number}.npy", rng.normal(4, 2, (2, 30, 22)).astype(np.float32))
        np.save(folder / "told" / f"{number}.npy", rng.normal(number, 1, (5, 6)).astype(np.float32))
        (folder / "told" / f"{number}.txt").write_text(f"film {number}")
    (folder / "boxed.jsonl").write_text("\n".join(boxes) + "\n")


def make_tower(folder: Path) -> None:
    """A text tower's weights and a tokeniser, as files."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "square": 3} | {str(n): 4 + n for n in range(10)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    table = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    safetensors.numpy.save_file({"table.weight": table}, folder / "tower.safetensors")


def execute(root: Path, *command: str) -> str:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TUBELET_DATA": str(root / "shards")}
    environment["PATH"] = str(Path(sys.executable).parent) + os.pathsep + environment["PATH"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def drive(root: Path, ranks: int, folder: str, *overrides: str, only: tuple[str, ...] = tuple(RUNS)) -> list[int]:
    """Train some of the six on some ranks."""
    plan = [
        {"program": RUNS[name], "recipe": name, "overrides": [*SHORT, f"run.dir={folder}/{name}", *overrides]}
        for name in only
    ]
    (root / f"{folder}.json").write_text(json.dumps(plan))
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--master_port", str(free_port())]
    launcher = [*deepspeed, "--num_accelerators", str(ranks)] if ranks > 1 else []
    printed = execute(root, sys.executable, *launcher, str(HERE / "driver.py"), f"{folder}.json")
    line = next(line for line in printed.splitlines() if "CODES " in line)
    codes: list[int] = json.loads(line.partition("CODES ")[2])
    return codes


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with the six additions, and their data packed by the command that users have."""
    root = tmp_path_factory.mktemp("extended")
    for package in ("pretrain", "finetune", "launch", "recipes"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in sorted((HERE / "files").rglob("*")):
        target = root / path.relative_to(HERE / "files")
        if path.is_file() and "__pycache__" not in path.parts:
            assert not target.exists(), f"{target}: an extension replaces nothing"
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
    make_sources(root / "raw")
    pack = [sys.executable, "launch/pack.py", "--workers", "0"]
    execute(root, *pack, "raw/pictures", "shards/pictures", "--kind", "image", "--with", "txt")
    execute(root, *pack, "raw/films", "shards/films", "--audio", "keep")
    execute(root, *pack, "raw/boxed.jsonl", "shards/boxed", "--kind", "image")
    for name in ("old", "new"):
        execute(root, *pack, f"raw/{name}", f"shards/{name}", "--kind", "array")
    execute(root, *pack, "raw/told", "shards/told", "--kind", "array", "--with", "txt")
    make_tower(root / "shards")
    return root


def losses(root: Path, folder: str, name: str) -> list[float]:
    lines = (root / folder / name / "metrics.jsonl").read_text().splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [record["train/loss"] for record in records if "train/loss" in record]


@pytest.fixture(scope="module")
def one(root: Path) -> Path:
    """The six runs on one rank."""
    assert drive(root, 1, "one") == [0] * len(RUNS)
    return root / "one"


def test_their_steps_are_replayed(root: Path, one: Path) -> None:
    """With the queue, the frozen tower and the turns that they had: the losses are the run's own to the bit."""
    names = ("queue_contrast", "captioned", "translation")
    lines = [f"assert main(['one/{name}', '4', '--all']) == 0" for name in names]
    execute(root, sys.executable, "-c", "\n".join(["from finetune.commands.replay import main", *lines]))
    found = {}
    for name in names:
        report = json.loads((one / name / "incidents" / "replay_step_00000004.json").read_text())
        assert report["weights_of_step"] == 3
        found[name] = [(batch["turn"], batch["loss"]) for batch in report["micro_batches"]]
    for name in names[:2]:
        assert np.mean([loss for _, loss in found[name]]) == losses(root, "one", name)[3], name
    line = json.loads((one / "translation/metrics.jsonl").read_text().splitlines()[3])
    # The later turn saw the critic's update, and so has another loss.
    critic, translator = found["translation"][::2], found["translation"][1::2]
    assert np.mean([loss for _, loss in critic]) == line["train/loss_critic"] and line["step"] == 4
    assert [turn for turn, _ in critic + translator] == ["critic"] * 2 + ["translator"] * 2


def test_six_additions_train_resume_and_don_t_depend_on_ranks(root: Path, one: Path) -> None:
    assert drive(root, 2, "two", "batch.micro=2") == [0] * len(RUNS)
    # Stopped after three steps, and gone on with: queue, frozen tower, both turns' moments come back.
    assert drive(root, 2, "halves", "batch.micro=2", "schedule.max_steps=3") == [0] * len(RUNS)
    assert drive(root, 2, "halves", "batch.micro=2") == [0] * len(RUNS)
    for name in RUNS:
        whole = losses(root, "two", name)
        assert len(whole) == STEPS and np.isfinite(whole).all() and len(set(whole)) == STEPS, (name, whole)
        assert losses(root, "halves", name) == whole, f"{name}: resumed, bit for bit"
        near = np.allclose(losses(root, "one", name), whole, rtol=2e-4)
        assert near, f"{name}: another number of ranks: {losses(root, 'one', name)}, {whole}"
    records = (root / "two/tiny_detection/metrics.jsonl").read_text()
    assert '"eval/closeness"' in records, "a task's own evaluation"
    assert '"train/loss_critic"' in (root / "two/translation/metrics.jsonl").read_text()

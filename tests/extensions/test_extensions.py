"""Six additions of every kind, in miniature: files in a copy of the checkout, nothing edited; then they train.

A contrastive method with a queue on pairs of pictures, one on video with sound, one on captioned pictures with a frozen
tower, an adversarial one on rasters of two sources, a detection task with boxes, a narration task on feature arrays.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from tests.toy_run import train
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

#: Six steps must lead to some right bytes.
OWN = {"tiny_narration": ("optim.base_lr=3",)}


def draw(number: int) -> np.ndarray:
    """A picture of noise with a bright square, 40 x 56, never flat."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 120, (40, 56, 3), dtype=np.uint8)
    pixels[number : number + 16, 8:24] = rng.integers(130, 255, 3)
    return pixels


def write_film(path: Path, number: int) -> None:
    """Two seconds of 12 frames each, with a tone whose height goes with the picture and rises with time."""
    rate = 8000
    with av.open(str(path), "w") as file:
        video, audio = file.add_stream("libx264", rate=12), file.add_stream("aac", rate=rate)
        video.height, video.width, _ = draw(number).shape
        video.pix_fmt = "yuv420p"
        audio.layout = "mono"
        for _ in range(24):
            file.mux(video.encode(av.VideoFrame.from_ndarray(draw(number), format="rgb24")))
        seconds = np.arange(rate * 2) / rate
        tone = np.sin(2 * np.pi * (200 + 90 * number + 150 * seconds) * seconds).astype(np.float32)
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
        row = {"path": str(picture), "boxes": [[8 / 56, number / 40, 24 / 56, (number + 16) / 40]] * (1 + number % 3)}
        boxes.append(json.dumps(row))
        write_film(folder / "films" / f"{number}.mp4", number)
        rng = np.random.default_rng(number)
        np.save(folder / "old" / f"{number}.npy", rng.gamma(2, 3, (1, 24, 20)).astype(np.float32))
        np.save(folder / "new" / f"{number}.npy", rng.normal(4, 2, (2, 30, 22)).astype(np.float32))
        np.save(folder / "told" / f"{number}.npy", rng.normal(number, 1, (5, 6)).astype(np.float32))
        (folder / "told" / f"{number}.txt").write_text(f"film {number}")
    (folder / "boxed.jsonl").write_text("\n".join(boxes) + "\n")


def make_tower(folder: Path, seed: int = 0) -> None:
    """A text tower's weights and a tokeniser, as files."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "square": 3} | {str(n): 4 + n for n in range(10)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    table = np.random.default_rng(seed).normal(size=(64, 16)).astype(np.float32)
    safetensors.numpy.save_file({"table.weight": table}, folder / "tower.safetensors")


def execute(root: Path, *words: str, ranks: int = 1) -> str:
    # The checkout of these tests would hide the copy.
    return train(words, ranks, root, timeout_s=400, TUBELET_DATA=str(root / "shards"), PYTHONPATH="")


def entries(folder: str, *overrides: str, only: Iterable[str] = RUNS) -> list[dict[str, Any]]:
    """Runs for driver.py, in a folder of their own."""
    return [
        {
            "program": RUNS[name],
            "recipe": name,
            "overrides": [*SHORT, *OWN.get(name, ()), f"run.dir={folder}/{name}", *overrides],
            # Once is enough, and each takes as long as the run itself.
            "planned": folder == "one",
        }
        for name in only
    ]


def drive(root: Path, ranks: int, plan: list[dict[str, Any]]) -> list[Any]:
    """Train run after run on some ranks; what each of them ended with."""
    (root / "plan.json").write_text(json.dumps(plan))
    printed = execute(root, str(HERE / "driver.py"), "plan.json", ranks=ranks)
    line = next(line for line in printed.splitlines() if "ENDS " in line)
    ends: list[Any] = json.loads(line.partition("ENDS ")[2])
    return ends


PACK = """
import json, sys
from pretrain.commands.pack import main
sys.exit(max(main(["--workers", "0", *words]) for words in json.loads(sys.argv[1])))
"""


PLAN_AND_EXPORT = """
import json, sys
from finetune.commands import export
from pretrain.commands import plan
planned, exported = json.loads(sys.argv[1])
sys.exit(plan.main(planned) or export.main(exported))
"""


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
    commands = [
        ["raw/pictures", "shards/pictures", "--kind", "image", "--with", "txt"],
        ["raw/films", "shards/films", "--audio", "keep"],
        ["raw/boxed.jsonl", "shards/boxed", "--kind", "image"],
        *([f"raw/{name}", f"shards/{name}", "--kind", "array"] for name in ("old", "new")),
        ["raw/told", "shards/told", "--kind", "array", "--with", "txt"],
    ]
    execute(root, "-c", PACK, json.dumps(commands))
    make_tower(root / "shards")
    shutil.copy(root / "shards/tower.safetensors", root / "other.safetensors")
    return root


def command(root: Path, *plan: tuple[str, list[str]]) -> list[tuple[int, str]]:
    """Run commands one after the other; exit code and output of each."""
    (root / "commands.json").write_text(json.dumps(plan))
    printed = execute(root, str(HERE / "commands_driver.py"), "commands.json")
    line = next(line for line in printed.splitlines() if line.startswith("RESULTS "))
    return [(code, output) for code, output in json.loads(line.removeprefix("RESULTS "))]


@pytest.fixture(scope="module")
def ends(root: Path) -> dict[str, list[Any]]:
    """The six on one rank and on two, and on two stopped after three steps and gone on with; by folder."""
    micro, half = "batch.micro=2", "schedule.max_steps=3"
    # The loss across the whole batch: two micro-batches on one rank, one on two.
    # And once more in one micro-batch, whose loss a replay can give again.
    one = drive(root, 1, entries("one") + entries("at_once", "batch.micro=4", only=["queue_contrast"]))
    changed = entries("changed", micro, f"objective.tower={root / 'other.safetensors'}", only=["captioned"])
    begun = [entry | {"overrides": [*entry["overrides"], half]} for entry in entries("halves", micro) + changed]
    two = drive(root, 2, entries("two", micro, "log.pictures_every_steps=3") + begun)
    make_tower(root, seed=1)
    (root / "tower.safetensors").replace(root / "other.safetensors")
    # Queue, teacher, frozen tower, both turns' moments come back.
    rest = drive(root, 2, entries("halves", micro) + changed)
    count = len(RUNS)
    first = {"one": one[:count], "two": two[:count], "begun": two[count:]}
    return first | {"halves": rest[:count], "changed": rest[count:]}


@pytest.fixture(scope="module")
def trained(root: Path, ends: dict[str, list[Any]]) -> Path:
    """The runs of one rank."""
    assert [end[0] for end in ends["one"]] == [0] * len(RUNS)
    return root / "one"


def losses(root: Path, folder: str, name: str) -> list[float]:
    lines = (root / folder / name / "metrics.jsonl").read_text().splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [record["train/loss"] for record in records if "train/loss" in record]


def test_replayed_losses_are_those_of_the_run(root: Path, trained: Path) -> None:
    """With the queue, the frozen tower and the turns that they had: the losses are the run's own to the bit."""
    runs = {"queue_contrast": "at_once", "captioned": "one", "translation": "one"}
    lines = [f"assert main(['{folder}/{name}', '4', '--all']) == 0" for name, folder in runs.items()]
    execute(root, "-c", "\n".join(["from finetune.commands.replay import main", *lines]))
    found = {}
    for name, folder in runs.items():
        report = json.loads((root / folder / name / "incidents" / "replay_step_00000004.json").read_text())
        assert report["weights_of_step"] == 3
        found[name] = [(batch["turn"], batch["loss"]) for batch in report["micro_batches"]]
    for name in ("queue_contrast", "captioned"):
        assert np.mean([loss for _, loss in found[name]]) == losses(root, runs[name], name)[3], name
    line = json.loads((trained / "translation/metrics.jsonl").read_text().splitlines()[3])
    # The later turn saw the critic's update, and so has another loss.
    critic, translator = found["translation"][::2], found["translation"][1::2]
    assert np.mean([loss for _, loss in critic]) == line["train/loss_critic"] and line["step"] == 4
    assert [turn for turn, _ in critic + translator] == ["critic"] * 2 + ["translator"] * 2


def test_six_additions_train_resume_and_don_t_depend_on_ranks(root: Path, ends: dict[str, list[Any]]) -> None:
    for folder in ("one", "two", "begun", "halves"):
        assert [end[0] for end in ends[folder]] == [0] * len(ends[folder]), ends[folder]
    for name in RUNS:
        whole = losses(root, "two", name)
        assert len(whole) == STEPS and np.isfinite(whole).all() and len(set(whole)) == STEPS, (name, whole)
        assert losses(root, "halves", name) == whole, f"{name}: resumed, bit for bit"
        near = np.allclose(losses(root, "one", name), whole, rtol=2e-4)
        assert near, f"{name}: another number of ranks: {losses(root, 'one', name)}, {whole}"
    records = (root / "two/tiny_detection/metrics.jsonl").read_text()
    assert '"eval/closeness"' in records, "a task's own evaluation"
    assert '"train/loss_critic"' in (root / "two/translation/metrics.jsonl").read_text()


DETECTION, NARRATION = (
    ["--recipe", name, *SHORT, f"run.dir=one/{name}"] for name in ("tiny_detection", "tiny_narration")
)
#: Command, words, exit code, and a part of what it prints.
OF_CLASSIFICATION = [
    ("predict", ["film.mp4", "--weights", "one/tiny_detection"], 1, "objective tiny_detection has no answer"),
    ("finetune", [*NARRATION, "--test", "last"], 0, ""),
    ("finetune", [*DETECTION, "--test", "last"], 0, ""),
    ("finetune", ["--compare", "one/tiny_detection"], 1, "tiny_detection; --compare is for classification"),
    ("evaluate", DETECTION, 2, "objective.name: found tiny_detection, allowed: classification"),
    ("finetune", [*DETECTION, "ema.decay=0.9", "--check"], 2, "ema: objective.name=tiny_detection does not read"),
    ("finetune", [*DETECTION, "tune.lora.rank=4", "--check"], 2, "tune: objective.name=tiny_detection does not"),
    ("export", ["one/translation", "x", "--format", "map"], 2, "can be written as: safetensors"),
]
COMMANDS = {
    "replay": [("replay", [f"one/{name}", "6"]) for name in RUNS],
    "export": [("export", [f"one/{name}", f"weights/{name}"]) for name in RUNS],
    "export again": [("export", [f"weights/{name}", f"again/{name}"]) for name in RUNS],
    "refused": [(name, words) for name, words, _, _ in OF_CLASSIFICATION],
}


@pytest.fixture(scope="module")
def told(root: Path, trained: Path) -> dict[str, list[tuple[int, str]]]:
    """Exit codes and outputs of all commands below, from one process."""
    plan = [(f"finetune.commands.{name}", words) for part in COMMANDS.values() for name, words in part]
    results = iter(command(root, *plan))
    return {part: [next(results) for _ in entries] for part, entries in COMMANDS.items()}


def test_their_steps_are_replayed(trained: Path, told: dict[str, list[tuple[int, str]]]) -> None:
    found = dict(zip(RUNS, told["replay"], strict=True))
    assert [code for code, _ in found.values()] == [0] * len(RUNS), found
    pictures = {name for name in RUNS if list((trained / name / "incidents").glob("replay_step_00000006_video.*"))}
    assert pictures == {"queue_contrast", "video_sound", "captioned", "tiny_detection"}
    assert all(("no picture" in output) != (name in pictures) for name, (_, output) in found.items())
    turns = json.loads((trained / "translation/incidents/replay_step_00000006.json").read_text())["micro_batches"]
    assert [(row["micro"], row["turn"]) for row in turns] == [(m, t) for m in (0, 1) for t in ("critic", "translator")]
    for row in turns:
        assert row["loss"] > 0 and {name.split(".")[1] for name in row["gradients"]} == {row["turn"]}


def test_their_weights_are_exported_and_read_back(root: Path, told: dict[str, list[tuple[int, str]]]) -> None:
    assert [code for code, _ in told["export"] + told["export again"]] == [0] * 2 * len(RUNS), told
    for name in RUNS:
        weights, again = (
            safetensors.numpy.load_file(root / folder / name / "model.safetensors") for folder in ("weights", "again")
        )
        card = (root / "weights" / name / "README.md").read_text()
        assert f"\ntags: [{name}, " in card and "videomae" not in card
        assert weights and weights.keys() == again.keys()
        assert all(np.array_equal(weights[key], again[key]) for key in weights), name


def test_commands_of_classification_refuse_other_tasks(told: dict[str, list[tuple[int, str]]]) -> None:
    for case, found in zip(OF_CLASSIFICATION, told["refused"], strict=True):
        assert found[0] == case[2] and case[3] in found[1], (case, found)


def test_additions_bring_their_own_tests_and_pictures(root: Path, ends: dict[str, list[Any]]) -> None:
    tests = {name: end[1] for name, end in zip(RUNS, ends["two"], strict=True)}
    assert {name for name, found in tests.items() if found is not None} == {"tiny_detection", "tiny_narration"}
    assert tests["tiny_detection"] == {"tested": 1.0}
    assert 0 < tests["tiny_narration"]["right_bytes"] < 1
    assert ends["halves"][list(RUNS).index("tiny_narration")][1] == tests["tiny_narration"], "the same weights"
    assert len((root / "two/tiny_narration/narration.bin").read_bytes()) == 8 * 12, "bytes of eight films"
    pictures = {path.parent.parent.name for path in (root / "two").glob("*/pictures/step_00000003.png")}
    assert pictures == {"queue_contrast"}


def test_an_addition_is_planned_and_exported_by_the_commands(root: Path, ends: dict[str, list[Any]]) -> None:
    words = ["--recipe", "queue_contrast", "--gpus", "2", "--json", "plan.json", *SHORT, "batch.micro=2"]
    execute(root, "-c", PLAN_AND_EXPORT, json.dumps([words, ["two/queue_contrast", "exported"]]))
    assert json.loads((root / "plan.json").read_text())["largest_micro"] > 2
    weights = safetensors.numpy.load_file(root / "exported/model.safetensors")
    assert weights and not any("twin" in name for name in weights), "the network alone"


def test_frozen_tower_is_noted_and_a_changed_one_refused(root: Path, ends: dict[str, list[Any]]) -> None:
    notes = [
        json.loads((root / folder / "captioned/checkpoints" / step / "state.json").read_text())["frozen"]["tower"]
        for folder, step in (("two", "step_00000006"), ("halves", "step_00000006"), ("changed", "step_00000003"))
    ]
    assert len({note["digest"] for note in notes}) == 1, "of the values, wherever they lie"
    assert notes[2]["weights"] == str(root / "other.safetensors")
    (refused,) = ends["changed"]
    assert refused.startswith("CheckpointError") and notes[2]["digest"] in refused and "objective.tower" in refused
    assert len(losses(root, "changed", "captioned")) == 3

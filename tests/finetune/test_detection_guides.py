"""The commands of the guides of action detection, from annotations to a rendered video, with small models and films."""

import json
import pickle
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import av
import pytest

from finetune.commands.evaluate import main as evaluate
from finetune.commands.finetune import main as finetune
from pretrain.data.boxes.action_list import named_classes
from pretrain.data.decoders import open_video
from tests.data.boxes.box_files import write
from tests.films import write_film
from tests.finetune.test_from_csv import FOUND, LABELS, TRUTH, other_truth, tube_files
from tests.toy_run import train
from tests.toy_shards import ROOT, encoded

PEDESTRIANS = ROOT / "tests" / "assets" / "pedestrians.mp4"
PACKING = "--workers 0 --preset ultrafast --check-reads 1"
COMMON = """
    run.init_weights=null batch.samples=4 batch.micro=4 batch.ranks=1 data.lanes=4 data.shuffle_window=4 data.workers=0
    evaluate.micro=4 evaluate.workers=0 schedule.epochs=1 schedule.warmup_epochs=0 compute.dtype=fp32 zero.stage=0
    compute.activation_checkpointing=false log.wandb=disabled log.peak_tflops=0.1 log.pictures_every_steps=0
    input.frames=4 input.short_side=32 model.size=custom model.patch_size=16 model.dim=32 model.heads=2
    model.mlp_ratio=2 model.drop_path=0"""
VIT = """
    model.depth=1 model.pretrain_frames=4 model.pretrain_height=32 model.pretrain_width=32 input.crop_size=32"""
#: What makes a recipe small.
SMALL = {
    "vit_b_ava": VIT,
    "vit_l_cycleacr_ava": f"""{VIT}
        objective.dim=8 objective.hidden=16 objective.memory.past=2 objective.memory.future=1 objective.max_persons=4
        objective.memory.max_per_second=2""",
    "vit_b_evad_ava": """
        model.depth=4 model.pretrain_side=64 model.queries=8 model.rcnn_heads=1 model.query_dim=24 model.query_heads=2
        model.query_hidden=48 model.dynamic_dim=8 model.pool_size=3 model.action_pool_size=3 model.decoder_dim=24
        model.decoder_depth=1 model.decoder_heads=2 model.decoder_drop_path=0 model.action_hidden=32
        model.prune_blocks=[1] input.max_boxes=8 schedule.epochs=2 schedule.milestones=[1]""",
}
PAGES = ("videomae_detection", "cycleacr", "evad")
#: Words of commands that look at a recipe and need nothing else.
LOOKING = {"--check", "--dry-run"}
#: Rows of the own csv files, keyframes 3 s apart.
HEADER = "video,time,x1,y1,x2,y2,label,person\n"
OWN = [f"club/a,{time},{0.3 * row:.1f},0.1,{0.3 * row + 0.2:.1f},0.9,{label},{row}\n"
       for time in (1, 4, 7, 10) for row, label in enumerate(("wave", "jump", "sit"))]  # fmt: skip


def commands(page: str) -> list[list[str]]:
    """Words of each command of a page."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    lines = [shlex.split(line) for line in "".join(blocks).splitlines()]
    assert all(words[0] in ("python", "deepspeed") and words[1].startswith("launch/") for words in lines), lines
    return [words[1:] for words in lines]


def small(words: list[str]) -> list[str]:
    """The same command for small films and models."""
    script = Path(words[0]).stem
    if script == "pack":
        return [*words, *PACKING.split()]
    if script != "finetune":
        return words
    recipe = words[words.index("--recipe") + 1]
    return [*words, *COMMON.split(), *SMALL[recipe].split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the guides name: films of one frame a second, so that second 902 is near."""
    root = tmp_path_factory.mktemp("guides")
    write_film(root / "films/m.mp4", 920, fps=1)
    write_film(root / "videos/club/a.mp4", 300)
    with open_video(PEDESTRIANS.read_bytes(), "pyav") as reader:
        (root / "street.mp4").write_bytes(encoded(reader.frames(list(range(12))), 10))
    for split, seconds in (("train", range(902, 910)), ("val", range(912, 916))):
        rows = [f"m,0{second},0.1,0.1,0.5,0.9,{label},0\nm,0{second},0.5,0.1,0.9,0.9,80,1\n"
                for second in seconds for label in (12, 79)]  # fmt: skip
        write(root / f"ava_{split}_v2.2.csv", "".join(rows))
        write(root / f"ava_{split}_excluded_timestamps_v2.2.csv", "m,0903\nm,0915\n")
    people = "".join(f"m,0{second},0.1,0.1,0.5,0.8,,0.9\n" for second in range(912, 915))
    write(root / "ava_val_boxes.csv", people)
    left_out = {2, 16, 18, 19, 21, 23, 25, 31, 32, 33, 35, 39, 40, 42, 44, 50, 53, 55, 71, 75}
    items = [f'item {{ name: "action {one}" id: {one} }}\n' for one in range(1, 81) if one not in left_out]
    write(root / "ava_action_list.pbtxt", "".join(items))
    for split in ("train", "val"):
        write(root / f"{split}.csv", HEADER + "".join(OWN))
    return root


@pytest.fixture(scope="module")
def printed(folder: Path) -> dict[str, list[tuple[list[str], str]]]:
    """What each command of the guides of systems has printed, by page; all of them have ended well."""
    pages = {name: [words for words in commands(f"systems/{name}.md") if not LOOKING & set(words)] for name in PAGES}
    lines = [words for page in pages.values() for words in page]
    (folder / "lines.json").write_text(json.dumps([small(words) for words in lines]))
    output = train([ROOT / "tests/finetune/guide_program.py", folder / "lines.json"], 1, folder, timeout_s=570)
    parts = output.split("RUN [")[1:]
    assert len(parts) == len(lines) and [part.rsplit("CODE ", 1)[1].strip() for part in parts] == ["0"] * len(lines), (
        output[-6000:]
    )
    each = iter(parts)
    return {name: [(words, next(each)) for words in page] for name, page in pages.items()}


def of(printed: list[tuple[list[str], str]], script: str, word: str = "") -> str:
    """What the last command of a page with this script and word has printed."""
    return [text for words, text in printed if words[0] == f"launch/{script}.py" and word in " ".join(words)][-1]


@pytest.mark.parametrize("page", PAGES)
def test_guides_lead_to_a_number_and_a_rendered_video(page: str, folder: Path, printed: dict[str, Any]) -> None:
    for words, text in printed[page]:
        if words[0] == "launch/evaluate.py":
            # The number that the test itself gave, in the variant that is asked for.
            test = folder / words[words.index("--from-csv") + 1]
            scores = json.loads((max(test.parent.parent.glob("step_*")) / "scores.json").read_text())
            (variant, number), = re.findall(r"variant (\w+).*frame-mAP@0.5 ([\d.]+) %", text, re.DOTALL)
            assert float(number) == pytest.approx(scores[f"mAP ({variant})"], abs=0.006), words
        if words[0] == "launch/predict.py":
            with av.open(str(folder / words[words.index("--out") + 1])) as video:
                assert sum(1 for _ in video.decode(video=0)) == 12
            assert "1 keyframes" in text
    assert "video: street" in of(printed[page], "predict")


@pytest.mark.parametrize("page", PAGES)
def test_recipes_are_in_order_as_the_guides_have_them(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The words that make them small would hide what does not fit."""
    for words in commands(f"systems/{page}.md"):
        if words[0] == "launch/finetune.py" and "--test" not in words:
            looking = [] if LOOKING & set(words) else ["--check"]
            assert finetune([*words[1:], *looking]) == 0, capsys.readouterr().err
    if page == "evad":
        assert "520.6 GMAC" in capsys.readouterr().out


def test_what_is_said_of_files(folder: Path, printed: dict[str, Any]) -> None:
    assert [path.name for path in (folder / "weights").iterdir()] == ["evad.pth"]
    assert "usage: TRAIN.CHECKPOINT_FILE_PATH" in printed["evad"][-1][1]
    assert "3 classes, numbered by their names" in printed["videomae_detection"][6][1]
    assert all(len(row.split(",")) == 8 for row in (folder / "street_actions.csv").read_text().splitlines())


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the page on metrics names, all found as they are."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "ava_action_list.pbtxt", LABELS)
    write(tmp_path / "ava_val_v2.2.csv", TRUTH)
    write(tmp_path / "detections.csv", FOUND)
    write(tmp_path / "ava_val_excluded_timestamps_v2.2.csv", "film,0904\n")
    write(tmp_path / "ava_val_boxes.csv", re.sub(",1[02],", ",,", FOUND))
    write(tmp_path / "own.csv", HEADER + "film,902,0.1,0.1,0.5,0.9,walk,0\nfilm,903,0.1,0.1,0.5,0.9,run,0\n")
    write(tmp_path / "own_detections.csv", FOUND.replace(",12,", ",2,").replace(",10,", ",1,"))
    write(tmp_path / "shards/own/classes.json", named_classes("test", ["walk", "run"]).to_json())
    tube_files(tmp_path)
    content = pickle.loads((tmp_path / "truth.pkl").read_bytes())
    (tmp_path / "JHMDB-GT.pkl").write_bytes(pickle.dumps(content | {"test_videos": [["run/a"]] * 2}))
    other_truth(tmp_path, "names")
    (tmp_path / "own.csv").rename(tmp_path / "own_tubes.csv")
    write(tmp_path / "own.csv", HEADER + "film,902,0.1,0.1,0.5,0.9,walk,0\nfilm,903,0.1,0.1,0.5,0.9,run,0\n")
    other_truth(tmp_path, "pyannot")
    (tmp_path / "truth.pkl").rename(tmp_path / "pyannot.pkl")
    (tmp_path / "list.txt").rename(tmp_path / "testlist01.txt")
    for fold in (1, 2):
        shutil.copyfile(tmp_path / "found.csv", tmp_path / f"found_{fold}.csv")
    return tmp_path


def test_metrics_guide(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = commands("detection_metrics.md")
    assert len(lines) == 8
    for words in lines:
        assert evaluate(words[1:]) == 0, (words, capsys.readouterr().err)
        shown = capsys.readouterr().out
        number = "video-mAP @0.2 100.00" if "--tubes" in words else "AP@0.5 100.00 %"
        assert number in shown, (words, shown)
    assert json.loads((scored / "numbers.json").read_text())["variant"] == "slowfast"

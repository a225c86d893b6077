"""The commands of TagAlign's page, in order, on small pictures with a small CLIP."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.captioned_pictures import given, world
from tests.toy_run import train
from tests.toy_shards import ROOT, encoded

#: What makes the recipe small.
SMALL = """
    objective.towers.weights=clip objective.towers.dtype=fp32 input.height=32 input.width=32
    input.tokenizer=tokenizer.json input.context=12 batch.samples=8 batch.micro=4 batch.ranks=1 data.lanes=4
    data.shuffle_window=4 data.workers=0 data.bad_rate=0.9 schedule.steps=2 compute.dtype=fp32 zero.stage=0
    log.wandb=disabled log.peak_tflops=0.1 log.pictures_every_steps=0"""


def commands() -> list[list[str]]:
    """Words of each command of the page."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/systems/tagalign.md").read_text(), re.DOTALL)
    lines = [shlex.split(line) for line in "".join(blocks).splitlines()]
    assert len(lines) > 6 and all(one[0] in ("python", "deepspeed") and one[1].startswith("launch/") for one in lines)
    return [words[1:] for words in lines]


def small(words: list[str], tags: int) -> list[str]:
    sizes = [f"{key}={value}" for key, value in given().items()]
    script = Path(words[0]).stem
    if script == "tag":
        return [*words, "--tokenizer", "tokenizer.json", "--set", *sizes]
    if script == "pretrain":
        return [*words, *SMALL.split(), f"input.tag_count={tags}", *(f"model.clip.{size}" for size in sizes)]
    return [*words, "--workers", "0"] if script == "pack" else words


def test_the_page_leads_from_captions_to_masks(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    from tests.captioned_pictures import drawn

    folder = world(tmp_path_factory)
    for name in ("pictures", "masks"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "clip").mkdir()
    shutil.copy(folder / "clip.safetensors", tmp_path / "clip" / "model.safetensors")
    shutil.copy(folder / "tokenizer.json", tmp_path)
    shutil.copy(folder / "pictures" / "003.png", tmp_path / "cat.png")
    (tmp_path / "street.mp4").write_bytes(encoded((drawn(number // 6)[0] for number in range(12)), rate=6))
    lines = [words for words in commands() if "--check" not in words and "--dry-run" not in words]
    # Of the words that are left when no attributes are tags: shapes, ground, and what an odd caption says.
    (tmp_path / "lines.json").write_text(json.dumps([small(words, 5) for words in lines]))
    output = train([ROOT / "tests/finetune/guide_program.py", tmp_path / "lines.json"], 1, tmp_path, timeout_s=570)
    assert "5 tags; input.tag_count=5" in output and output.count("CODE 0") == len(lines)
    assert "mIoU, %" in output
    assert (tmp_path / "cat_queries.png").exists() and (tmp_path / "street_queries.mp4").exists()
    assert (tmp_path / "weights" / "own" / "model.safetensors").exists()

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.runtime import wandb_run
from pretrain.runtime.environment import environment_report
from pretrain.runtime.pictures import contact_sheet, save_pictures
from pretrain.runtime.progress import Goal, Progress, duration
from pretrain.runtime.seeds import seed_forward
from pretrain.runtime.speed import matmul_tflops
from pretrain.runtime.wandb_run import open_wandb, wandb_mode


def record(step: int, wait: float = 0.01, seconds: float = 2.0) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 10,
        "train/loss": 0.5,
        "optim/lr": 1e-3,
        "speed/step_s": seconds,
        "speed/clips_per_s": 8 / seconds,
        "speed/mfu": 0.25,
        "speed/data_wait_share": wait,
        "memory/peak_gib": 1.5,
    }


def shown(caplog: pytest.LogCaptureFixture, records: list[dict[str, Any]], every: int) -> list[str]:
    progress = Progress(Goal(0, 100, every), live=False)
    with caplog.at_level(logging.INFO):
        for one in records:
            progress.show(one)
    return [message for message in caplog.messages]


def test_plain_lines_come_at_the_interval_with_the_mean_speed(caplog: pytest.LogCaptureFixture) -> None:
    lines = shown(caplog, [record(1, seconds=1), record(2, seconds=3), record(3), record(4)], every=2)
    assert [line.split("  ")[0] for line in lines] == ["step 2/100", "step 4/100"]
    assert "4.0 clips/s" in lines[0]  # 16 clips in 4 s
    assert "MFU 25.0%" in lines[0]


def test_waiting_for_data_is_told_once_and_not_while_warming_up(caplog: pytest.LogCaptureFixture) -> None:
    lines = shown(caplog, [record(step, wait=0.5) for step in range(1, 40)], every=1000)
    assert len(lines) == 1
    assert "waits for data 50 %" in lines[0]
    caplog.clear()
    assert shown(caplog, [record(step, wait=0.5) for step in range(1, 20)], every=1000) == []


def test_duration() -> None:
    assert [duration(s) for s in (0, 61, 3_600 * 30 + 5)] == ["00:00:00", "00:01:01", "1d 06:00:05"]


def test_pictures_are_readable_and_show_the_pixels(tmp_path: Path) -> None:
    colours = {"original": (10, 20, 30), "masked": (99, 0, 5)}  # no grey, which letters have as well
    videos = {
        name: torch.tensor(colour, dtype=torch.uint8).expand(3, 16, 24, 32, 3) for name, colour in colours.items()
    }
    png, gif = save_pictures(videos, tmp_path / "pictures" / "step_1", clips=2)
    sheet = np.asarray(Image.open(png))
    assert np.array_equal(sheet, contact_sheet({name: video[:2].numpy() for name, video in videos.items()}))
    assert [int((sheet == value).all(-1).sum()) for value in colours.values()] == [2 * 8 * 24 * 32] * 2
    assert Image.open(gif).n_frames >= 1


def test_moving_picture_has_every_frame(tmp_path: Path) -> None:
    video = torch.arange(16, dtype=torch.uint8).mul(15).reshape(1, 16, 1, 1, 1).expand(1, 16, 24, 24, 3)
    assert Image.open(save_pictures({"original": video}, tmp_path / "x", clips=4)[1]).n_frames == 16


def test_forward_seeds_differ_in_each_part_and_repeat() -> None:
    def draw(*key: int) -> float:
        seed_forward(*key)
        return float(torch.rand(()))

    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    drawn = [draw(*key) for key in keys]
    assert len(set(drawn)) == len(keys)
    assert [draw(*key) for key in keys] == drawn


def test_environment_report_holds_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("NCCL_SECRET_THING", "hush")
    monkeypatch.setenv("WANDB_API_KEY", "hush")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    report = environment_report()
    assert report["variables"]["SLURM_JOB_ID"] == "17"
    assert "hush" not in str(report)
    assert report["packages"]["torch"] == torch.__version__.split("+")[0] or report["packages"]["torch"]


def test_matrix_rate_is_a_plausible_number() -> None:
    assert 0.001 < matmul_tflops(torch.device("cpu"), torch.float32) < 100


@pytest.mark.parametrize(
    ("setting", "environ", "expected"),
    [
        ("auto", {"NETRC": "/nowhere"}, "offline"),
        ("auto", {"WANDB_API_KEY": "x"}, "online"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "offline"),
        ("disabled", {"WANDB_API_KEY": "x"}, "disabled"),
        ("offline", {"WANDB_API_KEY": "x"}, "offline"),
    ],
)
def test_wandb_mode(setting: str, environ: dict[str, str], expected: str) -> None:
    assert wandb_mode(setting, environ) == expected


def test_wandb_offline_writes_into_the_run_folder_under_one_id(tmp_path: Path) -> None:
    ids = []
    for step in (1, 2):
        run = open_wandb("offline", "tubelet", "name", tmp_path, {"run": {"seed": 0}})
        run.log({"step": step, "train/loss": 0.5}, step)
        videos = {"original": torch.zeros(1, 4, 16, 16, 3, dtype=torch.uint8)}
        run.log_pictures(save_pictures(videos, tmp_path / "pictures" / f"{step}", clips=1), step)
        run.close(0)
        ids.append((tmp_path / "wandb_id").read_text())
    assert ids[0] == ids[1]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))) >= 1
    open_wandb("disabled", "tubelet", "name", tmp_path, {}).log({"train/loss": 1.0}, 3)


def wandb_files(folder: Path) -> list[Path]:
    return list((folder / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_wandb_server_that_does_not_answer_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(wandb_run, "START_S", 1.0)
    run = open_wandb("online", "tubelet", "name", tmp_path, {})
    run.log({"train/loss": 1.0}, 1)
    run.close(0)
    assert "online run could not be started" in caplog.text and "wandb sync" in caplog.text
    assert len(wandb_files(tmp_path)) == 1


@pytest.mark.parametrize("damage", [b"", b"\0" * 8, b"\xff\xfe", b"a b"])
def test_a_damaged_wandb_id_begins_another_run(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "wandb_id").write_bytes(damage)
    open_wandb("offline", "tubelet", "name", tmp_path, {}).close(0)
    found = (tmp_path / "wandb_id").read_text()
    assert wandb_run.RUN_ID.fullmatch(found) and found in wandb_files(tmp_path)[0].name


def test_a_folder_that_wandb_cannot_write_costs_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "wandb").write_text("no folder")  # root may write into every folder, so this stands for one it may not
    run = open_wandb("offline", "tubelet", "name", tmp_path, {})
    run.log({"train/loss": 1.0}, 1)
    run.close(0)
    assert "nothing is logged there" in caplog.text

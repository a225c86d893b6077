"""Disks that fill up: what a run can do without must not end it."""

import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.runtime.disk import Tolerance, advice
from pretrain.runtime.logging import RunFileHandler
from pretrain.runtime.metrics import JsonLines, read_records

ROOT = Path(__file__).resolve().parents[2]


def fill(folder: Path) -> Path:
    """Take all room of a file system."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return ballast


def test_records_wait_for_room(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = JsonLines(small_disk / "metrics.jsonl")
    lines.write({"step": 0})
    ballast = fill(small_disk)
    for step in range(1, 400):  # more than the rest of the file's last page takes
        lines.write({"step": step, "text": "x" * 100})
    assert caplog.text.count("could not be written, training goes on") == 1
    assert "disk or the quota is full" in caplog.text
    read = [record["step"] for record in read_records(small_disk / "metrics.jsonl")]
    assert read == list(range(len(read))) and len(read) < 100
    ballast.unlink()
    lines.write({"step": 400})
    lines.close()
    assert [record["step"] for record in read_records(small_disk / "metrics.jsonl")] == list(range(401))
    assert "can be written again" in caplog.text


def test_a_log_file_on_a_full_disk_is_told_once(small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    handler = RunFileHandler(small_disk / "log")
    logger = logging.getLogger("test_disk")
    logger.addHandler(handler)
    try:
        fill(small_disk)
        for _ in range(200):
            logger.warning("x" * 200)
    finally:
        logger.removeHandler(handler)
        handler.close()
    assert "Traceback" not in capfd.readouterr().err


def test_tolerance_is_for_named_errors_only(caplog: pytest.LogCaptureFixture) -> None:
    tolerate = Tolerance()
    with tolerate("it", KeyError):
        raise KeyError("x")
    with pytest.raises(ValueError), tolerate("it"):
        raise ValueError("a bug")
    assert "it could not be written" in caplog.text


def test_advice_fits_the_error() -> None:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for code, words in ((28, "full"), (30, "read-only"), (13, "may not write"), (24, f"now {soft}"), (5, "dmesg")):
        assert words in advice(OSError(code, os.strerror(code)))


def test_a_run_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    """As a user who is not root, where this is one."""
    code = (
        "import torch, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from pretrain.runtime.run_folder import open_folder\n"
        "from pretrain.errors import TrainingError\n"
        "from pretrain.runtime.process_group import Ranks\n"
        "import os\n"
        "os.setuid(65534) if os.getuid() == 0 else None\n"
        "try:\n"
        "    open_folder(sys.argv[1], Ranks(0, 1, 0, torch.device('cpu')), beat_s=10)\n"
        "except TrainingError as error:\n"
        "    print(error)\n"
    )
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        if parent.stat().st_uid == os.getuid() and parent != Path("/tmp"):
            parent.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code, str(closed / "run")], capture_output=True, text=True)
    assert "can't be written" in done.stdout and "change the owner or the mode" in done.stdout, done.stderr

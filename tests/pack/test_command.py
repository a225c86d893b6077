"""The command: exit codes, messages, checks, and running it as a file."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.commands.pack import main
from pretrain.data.index import load_index
from pretrain.data.pack import progress_report

ROOT = Path(__file__).resolve().parents[2]
FAST = ["--preset", "ultrafast", "--workers", "0", "--check-reads", "2", "--check-decoders", "pyav"]


@pytest.fixture(scope="module")
def packed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed class; copy it before changing it."""
    dest = tmp_path_factory.mktemp("packed") / "set"
    assert main([str(videos / "class0"), str(dest), "--shard-samples", "2", *FAST]) == 0
    return dest


@pytest.fixture
def changed(packed: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(packed, tmp_path / "set"))


def _check(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["--check", str(folder), "--workers", "0", "--check-decoders", "pyav", *more])
    return code, capsys.readouterr().err


def test_sound_shards_pass(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _check(packed, capsys) == (0, "pack: everything verifies\n")


def test_check_finds_a_flipped_byte(changed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = changed / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[-3000] ^= 1
    shard.write_bytes(data)
    code, text = _check(changed, capsys, "--hashes-only")
    assert code == 1 and "shard-000001.tar: sha256" in text and "shard-000000" not in text


def test_check_lists_every_problem(changed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(changed / "shard-000000.tar", changed / "stray.tar")
    one = changed / "shard-000000.tar"
    data = one.read_bytes()
    place = data.index(b"mdat") + 1500  # behind x264's note about itself
    one.write_bytes(data[:place] + bytes(400) + data[place + 400 :])
    (changed / "shard-000001.members.json").write_text('{"keys": ["a"], "offsets": [0], "sizes": [5]}')
    code, text = _check(changed, capsys)
    assert code == 1 and "4 problems" in text
    for part in ("stray.tar: not in the index", "shard-000000.tar: sha256", "shard-000000.tar: sample",
                 "shard-000001.members.json: this member table is not the one that was indexed"):  # fmt: skip
        assert part in text


def test_check_counts_frames(changed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = changed / "shard-000000.tar"
    data = shard.read_bytes()
    place = data.index(b'"frames": ') + len(b'"frames": ')
    shard.write_bytes(data[:place] + b"99" + data[place + 2 :])
    assert main(["--index-only", str(changed)]) == 0
    code, text = _check(changed, capsys)
    assert code == 1 and "its json says 99" in text


def test_check_without_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = _check(tmp_path, capsys)
    assert code == 1 and "--index-only" in text


def test_rejected_videos_are_summed_up(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(videos / "class0/v0.mp4", tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_text("x")
    assert main([str(tmp_path), str(tmp_path / "out"), *FAST]) == 0
    text = capsys.readouterr().err
    assert "1 videos packed" in text and "1 unreadable" in text and "rejected.jsonl" in text


def test_log_lines_tell_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress_report, "LOG_EVERY", 0.01)
    written, last = capsys.readouterr(), ""

    def lines_with(start: str) -> str:
        nonlocal last
        deadline = time.monotonic() + 20
        while start not in last and time.monotonic() < deadline:
            last = (capsys.readouterr().err.splitlines() or [last])[-1]
            time.sleep(0.01)
        return last

    with progress_report.progress_bar(500) as show:
        assert lines_with("pack: 0/500 videos, 0.0 videos/s").endswith(" s"), "a long film alone is no silence"
        for done in range(101, 111):  # a restart that found 100 videos done
            show(done, 500, (done - 100) * 5_000_000)
        line = lines_with("pack: 110/500 videos, ")
    assert written.err == "" and line.endswith(" left")
    rate = float(line.split(", ")[1].removesuffix(" videos/s"))
    hours, minutes, seconds = map(int, line.split(" left")[0].rsplit(" ", 1)[1].split(":"))
    assert rate > 0 and hours * 3600 + minutes * 60 + seconds == pytest.approx(390 / rate, abs=1 + 40 / rate**2)


def test_where_and_labels_from_a_manifest(videos: Path, tmp_path: Path) -> None:
    lines = ["path,label,split", *(f"class0/v{n}.mp4,{n},{'test' if n == 3 else 'train'}" for n in (0, 3, 6))]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    arguments = [str(tmp_path / "m.csv"), str(tmp_path / "out"), "--data-root", str(videos), "--where", "split=train"]
    assert main([*arguments, "--where", "label=0,3", *FAST]) == 0
    assert load_index(str(tmp_path / "out")).samples == 1
    assert main([*arguments, "--where", "label=0,6,9", "--overwrite", *FAST]) == 0
    assert load_index(str(tmp_path / "out")).samples == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "SOURCE and a DEST"),
        (["{videos}", "{tmp}/o", "--copy", "--fps", "10"], "choose one"),
        (["{videos}", "{tmp}/o", "--codec", "av1"], "--check-decoders pyav"),
        (["{videos}", "{tmp}/o", "--part", "0/2", "--overwrite"], "--overwrite"),
        (["{tmp}", "{tmp}/o"], "no video found"),
        (["{tmp}/nothing", "{tmp}/o"], "does not exist"),
        (["{videos}", "{tmp}/o", "--part", "2/2"], "expected I/N"),
        (["{videos}", "{tmp}/o", "--fps", "fast"], "frame rate"),
        (["{videos}", "{tmp}/o", "--check-decoders", "magic"], "allowed"),
        (["{videos}", "{tmp}/o", "--check", "--merge"], "not allowed with"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [one.format(videos=videos, tmp=tmp_path) for one in arguments]
    try:
        code: object = main(filled)
    except SystemExit as stop:  # argparse's own errors
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_missing_files_hint_at_data_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.txt").write_text("a.mp4 1\n")
    assert main([str(tmp_path / "list.txt"), str(tmp_path / "out"), *FAST]) == 1
    text = capsys.readouterr().err
    assert "not one video" in text and "--data-root" in text


def test_runs_as_a_file_from_another_folder(tmp_path: Path) -> None:
    for command in ([str(ROOT / "launch/pack.py")], ["-m", "pretrain.commands.pack"]):
        environment = {"PYTHONPATH": str(ROOT)} if command[0] == "-m" else {}
        done = subprocess.run(
            [sys.executable, *command, "--help"], cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0 and "--index-only URL" in done.stdout, done.stderr

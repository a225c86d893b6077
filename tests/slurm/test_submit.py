"""launch/slurm/submit.py: what it would submit, and what it refuses."""

import os
import re
import shlex
from pathlib import Path

import pytest

from pretrain.commands.submit import ROOT, limit_seconds, main

RUN = ["--recipe", "vit_b_dual", "run.dir=/shared/run"]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    """The commands of `--print`, as words."""
    assert main([*words, "--print"]) == 0
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def test_the_lead_is_one_number_in_both_places(capsys: pytest.CaptureFixture[str]) -> None:
    [words] = printed(capsys, "pretrain", "--stop-lead", "77", "--nodes", "4", "--qos=high", *RUN)
    assert "--signal=B:USR1@77" in words and "TUBELET_STOP_LEAD_S=77" in words
    assert words[words.index("launch/slurm/pretrain.sbatch") + 1 :] == RUN
    assert "--nodes=4" in words and "--qos=high" in words and "--no-requeue" not in words


def test_the_shells_variables_reach_the_ranks_unless_asked_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    [words] = printed(capsys, "pretrain", "--sbatch=--export=NIL", *RUN)
    exports = [word for word in words if word.startswith("--export")]
    assert exports == ["--export=ALL", "--export=NIL"], "of two the last one holds"


@pytest.mark.parametrize("program", ["pretrain", "finetune"])
def test_the_template_states_one_lead_too(program: str) -> None:
    text = (ROOT / "launch" / "slurm" / f"{program}.sbatch").read_text()
    signal = re.search(r"--signal=B:USR1@(\d+)", text)
    lead = re.search(r"TUBELET_STOP_LEAD_S:-(\d+)}", text)
    assert signal and lead and signal[1] == lead[1]


def test_a_chain_waits_and_never_returns(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = printed(capsys, "pretrain", "--chain", "2", *RUN)
    assert "--no-requeue" in first and "TUBELET_REQUEUE=0" in first
    assert not any(word.startswith("--dependency") for word in first)
    assert "--dependency=afterany:JOB_BEFORE" in second


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("pyxis", f"TUBELET_SRUN_OPTIONS=--container-image=a:1 --container-mounts={ROOT}:{ROOT},/shared:/shared"),
        ("apptainer", f"TUBELET_CONTAINER_RUN=apptainer exec --nv --bind {ROOT} --bind /shared"),
    ],
    ids=["pyxis", "apptainer"],  # else this machine's path is part of the name, and of docs/reliability.md
)
def test_containers(capsys: pytest.CaptureFixture[str], kind: str, expected: str) -> None:
    [words] = printed(capsys, "pretrain", "--container=a:1", "--mount=/shared", f"--container-with={kind}", *RUN)
    assert any(word.startswith(expected) for word in words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain", "--recipe", "vit_b_dual"], "run.dir=FOLDER is missing"),
        (["pretrain", "run.dir=/x"], "--recipe NAME is missing"),
        (["pack"], "SOURCE and DEST"),
        (["pretrain", "--time", "5", *RUN], "--time 5 is 300 s"),
    ],
)
def test_what_is_missing_is_said_before_the_queue(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as leave:
        main(words)
    assert leave.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("1-0:0:5", 86405)]
    + [("UNLIMITED", None), ("1:2:3:4", None), ("a-1", None), ("", None)],
)
def test_time_limits_as_slurm_writes_them(text: str, seconds: int | None) -> None:
    assert limit_seconds(text) == seconds


def test_elsewhere_the_job_is_told_where_the_templates_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    [words] = printed(capsys, "finetune", "--container=a:1", *RUN)
    assert f"TUBELET_HOME={ROOT}" in words and str(ROOT / "launch/slurm/finetune.sbatch") in words
    assert f"--container-mounts={ROOT}:{ROOT},{tmp_path}:{tmp_path} --container-workdir={tmp_path}" in words[0]


def test_without_slurm(capsys: pytest.CaptureFixture[str]) -> None:
    os.environ["PATH"] = ""
    assert main(["pretrain", *RUN]) == 1
    assert "login node" in capsys.readouterr().err

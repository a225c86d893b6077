"""launch/slurm/pack.sbatch on a real Slurm: a task of the array comes back alone, and one that is killed as well."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.toy_shards import ROOT

pytestmark = pytest.mark.timeout(600)

#: The first packer of task 0 is killed, and the first of task 1, the last one, runs until it is asked to come back.
FIRST = """\
#!/bin/bash
mark=$0.$SLURM_ARRAY_TASK_ID
if [ -e "$mark" ]; then exec "$@"; fi
touch "$mark"
if [ "$SLURM_ARRAY_TASK_ID" = 0 ]; then kill -KILL $$; fi
exec sleep 600
"""


def test_tasks_come_back_alone(site: Any, tmp_path: Path) -> None:
    """The last task's job has the array's own number, which stands for all tasks wherever Slurm is told it."""
    clips = sorted((ROOT / "tests/assets/actions").rglob("*.mp4"))[:2]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{clip},0\n" for clip in clips))
    first = tmp_path / "first"
    first.write_text(FIRST)
    first.chmod(0o755)
    submit = [sys.executable, str(ROOT / "launch/slurm/submit.py"), "pack", "--parts=2", "--cpus-per-task=1"]
    # Where a user's lists are, and not launch/: relative paths are the user's.
    words = [*submit, f"--sbatch=--output={tmp_path}/%a.out", "list.csv", "packed"]
    cluster = site.cluster
    # What submit.py adds goes beside it.
    environ = site.environment(TUBELET_CONTAINER_RUN=str(first))
    job = cluster.run(*words, environ=environ, cwd=tmp_path)
    assert cluster.finish(f"{job}_0") == "COMPLETED", (tmp_path / "0.out").read_text()
    assert "packing was killed (137): back to the queue" in (tmp_path / "0.out").read_text()
    assert cluster.job(f"{job}_1", "JobId") == job and cluster.job(f"{job}_1", "JobState") == "RUNNING"
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    cluster.wait("it comes back", lambda: cluster.job(f"{job}_1", "Restarts") == "1")
    assert cluster.finish(f"{job}_1") == "COMPLETED", (tmp_path / "1.out").read_text()
    assert [cluster.job(f"{job}_{task}", "Restarts") for task in (0, 1)] == ["1", "1"]
    assert (tmp_path / "packed" / "index.json").exists()

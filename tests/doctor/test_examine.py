"""launch/doctor.py and the checks of every start: what is wrong is found, and the host that differs is named."""

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pretrain.doctor.links import judge_link
from pretrain.engine.start_checks import judge_clock
from pretrain.runtime.findings import Finding, merge, odd_ones
from pretrain.runtime.host_checks import (
    check_descriptors,
    check_disk_space,
    check_shared_memory,
    check_temporary_folder,
)
from tests import forge
from tests.ranks import environment, free_port, outputs_of, start_rank

ROOT = Path(__file__).resolve().parents[2]

#: Runs in one rank before all else: another host name and another version of torch, as far as anyone can ask.
SABOTAGE = """\
import platform
from importlib import metadata
version = metadata.version
metadata.version = lambda name: "1.0.0" if name == "torch" else version(name)
platform.node = lambda: "node-b"
"""


def examine(*words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and findings of the doctor on this machine alone."""
    command = [ROOT / "launch" / "doctor.py", *words, "--json"]
    done = forge.start(command, environment(), stderr=subprocess.PIPE)
    printed, errors = done.communicate(timeout=300)
    return done.returncode, json.loads(printed) if printed else {"stderr": errors}


def pair(script: str, words: list[str], folder: Path) -> list[tuple[int, str]]:
    """Exit code and output of two ranks, the second of which is on a host with all that can be wrong."""
    (folder / "sitecustomize.py").write_text(SABOTAGE)
    port, script = free_port(), str(ROOT / "launch" / script)
    sound = start_rank([script, *words], rank=0, ranks=2, port=port)
    spoilt = start_rank(
        [script, *words, "optim.base_lr=0.2"],
        rank=1,
        ranks=2,
        port=port,
        environ={"PYTHONPATH": str(folder)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300)),
    )
    outputs = outputs_of([sound, spoilt])
    return list(zip((sound.returncode, spoilt.returncode), outputs, strict=True))


def test_one_sound_machine(toy: Any, tmp_path: Path) -> None:
    code, found = examine("--recipe", str(toy.recipe), f"run.dir={tmp_path / 'run'}")
    assert code == 0 and found["status"] != "fail", found
    assert {line["check"] for line in found["checks"]} >= {
        *("torch", "deepspeed", "recipe", "open files", "shared memory", "disk space", "run folder", "clock"),
        *("arithmetic", "memory", "matrix products", "source toy", "decoder, toy"),
    }
    assert not list((tmp_path / "run").iterdir()), "the doctor leaves nothing behind"


def test_what_cannot_be_read_is_told_and_all_else_is_still_examined(toy: Any, tmp_path: Path) -> None:
    words = [f"data.sources.lost.shards={tmp_path / 'nowhere'}", f"run.dir={tmp_path / 'run'}"]
    code, found = examine("--recipe", str(toy.recipe), *words)
    assert code == 1
    failed = [line for line in found["checks"] if line["status"] == "fail"]
    assert [line["check"] for line in failed] == ["source lost", "decoder, lost"]
    assert "nowhere" in failed[0]["value"] and "data.sources.lost.shards" in failed[0]["advice"]
    assert "source toy" in {line["check"] for line in found["checks"] if line["status"] == "ok"}


def test_the_host_that_differs_is_named_by_the_doctor_and_refused_by_a_start(toy: Any, tmp_path: Path) -> None:
    words = ["--recipe", str(toy.recipe), f"run.dir={tmp_path / 'run'}", "data.workers=8"]
    (code, table), (other_code, _) = pair("doctor.py", words, tmp_path)
    assert (code, other_code) == (1, 1), table
    failed = [line for line in table.splitlines() if line.strip().startswith("fail")]
    for check, what in (
        ("torch", "1.0.0"),
        ("recipe", "optim.base_lr: 0.2 instead of 0.1"),
        ("open files", "300 open files allowed"),
    ):
        assert any(f" {check} " in line and "host node-b (rank 1)" in line and what in line for line in failed), table
    assert len(failed) == 3 and "all-reduce" in table and "links between hosts" in table
    for code, output in pair("pretrain.py", words, tmp_path):
        assert code == 1 and "3 checks of the hosts failed" in output and "host node-b (rank 1)" in output, output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_limits_that_are_too_low() -> None:
    free = check_shared_memory(2, 1 << 61)
    assert free.status == "fail" and "--shm-size" in free.advice and "lower data.prefetch or batch.micro" in free.advice
    assert check_shared_memory(1, 1).status == check_shared_memory(0, 1 << 62).status == "ok"
    assert check_descriptors(10**6, 2).status == "fail"


@pytest.mark.parametrize(("length", "workers", "status"), [(75, 2, "ok"), (76, 2, "fail"), (76, 0, "ok"), (9, 2, "ok")])
def test_names_of_sockets(
    length: int, workers: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = "/" + "x" * (length - 1)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    assert check_temporary_folder(workers).status == status
    # The path that multiprocessing would take, against the system's own word.
    path = f"{folder}/pymp-abcdefgh/listener-abcdefgh"
    with socket.socket(socket.AF_UNIX) as one, pytest.raises(OSError) as error:
        one.bind(path)
    assert ("too long" in str(error.value)) == (length > 75)


def test_address_space() -> None:
    """Limits as `ulimit -v` sets them, one after the other in one process, from wide to narrow."""
    program = (
        "import resource; from pretrain.runtime.host_checks import check_address_space\n"
        "for limit in (resource.RLIM_INFINITY, 64 << 30, 4 << 30):\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (limit, limit)); print(check_address_space().status)"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ok", "warn", "fail"]


@pytest.mark.parametrize(("share", "status"), [(2.0, "fail"), (0.6, "warn"), (0.01, "ok")])
def test_room_for_checkpoints(tmp_path: Path, share: float, status: str) -> None:
    found = check_disk_space(tmp_path / "not yet" / "there", int(share * _free(tmp_path)), kept=2)
    assert found.status == status


def _free(folder: Path) -> int:
    import shutil

    return shutil.disk_usage(folder).free


def test_one_slow_link_names_both_ends_and_kinds_are_not_compared() -> None:
    hosts = ["a", "a", "b", "b", "c", "c"]
    links = [100.0, 10.0, 101.0, 2.0, 99.0, 11.0]
    found = [judge_link(rank, links, hosts) for rank in range(6)]
    assert [one.status for one in found] == ["ok", "ok", "ok", "warn", "ok", "ok"]
    lines = {
        line.status: line for line in merge([[one] for one in found], hosts) if line.check == "links between hosts"
    }
    assert lines["warn"].where == "host b (rank 3)" and "rank 4 on host c" in lines["warn"].value


@pytest.mark.parametrize(("skew_s", "status"), [(0.5, "ok"), (-30.0, "warn"), (3600.0, "fail")])
def test_clocks(skew_s: float, status: str) -> None:
    assert judge_clock(skew_s).status == status


def test_findings_of_many_ranks_become_one_line() -> None:
    hosts = [f"n{rank // 2}" for rank in range(40)]
    fine = [[Finding("x", "ok", str(rank))] for rank in range(40)]
    assert [str(line) for line in merge(fine, hosts)] == ["x: 0"]
    bad = [[Finding("x", "fail", "low", "raise it")] if rank in (4, 5, 9) else fine[rank] for rank in range(40)]
    assert [str(line) for line in merge(bad, hosts)] == ["x: host n2 (ranks 4, 5), host n4 (rank 9): low; raise it"]
    assert odd_ones(["a", "b", "a"]) == ("a", [1])

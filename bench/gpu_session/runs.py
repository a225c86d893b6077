"""Whole programs as a user starts them: the doctor, saving and resuming, and a run that is killed."""

import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from bench.gpu_session.session import ROOT, Rows, Session

STEPS, KILLED_AFTER = 16, 7
#: What the runs print.
OUTPUT = "output.txt"
#: Longest time until a run has begun.
START_S = 240.0
#: As the toy shards are; ViT-B's shape on a GPU, whatever the videos show.
REAL = ("model.size=base", "model.dim=null", "model.depth=null", "model.heads=null", "model.mlp_ratio=null",
        "model.decoder_dim=null", "model.decoder_depth=null", "model.decoder_heads=null", "input.height=224",
        "input.width=224", "compute.dtype=bf16", "zero.stage=2", "compute.deterministic=true")  # fmt: skip


def doctor(session: Session) -> dict[str, Rows]:
    """Examine this machine and its links between GPUs."""
    toy = _toy(session)
    words = [ROOT / "launch" / "doctor.py", "--recipe", toy.recipe, "--json", "batch.samples=8", "batch.micro=1"]
    found = json.loads(_from_brace(session.run(words, session.ranks, allowed=(0, 1))))
    return {f"doctor: {found['status']}": found["checks"]}


def _from_brace(text: str) -> str:
    """Cut off what libraries print before the JSON."""
    return text[text.index("{") :]


def saving(session: Session) -> dict[str, Rows]:
    """Run bench/checkpoint.py here: pauses of saves, and resuming, from the disk and from S3 on loopback."""
    found = session.folder / "checkpoint.json"
    words = [ROOT / "bench" / "checkpoint.py", "--ranks", session.ranks, "--json", found, "--folder", session.folder]
    words += ["--layers", 2, "--rounds", 1] if session.toy else ["--rounds", 3]
    # It starts its ranks itself.
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=session.environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"bench/checkpoint.py: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    content = json.loads(found.read_text(encoding="utf-8"))
    rows = [
        {"what": name, "first": values[0], "then": ", ".join(f"{one:.3g}" for one in values[1:])}
        for name, values in content.items() if isinstance(values, list) and "steps" not in name
    ]  # fmt: skip
    limits = [{"limit": name, "MB/s": rate} for name, rate in content["limits"].items()]
    return {f"seconds of saving and resuming {content['bytes'] / 1e9:.2f} GB": rows, "limits": limits}


def kill(session: Session) -> dict[str, Rows]:
    """kill -9 of all ranks in mid-run: the same command goes on, and its losses are those of a run left alone."""
    toy = _toy(session)
    whole = session.folder / "whole"
    session.run(_training(session, toy, whole), session.ranks)
    killed = session.folder / "killed"
    process = _start(session, _training(session, toy, killed))
    try:
        _wait_for(killed, KILLED_AFTER, process)
    finally:
        _kill_all(process)
    before = len(_losses(killed))
    if before >= STEPS:
        raise RuntimeError(f"the kill came after the last step, {before}: nothing was tried")
    started, again = time.monotonic(), _start(session, _training(session, toy, killed))
    resumed = _wait_for(killed, before + 1, again) - started
    if again.wait():
        raise RuntimeError(f"the run did not go on after kill -9: exit code {again.returncode}\n{_output(session)}")
    if "continuing from" not in _output(session):
        raise RuntimeError(f"the run began anew after kill -9\n{_output(session)}")
    wanted, found = _losses(whole), _losses(killed)
    off = max((abs(one - other) for one, other in zip(wanted, found, strict=True)), default=0.0)
    row = {"ranks": session.ranks, "steps": len(wanted), "killed after": before, "same losses": wanted == found,
           "largest difference": off, "first new step after, s": resumed}  # fmt: skip
    return {"kill -9 with compute.deterministic=true, and the same command again": [row]}


def _toy(session: Session) -> Any:
    """Make shards of tiny real videos and a recipe for them, as the tests have."""
    return import_module("tests.toy_run").make_toy(session.folder / "toy")


def _training(session: Session, toy: Any, run: Path) -> list[object]:
    micro = 8 // session.ranks if 8 % session.ranks == 0 else 1
    words = [*(() if session.toy else REAL), f"batch.micro={micro}", f"batch.samples={micro * session.ranks}",
             "data.lanes=8", f"schedule.max_steps={STEPS}", "checkpoint.every_steps=3", "schedule.epochs=20",
             "optim.base_lr=1e-3", f"run.dir={run}", *session.overrides]  # fmt: skip
    return [ROOT / "launch" / "pretrain.py", "--recipe", toy.recipe, *words]


def _start(session: Session, words: list[object]) -> subprocess.Popen[bytes]:
    """Start training; its output goes to a file."""
    command = session.command(words, session.ranks)
    with (session.folder / OUTPUT).open("ab") as output:
        return subprocess.Popen(command, env=session.environment(), cwd=session.folder, stdout=output, stderr=output)


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of the launcher and all below it, and wait until they are gone.

    One by one: torchrun gives each rank a session of its own, so its group's end would leave ranks that train on.
    """
    if process.poll() is not None:
        return  # it ended by itself, which whoever waited for it tells
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        one.kill()
    _, alive = psutil.wait_procs(family, timeout=30)
    if alive:
        raise RuntimeError(f"still there after kill -9: {alive}")


def _output(session: Session) -> str:
    """Read the end of what the runs printed."""
    return (session.folder / OUTPUT).read_text(encoding="utf-8", errors="replace")[-20_000:]


def _wait_for(run: Path, steps: int, process: subprocess.Popen[bytes]) -> float:
    """Return the time at which a run has recorded so many steps."""
    deadline = time.monotonic() + START_S
    while len(_losses(run)) < steps:
        if process.poll() is not None or time.monotonic() > deadline:
            output = (run.parent / OUTPUT).read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"step {steps} not reached (exit code {process.poll()})\n{output[-3000:]}")
        time.sleep(0.02)
    return time.monotonic()


def _losses(run: Path) -> list[float]:
    """Read the loss of each step from a run's records."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["train/loss"] for line in lines if line.endswith("\n")]

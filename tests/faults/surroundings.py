"""Faults of what surrounds a run: files that others change, terminals that close, machines that sleep, strangers."""

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.case import Case
from tests.faults.lab import Attempt, Lab, NotKept

STOPS = "all ranks save at one step and leave with 75; the same command goes on, bit for bit"
LEFT_OUT = "the line is left out and told with its file, which is kept aside; bit for bit"
CLEAR = "one line that says what to do, exit code 1; then the same command trains, bit for bit"
HELD_AGAIN = "noticed at the next save; the folder is held again with all lines, and the run is done; bit for bit"

#: Half a kilobyte of nothing: what a file system shows after a power loss where data were promised and never came.
ZEROS = bytes(512) + b"\n"

#: A watchdog that would judge a machine asleep within the time that it sleeps here.
SHORT = ("watchdog.least_s=10", "watchdog.long_s=20", "watchdog.stop_after_s=5")
ASLEEP_S = 45


def append(name: str, data: bytes) -> Callable[[Lab], None]:
    """Add bytes to a file of the run folder."""

    def harm(lab: Lab) -> None:
        path = lab.run / name
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            file.write(data)

    return harm


def overwrite_line(lab: Lab) -> None:
    """Put a line of zeros in the middle of metrics.jsonl."""
    path = lab.run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(3, bytes(len(lines[3]) - 1) + b"\n")
    path.write_bytes(b"".join(lines))


def kept_aside(name: str) -> Callable[[Lab], None]:
    """Fail where the damaged file was not kept."""

    def check(lab: Lab) -> None:
        if not list((lab.run / name).parent.glob(f"{Path(name).name}.damaged*")):
            raise NotKept(f"{name} was damaged, and is not kept beside")

    return check


def records() -> Iterator[Case]:
    """Files that only tell of the past."""
    harms: dict[str, tuple[str, Callable[[Lab], None]]] = {
        "zeros in the middle of metrics.jsonl": ("metrics.jsonl", overwrite_line),
        "zeros at the end of metrics.jsonl": ("metrics.jsonl", append("metrics.jsonl", ZEROS)),
        "zeros in bad_samples/rank_00000.jsonl": (
            "bad_samples/rank_00000.jsonl",
            append("bad_samples/rank_00000.jsonl", ZEROS),
        ),
    }
    for fault, (name, harm) in harms.items():
        says = rf"{Path(name).name}:\d+: damaged line left out"
        yield Case(fault, "resume", LEFT_OUT, held=False, before=harm, says=says, check=kept_aside(name))
    yield Case(
        *("heartbeats is a file", "resume", CLEAR),
        held=False,
        before=file_for_a_folder,
        codes=(1,),
        says="heartbeats",
        mend=lambda lab: (lab.run / "heartbeats").unlink(),
    )


def file_for_a_folder(lab: Lab) -> None:
    """Put a file in the place of the heartbeats' folder."""
    shutil.rmtree(lab.run / "heartbeats", ignore_errors=True)
    (lab.run / "heartbeats").write_text("")


def rename_folder(lab: Lab, attempt: Attempt) -> None:
    """Rename the run folder while it trains."""
    lab.run.rename(lab.run.with_name("renamed"))


def renamed_is_whole(lab: Lab) -> None:
    """Fail where the renamed folder lost a checkpoint of the time before."""
    if not (lab.run.with_name("renamed") / "checkpoints" / "step_00000004" / "manifest.json").exists():
        raise NotKept("the renamed folder has lost its checkpoint")


def folders() -> Iterator[Case]:
    """Run folders that somebody tidies up while they are in use."""

    def without(name: str) -> Callable[[Lab, Attempt], None]:
        return lambda lab, attempt: (lab.run / name).unlink()

    for name in ("metrics.jsonl", ".lock"):
        yield Case(f"{name} deleted", "mid-epoch", HELD_AGAIN, without(name), says="was deleted")
    yield Case(
        *("run folder renamed", "mid-epoch", HELD_AGAIN, rename_folder),
        says="was renamed to .*renamed",
        check=renamed_is_whole,
    )
    yield Case(
        *("checkpoint.upload into the run folder", "start", CLEAR),
        held=False,
        before=lambda lab: lab.options.append(f"checkpoint.upload={lab.run}/checkpoints"),
        codes=(1, 2),
        says="checkpoint.upload",
        mend=lambda lab: lab.options.pop() and None,
    )


def signals() -> Iterator[Case]:
    """Terminals, and machines that sleep."""

    def send(number: signal.Signals) -> Callable[[Lab, Attempt], None]:
        return lambda lab, attempt: os.kill(attempt.ranks()[0], number)

    for phase in ("start", "mid-epoch", "save"):
        yield Case(
            *("SIGHUP, as when the terminal closes", phase, STOPS, send(signal.SIGHUP)), codes=(75,), says="SIGHUP"
        )
        yield Case("SIGINT, as by Ctrl-C, once", phase, STOPS, send(signal.SIGINT), codes=(75,), says="SIGINT")
    yield Case(
        *("the machine sleeps, longer than a hang may last", "mid-epoch"),
        promise="nothing is judged by the time that passed; the run is done, bit for bit",
        inject=sleep_and_wake,
        ranks=2,
        options=SHORT,
    )


def sleep_and_wake(lab: Lab, attempt: Attempt) -> None:
    """Stop all ranks, as a suspended machine does, and let them go on."""
    lab.release()
    for pid in attempt.ranks():
        os.kill(pid, signal.SIGSTOP)
    time.sleep(ASLEEP_S)
    for pid in attempt.ranks():
        os.kill(pid, signal.SIGCONT)


class Payload:
    """An object that makes a file where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def plant(lab: Lab) -> None:
    """Put a payload into the newest checkpoint, with its right hash in the manifest, as whoever made both would."""
    import torch

    from pretrain.checkpoint.manifest import describe_file, read_manifest, write_manifest

    folder = lab.run / "checkpoints" / "step_00000008"
    path = next(folder.glob("deepspeed/*model_states.pt"))
    # Our own file, just written: what is read here has no payload yet.
    content = torch.load(path, weights_only=False)
    torch.save(content | {"more": Payload(lab.folder / "proof")}, path)
    manifest = read_manifest(folder)
    entries = tuple(describe_file(folder, entry.path) for entry in manifest.files)
    write_manifest(folder, dataclasses.replace(manifest, files=entries))


def nobody_was_let_in(lab: Lab) -> None:
    """Fail where the payload ran."""
    if (lab.folder / "proof").exists():
        raise NotKept("the payload was run")


def strangers() -> Iterator[Case]:
    """Files of somebody who means harm."""
    yield Case(
        *("a payload in a checkpoint, with the right hashes", "resume"),
        promise="refused with the name of what it holds, exit code 1, nothing is run; without it the one before serves",
        held=False,
        before=plant,
        codes=(1,),
        says="mkdir",
        mend=lambda lab: shutil.rmtree(lab.run / "checkpoints" / "step_00000008"),
        check=nobody_was_let_in,
    )


def surroundings() -> Iterator[Case]:
    """All of them."""
    for family in (records, folders, signals, strangers):
        yield from family()

"""Faults of the object store that data come from and checkpoints go to: a real S3 server behind a proxy."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.faults import servers
from tests.faults.case import Case
from tests.faults.lab import Attempt, Lab, NotKept, until

FROM_STORE = ("data.sources.toy.shards=s3://bucket/toy", "data.deadline_s=200")
#: A store that is away for longer than this ends the run.
IMPATIENT = ("data.sources.toy.shards=s3://bucket/toy", "data.deadline_s=4")

#: checkpoint.keep_last of the recipe.
KEPT = 2

WAITS = "the run waits and goes on; no sample lost or seen twice: bit for bit"
ENDS = "all ranks save at one step, exit code 1 and one error with the URL; the same command goes on, bit for bit"
UPLOADS = "training goes on, the upload is tried again; bit for bit, and all checkpoints that stay are in the store"


def set_faults(lab: Lab, **faults: Any) -> None:
    """Change the proxy."""
    assert lab.proxy is not None
    for name, value in faults.items():
        setattr(lab.proxy, name, value)


def from_now_on(**faults: Any) -> Callable[[Lab, Attempt], None]:
    """Faults of requests from now to the end of this start; some must strike."""

    def inject(lab: Lab, attempt: Attempt) -> None:
        lab.release()
        set_faults(lab, **faults)

    return inject


def for_a_while(seconds: float, **faults: Any) -> Callable[[Lab, Attempt], None]:
    """Faults that are over when they have struck and some seconds have passed."""

    def inject(lab: Lab, attempt: Attempt) -> None:
        assert lab.proxy is not None
        before = sum(lab.proxy.seen.values()) - lab.proxy.seen["requests"]
        lab.release()
        set_faults(lab, **faults)
        until(lambda: struck(lab) > before or None not in attempt.codes, "a request", attempt)
        time.sleep(seconds)
        lab.proxy.clear()

    return inject


def struck(lab: Lab) -> int:
    """How many requests met a fault so far."""
    assert lab.proxy is not None
    return sum(lab.proxy.seen.values()) - lab.proxy.seen["requests"]


def restart_server(lab: Lab, attempt: Attempt) -> None:
    """The server is killed, and is back after three seconds."""
    assert lab.server is not None
    lab.server.kill()
    lab.release()
    time.sleep(3)
    lab.server.start()


def open_store(lab: Lab) -> None:
    """A store with the data."""
    lab.open_store()


def clear(lab: Lab) -> None:
    """The store is well again."""
    assert lab.proxy is not None
    lab.proxy.clear()


def was_struck(lab: Lab) -> None:
    """The fault did happen."""
    if not struck(lab):
        raise NotKept("no request met the fault")


def data_cases() -> Iterator[Case]:
    """The store that data come from."""
    bad: dict[str, dict[str, Any]] = {
        "503 SlowDown for a third of the requests": {"throttled": 0.33},
        "connections reset in a third of the answers": {"cut": 0.33},
        "latency of 0.1 to 0.5 s": {"latency_s": (0.1, 0.5)},
        "a bit flipped in a third of the answers": {"flips": 0.33},
    }
    for name, faults in bad.items():
        for phase in ("first step", "mid-epoch", "epoch border"):
            check = was_struck if "latency_s" not in faults else lambda lab: None
            yield data_case(name, phase, from_now_on(**faults), check=check)
    for phase in ("start", "first step", "mid-epoch", "epoch border", "resume"):
        yield data_case("server killed, back after 3 s", phase, restart_server)
    for phase in ("first step", "mid-epoch", "epoch border"):
        yield data_case("server hangs for 5 s", phase, for_a_while(5, hangs=True), check=was_struck)
    yield data_case("404 NoSuchKey for 3 s", "mid-epoch", for_a_while(3, missing=True), check=was_struck)
    lasting: dict[str, dict[str, Any]] = {
        "hangs": {"hangs": True},
        "refuses connections": {"refuses": True},
        "denies access": {"denies": True},
        "answers 20 bytes a second": {"bytes_per_s": 20},
    }
    for phase in ("mid-epoch", "epoch border"):
        for name, fault in lasting.items():
            yield Case(
                *(f"data: server {name} for longer than data.deadline_s", phase, ENDS, from_now_on(**fault)),
                options=IMPATIENT,
                before=open_store,
                codes=(1,),
                says="check the (store|credentials)",
                mend=clear,
            )
    promise = "one error at the start, exit code 1; with the right ones the same command trains, bit for bit"
    yield Case(
        *("data: wrong credentials", "start", promise),
        held=False,
        options=IMPATIENT,
        before=wrong_credentials,
        codes=(1,),
        says="(?i)forbidden|denied|credential|signature",
        mend=right_credentials,
    )


def data_case(name: str, phase: str, inject: Callable[[Lab, Attempt], None], **more: Any) -> Case:
    """A fault of the store that data come from, which the run waits for."""
    return Case(f"data: {name}", phase, WAITS, inject, options=FROM_STORE, before=open_store, **more)


def wrong_credentials(lab: Lab) -> None:
    """The secret is another."""
    proxy = lab.open_store()
    lab.environ |= servers.environment(proxy.port, timeout_s=2, secret="another")


def right_credentials(lab: Lab) -> None:
    """The secret is the right one."""
    assert lab.proxy is not None
    lab.environ |= servers.environment(lab.proxy.port, timeout_s=2)


def all_uploaded(lab: Lab) -> None:
    """The checkpoints that retention keeps are in the store as well."""
    here = sorted(path.name for path in (lab.run / "checkpoints").glob("step_*"))[-KEPT:]
    if lab.uploaded()[-KEPT:] != here:
        raise NotKept(f"in the store {lab.uploaded()}, on the disk {here}")


def give_up_soon(lab: Lab) -> None:
    """Uploads have four seconds."""
    lab.options.append("checkpoint.upload_deadline_s=4")


def until_told(lab: Lab, attempt: Attempt) -> None:
    """No answer until the upload has been given up."""
    until(lambda: "NOT UPLOADED" in attempt.output or None not in attempt.codes, "the warning", attempt)


def uploads() -> Iterator[Case]:
    """The store that checkpoints go to."""
    bad: dict[str, Callable[[Lab, Attempt], None]] = {
        "503 SlowDown for a third of the requests": from_now_on(throttled=0.33),
        "connections reset in a third of the answers": from_now_on(cut=0.33),
        "latency of 0.1 to 0.5 s": from_now_on(latency_s=(0.1, 0.5)),
        "connections refused for 5 s": for_a_while(5, refuses=True),
        "server killed, back after 3 s": restart_server,
    }
    for name, inject in bad.items():
        yield Case(f"upload: {name}", "upload", UPLOADS, inject, check=all_uploaded)
    yield Case(
        *("upload: server hangs for longer than checkpoint.upload_deadline_s", "upload", UPLOADS, until_told),
        before=give_up_soon,
        says="NOT UPLOADED",
        check=all_uploaded,
    )
    yield Case(
        *("upload: server denies access to the end", "upload", "trained to the end, exit code 1, nothing lost on the "
        "disk; the same command uploads what is missing", from_now_on(denies=True)),
        before=give_up_soon,
        codes=(1,),
        says="start the same command again",
        mend=clear,
        check=all_uploaded,
    )  # fmt: skip


def lose_folder(lab: Lab, attempt: Attempt) -> None:
    """The host dies with its disk, when a checkpoint has come to the store."""
    until(lab.uploaded, "an upload", attempt)
    attempt.struck |= set(range(len(attempt.processes)))
    attempt.kill()
    until(lambda: None not in attempt.codes, "the end", attempt)
    shutil.rmtree(lab.run)


def lost_disks() -> Iterator[Case]:
    """The run folder is lost; the store has what was uploaded."""
    promise = "the same command goes on from the newest checkpoint in the store, bit for bit"
    for phase in ("mid-epoch", "epoch border", "save"):
        yield Case(
            *("host lost with its disk", phase, promise, lose_folder),
            before=upload_too,
            codes=None,
            check=came_back,
        )
    yield Case(
        *("SIGKILL while a checkpoint comes back from the store", "download", promise),
        held=False,
        before=lost_before,
        check=came_back,
    )


def came_back(lab: Lab) -> None:
    """The last start began with a checkpoint from the store."""
    all_uploaded(lab)
    if "restored from s3://" not in lab.attempts[-1].output:
        raise NotKept(f"nothing came from the store: {lab.attempts[-1].output[-1500:]}")


def upload_too(lab: Lab) -> None:
    """Checkpoints go to a store."""
    lab.open_store()
    lab.options += [f"checkpoint.upload=s3://{servers.BUCKET}/run", "checkpoint.upload_deadline_s=120"]


def lost_before(lab: Lab) -> None:
    """An earlier start has uploaded eight steps, and its disk is lost; another is killed while they come back."""
    upload_too(lab)
    lab.options.append("schedule.max_steps=8")
    if lab.start().wait() != [0]:
        raise NotKept(f"the first start failed: {lab.attempts[-1].output[-1500:]}")
    lab.options.remove("schedule.max_steps=8")
    shutil.rmtree(lab.run)
    assert lab.proxy is not None
    lab.proxy.only, lab.proxy.hangs = r"GET .*step_00000008/deepspeed", True
    attempt = lab.start()
    until(lambda: lab.proxy is not None and lab.proxy.seen["hung"] > 0, "the download", attempt)
    lab.strike()
    os.kill(attempt.ranks()[0], signal.SIGKILL)
    attempt.wait()
    lab.proxy.clear()
    lab.check_nobody_left()
    lab.check_checkpoints()


def stores() -> Iterator[Case]:
    """All of them."""
    yield from data_cases()
    yield from uploads()
    yield from lost_disks()

"""The faults and the phases in which they strike: all rows of docs/reliability.md."""

import math
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.case import PHASES, Case
from tests.faults.lab import Attempt, Lab, NotKept, until
from tests.faults.sources import sources
from tests.faults.stores import stores
from tests.faults.surroundings import surroundings
from tests.toy_shards import forget_hashes, swap_rows

AGAIN = "all processes end; the same command goes on from the newest checkpoint, bit for bit"
STOPS = "all ranks save at one step and leave with 75; the same command goes on, bit for bit"
PASSED_OVER = "the damaged checkpoint is told and passed over, the one before it serves; bit for bit"
LAYOUT = "the checkpoint is converted; the curve agrees within 1e-5"

#: A machine with other work must not look like a hang of its own.
SHORT = ("watchdog.least_s=10", "watchdog.long_s=40", "watchdog.stop_after_s=15")
TOLERANCE = 1e-5


def strike(number: signal.Signals, rank: int = 0, dies: bool = False) -> Callable[[Lab, Attempt], None]:
    """Send a signal to a rank."""

    def inject(lab: Lab, attempt: Attempt) -> None:
        if dies:
            attempt.struck.add(rank)
        os.kill(attempt.ranks()[rank], number)

    return inject


def kill_all(lab: Lab, attempt: Attempt) -> None:
    """SIGKILL of ranks, workers and launcher at once, as when the host dies."""
    attempt.struck |= set(range(len(attempt.processes)))
    attempt.kill()


def kill_launcher(lab: Lab, attempt: Attempt) -> None:
    """SIGKILL of the `deepspeed` command alone."""
    attempt.struck.add(0)
    os.kill(attempt.processes[0].pid, signal.SIGKILL)


def freeze(rank: int) -> Callable[[Lab, Attempt], None]:
    """A rank stands still until the others have left; then its host comes back."""

    def inject(lab: Lab, attempt: Attempt) -> None:
        pid = attempt.ranks()[rank]
        os.kill(pid, signal.SIGSTOP)
        attempt.struck.add(rank)
        lab.release()
        other = attempt.processes[1 - rank]
        until(lambda: other.poll() is not None, "the end of the other rank", attempt)
        os.kill(pid, signal.SIGCONT)

    return inject


def strike_worker(number: signal.Signals) -> Callable[[Lab, Attempt], None]:
    """Send a signal to the data worker."""

    def inject(lab: Lab, attempt: Attempt) -> None:
        os.kill(attempt.workers()[0], number)

    return inject


def touch_stop(lab: Lab, attempt: Attempt) -> None:
    """Ask for a stop by the file."""
    (lab.run / "stop").touch()


def wait_for_limit(lab: Lab, attempt: Attempt) -> None:
    """Hold until the wall-clock limit of a minute is near."""
    time.sleep(max(0.0, attempt.began + 50 - time.monotonic()))


def kills() -> Iterator[Case]:
    """Processes die."""
    for phase in PHASES:
        for rank in (0, 1):
            yield Case(
                *(f"SIGKILL of rank {rank}", phase, AGAIN, strike(signal.SIGKILL, rank, dies=True)),
                ranks=2,
                hold_rank=rank,
                codes=None,
            )
        yield Case("SIGKILL of all processes", phase, AGAIN, kill_all, codes=None)
        yield Case("SIGKILL of the deepspeed command", phase, AGAIN, kill_launcher, 2, launcher=True, codes=None)
    yield Case("SIGKILL between manifest and rename", "publish", AGAIN, kill_all, codes=None)


def stops() -> Iterator[Case]:
    """Requests to stop."""
    for phase in PHASES:
        yield Case("SIGTERM to a rank", phase, STOPS, strike(signal.SIGTERM), codes=(75,), says="SIGTERM")
        yield Case("stop file", phase, STOPS, touch_stop, codes=(75,), says="stop file")
        yield Case(
            *("SIGUSR1 to rank 1 alone", phase, STOPS, strike(signal.SIGUSR1, 1)),
            ranks=2,
            codes=(75,),
            says="SIGUSR1 at rank 1",
        )
    for phase in ("mid-epoch", "save"):
        limit = ("run.time_limit_minutes=1",)
        yield Case("wall-clock limit", phase, STOPS, wait_for_limit, codes=(75,), says="wall-clock", options=limit)


def hangs() -> Iterator[Case]:
    """Processes that stand still."""
    named = "the others tell which rank it is and leave with 75; the same command goes on, bit for bit"
    for phase in ("mid-epoch", "epoch border", "save", "resume"):
        rank = 0 if phase == "save" else 1
        yield Case(
            *(f"SIGSTOP of rank {rank} until the other has left", phase, named, freeze(rank)),
            ranks=2,
            hold_rank=rank,
            codes=(75,),
            says=rf"hang: step .*rank {rank} \(host",
            options=SHORT,
        )
    worker = ("data.workers=1", "data.prefetch=1")
    for phase in ("first step", "mid-epoch", "epoch border", "save"):
        yield Case(
            *("SIGKILL of a data worker", phase, "an error that says so; " + AGAIN, strike_worker(signal.SIGKILL)),
            codes=(1,),
            says="(?i)killed",
            options=worker,
        )
    for phase in ("first step", "mid-epoch"):
        told = "the rank names the phase `data` and leaves with 75; the same command goes on, bit for bit"
        yield Case(
            *("SIGSTOP of a data worker", phase, told, strike_worker(signal.SIGSTOP)),
            codes=(75,),
            says="hang: step .*data of step",
            options=worker + SHORT,
        )


def nans() -> Iterator[Case]:
    """Losses that are none."""
    for phase in ("first step", "mid-epoch"):
        yield Case(
            *("NaN loss, once; policy stop", phase, "exit code 1, no update; the same command goes on, bit for bit"),
            accident="nan",
            codes=(1,),
            says="not finite",
            options=("guard.nonfinite=stop",),
        )
        for policy in ("skip", "rewind", "lower_lr"):
            what = "the update of that step alone is left out, the batch written down; the run is done"
            yield Case(
                *(f"NaN loss, once; policy {policy}", phase, what),
                accident="nan",
                says="not finite",
                options=(f"guard.nonfinite={policy}", "guard.lower_lr_steps=2"),
                same=None,
                check=recorded,
            )


def recorded(lab: Lab) -> None:
    """One step was left out, with all others as they should be, and the bad batch is in the run folder."""
    skipped_steps = [record["step"] for record in lab.records() if record["optim/skipped"]]
    losses = [record["train/loss"] for record in lab.records() if not record["optim/skipped"]]
    if len(skipped_steps) != 1 or not all(map(math.isfinite, losses)):
        raise NotKept(f"steps without an update: {skipped_steps}, losses {losses}")
    found = list((lab.run / "incidents").glob("step_*.json"))
    if len(found) != 1:
        raise NotKept(f"incidents: {found}")


def flip(path: Path) -> None:
    """Change one byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Cut a file in half."""
    os.truncate(path, path.stat().st_size // 2)


def newest(lab: Lab) -> Path:
    """The newest checkpoint."""
    return lab.run / "checkpoints" / "step_00000008"


def states(lab: Lab) -> Path:
    """Its file of optimiser states."""
    return next(newest(lab).glob("deepspeed/*optim_states.pt"))


def half_published(lab: Lab) -> None:
    """What a kill leaves during a save: the folder under its working name, without a manifest."""
    working = newest(lab).with_name(".saving_step_00000012")
    shutil.copytree(newest(lab), working)
    (working / "manifest.json").unlink()


def add_torn_line(lab: Lab) -> None:
    """The last record was cut by a crash of the host."""
    with open(lab.run / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "train/lo')


def damages() -> Iterator[Case]:
    """What lies on the disk is not what was written."""
    harms: dict[str, Callable[[Lab], None]] = {
        "optimiser states: a byte changed": lambda lab: flip(states(lab)),
        "optimiser states cut": lambda lab: cut(states(lab)),
        "optimiser states gone": lambda lab: states(lab).unlink(),
        "manifest cut": lambda lab: cut(newest(lab) / "manifest.json"),
        "manifest gone": lambda lab: (newest(lab) / "manifest.json").unlink(),
        "state.json cut": lambda lab: cut(newest(lab) / "state.json"),
    }
    for name, harm in harms.items():
        where = "newest checkpoint, "
        yield Case(where + name, "resume", PASSED_OVER, held=False, before=harm, says="damaged and skipped")
    promise = "what a killed save left is removed; bit for bit"
    yield Case("checkpoint half published", "resume", promise, held=False, before=half_published, says="removing")
    promise = "the line is dropped with the steps that are run again; bit for bit"
    yield Case("last line of metrics.jsonl cut", "resume", promise, held=False, before=add_torn_line)


def own_shards(lab: Lab) -> Path:
    """Shards of this run alone, which others do not read."""
    shards = shutil.copytree(lab.toy.folder / "shards", lab.folder / "shards")
    lab.options.append(f"data.sources.toy.shards={shards}")
    return shards


def use_early_index(lab: Lab) -> None:
    """The index holds no hashes."""
    forget_hashes(own_shards(lab))


def harm_tables(harm: Callable[[Path], None]) -> Callable[[Lab], None]:
    """Every member table of the run's shards is harmed."""

    def before(lab: Lab) -> None:
        for path in own_shards(lab).glob("*.members.json"):
            harm(path)

    return before


def put_tables_back(lab: Lab) -> None:
    """The tables come from where the data set came from."""
    for path in (lab.toy.folder / "shards").glob("*.members.json"):
        shutil.copy(path, lab.folder / "shards")


def tables() -> Iterator[Case]:
    """Member tables that are not those of their index."""
    harms: dict[str, Callable[[Path], None]] = {"two rows swapped": swap_rows, "a byte changed": flip, "cut": cut}
    promise = "one error that names the table, exit code 1; with the right one the same command goes on, bit for bit"
    for name, harm in harms.items():
        for phase in ("start", "resume"):
            yield Case(
                *(f"member tables: {name}", phase, promise),
                held=False,
                before=harm_tables(harm),
                codes=(1,),
                says=r"members.json: this member table is not the one that was indexed .*--index-only",
                mend=put_tables_back,
            )
    promise = "said once, with the command that adds the hashes; bit for bit"
    said = "--index-only .* adds them"
    yield Case("index of an early release", "start", promise, held=False, before=use_early_index, says=said)


def layouts() -> Iterator[Case]:
    """Another number of ranks, or another ZeRO stage, from one start to the next."""
    for ranks, there, stage in ((1, 2, 2), (2, 1, 2), (2, 2, 1), (2, 2, 3), (2, 1, 3), (1, 2, 1), (1, 2, 3)):
        yield Case(
            *(f"{ranks} rank(s), ZeRO 2 -> {there} rank(s), ZeRO {stage}", "resume", LAYOUT),
            ranks=ranks,
            next_ranks=there,
            held=False,
            before=lambda lab, there=there: setattr(lab, "ranks", there),  # type: ignore[misc]
            options=(f"zero.stage={stage}",),
            says="will be converted",
            same=TOLERANCE,
        )
    yield Case(
        *("SIGKILL of rank 1, and its node stays away: one rank goes on", "mid-epoch", "all processes end; " + LAYOUT),
        inject=strike(signal.SIGKILL, 1, dies=True),
        ranks=2,
        next_ranks=1,
        hold_rank=1,
        codes=None,
        same=TOLERANCE,
    )


def second_start(lab: Lab, attempt: Attempt) -> None:
    """The same command while the run goes on."""
    hold, lab.hold = lab.hold, {}
    second = lab.start()
    lab.attempts.pop()
    if second.wait() != [1] or "is in use by" not in second.output:
        raise NotKept(f"the second start: {second.codes} {second.output[-800:]}")
    lab.hold = hold


def on_machine(name: str) -> Callable[[Lab], None]:
    """Starts from now on run on that machine, as far as they can tell, and its file systems have no flock."""
    return lambda lab: lab.environ.update(NO_FLOCK=name)


def take_over(lab: Lab, attempt: Attempt) -> None:
    """The machine stands still, another one goes on with the run, and it comes back."""
    pid = attempt.ranks()[0]
    os.kill(pid, signal.SIGSTOP)
    on_machine("second")(lab)
    other = lab.start()
    lab.attempts.pop()
    if other.wait() != [0] or "taken over" not in other.output:
        raise NotKept(f"the second machine: {other.codes} {other.output[-800:]}")
    before = written(lab)
    lab.release()
    os.kill(pid, signal.SIGCONT)
    attempt.wait()
    if changed := [path.name for path, stamp in written(lab).items() if before.get(path) != stamp]:
        raise NotKept(f"written after another machine had taken the folder: {changed}")


def written(lab: Lab) -> dict[Path, int]:
    """When each file of the run folder was written."""
    return {path: path.stat().st_mtime_ns for path in lab.run.rglob("*") if path.is_file()}


def taken_over(lab: Lab) -> None:
    """The second start found the first one's lock, without a sign of life."""
    if "taken over" not in lab.attempts[-1].output:
        raise NotKept(lab.attempts[-1].output[-1500:])


def machines() -> Iterator[Case]:
    """Machines that share a file system without flock, where a lock outlives its holder."""
    on = on_machine("first")
    promise = "another machine takes the folder over after six beats; " + AGAIN
    yield Case(
        *("SIGKILL of all processes; no flock", "mid-epoch", promise, kill_all),
        before=on,
        codes=None,
        mend=on_machine("second"),
        says="has no flock",
        check=taken_over,
    )
    promise = "the other machine ends it; back again it notices, writes nothing and leaves with 1; bit for bit"
    yield Case(
        *("machine suspended, another one takes over; no flock", "mid-epoch", promise, take_over),
        before=on,
        codes=(1,),
        says="has taken the folder over",
    )
    promise = "refused: in use by host and process; the run itself goes on, bit for bit"
    yield Case(
        *("the same command started twice; no flock", "mid-epoch", promise, second_start), before=on,
    )  # fmt: skip


def limit(kind: int, value: int) -> Callable[[Lab, Attempt], None]:
    """A limit of the operating system (ulimit) until a save has failed."""

    def inject(lab: Lab, attempt: Attempt) -> None:
        pid = attempt.ranks()[0]
        before = resource.prlimit(pid, kind)
        resource.prlimit(pid, kind, (value, before[1]))
        lab.release()
        until(lambda: "NO CHECKPOINT" in attempt.output or attempt.codes != [None], "the error", attempt)
        if attempt.codes == [None]:
            resource.prlimit(pid, kind, before)

    return inject


def fill_for_a_while(lab: Lab, attempt: Attempt) -> None:
    """No room until a save has failed."""
    lab.fill()
    lab.release()
    until(lambda: "NO CHECKPOINT" in attempt.output or attempt.codes != [None], "the error", attempt)
    (lab.run / "ballast").unlink()


def make_room(lab: Lab) -> None:
    """Somebody has cleared up."""
    (lab.run / "ballast").unlink(missing_ok=True)


def read_only(lab: Lab) -> None:
    """The run folder's file system is read-only."""
    content = lab.folder / "content"
    if lab.run.exists():
        lab.run.rename(content)
    lab.mount(40)
    if content.exists():
        shutil.copytree(content, lab.run, dirs_exist_ok=True)
    lab.remount("ro")


def full(lab: Lab) -> None:
    """The run folder's file system has no room."""
    lab.mount(40)
    lab.fill()


def disks() -> Iterator[Case]:
    """File systems that do not take what is written."""
    told = "no checkpoint until there is room, training goes on and loses no record; bit for bit"
    for phase in ("first step", "mid-epoch", "epoch border", "save"):
        yield Case(
            *("disk full until a save has failed", phase, told, fill_for_a_while),
            before=lambda lab: lab.mount(40),
            says="NO CHECKPOINT",
            needs="mount",
        )
    ends = "exit code 1 after checkpoint.max_failures, checkpoints before are untouched; " + AGAIN
    yield Case(
        *("disk full for good", "mid-epoch", ends, lambda lab, _: lab.fill()),
        before=lambda lab: lab.mount(40),
        options=("checkpoint.max_failures=1",),
        codes=(1,),
        says="saves in a row failed",
        mend=make_room,
        needs="mount",
    )
    clear = "one line that says what to do, exit code 1; then the same command trains, bit for bit"
    for phase, before in (("start", read_only), ("resume", read_only)):
        yield Case(
            *("read-only run folder", phase, clear),
            held=False,
            before=before,
            codes=(1,),
            says="(?i)read-only",
            mend=lambda lab: lab.remount("rw"),
            needs="mount",
        )
    yield Case(
        *("disk full", "start", clear), held=False, before=full, codes=(1,), says="(?i)no space", mend=make_room,
        needs="mount",
    )  # fmt: skip
    yield Case("file size limited (ulimit -f)", "mid-epoch", told, limit(resource.RLIMIT_FSIZE, 100_000))
    promise = "refused: in use by another process; the run itself goes on, bit for bit"
    yield Case("the same command started twice", "mid-epoch", promise, second_start)


def all_cases() -> list[Case]:
    """Every row; those of stores, of what is packed and of what surrounds a run are in files of their own."""
    families = (kills, stops, hangs, nans, damages, tables, layouts, disks, machines, stores, sources, surroundings)
    return [case for family in families for case in family()]

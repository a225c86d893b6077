"""A real Slurm with several nodes on this machine, without systemd and cgroups: munged, slurmctld, one slurmd a node.

All nodes share the machine's host name and loopback; SLURMD_NODENAME tells their processes apart. Everything lies in
one folder, every daemon is a child of the caller (foreground), and every process of the cluster is found again by that
folder in its environment or among its open files, so `stop` leaves nothing behind, whatever happened before.

A guard process kills them also where the caller itself is killed: `python slurm_cluster.py FOLDER` waits for the end of
its standard input, which the caller holds open, and then kills everything that belongs to FOLDER.

Needs the Debian packages slurm-wlm and munge (.ci/run installs them).
"""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

#: Debian puts daemons where a user's PATH does not look.
SEARCH = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"

#: A patient limit for anything that takes seconds on an idle machine.
PATIENCE_S = 300.0

FINAL = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")

CONFIGURATION = """\
ClusterName=tubelet
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort={controller}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait={kill_wait}
JobRequeue=1
GresTypes=gpu
MailProg=/bin/true
"""


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


class SlurmCluster:
    """Start with `with SlurmCluster(folder) as cluster:`.

    Args:
        folder: Gets keys, configuration, logs and state; short enough for a socket's name (about 90 characters).
        nodes: Number of nodes, named n1, n2 …
        cpus: Processors that each node claims to have.
        kill_wait_s: Seconds between Slurm's SIGTERM and SIGKILL when it ends a job.
    """

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 4, kill_wait_s: int = 10) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self._cpus, self._kill_wait_s = cpus, kill_wait_s
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._guard: subprocess.Popen[bytes] | None = None
        self._failed: set[str] = set()

    @property
    def configuration(self) -> Path:
        return self.folder / "slurm.conf"

    def environment(self, **more: str) -> dict[str, str]:
        """os.environ for programs that talk to this cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return kept | {"SLURM_CONF": str(self.configuration), "PATH": SEARCH} | more

    def __enter__(self) -> "SlurmCluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Write the configuration, start all daemons, and return when every node is idle."""
        self._configure()
        self._guard = subprocess.Popen(
            [sys.executable, __file__, str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", ["munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files])
        self.wait("munged answers", (munge / "socket").exists)
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        self.wait("all nodes are idle", lambda: all(self.node_state(node) == "IDLE" for node in self.nodes))

    def stop(self) -> None:
        """Kill every process of this cluster."""
        self.kill_all()
        if self._guard is not None:
            self._guard.communicate()  # closes its standard input
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()

    def start_controller(self) -> None:
        """Start (or restart) slurmctld, with the state that one before it has saved."""
        self._daemon("slurmctld", ["slurmctld", "-D", "-i", "-f", str(self.configuration)])

    def kill_controller(self) -> None:
        """SIGKILL to slurmctld; nodes and what runs there go on."""
        controller = self._daemons.pop("slurmctld")
        controller.kill()
        controller.wait()

    def start_node(self, node: str) -> None:
        """Start (or restart) a node's slurmd."""
        # As after a power failure. Without it slurmd was seen to send SIGTERM to later steps of the same numbers.
        rebooted = ["-b", "-c"] if node in self._failed else []
        self._failed.discard(node)
        self._daemon(node, ["slurmd", "-D", *rebooted, "-f", str(self.configuration), "-N", node])

    def kill_node(self, node: str) -> None:
        """What a power failure does: slurmd, its step daemons and all they run get SIGKILL at once."""
        self.kill_all(node)
        self._daemons.pop(node).wait()
        self._failed.add(node)

    def kill_all(self, node: str | None = None) -> None:
        """SIGKILL to all processes of the cluster or of one node, until none is left."""
        deadline = time.monotonic() + PATIENCE_S
        while processes := self.processes(node):
            assert time.monotonic() < deadline, f"processes that don't die: {processes}"
            kill(processes)

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """Living processes of the cluster or of one node: daemons, steps, and what jobs run."""
        return [process for process in psutil.process_iter() if self._owns(process, node)]

    def running(self, node: str, word: str) -> list[psutil.Process]:
        """Processes of a node with that word in their command line, such as launch/pretrain.py: its ranks."""
        return [process for process in self.processes(node) if word in _command(process)]

    def _owns(self, process: psutil.Process, node: str | None) -> bool:
        """Whether a process is of this cluster: by its environment or, as step daemons hide theirs, by its log."""
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                return False
            if process.name() in ("slurmstepd", "slurmscriptd"):
                logs = str(self.folder / (f"slurmd-{node}.log" if node else "slurm"))
                return any(file.path.startswith(logs) for file in process.open_files())
            environ = process.environ()
        except psutil.Error:
            return False
        ours = environ.get("SLURM_CONF") == str(self.configuration)
        return ours and (node is None or node in (environ.get("SLURMD_NODENAME"), environ.get("TUBELET_NODE")))

    def run(
        self, *words: str, environ: Mapping[str, str] | None = None, cwd: Path | None = None, check: bool = True
    ) -> str:
        """Run a client program (sbatch, scontrol …); returns what it printed."""
        done = subprocess.run(
            words, env=dict(environ or self.environment()), cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0 or not check, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def node_state(self, node: str) -> str:
        """IDLE, ALLOCATED, DOWN …; empty while the controller does not answer."""
        return _field(self.run("scontrol", "show", "node", "-o", node, check=False), "State")

    def job(self, number: str, field: str) -> str:
        """A field of `scontrol show job`: JobState, Restarts, ExitCode, Reason …"""
        return _field(self.run("scontrol", "show", "job", "-o", number, check=False), field)

    def start_now(self, number: str) -> None:
        """Spare a requeued job most of the two minutes that Slurm lets it wait; nothing happens where it does not wait.

        It waits three seconds: a node refuses a start whose credential is not younger than the order to end the job,
        in whole seconds, and the controller then gives the job up (FAILED, exit code 1).
        """
        if self.job(number, "JobState") == "PENDING" and _seconds_until(self.job(number, "StartTime")) > 10:
            self.run("scontrol", "update", f"JobId={number}", "StartTime=now+3", check=False)

    def finish(self, number: str, timeout_s: float = PATIENCE_S, hurry: bool = True) -> str:
        """Wait for a job's end, over any number of requeues; returns its last state."""

        def ended() -> bool:
            if hurry:
                self.start_now(number)
            return self.job(number, "JobState") in FINAL

        self.wait(f"job {number} ends", ended, timeout_s)
        return self.job(number, "JobState")

    def wait(self, what: str, condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        """Return when `condition` holds; AssertionError with the logs' ends when it does not in time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}\n{self._logs()}"
            time.sleep(0.1)

    def _daemon(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment(TUBELET_NODE=name), stdout=output, stderr=output, start_new_session=True
            )

    def _configure(self) -> None:
        munge = self.folder / "munge"
        for path in (self.folder, munge, self.folder / "state", *(self.folder / "spool" / node for node in self.nodes)):
            path.mkdir(parents=True, exist_ok=True, mode=0o755)
        (munge / "key").write_bytes(secrets.token_bytes(1024))
        (munge / "key").chmod(0o400)
        host, ports = socket.gethostname().partition(".")[0], free_ports(1 + len(self.nodes))
        facts = {"host": host, "user": getpass.getuser(), "folder": self.folder, "kill_wait": self._kill_wait_s}
        text = CONFIGURATION.format(controller=ports[0], **facts)
        for node, port in zip(self.nodes, ports[1:], strict=True):
            text += (
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self._cpus} RealMemory=8000"
            )
            text += f" Gres=gpu:{self._cpus}\n"
        text += f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP\n"
        self.configuration.write_text(text)
        for number in range(self._cpus):  # Slurm wants a file for each accelerator, of whatever kind
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{self._cpus - 1}]\n")

    def _logs(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {log.name}\n" + "\n".join(log.read_text().splitlines()[-15:]) for log in logs)


def free_ports(count: int) -> list[int]:
    """TCP ports that are free now, all different."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to all, and wait a moment for them to go."""
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(processes, timeout=1)


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:  # it has just ended
        return []


def _seconds_until(moment: str) -> float:
    """Seconds from now until `2026-01-31T23:59:59`; 0 for Unknown."""
    try:
        return (datetime.fromisoformat(moment) - datetime.now()).total_seconds()
    except ValueError:
        return 0.0


def _field(line: str, name: str) -> str:
    for word in line.split():
        if word.startswith(name + "="):
            return word.partition("=")[2]
    return ""


if __name__ == "__main__":
    sys.stdin.read()
    SlurmCluster(Path(sys.argv[1])).kill_all()

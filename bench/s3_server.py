"""An S3 server on loopback for the benchmarks, with a delay in front of it if asked: both processes of their own.

python bench/s3_server.py PORT BEHIND SECONDS is that delay: it passes connections on from PORT to BEHIND, and lets what
a client sends wait. Connections stay open between requests, as those of a store do.
"""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def s3_server(folder: Path, latency_s: float = 0.0) -> Iterator[None]:
    """Rclone over `folder`, whose folders are buckets; fsspec's s3 goes there, of this process and of its children."""
    import fsspec

    rclone = shutil.which("rclone") or str(Path(sys.executable).parent / "rclone")
    server, front = free_port(), free_port() if latency_s else 0
    serve = [rclone, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{server}", "--auth-key", "KEY,SECRET"]
    processes = [subprocess.Popen([*serve, "--vfs-cache-mode", "off"], stderr=subprocess.DEVNULL)]
    if latency_s:
        processes.append(subprocess.Popen([sys.executable, __file__, str(front), str(server), str(latency_s)]))
    port = front or server
    checks = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    s3 = {"key": "KEY", "secret": "SECRET", "endpoint_url": f"http://127.0.0.1:{port}"}
    fsspec.config.conf["s3"] = s3 | {"config_kwargs": {"signature_version": "s3v4", **checks}}
    os.environ["FSSPEC_S3"] = json.dumps(fsspec.config.conf["s3"])
    try:
        for listener in {server, port}:
            wait_for(listener)
        yield
    finally:
        for process in processes:
            process.kill()


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_for(port: int, seconds: float = 30.0) -> None:
    """Until somebody listens at a port.

    Raises:
        OSError: nobody did.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


async def delay(port: int, behind: int, latency_s: float) -> None:
    """Pass connections on, with a wait before what comes from the client."""

    async def one_way(source: asyncio.StreamReader, target: asyncio.StreamWriter, wait_s: float) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 18):
                if wait_s:
                    await asyncio.sleep(wait_s)
                target.write(data)
                await target.drain()
        target.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", behind)
        await asyncio.gather(one_way(reader, back, latency_s), one_way(there, writer, 0.0))

    listener = await asyncio.start_server(serve, "127.0.0.1", port)
    await listener.serve_forever()


if __name__ == "__main__":
    asyncio.run(delay(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
